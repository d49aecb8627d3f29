"""What the box suites share. To be imported in the throwaway machine only (`tests/box run -- tests/suites/run`): it
restarts services, kills processes and replaces /etc/nerve/workflows.

Roles write outside of their own directory only below SCRATCH, and only with `worker=WRITES` in their definition.

A test class names its definitions and gets a freshly started nerve that has just those:

    class Ends(nervebox.Case):
        definitions = {"say-hello": nervebox.command("echo hello")}

        def test_success(self):
            run = nervebox.start("say-hello")
            self.assertEqual(nervebox.ended(run)["exitCode"], 0)

No test sleeps for something to happen: it waits for it with `wait_for`, which says what it waited for when it gives up.
"""

import contextlib
import ctypes
import glob
import json
import os
import pathlib
import select
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
import unittest

import livedb

WORKFLOWS = pathlib.Path("/etc/nerve/workflows")
SETTINGS = pathlib.Path("/etc/nerve/nerve.yaml")
UNITS = pathlib.Path("/run/systemd/system")
STATE = pathlib.Path("/var/lib/nerve")
DATABASE = STATE / "nerve.db"
CGROUPS = pathlib.Path("/sys/fs/cgroup")
SLICE = CGROUPS / "nerve.slice/nerve-wf.slice"
SCRATCH = pathlib.Path("/var/spool/nervebox")
WRITES = {"ReadWritePaths": str(SCRATCH)}  # worker: section of a workflow whose roles write there
TIMEOUT = 20  # seconds; nothing that a test waits for takes nearly as long on a busy machine


# ---- commands -------------------------------------------------------------------------------------------------------

def sh(*argv, input=None, check=True, timeout=60, **more):
    """Runs a command and returns its CompletedProcess with text in stdout and stderr. `check`: False, True (it must
    exit 0), or the exit status that it must have."""
    text = not isinstance(input, bytes)
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=text, timeout=timeout,
                          **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}), **more)
    expected = 0 if check is True else check
    if check is not False and done.returncode != expected:
        raise AssertionError(f"{' '.join(map(str, argv))[:500]}: exit status {done.returncode}, not {expected}\n"
                             f"stdout: {done.stdout[-2000:]}\nstderr: {done.stderr[-2000:]}")
    return done


def ctl(*argv, input=None, check=True, timeout=60, **more):
    """nervectl; see `sh`."""
    return sh("nervectl", *argv, input=input, check=check, timeout=timeout, **more)


def systemctl(*argv, check=True):
    return sh("systemctl", *argv, check=check)


def properties(unit, *names):
    """What `systemctl show` says of a unit, as a dict; of all properties when none is named."""
    text = systemctl("show", *[f"--property={name}" for name in names], unit).stdout
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def unit_of(workflow):
    return f"nerve-wf@{workflow}.service"


# ---- waiting --------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
IN_MODIFY, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x80, 0x100, 0x200


@contextlib.contextmanager
def _changes(paths):
    """A descriptor that is readable when something in these directories or files changes (inotify)."""
    fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for path in paths:  # one that is not there yet is left to the interval
            _libc.inotify_add_watch(fd, os.fsencode(path), IN_MODIFY | IN_MOVED_TO | IN_CREATE | IN_DELETE)
        yield fd
    finally:
        os.close(fd)


def wait_for(predicate, what, timeout=TIMEOUT, watch=()):
    """Waits until `predicate()` is true and returns what it returned; fails, saying `what`, after `timeout` seconds.

    It looks again as soon as nerve has committed something (its WAL changes) or one of the `watch`ed files or
    directories changes. Not everything that is waited for makes a file change: processes go, units change, /proc says
    nothing. For those it looks again every 50 ms: the one place in the suites where time is a signal."""
    deadline = time.monotonic() + timeout
    with _changes([STATE, *watch]) as fd:
        while True:
            value = predicate()
            if value:
                return value
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"waited {timeout} s for {what}; the last look gave {value!r}")
            if select.select([fd], [], [], min(left, 0.05))[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 65536)


# ---- definitions and the daemon -------------------------------------------------------------------------------------

def command(script, **keys):
    """A definition with one role `main` that is a shell script. `keys` are more keys of the workflow (worker=…,
    concurrency=…); those of a role go there (prompt=…, cwd=…, role_timeout=…)."""
    role = {"exec": ["/bin/sh", "-c", script]}
    for key, name in (("prompt", "prompt"), ("cwd", "cwd"), ("role_timeout", "timeout")):
        if key in keys:
            role[name] = keys.pop(key)
    return {"roles": {"main": role}, "graph": {"$START": "main", "main": {"ok": "$END"}}, **keys}


# A role that says that its round began, with its attempt, and then waits for leave to end. What it appends to RUN.log are
# the side effects of the run: a round that ran twice is there twice. See `GatedCase`.
GATED = (f"cd {SCRATCH}; echo begin $NERVE_ROUND $NERVE_ATTEMPT >>$NERVE_RUN_ID.log;"
         "until [ -e $NERVE_RUN_ID.go.$NERVE_ROUND -o -e $NERVE_RUN_ID.go.all ]; do sleep 0.02; done;"
         "echo end $NERVE_ROUND $NERVE_ATTEMPT >>$NERVE_RUN_ID.log; echo said $NERVE_ROUND")


def rounds(script, count, **keys):
    """A definition of so many rounds of this script, each by a role of its own: r1, r2, …"""
    names = [f"r{number}" for number in range(1, count + 1)]
    graph = {"$START": names[0], **{name: {"ok": after} for name, after in zip(names, [*names[1:], "$END"])}}
    return {"roles": {name: {"exec": ["/bin/sh", "-c", script]} for name in names}, "graph": graph, **keys}


def replace(path, text, mode=0o644, owner=0):
    """Writes a file such that who watches it sees the old one or the new one, never a part or an empty one, or one with
    another mode or owner."""
    path = pathlib.Path(path)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(text if isinstance(text, bytes) else text.encode())
    fresh.chmod(mode)
    os.chown(fresh, owner, owner)
    fresh.rename(path)
    return path


def define(name, definition, directory=WORKFLOWS, **more):
    """Writes a definition: YAML text or bytes as they are, a dict as JSON (which YAML includes) with `version` and
    `name` added. nerve reads definitions when it starts (see `load`), when it is told to (see `reload`), and soon after
    one has changed. `more`: see `replace`. Returns the path."""
    if isinstance(definition, dict):
        definition = json.dumps({"version": 1, "name": name, **definition}, indent=1)
    return replace(pathlib.Path(directory) / f"{name}.yaml", definition, **more)


def reload():
    """`systemctl reload nerve`: nerve looks at its files, at once; wait for what that is to change."""
    systemctl("reload", "nerve.service")


def load(definitions):
    """Starts nerve anew with just these definitions ({name: text or dict}), an empty store and no workers. Whatever
    state the tests before have left it in, they cannot spoil those that follow."""
    sweep()
    for name, definition in definitions.items():
        define(name, definition)
    systemctl("start", "nerve.service")


def restart_nerve():
    """Restarts nerve.service; returns when it is ready, so when it answers."""
    systemctl("restart", "nerve.service")


def sweep():
    """Stops nerve and all workers, and removes store, definitions and the roles' files."""
    systemctl("stop", "nerve.service")
    systemctl("stop", "nerve-wf@*.service")
    systemctl("reset-failed", "nerve-wf@*.service", check=False)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    SCRATCH.chmod(0o1777)
    WORKFLOWS.mkdir(parents=True, exist_ok=True)
    SETTINGS.unlink(missing_ok=True)
    left = [pathlib.Path(path) for path in glob.glob("/var/lib/nerve-wf/*/*/*")]  # of runs whose worker was stopped
    for path in [*STATE.iterdir(), *SCRATCH.iterdir(), *WORKFLOWS.iterdir(), *left]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class Case(unittest.TestCase):
    """A class of tests over its own definitions; see the head of this file."""

    definitions = {}

    @classmethod
    def setUpClass(cls):
        load(cls.definitions)

    @classmethod
    def tearDownClass(cls):
        load({})

    def tearDown(self):
        """Ends the runs that the test, when it failed, has left open: they would hold the slots of the next one. When
        that does not work either, all begins anew."""
        if not open_runs():
            return
        try:
            ctl("workflow", "kill", "--grace", "0", *open_runs(), check=False, timeout=10)
        except subprocess.TimeoutExpired:
            pass
        if open_runs():
            load(self.definitions)

    def scratch(self):
        """A fresh directory below SCRATCH that every user may write to, but for the sandbox of the worker: see WRITES."""
        path = pathlib.Path(tempfile.mkdtemp(dir=SCRATCH))
        path.chmod(0o1777)
        return path


class GatedCase(Case):
    """Tests whose roles are GATED."""

    maxDiff = None

    def go(self, run, number="all"):
        """Lets this round of the run end, or all of them."""
        (SCRATCH / f"{run}.go.{number}").touch()

    def log(self, run):
        """The side effects: a list of (begin or end, round, attempt)."""
        try:
            lines = (SCRATCH / f"{run}.log").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(what, int(number), int(attempt)) for what, number, attempt in map(str.split, lines)]

    def begun(self, run, number, attempt=1):
        """Waits until this round of the run has begun."""
        wait_for(lambda: ("begin", number, attempt) in self.log(run), f"round {number} of run {run}, attempt {attempt}",
                 watch=[SCRATCH])

    def role_pid(self, run):
        """The role's first process, as {pid: start time}: it leads its session."""
        def found():
            pids = pids_of(cgroup_of(run))
            leaders = {pid: begun for pid, begun in pids.items() if self.session(pid) == pid}
            return leaders if len(leaders) == 1 else None
        return wait_for(found, f"the role of run {run}")

    def session(self, pid):
        try:
            return os.getsid(pid)
        except ProcessLookupError:
            return None

    def whole(self, run, count):
        """It completed after so many rounds; its thread is dense and in order, on the bus and in the database."""
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"], found["rounds"]),
                         ("completed", 0, "success", count), run_json(run)["events"])
        said = thread(run)
        self.assertEqual([one["round"] for one in said], list(range(count + 1)))
        self.assertEqual([one["role"] for one in said], ["__start__", *[f"r{number}" for number in range(1, count + 1)]])
        self.assertEqual([one["content"] for one in said[1:]], [f"said {number}" for number in range(1, count + 1)])
        kinds = events(run)
        self.assertEqual(kinds.count("thread-workflow-message"), count)
        self.assertEqual((kinds[0], kinds[-1], kinds.count("ended")), ("queued", "ended", 1))

    def once(self, run, count):
        """Every round ran once."""
        self.assertEqual(self.log(run), [(what, number, 1) for number in range(1, count + 1) for what in ("begin", "end")])

    def kept(self, run, number):
        """No round up to this one, all of which are acknowledged, was executed again after it was done."""
        for done in range(1, number + 1):
            whats = [what for what, of, _ in self.log(run) if of == done]
            self.assertEqual((whats.count("end"), whats[-1]), (1, "end"), self.log(run))

    def completes(self, run, count):
        """Lets it go on to its end, which is a good one."""
        self.go(run)
        stored_end(run)
        self.whole(run, count)

    def kill_nerved(self):
        """kill -9, and returns once its successor answers."""
        pid = nerved_pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: nerved_pid() not in (0, pid), "another nerved")
        self.answers()

    def answers(self):
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to answer")


# ---- runs -----------------------------------------------------------------------------------------------------------

def start(workflow, prompt=None, *options, wait=False, check=True):
    """Starts a run and returns its id. With `wait` it waits for the end and returns (id, exit status of nervectl)."""
    prompt = [] if prompt is None else ["-p", prompt]
    done = ctl("workflow", "start", workflow, *prompt, *options, *(["--wait"] if wait else []),
               check=False if wait else check)
    run = done.stdout.strip()
    if wait:
        return run, done.returncode
    return run


class Waiter:
    """`nervectl workflow start --wait`, running."""

    def __init__(self, workflow, prompt=None, *options):
        prompt = [] if prompt is None else ["-p", prompt]
        self.process = subprocess.Popen(["nervectl", "workflow", "start", workflow, *prompt, *options, "--wait"],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)
        self.run = self.process.stdout.readline().strip()

    def status(self, timeout=TIMEOUT):
        """Its exit status."""
        with self.process:
            try:
                return self.process.wait(timeout)
            finally:
                self.process.kill()


class Tried:
    """`nervectl workflow start`, with its exit status and what it said; by default it must succeed."""

    def __init__(self, workflow, *options, prompt=None, check=True):
        prompt = [] if prompt is None else ["-p", prompt]
        done = ctl("workflow", "start", workflow, *prompt, *options, check=check)
        self.run, self.status, self.said = done.stdout.strip(), done.returncode, done.stderr


def listed(*options):
    """`workflow list -o json`, newest first."""
    return json.loads(ctl("workflow", "list", *options, "-o", "json").stdout)


def row(run):
    """The run's element of `workflow list -o json`."""
    return next(element for element in listed("-n", "10000") if element["run"] == run)


def run_json(run):
    """The one element of `workflow show -o json`."""
    return json.loads(ctl("workflow", "show", run, "-o", "json").stdout)[0]


def thread(run, *options):
    """`thread -o json`: the start, then the rounds."""
    return json.loads(ctl("thread", run, *options, "-o", "json").stdout)


def events(run):
    """Types of the run's events, in order."""
    return [event["type"] for event in run_json(run)["events"]]


@contextlib.contextmanager
def database():
    """The database as it is, as a sqlite3 connection with rows that have names."""
    with livedb.connect(DATABASE) as connection:
        yield connection


def stored(run):
    """The run's row in the database as a dict; None when it has none. Works while nerved or D-Bus is down."""
    with database() as connection:
        found = connection.execute("SELECT * FROM workflow_runs WHERE run = ?", [run]).fetchone()
        return found and dict(found)


def open_runs():
    """The ids of the runs that have not ended, by the database."""
    with database() as connection:
        return [found["run"] for found in connection.execute("SELECT run FROM workflow_runs WHERE ended_at IS NULL")]


def ended(run, timeout=TIMEOUT):
    """Waits until the run has ended, by the database, and returns its element of `workflow list -o json`."""
    stored_end(run, timeout)
    return row(run)


def stored_end(run, timeout=TIMEOUT):
    """Likewise, but returns the row of the database and so needs neither nerved nor D-Bus."""
    def has_ended():
        found = stored(run)
        return found if found and found["ended_at"] is not None else None
    return wait_for(has_ended, f"the end of run {run}", timeout)


def count_events(run, kind):
    """How many events of this type the run has in the database: 'dispatched', 'worker-lost', …"""
    with database() as connection:
        return connection.execute("SELECT count(*) FROM events WHERE ref = ? AND type = ?", [run, kind]).fetchone()[0]


def wait_event(run, kind, count=1, timeout=TIMEOUT):
    """Waits until the run has so many events of this type."""
    wait_for(lambda: count_events(run, kind) >= count, f"{count} {kind} events of run {run}", timeout)


def wait_rounds(run, rounds, timeout=TIMEOUT):
    """Waits until so many rounds of the run are durable."""
    wait_for(lambda: (stored(run) or {"rounds": -1})["rounds"] >= rounds, f"round {rounds} of run {run}", timeout)


def wait_status(run, status, timeout=TIMEOUT):
    """Waits until the run is `status` by the database: 'queued', 'started', …"""
    wait_for(lambda: (stored(run) or {"status": None})["status"] == status, f"run {run} to be {status}", timeout)


def losses(run):
    """The payloads of the run's `worker-lost` events: cause, code or signal, invocation, attempt."""
    return [event["payload"] for event in run_json(run)["events"] if event["type"] == "worker-lost"]


# ---- workflows and their workers ------------------------------------------------------------------------------------

def overview():
    """What `GetStatus` answers, as plain values."""
    def plain(value):
        if isinstance(value, dict):
            return plain(value["data"]) if set(value) == {"type", "data"} else {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else value
    # A nerved that has just begun answers on its own socket first.
    call = ["busctl", "--json=short", "call", "org.nerve1", "/org/nerve1", "org.nerve1.Manager", "GetStatus"]
    text = wait_for(lambda: (done := sh(*call, check=False)).returncode == 0 and done.stdout, "nerve on the bus")
    return plain(json.loads(text))[0]


def status(workflow):
    """The workflow's element of `overview()`: worker, running, queued, concurrency, …; None when nerve knows none."""
    return next((element for element in overview()["workflows"] if element["name"] == workflow), None)


def wait_worker(workflow, word, timeout=TIMEOUT):
    """Waits until `status` has this word for the workflow's worker: ready, draining, blocked, … Returns its pid or 0."""
    found = wait_for(lambda: (now := status(workflow)) and now["worker"] == word and now,
                     f"the worker of {workflow} to be {word}", timeout)
    return found.get("mainPid", 0)


def wait_ready(workflow, after=0):
    """Waits until a worker is ready that is not the process `after`; returns its pid."""
    def ready():
        now = status(workflow)
        return now["worker"] == "ready" and now.get("mainPid") not in (None, after) and now["mainPid"]
    return wait_for(ready, f"a worker of {workflow} other than {after}")


def wait_absent(workflow):
    """Waits until there is no worker: no process, and no unit that could hold one."""
    wait_for(lambda: not is_populated(worker_cgroup(workflow)) and properties(unit_of(workflow), "ActiveState")["ActiveState"]
             in ("inactive", "failed"), f"the worker of {workflow} to be gone")


def kill_process(pid, number=signal.SIGKILL):
    """Sends a signal until the process is gone. Rust's handler of SIGSEGV takes the first one for itself."""
    begun = start_time(pid)
    def gone():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return start_time(pid) != begun
    wait_for(gone, f"process {pid} to die of {signal.Signals(number).name}")


def happened(workflow, kind):
    """The payloads of the workflow's own events of this type: worker-died, workflow-blocked, worker-stopped, …"""
    with database() as connection:
        found = connection.execute("SELECT payload FROM events WHERE ref = ? AND type = ? ORDER BY seq", [workflow, kind])
        return [json.loads(one["payload"]) for one in found]


def drain(workflow, *options, check=True, timeout=60):
    return ctl("workflow", "drain", workflow, *options, check=check, timeout=timeout)


def reset(workflow, check=True):
    return ctl("workflow", "reset", workflow, check=check)


def abort(run, *options, check=True):
    return ctl("workflow", "abort", *options, run, check=check)


@contextlib.contextmanager
def drop_in(workflow, text):
    """With this drop-in of the workflow's unit, which beats what nerve asks systemd for."""
    folder = UNITS / f"{unit_of(workflow)}.d"
    replace(folder / "50-nervebox.conf", text)
    systemctl("daemon-reload")
    try:
        yield
    finally:
        shutil.rmtree(folder)
        systemctl("daemon-reload")


# A worker that misbehaves once: it leaves a mark, and whoever finds the mark is the real one. What it does meanwhile
# is said with `connected` (say ready), `heard` (take frames until one of these types) and `said` (send one).
WORKER = r"""
import json, os, pathlib, signal, socket, sys, time
name = os.environ["NERVE_WORKFLOW"]
mark = pathlib.Path(os.environ["STATE_DIRECTORY"], "nervebox-mark")
if mark.exists():
    os.execv("/usr/libexec/nerve/nerve-worker", ["nerve-worker", name])
mark.touch()
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
stream = None
def connected():
    global stream
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(os.environ["NERVE_SOCKET"])
    lines = stream.makefile()
    said(type="ready", protocol=1, workflow=name, runs=[])
    return lines
def said(**frame):
    stream.sendall(json.dumps(frame).encode() + b"\n")
def heard(*types):
    for line in lines:
        frame = json.loads(line)
        if frame["type"] in types:
            return frame
    sys.exit(9)
"""


@contextlib.contextmanager
def worker_that(workflow, act):
    """With a worker that does this the first time it is started; `act` is Python. Its definition needs nothing for it."""
    program = replace(SCRATCH / f"worker-{workflow}.py", f"{WORKER}\n{act}\n")
    pathlib.Path(f"/var/lib/private/nerve-wf/{workflow}/nervebox-mark").unlink(missing_ok=True)
    with drop_in(workflow, f"[Service]\nExecStart=\nExecStart=/usr/bin/python3 {program}\n"):
        yield


# ---- processes and cgroups ------------------------------------------------------------------------------------------

def cgroup_of(run):
    """The directory of the run's cgroup, whether it exists or not."""
    return SLICE / unit_of(stored(run)["workflow"]) / f"run-{run}"


def worker_cgroup(workflow):
    """The directory of the worker unit's cgroup."""
    return SLICE / unit_of(workflow)


def pids_of(cgroup):
    """The processes in a cgroup and below, as {pid: start time}; empty when there is none."""
    found = {}
    for path in glob.glob(f"{glob.escape(str(cgroup))}/**/cgroup.procs", recursive=True):
        with contextlib.suppress(OSError):
            for pid in map(int, pathlib.Path(path).read_text().split()):
                if (begun := start_time(pid)) is not None:
                    found[pid] = begun
    return found


def processes(run, count=1, timeout=TIMEOUT):
    """Waits until the run has at least so many processes and returns them as `pids_of`."""
    cgroup = cgroup_of(run)
    return wait_for(lambda: (pids := pids_of(cgroup)) and len(pids) >= count and pids,
                    f"{count} processes in {cgroup}", timeout)


def start_time(pid):
    """When a process was started, which with its pid tells it from all others; None when it is gone or a zombie."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def process_state(pid):
    """R, S, T (stopped), Z, …; None when it is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def alive(pids):
    """Those of {pid: start time} that live."""
    return {pid: begun for pid, begun in pids.items() if start_time(pid) == begun}


def is_populated(cgroup):
    """Whether a process is in the cgroup or below, as the kernel says; one that does not exist has none."""
    try:
        return "populated 1" in (pathlib.Path(cgroup) / "cgroup.events").read_text().splitlines()
    except (FileNotFoundError, OSError):
        return False


def marked(mark, where="environ"):
    """Processes anywhere with `mark` in their environment (or `where="cmdline"`), as {pid: start time}: finds what left
    its cgroup. Every process of a role has `NERVE_RUN_ID=…` in its environment."""
    found = {}
    for path in glob.glob("/proc/[0-9]*"):
        pid = int(path[6:])
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark.encode() in pathlib.Path(path, where).read_bytes():
                if (begun := start_time(pid)) is not None:
                    found[pid] = begun
    return found


def assert_gone(run, pids=()):
    """Nothing of the run is left: its cgroup is absent or not populated, none of the recorded processes ({pid: start
    time}) lives, and no process has the run's id in its environment."""
    cgroup = cgroup_of(run)
    assert not is_populated(cgroup), f"{cgroup} still has processes {pids_of(cgroup)}"
    left = alive(dict(pids))
    assert not left, f"processes {left} of run {run} still live"
    strays = marked(f"NERVE_RUN_ID={run}")
    assert not strays, f"processes {strays} carry the id of run {run}"


def main_pid(unit):
    """The unit's MainPID, 0 when it has none."""
    return int(properties(unit, "MainPID")["MainPID"])


def nerved_pid():
    return main_pid("nerve.service")


def worker_pid(workflow):
    return main_pid(unit_of(workflow))


# ---- the journal ----------------------------------------------------------------------------------------------------

def journal(*matches):
    """Entries of the journal that match (journalctl arguments such as NERVE_RUN_ID=…), oldest first, as dicts. What
    was sent before is there: it syncs first."""
    sh("journalctl", "--sync")
    text = sh("journalctl", "--no-pager", "--all", "--output=json", *matches, check=False).stdout
    return [json.loads(line) for line in text.splitlines()]
