"""A server that speaks the OpenAI chat protocol, for tests, the demo and the benchmark: it answers what a list of
behaviours says, one for each request, the last one for ever, and keeps what it was asked.

    with openai.Server(openai.status(429, retry_after=1), openai.reply("hello")) as server:
        …  # base_url: server.url
        server.requests[0].body["messages"]

By hand, every request being answered so: `python3 openai.py PORT [CONTENT]`.

No behaviour sleeps: one that waits does so until the test or its client lets it go."""

import http.server
import json
import pathlib
import socket
import ssl
import sys
import threading

CERTIFICATE = pathlib.Path(__file__).with_name("openai.pem")  # of 127.0.0.1, with its key; no secret
USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


class Request:
    """What was asked: `headers`, `body`; `answered` is set when the server is done with it, `gone` when its client
    closed the connection before that."""

    def __init__(self, handler):
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.body = json.loads(handler.rfile.read(int(self.headers["content-length"])))
        self.answered, self.gone = threading.Event(), threading.Event()
        self.connection = handler.connection

    @property
    def key(self):
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    def send(self, text):
        self.connection.sendall(text if isinstance(text, bytes) else text.encode())

    def stay(self, leave=None):
        """Until the client closes the connection, or `leave` is set."""
        if leave is not None:
            leave.wait()
        elif not self.connection.recv(1):
            self.gone.set()


# ---- behaviours -----------------------------------------------------------------------------------------------------

def head(code, kind, length=None, **headers):
    lines = [f"HTTP/1.1 {code} {http.HTTPStatus(code).phrase}", f"Content-Type: {kind}", "Connection: close"]
    lines += [] if length is None else [f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""])


def whole(code, body, **headers):
    body = body if isinstance(body, str) else json.dumps(body)
    return head(code, "application/json", len(body.encode()), **headers) + body


def event(body):
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n"


def pieces(content, size=5):
    """The events of a streamed reply."""
    def of(delta, reason=None):
        return event({"model": "scripted", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})
    said = [of({"content": content[at:at + size]}) for at in range(0, len(content), size)]
    usage = {"model": "scripted", "choices": [], "usage": USAGE}
    return [of({"role": "assistant"}), *said, of({}, "stop"), event(usage), event("[DONE]")]


def completion(content):
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {"model": "scripted", "choices": [choice], "usage": USAGE}


def answer(request, content, gates=None):
    """As it was asked for: piece by piece or whole. Of `gates`, one for each piece, each is waited for."""
    if not request.body.get("stream"):
        return request.send(whole(200, completion(content)))
    request.send(head(200, "text/event-stream"))
    for number, piece in enumerate(pieces(content)):
        if gates and number < len(gates):
            gates[number].wait()
        request.send(piece)


def reply(content):
    """Says this; a function gets the request and returns what to say."""
    return lambda request: answer(request, content(request) if callable(content) else content)


def slow(content, *gates):
    """Waits for an Event before each piece."""
    return lambda request: answer(request, content, gates)


def status(code, message="no", retry_after=None, **headers):
    """An error, as OpenAI writes one."""
    if retry_after is not None:
        headers["Retry_After"] = retry_after
    return lambda request: request.send(whole(code, {"error": {"message": message, "type": "test"}}, **headers))


def echo(code=401):
    """An error that quotes the Authorization header."""
    return lambda request: status(code, f"not with {request.headers.get('authorization')}")(request)


def cut(content, at):
    """Ends the connection after so many bytes of what would have been the answer."""
    def behave(request):
        parts = [head(200, "text/event-stream"), *pieces(content)] if request.body.get("stream") else \
            [whole(200, completion(content))]
        request.send("".join(parts).encode()[:at])
    return behave


def reset(request):
    """Ends the connection as a crash does, without a byte."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def silent(request):
    """Says nothing, until its client goes."""
    request.stay()


def stalled(request):
    """Begins a reply and says no more, until its client goes."""
    request.send(head(200, "text/event-stream") + pieces("begun", 5)[1])
    request.stay()


def oversized(request):
    """A reply of more than a mebibyte."""
    answer(request, "x" * (1024 * 1024 + 1))


def malformed(body):
    """200, with a body that is no completion: text as it is, or JSON."""
    return lambda request: request.send(whole(200, body))


# ---- the server -----------------------------------------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        request = Request(self)
        behave = self.server.next(request, self.path)
        try:
            behave(request)
        except (BrokenPipeError, ConnectionResetError):
            request.gone.set()
        finally:
            self.close_connection = True
            request.answered.set()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Listens from the moment it is made, on a free port unless one is named; with `tls` as CERTIFICATE."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *script, port=0, tls=False):
        super().__init__(("127.0.0.1", port), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"http{'s' * tls}://127.0.0.1:{self.server_address[1]}/v1"
        self.changed = threading.Condition()
        self.play(*script or [reply("ok")])

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def play(self, *script):
        """Begins a new script, with no requests."""
        with self.changed:
            self.script, self.requests = list(script), []

    def next(self, request, path):
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()
            if path != "/v1/chat/completions":
                return status(404, f"there is no {path}")
            return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def asked(self, count=1, timeout=20):
        """Waits until there were so many requests, and returns the last of them."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.requests) >= count, timeout):
                raise AssertionError(f"waited {timeout} s for request {count}; there were {len(self.requests)}")
            return self.requests[count - 1]


if __name__ == "__main__":
    here = Server(reply(sys.argv[2] if len(sys.argv) > 2 else "ok"), port=int(sys.argv[1]))
    print(here.url, flush=True)
    here.serve_forever()
