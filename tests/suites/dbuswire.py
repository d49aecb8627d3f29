"""A D-Bus client of a few lines: for calls that busctl cannot make, as any uid, from a connection whose name is known.

    with Connection(uid=65534) as bus:
        reply = bus.call("org.nerve1", "/org/nerve1", "org.nerve1.Manager", "GetRun", "s", "3fa9")
        reply.error  # None, or 'org.nerve1.Error.NotPermitted'

Little-endian; types s, u, t, b and a{sv} with a str, bool or int (u) in it: what org.nerve1 takes.
"""

import contextlib
import os
import socket
import struct
import subprocess

ADDRESS = "/run/dbus/system_bus_socket"
NOBODY = 65534
PRIVATE = "/run/nerve/private"
MANAGER = ("org.nerve1", "/org/nerve1", "org.nerve1.Manager")


@contextlib.contextmanager
def effective(uid):
    """With this effective uid and no groups of root's: what a socket is connected with is what its peer sees."""
    if uid == os.geteuid():
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def connect_as(uid, path):
    """A stream socket that `uid` connected."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.settimeout(30)
    with effective(uid):
        stream.connect(path)
    return stream


class Writer:
    def __init__(self, data=b""):
        self.data = bytearray(data)

    def align(self, size):
        self.data += b"\0" * (-len(self.data) % size)

    def put(self, signature, value):
        if signature in ("s", "o"):
            raw = value if isinstance(value, (bytes, bytearray)) else value.encode()
            self.align(4)
            self.data += struct.pack("<I", len(raw)) + raw + b"\0"
        elif signature == "g":
            self.data += bytes([len(value)]) + value.encode() + b"\0"
        elif signature in ("u", "b"):
            self.align(4)
            self.data += struct.pack("<I", int(value))
        elif signature == "t":
            self.align(8)
            self.data += struct.pack("<Q", value)
        elif signature == "a{sv}":
            entries = Writer(self.data)
            entries.align(4)
            length_at = len(entries.data)
            entries.data += b"\0\0\0\0"
            entries.align(8)
            begun = len(entries.data)
            for key, inner in value.items():
                entries.align(8)
                entries.put("s", key)
                kind = "b" if isinstance(inner, bool) else "u" if isinstance(inner, int) else "s"
                entries.put("g", kind)
                entries.put(kind, inner)
            struct.pack_into("<I", entries.data, length_at, len(entries.data) - begun)
            self.data = entries.data
        else:
            raise ValueError(signature)


def split(signature):
    """The single types of a signature."""
    while signature:
        one = "a{sv}" if signature.startswith("a{sv}") else signature[0]
        yield one
        signature = signature[len(one):]


def message(serial, destination, path, interface, member, signature, arguments):
    body = Writer()
    for kind, argument in zip(split(signature), arguments, strict=True):
        body.put(kind, argument)
    fields = Writer()
    for code, kind, value in ((1, "o", path), (6, "s", destination), (2, "s", interface), (3, "s", member),
                              (8, "g", signature)):
        if value:
            fields.align(8)
            fields.data += bytes([code])
            fields.put("g", kind)
            fields.put(kind, value)
    head = Writer(struct.pack("<cBBBII", b"l", 1, 0, 1, len(body.data), serial) + struct.pack("<I", len(fields.data)))
    head.data += fields.data
    head.align(8)
    return bytes(head.data) + bytes(body.data)


class Reply:
    def __init__(self, kind, fields, body):
        self.kind, self.fields, self.body = kind, fields, body
        self.error = fields.get(4) if kind == 3 else None

    @property
    def text(self):
        """The first argument, if it is a string."""
        if not self.fields.get(8, "").startswith(("s", "o")):
            return None
        size, = struct.unpack_from("<I", self.body)
        return self.body[4:4 + size].decode()


class Connection:
    """To a bus; with `greet=False` to a peer, which has no bus's Hello and no names."""

    def __init__(self, uid=0, address=ADDRESS, greet=True):
        self.stream = connect_as(uid, address)
        self.stream.sendall(b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode() + b"\r\n")
        line = self._line()
        if not line.startswith(b"OK "):
            raise PermissionError(line.decode())
        self.stream.sendall(b"BEGIN\r\n")
        self.serial = 0
        self.name = None
        if greet:
            self.name = self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello").text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def _line(self):
        line = b""
        while not line.endswith(b"\r\n"):
            byte = self.stream.recv(1)
            if not byte:
                raise ConnectionError("the bus hung up")
            line += byte
        return line

    def _exactly(self, size):
        data = bytearray()
        while len(data) < size:
            chunk = self.stream.recv(min(size - len(data), 1 << 20))
            if not chunk:
                raise ConnectionError("the bus hung up")
            data += chunk
        return bytes(data)

    def send(self, destination, path, interface, member, signature="", *arguments):
        """Sends a call and returns its serial."""
        self.serial += 1
        self.stream.sendall(message(self.serial, destination, path, interface, member, signature, arguments))
        return self.serial

    def receive(self):
        """The next message as (serial it replies to, Reply)."""
        head = self._exactly(16)
        order, kind, _, _, body, _, fields = struct.unpack("<cBBBIII", head)
        if order != b"l":
            raise ValueError("the sender is big-endian")
        raw = self._exactly(fields + (-fields % 8))
        return (parsed := parse_fields(raw[:fields])).get(5), Reply(kind, parsed, self._exactly(body))

    def reply_to(self, serial):
        while True:
            answered, reply = self.receive()
            if answered == serial and reply.kind in (2, 3):
                return reply

    def call(self, destination, path, interface, member, signature="", *arguments):
        return self.reply_to(self.send(destination, path, interface, member, signature, *arguments))


def parse_fields(raw):
    """Header fields by code; those of string type and the reply's serial."""
    found, at = {}, 0
    while at < len(raw):
        at += -at % 8
        code, size = raw[at], raw[at + 1]
        kind = raw[at + 2:at + 2 + size].decode()
        at += 3 + size
        if kind == "g":
            found[code] = raw[at + 1:at + 1 + raw[at]].decode()
            at += 2 + raw[at]
        elif kind in ("s", "o"):
            at += -at % 4
            length, = struct.unpack_from("<I", raw, at)
            found[code] = raw[at + 4:at + 4 + length].decode()
            at += 5 + length
        elif kind == "u":
            at += -at % 4
            found[code], = struct.unpack_from("<I", raw, at)
            at += 4
        else:
            raise ValueError(kind)
    return found


def systemctl_bus(verb):
    """Stops, starts or restarts the bus: however often, since its own start limit would soon leave it failed."""
    subprocess.run(["systemctl", "reset-failed", "dbus.socket", "dbus.service"], check=False, capture_output=True)
    subprocess.run(["systemctl", verb, "dbus.socket", "dbus.service"], check=True, capture_output=True)


def is_served():
    """Whether nerve answers on the bus, and not only on its private socket."""
    try:
        with Connection() as bus:
            return bus.call(*MANAGER, "GetStatus").error is None
    except OSError:
        return False
