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
import sqlite3
import subprocess
import tempfile
import time
import unittest

WORKFLOWS = pathlib.Path("/etc/nerve/workflows")
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


def define(name, definition, directory=WORKFLOWS):
    """Writes a definition: YAML text or bytes as they are, a dict as JSON (which YAML includes) with `version` and
    `name` added. nerve reads definitions when it starts: see `load`. Returns the path."""
    if isinstance(definition, dict):
        definition = json.dumps({"version": 1, "name": name, **definition}, indent=1)
    if isinstance(definition, str):
        definition = definition.encode()
    directory = pathlib.Path(directory)
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = directory / f"{name}.yaml"
    path.write_bytes(definition)
    path.chmod(0o644)
    return path


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
    for path in [*STATE.iterdir(), *SCRATCH.iterdir(), *WORKFLOWS.iterdir()]:
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
    """The database, read-only, as a sqlite3 connection with rows that have names."""
    with contextlib.closing(sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True, timeout=10)) as connection:
        connection.row_factory = sqlite3.Row
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
