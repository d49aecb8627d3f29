"""nerved dies at each of thirty moments, in two ways: it aborts there, or it stops there and is killed. Afterwards all
is as it must be, as the checker says: `tests/box run --failpoints -- tests/suites/run failpoints`.

src/os/failpoint.rs has them die; the table of cases says what leads to each moment."""

import contextlib
import os
import pathlib
import signal
import subprocess
import unittest

import invariants
import livedb
import nervebox
from nervebox import SCRATCH, WRITES, Case, ctl, start, stored, systemctl, wait_for

NERVED = pathlib.Path("/usr/libexec/nerve/nerved")
POINTS = pathlib.Path("/run/nerve/failpoints")
DROP_IN = pathlib.Path("/run/systemd/system/nerve.service.d/failpoints.conf")
TOLD, SHARED = SCRATCH / "told", SCRATCH / "shared"
DEEDS = SHARED / "deeds"
# What nervectl exits with when nerve died on it.
UNKNOWN, NO_ANSWER = 74, 69

# A role that waits for leave to end its round, and says what it does.
GATED = (f"cd {SCRATCH}; {invariants.DEED.format(file=DEEDS, what='begin')};"
         "until [ -e $NERVE_RUN_ID.go.$NERVE_ROUND -o -e $NERVE_RUN_ID.go.all ]; do sleep 0.02; done;"
         f"{invariants.DEED.format(file=DEEDS, what='end')}; echo said $NERVE_ROUND")
# One that does not want to go.
STUBBORN = f"trap '' TERM; cd {SCRATCH}; {invariants.DEED.format(file=DEEDS, what='begin')}; while :; do sleep 0.05; done"


def rounds(script, count, **keys):
    """A workflow of so many rounds of this script."""
    names = [f"r{number}" for number in range(1, count + 1)]
    graph = {"$START": names[0], **{name: {"ok": after} for name, after in zip(names, [*names[1:], "$END"])}}
    return {"roles": {name: {"exec": ["/bin/sh", "-c", script]} for name in names}, "graph": graph, "worker": WRITES,
            **keys}


def has_failpoints():
    return NERVED.exists() and os.fsencode(POINTS) in NERVED.read_bytes()


def takes(option, *verb):
    """Whether this nervectl knows an option."""
    return option in ctl(*verb, "--help", check=False).stdout


# What leads to each moment; a method of the class below for each.
CASES = {
    "start": ["F01", "F02", "F03", "F04", "F05", "F06", "F07", "F08", "F09", "F10", "F11", "F12"],
    "round": ["F13", "F14", "F15"],
    "finish": ["F16", "F17", "F18", "F20"],
    "drain": ["F19"],
    "kill": ["F21", "F22", "F23", "F24", "F25"],
    "recover": ["F26", "F27", "F28"],
    "fill": ["F29", "F30"],
}
WAYS = ("abort", "pause")


def own_workflow(point, way):
    """A workflow of one case, whose worker is not there yet."""
    return f"begin-{point.lower()}-{way}"


@unittest.skipUnless(has_failpoints(), "needs tests/box run --failpoints")
class Failpoints(Case):
    definitions = {
        "stand-by": rounds(GATED, 2, concurrency=4),
        "take-rounds": rounds(GATED, 3, concurrency=4),
        "take-turns": rounds(GATED, 1),
        "stay-on": rounds(STUBBORN, 1, concurrency=4),
        "be-brief": rounds("exit 0", 1, concurrency=4),
        **{own_workflow(point, way): rounds(GATED, 1) for point in [*CASES["start"], *CASES["drain"]] for way in WAYS},
    }

    is_spoilt = False

    @classmethod
    def setUpClass(cls):
        POINTS.mkdir(exist_ok=True)
        DROP_IN.parent.mkdir(parents=True, exist_ok=True)
        DROP_IN.write_text(f"[Service]\nReadWritePaths={POINTS}\n")
        systemctl("daemon-reload")
        super().setUpClass()
        cls.has_keys = takes("--key", "workflow", "start")
        cls.has_drain = ctl("workflow", "drain", "--help", check=False).returncode == 0

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        DROP_IN.unlink()
        DROP_IN.parent.rmdir()
        systemctl("daemon-reload")

    def setUp(self):
        # What one case broke is not to be found again by all that follow.
        if type(self).is_spoilt:
            nervebox.load(self.definitions)
            type(self).is_spoilt = False
        for path in POINTS.iterdir():
            path.unlink()
        self.assertEqual(invariants.make_deeds(SHARED), DEEDS)
        self.told = invariants.Told(TOLD)
        self.clients = []
        self.addCleanup(self.end_clients)

    def end_clients(self):
        for client in self.clients:
            client.kill()
            client.communicate()

    # ---- the frame of every case

    def case(self, point, way, scenario):
        # Somebody who has nothing to do with it.
        sibling = start("stand-by")
        self.told.started(sibling, "stand-by")
        self.begun(sibling, 1)
        self.runs = {sibling: (2, ("completed", 0))}
        scenario(point, way)
        for run in self.runs:
            self.go(run)
        for run, (count, end) in self.runs.items():
            row = nervebox.stored_end(run)
            self.assertEqual((row["status"], row["exit_code"], row["rounds"]), (*end, count), self.history(run))
            self.told.seen(run, row["status"], row["rounds"])
            # The worker lived, so nothing was executed twice.
            self.assertLessEqual(nervebox.count_events(run, "dispatched"), 1, self.history(run))
        self.at_rest()

    def history(self, run):
        with nervebox.database() as connection:
            rows = connection.execute("SELECT type, payload FROM events WHERE ref = ? ORDER BY seq", [run])
            return [(kind, payload[:300]) for kind, payload in rows]

    def at_rest(self):
        wait_for(lambda: not nervebox.open_runs(), "all runs to end")
        # The last things to go are the directories and the cgroup of a run that ended a moment ago.
        wait_for(lambda: not [line for line in self.look() if line.startswith("I12")], "everything to be cleared away")
        self.assertEqual(self.look(), [])

    def look(self):
        return invariants.check(told=TOLD, deeds=DEEDS, machine=invariants.Machine.look())

    def arm(self, point, way):
        (POINTS / point).write_text(way)

    def reached(self, point):
        return (POINTS / f"{point}.reached").exists()

    def dies(self, point, way):
        """Waits until nerved has come to the point and died there, and until another one answers."""
        wait_for(lambda: self.reached(point), f"{point} to be reached", watch=[POINTS])
        if way == "pause":
            pid = nervebox.nerved_pid()
            wait_for(lambda: nervebox.process_state(pid) == "T", "nerved to stop")
            os.kill(pid, signal.SIGKILL)
        self.answers()

    def answers(self):
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to answer")

    def client(self, *argv):
        """nervectl, running."""
        process = subprocess.Popen(["nervectl", *map(str, argv)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        self.clients.append(process)
        return process

    def outcome(self, client):
        """(exit status, stdout, stderr)"""
        out, complaint = client.communicate(timeout=nervebox.TIMEOUT)
        return client.returncode, out.strip(), complaint

    def go(self, run, number="all"):
        (SCRATCH / f"{run}.go.{number}").touch()

    def begun(self, run, number):
        wait_for(lambda: f"{run} {number} 1 begin\n" in DEEDS.read_text(), f"round {number} of run {run}", watch=[SHARED])

    def role_of(self, run):
        """The role's first process, which leads its session, as {pid: start time}; others come and go."""
        leaders = {}
        for pid, begun in nervebox.processes(run).items():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid:
                    leaders[pid] = begun
        return leaders

    def runs_of(self, workflow):
        with nervebox.database() as connection:
            rows = connection.execute("SELECT run FROM workflow_runs WHERE workflow = ? ORDER BY seq", [workflow])
            return [run for run, in rows]

    def open(self, workflow):
        return [run for run in self.runs_of(workflow) if run in nervebox.open_runs()]

    def start_with(self, workflow, key, *options):
        """The arguments of a start with a key, if there are keys."""
        return ["workflow", "start", workflow, *options, *(["--key", key] if self.has_keys else [])]

    def start_again(self, client, workflow, key, known, *options):
        """What came of a start that may have been cut off, and its retry: the same run. Returns the run."""
        status, run, complaint = self.outcome(client)
        self.assertIn(status, (0, UNKNOWN), complaint)
        if run:
            self.told.started(run, workflow, key if self.has_keys else None)
        else:
            self.assertEqual(status, UNKNOWN)
            self.assertRegex(complaint, "(?i)unknown.*again")
        if run and not self.has_keys:
            return run
        # The one that dies may take the question with it: that is what the key is for.
        again = wait_for(lambda: (done := ctl(*self.start_with(workflow, key, *options), check=False)).returncode == 0
                         and done.stdout.strip(), "an answer")
        self.told.started(again, workflow, key if self.has_keys else None)
        if self.has_keys:
            self.assertEqual(self.runs_of(workflow)[known:], [again], "one key is one run")
        if run:
            self.assertEqual(again, run)
        return again

    # ---- what leads to the moments

    def start(self, point, way):
        workflow, key = own_workflow(point, way), f"{point}-{way}"
        self.arm(point, way)
        client = self.client(*self.start_with(workflow, key))
        if point == "F05":
            # Whoever looks at the run was told its id.
            run = client.stdout.readline().strip()
            self.told.started(run, workflow, key if self.has_keys else None)
            self.client("workflow", "show", run)
        self.dies(point, way)
        if point == "F05":
            self.assertIn(client.wait(nervebox.TIMEOUT), (0, UNKNOWN, NO_ANSWER))
            again = ctl(*self.start_with(workflow, key)).stdout.strip() if self.has_keys else run
            self.assertEqual(self.runs_of(workflow), [again])
            self.assertEqual(again, run)
        else:
            before = self.runs_of(workflow)
            # What was not committed is not there; of what was there is one.
            if point in ("F01", "F02", "F03"):
                self.assertEqual(before, [])
            elif point != "F06":
                self.assertEqual(len(before), 1)
            if before and not self.has_keys:
                # Without a key a retry is another run; both have to end.
                self.runs[before[0]] = (1, ("completed", 0))
            run = self.start_again(client, workflow, key, 0)
        self.runs[run] = (1, ("completed", 0))

    def gated(self, workflow, count):
        run = start(workflow)
        self.told.started(run, workflow)
        self.begun(run, 1)
        self.runs[run] = (count, ("completed", 0))
        return run

    def round(self, point, way):
        run, other = self.gated("take-rounds", 3), self.gated("take-rounds", 3)
        self.arm(point, way)
        self.go(run, 1)
        self.dies(point, way)
        self.begun(run, 2)
        self.told.seen(run, "started", 1)
        self.assertEqual(stored(other)["rounds"], 0)

    def finish(self, point, way):
        run = self.gated("take-turns", 1)
        waiting = start("take-turns")
        self.told.started(waiting, "take-turns")
        self.runs[waiting] = (1, ("completed", 0))
        waiter = self.client("workflow", "start", "stand-by", "--wait")
        other = waiter.stdout.readline().strip()
        self.runs[other] = (2, ("completed", 0))
        self.arm(point, way)
        self.go(run)
        self.dies(point, way)
        self.begun(waiting, 1)
        # Who waited all the while is told, too.
        self.go(other)
        status, _, complaint = self.outcome(waiter)
        self.told.exited(other, status)
        self.assertEqual(status, 0, complaint)

    def drain(self, point, way):
        workflow = own_workflow(point, way)
        run = self.gated(workflow, 1)
        self.go(run)
        nervebox.stored_end(run)
        self.arm(point, way)
        if self.has_drain:
            self.client("workflow", "drain", workflow)
        else:
            systemctl("stop", nervebox.unit_of(workflow))
        self.dies(point, way)
        if self.has_drain:
            self.gated(workflow, 1)

    def kill(self, point, way):
        run, other = start("stay-on"), self.gated("stand-by", 2)
        self.told.started(run, "stay-on")
        self.begun(run, 1)
        self.runs[run] = (0, ("killed", 137))
        role = self.role_of(run)
        self.arm(point, way)
        client = self.client("workflow", "kill", "--grace", "300ms", "--reason", "case", run)
        self.dies(point, way)
        status, _, complaint = self.outcome(client)
        self.assertIn(status, (0, UNKNOWN, NO_ANSWER), complaint)
        if status == 0:
            self.told.kill_accepted(run)
        if point == "F21":
            # Nothing was recorded, and it lives.
            self.assertEqual((stored(run)["status"], stored(run)["killing"]), ("started", 0))
            self.assertEqual(nervebox.alive(role), role)
            self.assertNotEqual(status, 0)
            ctl("workflow", "kill", "--grace", "0", run)
            self.told.kill_accepted(run)
        nervebox.stored_end(run)
        nervebox.assert_gone(run, role)
        self.assertEqual(stored(other)["status"], "started")

    def recover(self, point, way):
        run = self.gated("take-turns", 1)
        waiting = [start("take-turns") for _ in range(2)]
        other = self.gated("take-rounds", 3)
        for queued in waiting:
            self.told.started(queued, "take-turns")
            self.runs[queued] = (1, ("completed", 0))
        self.go(other, 1)
        self.begun(other, 2)
        self.arm(point, way)
        os.kill(nervebox.nerved_pid(), signal.SIGKILL)
        self.dies(point, way)
        self.assertEqual([stored(queued)["status"] for queued in (run, *waiting)], ["started", "queued", "queued"])
        self.told.seen(other, "started", 1)

    def fill(self, point, way):
        """Starts with so much to say that the log is moved into the database."""
        big = {**self.definitions["be-brief"], "description": "x" * 250_000}
        for number in range(100):
            # Definitions fill it fastest.
            if livedb.frames(nervebox.DATABASE) > 900:
                break
            nervebox.define("be-big", {**big, "max_rounds": number + 1})
            ctl("reload")
        self.arm(point, way)
        prompt = SCRATCH / "prompt"
        # The longest that is no blob.
        prompt.write_text("x" * 65_536)
        known = len(self.runs_of("be-brief"))
        for number in range(20):
            key = f"{point}-{way}-{number}"
            client = self.client(*self.start_with("be-brief", key, "--prompt-file", prompt))
            # The moment may come while the run goes on.
            wait_for(lambda: self.reached(point) or (client.poll() is not None and not self.open("be-brief")),
                     "the moment, or the run's end")
            was_reached = self.reached(point)
            if was_reached:
                self.dies(point, way)
            before = self.runs_of("be-brief")[known:]
            run = self.start_again(client, "be-brief", key, known, "--prompt-file", prompt)
            for found in {run, *before}:
                self.runs[found] = (1, ("completed", 0))
            known = len(self.runs_of("be-brief"))
            if was_reached:
                return
        self.fail(f"{point} was not reached by 20 starts")


def make_test(scenario, point, way):
    def test(self):
        type(self).is_spoilt = True
        self.case(point, way, getattr(self, scenario))
        type(self).is_spoilt = False
    return test


for _scenario, _points in CASES.items():
    for _point in _points:
        for _way in WAYS:
            setattr(Failpoints, f"test_{_point}_{_way}", make_test(_scenario, _point, _way))


class Table(unittest.TestCase):
    """No moment is forgotten."""

    def test_every_moment_has_its_cases_and_its_place(self):
        numbered = [f"F{number:02}" for number in range(1, 31)]
        self.assertEqual(sorted(point for points in CASES.values() for point in points), numbered)
        source = pathlib.Path(__file__).resolve().parents[2] / "src"
        placed = {point for path in source.rglob("*.rs") for point in numbered
                  if f'failpoint!("{point}"' in path.read_text() and path.name != "failpoint.rs"}
        self.assertEqual(sorted(placed), numbered)
