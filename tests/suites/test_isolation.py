"""Who may reach what: workers of two workflows, a role and nerved, somebody without rights and the bus."""

import json
import pathlib
import pwd
import re
import unittest
import xml.etree.ElementTree as xml

import dbuswire
import nervebox
from nervebox import ctl, sh, systemctl

# A role that tries what it is told on stdin, and says how each attempt ended: "done", or the errno's name.
ATTEMPTS = r"""
import ctypes, errno, json, os, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result

def attach(pid):
    checked(libc.ptrace(16, pid, None, None))

def peek(pid):
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    mine = ctypes.create_string_buffer(8)
    local, remote = Vector(ctypes.addressof(mine), 8), Vector(0x400000, 8)
    checked(libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))

def descriptor_of(pid):
    # pidfd_getfd
    checked(libc.syscall(438, os.pidfd_open(pid), 0, 0))

def read(path):
    with open(path, "rb") as file:
        file.read(64)

def write(path, text):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)

deeds = {
    "kill": lambda pid: os.kill(pid, signal.SIGTERM), "probe": lambda pid: os.kill(pid, 0),
    "attach": attach, "peek": peek, "descriptor_of": descriptor_of, "read": read, "list": os.listdir, "write": write,
    "create": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL)), "unlink": os.unlink,
    "rename": lambda path: os.rename(path, path + "x"), "become": os.setuid, "mkdir": os.mkdir,
    "limit": lambda pid: os.sched_setaffinity(pid, {0}),
}
outcome = []
for deed, *arguments in json.load(sys.stdin):
    try:
        deeds[deed](*arguments)
        outcome.append("done")
    except OSError as error:
        outcome.append(errno.errorcode[error.errno])
print(json.dumps(outcome))
"""

# What a role sees of itself.
SELF = r"""
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
environ = [entry.split("=", 1) for entry in open("/proc/self/environ").read().split("\0") if entry]
fds = {}
for fd in os.listdir("/proc/self/fd"):
    try:
        fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        pass
visible = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
print(json.dumps({"status": {k: v.strip() for k, v in status.items()}, "environ": environ, "fds": fds,
                  "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(), "cwd": os.getcwd(),
                  "umask": os.umask(0), "visible": visible, "tmp": os.listdir("/tmp"),
                  "thread": open(os.environ["NERVE_THREAD"]).read()}))
"""

DENIED = {"EPERM", "EACCES", "ENOENT", "EROFS", "ESRCH"}


def python(script, **keys):
    definition = nervebox.command("", **keys)
    definition["roles"]["main"]["exec"] = ["/usr/bin/python3", "-c", script]
    return definition


HOLD = "echo hush > secret; echo hush > /tmp/planted; exec sleep infinity"
LONG = "an-exceedingly-long-name-of-a-workflow"


class Neighbours(nervebox.Case):
    definitions = {
        "hold-secret": nervebox.command(HOLD, worker={"Environment": "CANARY=hush"}),
        "try-neighbour": python(ATTEMPTS, prompt="{{ start.content }}", concurrency=2),
        "look-around": python(SELF, worker={"Environment": "COLOUR=blue"}),
        f"{LONG}-one": nervebox.command("id -u; id -un"),
        f"{LONG}-two": nervebox.command("id -u; id -un"),
        "run-as-nerve": nervebox.command("id -u; id -un", worker={"User": "nerve"}),
    }

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.held = nervebox.start("hold-secret")
        cls.victims = nervebox.processes(cls.held)
        cls.role = next(iter(cls.victims))
        cls.worker = nervebox.worker_pid("hold-secret")
        cls.nerved = nervebox.nerved_pid()
        cls.state = nervebox.wait_for(lambda: (path := pathlib.Path("/var/lib/private/nerve-wf/hold-secret")).is_dir()
                                      and path, "the state directory")
        cls.secret = nervebox.wait_for(lambda: next(cls.state.glob("runs/*/secret"), None), "the secret")

    def tearDown(self):
        """The run that is held stays."""

    def attempt(self, *attempts):
        run, status = nervebox.start("try-neighbour", json.dumps(attempts), wait=True)
        self.assertEqual(status, 0, nervebox.thread(run))
        return json.loads(nervebox.thread(run)[1]["content"])

    def refused(self, *attempts):
        for attempt, outcome in zip(attempts, self.attempt(*attempts), strict=True):
            with self.subTest(attempt=attempt):
                self.assertIn(outcome, DENIED)

    def test_what_is_a_roles_own_it_may_touch(self):
        # So that the refusals below are refusals, and not mistakes of the attempts.
        self.assertEqual(self.attempt(
            ["read", "/proc/self/environ"], ["list", "/proc/self/fd"], ["create", "mine"], ["rename", "mine"],
            ["unlink", "minex"], ["mkdir", "folder"], ["create", "/tmp/mine"],
            ["read", f"{nervebox.cgroup_of(self.held)}/cgroup.procs"]), ["done"] * 8)

    def test_each_workflow_has_an_uid_of_its_own(self):
        said = {}
        for name in ("look-around", f"{LONG}-one", f"{LONG}-two", "run-as-nerve"):
            run, status = nervebox.start(name, wait=True)
            self.assertEqual(status, 0)
            said[name] = nervebox.thread(run)[1]["content"]
        uids = {name: int(text.split()[0]) for name, text in said.items() if name != "look-around"}
        uids["look-around"] = json.loads(said["look-around"])["uid"][0]
        uids["hold-secret"] = pathlib.Path(f"/proc/{self.role}").stat().st_uid
        self.assertEqual(len(set(uids.values())), len(uids), uids)
        self.assertNotIn(0, uids.values())
        self.assertEqual(uids["run-as-nerve"], pwd.getpwnam("nerve").pw_uid)
        for name, uid in uids.items():
            with self.subTest(name=name):
                # The worker is who its roles are.
                self.assertEqual(pathlib.Path(f"/proc/{nervebox.worker_pid(name)}").stat().st_uid, uid)

    def test_a_role_cannot_touch_processes_of_another_workflow(self):
        pids = (self.role, self.worker, self.nerved, 1)
        self.refused(*[[deed, pid] for pid in pids for deed in
                       ("probe", "kill", "attach", "peek", "descriptor_of", "limit")])
        self.assertEqual(nervebox.alive(self.victims), self.victims)
        self.assertEqual(nervebox.nerved_pid(), self.nerved)

    def test_a_role_cannot_read_proc_of_another_workflow(self):
        self.refused(*[["read", f"/proc/{pid}/{file}"] for pid in (self.role, self.worker, self.nerved)
                       for file in ("environ", "mem", "maps", "cmdline", "stack", "syscall", "auxv")],
                     *[["list", f"/proc/{pid}/{folder}"] for pid in (self.role, self.worker, self.nerved)
                       for folder in ("fd", "root", "cwd", "task")])

    def test_a_role_cannot_read_the_files_of_another_workflow_or_of_nerved(self):
        # systemd shows a worker a /var/lib/private with nothing but its own directory.
        self.refused(["list", str(self.state)], ["read", str(self.secret)],
                     ["list", "/var/lib/nerve"], *[["read", f"/var/lib/nerve/{file}"] for file in
                                                   ("nerve.db", "nerve.db-wal", "nerve.db-shm", "lock")],
                     ["create", "/var/lib/nerve/x"], ["read", "/tmp/planted"],
                     ["read", f"/proc/{self.role}/root{self.secret}"])

    def test_a_role_cannot_write_where_definitions_and_units_are(self):
        self.refused(*[["create", f"{folder}/x"] for folder in
                       ("/etc/nerve/workflows", "/run/nerve", "/usr/lib/nerve/workflows", "/etc/systemd/system",
                        "/run/systemd/system", "/run/systemd/transient", "/usr/libexec/nerve", "/etc", "/run")],
                     ["mkdir", "/run/nerve/workflows"], ["unlink", "/run/nerve/worker.sock"],
                     ["rename", "/run/nerve/worker.sock"], ["unlink", "/run/nerve/private"], ["rename", "/run/nerve/private"],
                     ["write", "/etc/nerve/workflows/hold-secret.yaml", "x"], ["write", "/usr/libexec/nerve/nerved", "x"])
        self.assertEqual(sorted(path.name for path in pathlib.Path("/run/nerve").iterdir()), ["private", "worker.sock"])

    def test_a_role_cannot_use_the_cgroups_of_another_workflow(self):
        unit, run = nervebox.worker_cgroup("hold-secret"), nervebox.cgroup_of(self.held)
        slices = (unit, unit / "main", run, unit.parent)
        self.refused(*[["write", f"{cgroup}/cgroup.procs", "0"] for cgroup in slices],
                     *[["write", f"{cgroup}/cgroup.kill", "1"] for cgroup in slices],
                     *[["write", f"{cgroup}/cgroup.freeze", "1"] for cgroup in slices],
                     *[["mkdir", f"{cgroup}/x"] for cgroup in slices])
        self.assertEqual(nervebox.alive(self.victims), self.victims)

    def test_a_role_cannot_become_anybody_else(self):
        uid = pathlib.Path(f"/proc/{self.role}").stat().st_uid
        self.refused(["become", 0], ["become", uid])

    def test_what_a_role_is_given(self):
        run, status = nervebox.start("look-around", "the prompt", wait=True)
        self.assertEqual(status, 0)
        seen = json.loads(nervebox.thread(run)[1]["content"])
        names = [name for name, _ in seen["environ"]]
        with self.subTest("no variable twice"):
            self.assertEqual(sorted(names), sorted(set(names)))
        environ = dict(seen["environ"])
        with self.subTest("environment"):
            self.assertEqual(set(environ), {
                "PATH", "HOME", "USER", "LOGNAME", "LANG", "NERVE_WORKFLOW", "NERVE_RUN_ID", "NERVE_ROLE",
                "NERVE_ROUND", "NERVE_ATTEMPT", "NERVE_RETRY", "NERVE_THREAD", "COLOUR"})
        with self.subTest("values"):
            state = "/var/lib/nerve-wf/look-around"
            self.assertIn(environ["HOME"], (state, "/var/lib/private/nerve-wf/look-around"))
            self.assertEqual(environ["LANG"], "C.UTF-8")
            self.assertEqual((environ["USER"], environ["LOGNAME"]), ("nw-look-around", "nw-look-around"))
            self.assertEqual((environ["NERVE_WORKFLOW"], environ["NERVE_RUN_ID"], environ["NERVE_ROLE"],
                              environ["NERVE_ROUND"], environ["NERVE_ATTEMPT"]), ("look-around", run, "main", "1", "1"))
            self.assertTrue(environ["PATH"].startswith("/"))
            self.assertEqual(environ["COLOUR"], "blue")
        with self.subTest("thread"):
            lines = [json.loads(line) for line in seen["thread"].splitlines()]
            self.assertEqual([(line["round"], line["role"], line["content"]) for line in lines],
                             [(0, "__start__", "the prompt")])
        with self.subTest("directory"):
            self.assertTrue(seen["cwd"].endswith(f"/nerve-wf/look-around/runs/{run}"), seen["cwd"])
        with self.subTest("privileges"):
            status = seen["status"]
            self.assertEqual(status["NoNewPrivs"], "1")
            self.assertEqual({int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}, {0})
            self.assertEqual(status["Seccomp"], "2")
            self.assertEqual(len(set(seen["uid"])), 1)
            self.assertEqual(len(set(seen["gid"])), 1)
            self.assertNotIn(0, [*seen["uid"], *seen["gid"], *seen["groups"]])
        with self.subTest("signals"):
            for name in ("SigBlk", "SigIgn", "SigCgt"):
                # Python itself ignores SIGPIPE (13) and SIGXFSZ (25) and catches SIGINT (2); 32 and 33 are the C
                # library's own, and nobody can reset them.
                self.assertEqual(int(status[name], 16) & ~(1 << 12 | 1 << 24 | 1 << 1 | 3 << 31), 0, (name, status[name]))
        with self.subTest("descriptors"):
            self.assertEqual({fd: path for fd, path in seen["fds"].items() if fd not in "012"
                              and not re.fullmatch(r"/proc/\d+/fd", path)}, {})
        with self.subTest("others are invisible"):
            self.assertNotIn(self.nerved, seen["visible"])
            self.assertNotIn(self.role, seen["visible"])
            self.assertEqual(seen["tmp"], [])

    def test_no_sense_of_the_bus_comes_from_the_environment_of_who_starts(self):
        # A caller's environment is the caller's.
        done = ctl("workflow", "start", "look-around", "--wait",
                   env={"PATH": "/evil:/usr/bin:/bin", "LD_PRELOAD": "", "IFS": "x", "NERVE_CANARY": "hush"})
        seen = json.loads(nervebox.thread(done.stdout.strip())[1]["content"])
        self.assertNotIn("NERVE_CANARY", dict(seen["environ"]))
        self.assertNotIn("/evil", dict(seen["environ"])["PATH"])

    def test_the_state_directory_is_its_users_alone(self):
        for path, uid in ((self.state, pathlib.Path(f"/proc/{self.role}").stat().st_uid), (nervebox.STATE, 0),
                          (pathlib.Path("/var/lib/private"), 0)):
            with self.subTest(path=path):
                self.assertEqual((path.stat().st_uid, path.stat().st_mode & 0o7777), (uid, 0o700))
        for path in nervebox.STATE.iterdir():
            with self.subTest(path=path):
                self.assertEqual((path.stat().st_uid, path.stat().st_mode & 0o7777), (0, 0o600))


ACTIONS = pathlib.Path(__file__).resolve().parents[2] / "src/bus/authorize.rs"
NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")


class Strangers(nervebox.Case):
    """Whoever is not root may ask, and is told no."""

    definitions = {"sleep-long": nervebox.command("exec sleep infinity"), "say-hello": nervebox.command("echo hello")}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_id = nervebox.start("sleep-long", "a secret prompt")
        cls.pids = nervebox.processes(cls.run_id)
        cls.before = nervebox.listed("-n", "10000")

    def tearDown(self):
        """The run that is held stays."""

    def interfaces(self):
        bus, path, _ = dbuswire.MANAGER
        text = sh("busctl", "call", "--json=short", bus, path, "org.freedesktop.DBus.Introspectable", "Introspect").stdout
        tree = xml.fromstring(json.loads(text)["data"][0])
        return [interface for interface in tree.findall("interface") if interface.get("name").startswith("org.nerve1.")]

    def methods(self):
        """Those of all interfaces, with the interface of each."""
        return [(interface.get("name"), method) for interface in self.interfaces() for method in interface.findall("method")]

    def unchanged(self):
        self.assertEqual(nervebox.listed("-n", "10000"), self.before)
        self.assertEqual(nervebox.alive(self.pids), self.pids)

    def test_every_method_has_an_action(self):
        self.assertEqual({interface.get("name") for interface in self.interfaces()},
                         {"org.nerve1.Manager", "org.nerve1.Store"})
        methods = {method.get("name") for _, method in self.methods()}
        table = re.search(r"ACTIONS.*?\];", ACTIONS.read_text(), re.DOTALL).group()
        actions = dict(re.findall(r'\("(\w+)",\s*"(org\.nerve1\.[a-z-]+)"\)', table))
        self.assertEqual(methods, set(actions))
        self.assertGreaterEqual(methods, {"StartRun", "KillRun", "GetRun", "ListRuns", "GetThread", "GetStatus"})

    def test_the_interface_has_nothing_but_methods_and_its_signals(self):
        signals = {signal.get("name") for interface in self.interfaces() for signal in interface.findall("signal")}
        self.assertEqual(signals, {"RunChanged", "WorkflowChanged", "EventsAppended"})
        for interface in self.interfaces():
            self.assertEqual(interface.findall("property"), [])

    def test_nobody_may_call_any_method(self):
        values = {"s": self.run_id, "t": 0, "u": 1, "b": True, "a{sv}": {}}
        for interface, method in self.methods():
            name, (bus_name, path, _) = method.get("name"), dbuswire.MANAGER
            target = (bus_name, path, interface)
            signature = "".join(arg.get("type") for arg in method.findall("arg") if arg.get("direction") != "out")
            if "h" in signature:
                continue  # nervectl passes the descriptors: see below
            arguments = [values[kind] for kind in dbuswire.split(signature)]
            if name == "StartRun":
                arguments[0] = "say-hello"
            with self.subTest(method=name):
                with dbuswire.Connection(dbuswire.NOBODY) as bus:
                    self.assertEqual(bus.call(*target, name, signature, *arguments).error,
                                     "org.nerve1.Error.NotPermitted")
                words = ["0" if argument == {} else str(argument) for argument in arguments]
                done = sh(*NOBODY, "busctl", "call", *target, name, *([signature] if signature else []),
                          *words, check=1)
                self.assertIn("may not do", done.stderr)
        self.unchanged()

    def test_other_interfaces_give_nothing(self):
        with dbuswire.Connection(dbuswire.NOBODY) as bus:
            for interface, member, signature, arguments in (
                    ("org.freedesktop.DBus.Properties", "GetAll", "s", ["org.nerve1.Manager"]),
                    ("org.freedesktop.DBus.Properties", "Get", "ss", ["org.nerve1.Manager", "Runs"]),
                    ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects", "", []),
                    ("org.nerve1.Debug", "Dump", "", []), ("org.nerve1.Manager", "NoSuchMethod", "", []),
                    ("", "StartRun", "ssa{sv}", ["say-hello", "", {}])):
                with self.subTest(interface=interface, member=member):
                    reply = bus.call("org.nerve1", "/org/nerve1", interface, member, signature, *arguments)
                    self.assertNotIn(b"secret", reply.body)
                    self.assertNotIn(self.run_id.encode(), reply.body)
        self.unchanged()

    def test_nobody_gets_77_and_one_line_from_every_verb(self):
        run = self.run_id
        for line in (["workflow", "start", "say-hello"], ["workflow", "start", "say-hello", "--wait"],
                     ["workflow", "list"], ["workflow", "list", "--active", "-o", "json"], ["workflow", "show", run],
                     ["workflow", "kill", run], ["workflow", "kill", "--no-block", run], ["thread", run],
                     ["thread", run, "-o", "json"], ["logs", run], ["status"], ["workflow", "abort", run],
                     ["workflow", "drain", "sleep-long"], ["workflow", "drain", "sleep-long", "--wait"],
                     ["workflow", "reset", "sleep-long"], ["pause"], ["resume"], ["reload"],
                     ["events"], ["events", "-f"], ["thread", run, "-f"],
                     ["blob", "put", "/etc/passwd"], ["blob", "get", "0" * 64], ["blob", "exists", "0" * 64],
                     ["blob", "list"], ["store", "check"], ["store", "backup", "/tmp/nobodys"]):
            with self.subTest(line=line):
                done = sh(*NOBODY, "nervectl", *line, check=77)
                self.assertEqual(done.stdout, "")
                self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
                self.assertIn("root", done.stderr)  # what to do
        self.unchanged()

    def test_a_static_user_of_workers_may_do_no_more(self):
        for user in ("nerve", "daemon"):
            with self.subTest(user=user), dbuswire.Connection(pwd.getpwnam(user).pw_uid) as bus:
                self.assertEqual(bus.call(*dbuswire.MANAGER, "GetStatus").error, "org.nerve1.Error.NotPermitted")

    def test_arguments_that_make_no_sense_from_nobody(self):
        with dbuswire.Connection(dbuswire.NOBODY) as bus:
            for member, signature, arguments in (("StartRun", "s", ["say-hello"]), ("GetRun", "u", [7]),
                                                 ("StartRun", "ssa{sv}", ["say-hello", "", {"uid": 0}])):
                with self.subTest(member=member, signature=signature):
                    self.assertIsNotNone(bus.call(*dbuswire.MANAGER, member, signature, *arguments).error)
        self.unchanged()

    def test_nobody_cannot_take_nerves_name(self):
        with dbuswire.Connection(dbuswire.NOBODY) as bus:
            reply = bus.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su",
                             "org.nerve1", 0)
            self.assertEqual(reply.error, "org.freedesktop.DBus.Error.AccessDenied")

    def test_the_private_socket_is_roots_alone(self):
        mode = pathlib.Path(dbuswire.PRIVATE).stat()
        self.assertEqual((mode.st_uid, mode.st_mode & 0o7777), (0, 0o600))
        for user in ("nobody", "nerve"):
            with self.subTest(user=user), self.assertRaises(PermissionError):
                dbuswire.connect_as(pwd.getpwnam(user).pw_uid, dbuswire.PRIVATE)
        # Who has a connection that root made is root: the kernel says who connected, and a word of the message nothing.
        with dbuswire.Connection(address=dbuswire.PRIVATE, greet=False) as peer:
            self.assertIsNone(peer.call(*dbuswire.MANAGER, "GetStatus").error)

    def test_a_denial_is_on_record(self):
        with dbuswire.Connection(dbuswire.NOBODY) as bus:
            bus.call(*dbuswire.MANAGER, "KillRun", "sst", self.run_id, "", 0)
        found = [entry for entry in nervebox.journal("_SYSTEMD_UNIT=nerve.service")
                 if entry.get("NERVE_UID") == str(dbuswire.NOBODY) and "kill" in json.dumps(entry)]
        self.assertTrue(found)

    def test_what_the_bus_said_of_a_name_holds_for_that_bus_only(self):
        # dbus-daemon counts its clients' names, :1.5, from the beginning again when it is restarted.
        def restart_bus():
            dbuswire.systemctl_bus("restart")
            nervebox.wait_for(dbuswire.is_served, "nerve to be on the bus again")

        restart_bus()
        roots = set()
        for _ in range(40):
            with dbuswire.Connection(0) as bus:
                self.assertIsNone(bus.call(*dbuswire.MANAGER, "GetStatus").error)
                roots.add(bus.name)
        restart_bus()
        tried = 0
        for _ in range(100):
            with dbuswire.Connection(dbuswire.NOBODY) as bus:
                if bus.name in roots:
                    tried += 1
                    self.assertEqual(bus.call(*dbuswire.MANAGER, "StartRun", "ssa{sv}", "say-hello", "", {}).error,
                                     "org.nerve1.Error.NotPermitted", f"nobody is {bus.name} now, which was root before")
        self.assertGreater(tried, 0, "no name came again")
        self.unchanged()


if __name__ == "__main__":
    unittest.main()
