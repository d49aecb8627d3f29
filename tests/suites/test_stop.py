"""Stops that somebody wants: of one worker, of all, of nerve. The runs wait, and none is blamed.

Parity 032, 037 and 072: see the names of the tests."""

import time

import nervebox
from nervebox import GATED, WRITES, GatedCase, Tried, ctl, rounds, row, start, stored, systemctl, wait_for

# Ignores SIGTERM in every process; says in the log that it began, as GATED does.
STUBBORN = f"trap '' TERM; {GATED}"


def gated(count=2, **keys):
    return rounds(GATED, count, **{"worker": WRITES, **keys})


class StopCase(GatedCase):
    def busy(self, workflow):
        """A run in round 2 and one that waits."""
        first, second = start(workflow), start(workflow)
        self.begun(first, 1)
        self.go(first, 1)
        self.begun(first, 2)
        return first, second

    def stopped(self, workflow):
        """It is shown as stopped, with what to do about it, and there is no worker."""
        nervebox.wait_worker(workflow, "stopped")
        said = ctl("status").stdout
        self.assertIn(f"nervectl workflow reset {workflow}", said)
        self.assertFalse(nervebox.is_populated(nervebox.worker_cgroup(workflow)))
        self.assertEqual(nervebox.worker_pid(workflow), 0)

    def resumes(self, first, second, attempt=2):
        """Both complete; the first goes on in round 2 with this attempt."""
        self.begun(first, 2, attempt)
        for run in (first, second):
            self.completes(run, 2)
            self.kept(run, 2)
        self.once(second, 2)
        self.assertEqual(self.log(first)[:2], [("begin", 1, 1), ("end", 1, 1)])

    def no_death(self, workflow):
        self.assertEqual(nervebox.happened(workflow, "worker-died"), [])
        self.assertEqual(nervebox.happened(workflow, "workflow-blocked"), [])


class Worker(StopCase):
    """`systemctl stop`, `restart` and `kill` of a worker's unit."""

    definitions = {name: gated() for name in ("stop-idle", "stop-busy", "stop-slice", "stop-slice-too", "restart-busy", "restart-idle",
                                              "end-by-term", "stop-and-end", "stop-often")} | {
        "drop-stopped": gated(1, overflow="drop"), "keep-latest": gated(1, overflow="latest")}

    def test_parity_032_idle(self):
        workflow, unit = "stop-idle", nervebox.unit_of("stop-idle")
        self.completes(start(workflow), 2)
        systemctl("stop", unit)
        self.stopped(workflow)
        # A start is accepted and says that it waits, why, and for what.
        tried = Tried(workflow)
        for said in (tried.said, ctl("workflow", "show", tried.run).stdout):
            self.assertIn("stopped", said)
            self.assertIn(f"nervectl workflow reset {workflow}", said)
        for disturb in (nervebox.restart_nerve, self.kill_nerved, nervebox.reload, lambda: systemctl("daemon-reload")):
            disturb()
            self.stopped(workflow)
            self.assertEqual(stored(tried.run)["status"], "queued")
        nervebox.reset(workflow)
        self.completes(tried.run, 2)
        self.once(tried.run, 2)
        self.no_death(workflow)
        self.assertEqual(len(nervebox.happened(workflow, "worker-stopped")), 1)

    def test_busy(self):
        workflow = "stop-busy"
        first, second = self.busy(workflow)
        role = self.role_pid(first)
        systemctl("stop", nervebox.unit_of(workflow))
        self.assertEqual(nervebox.alive(role), {})
        self.stopped(workflow)
        self.assertEqual([stored(run)["status"] for run in (first, second)], ["started", "queued"])
        self.kill_nerved()
        self.stopped(workflow)
        self.assertIn("stopped", ctl("workflow", "show", first).stdout)
        nervebox.reset(workflow)
        self.resumes(first, second)
        self.assertEqual([lost["cause"] for lost in nervebox.losses(first)], ["stopped"])
        self.no_death(workflow)

    def test_the_slice(self):
        workflows = ("stop-slice", "stop-slice-too")
        pairs = [self.busy(workflow) for workflow in workflows]
        systemctl("stop", "nerve-wf.slice")
        for workflow in workflows:
            self.stopped(workflow)
        # Each has a reset of its own.
        nervebox.reset(workflows[0])
        self.resumes(*pairs[0])
        self.stopped(workflows[1])
        nervebox.reset(workflows[1])
        self.resumes(*pairs[1])
        for workflow in workflows:
            self.no_death(workflow)

    def test_many_times_crashes_no_run(self):
        workflow = "stop-often"
        first, second = self.busy(workflow)
        for attempt in range(2, 7):
            systemctl("stop", nervebox.unit_of(workflow))
            self.stopped(workflow)
            nervebox.reset(workflow)
            self.begun(first, 2, attempt)
        self.resumes(first, second, 6)
        self.no_death(workflow)

    def test_drop_refuses_and_latest_keeps_the_newest(self):
        for workflow in ("drop-stopped", "keep-latest"):
            self.completes(start(workflow), 1)
            systemctl("stop", nervebox.unit_of(workflow))
            self.stopped(workflow)
        tried = Tried("drop-stopped", check=75)
        self.assertEqual((row(tried.run)["status"], row(tried.run)["result"]), ("dropped", "blocked"))
        self.assertIn("nervectl workflow reset drop-stopped", tried.said)
        older, newer = start("keep-latest"), start("keep-latest")
        self.assertEqual((nervebox.stored_end(older)["result"], stored(newer)["status"]), ("queue-full", "queued"))
        nervebox.reset("keep-latest")
        self.completes(newer, 1)

    def test_kill_and_abort_need_no_worker(self):
        workflow = "stop-and-end"
        killed, aborted = self.busy(workflow)
        systemctl("stop", nervebox.unit_of(workflow))
        self.stopped(workflow)
        begun = time.monotonic()
        ctl("workflow", "kill", killed)
        self.assertEqual(row(killed)["exitCode"], 137)
        nervebox.abort(aborted)
        self.assertEqual(nervebox.stored_end(aborted, 2)["exit_code"], 143)
        self.assertLess(time.monotonic() - begun, 3)
        self.stopped(workflow)
        for run in (killed, aborted):
            nervebox.assert_gone(run)

    def test_restart_resumes_by_itself(self):
        workflow = "restart-busy"
        first, second = self.busy(workflow)
        worker = nervebox.worker_pid(workflow)
        systemctl("restart", nervebox.unit_of(workflow))
        self.begun(first, 2, attempt=2)
        self.assertNotIn(nervebox.worker_pid(workflow), (0, worker))
        self.assertEqual(nervebox.status(workflow)["worker"], "ready")
        self.resumes(first, second)
        self.assertEqual([lost["cause"] for lost in nervebox.losses(first)], ["stopped"])
        self.no_death(workflow)

    def test_restart_of_an_idle_worker(self):
        workflow = "restart-idle"
        self.completes(start(workflow), 2)
        for _ in range(3):
            worker = nervebox.wait_ready(workflow)
            systemctl("restart", nervebox.unit_of(workflow))
            nervebox.wait_ready(workflow, after=worker)
        self.completes(start(workflow), 2)
        self.no_death(workflow)

    def test_a_signal_through_systemd_is_a_death_and_no_stop(self):
        workflow = "end-by-term"
        first, second = self.busy(workflow)
        systemctl("kill", "-s", "TERM", "--kill-who=main", nervebox.unit_of(workflow))
        self.begun(first, 2, attempt=2)
        self.assertNotEqual(nervebox.status(workflow)["worker"], "stopped")
        self.assertEqual(nervebox.happened(workflow, "worker-stopped"), [])
        self.resumes(first, second)
        self.assertEqual(len(nervebox.happened(workflow, "worker-died")), 1)


class Nerve(StopCase):
    """`systemctl stop nerve.target`: everything goes on at the next start."""

    definitions = {"go-on": gated(), "go-on-too": gated(), "be-stopped": gated(), "be-killed": gated(),
                   **{f"be-stubborn-{number}": rounds(STUBBORN, 1, worker=WRITES) for number in range(4)}}

    def stop(self):
        systemctl("stop", "nerve.target")
        states = systemctl("is-active", "nerve.service", "nerve.socket", "nerve-wf.slice", check=False).stdout.split()
        self.assertEqual(states, ["inactive"] * 3)

    def start(self):
        systemctl("start", "nerve.service")
        self.answers()

    def setUp(self):
        systemctl("start", "nerve.target")

    def test_parity_072_five_times_and_no_run_is_blamed(self):
        workflows = ("go-on", "go-on-too")
        pairs = [self.busy(workflow) for workflow in workflows]
        for attempt in range(2, 7):
            self.stop()
            self.assertEqual([stored(run)["status"] for pair in pairs for run in pair], ["started", "queued"] * 2)
            self.start()
            for first, _ in pairs:
                self.begun(first, 2, attempt)
        for pair, workflow in zip(pairs, workflows):
            self.resumes(*pair, attempt=6)
            # nerved is on its way down itself: it may not see the last of its workers go.
            self.assertLessEqual({lost["cause"] for lost in nervebox.losses(pair[0])}, {"stopped", "unseen"})
            self.no_death(workflow)
            self.assertEqual(nervebox.happened(workflow, "worker-stopped"), [])

    def test_an_operators_stop_before_it_still_holds_after_it(self):
        workflow = "be-stopped"
        first, second = self.busy(workflow)
        systemctl("stop", nervebox.unit_of(workflow))
        self.stopped(workflow)
        self.stop()
        self.start()
        self.stopped(workflow)
        nervebox.reset(workflow)
        self.resumes(first, second)

    def test_a_kill_in_progress_is_finished(self):
        workflow = "be-stubborn-0"
        run = start(workflow)
        self.begun(run, 1)
        ctl("workflow", "kill", "--grace", "600s", "--no-block", run)
        self.stop()
        self.start()
        self.assertEqual(nervebox.stored_end(run)["exit_code"], 137)
        self.assertEqual([attempt for *_, attempt in self.log(run)], [1])

    def test_parity_037_all_workers_go_side_by_side_and_nothing_is_left(self):
        workflows = [f"be-stubborn-{number}" for number in range(4)]
        runs = [start(workflow) for workflow in workflows]
        pids = {}
        for run in runs:
            self.begun(run, 1)
            pids.update(nervebox.processes(run))
        begun = time.monotonic()
        self.stop()
        self.assertLess(time.monotonic() - begun, 10)
        self.assertEqual(nervebox.alive(pids), {})
        self.assertFalse(nervebox.is_populated(nervebox.SLICE))
        self.start()
        for run in runs:
            self.begun(run, 1, attempt=2)
            self.completes(run, 1)

    def test_nerved_is_killed_on_the_way_down(self):
        workflow = "be-killed"
        first, second = self.busy(workflow)
        # With nobody there to see the workers go. Whatever is made of that, it is no stop that somebody has to lift.
        pid = nervebox.nerved_pid()
        nervebox.sh("sh", "-c", f"systemctl stop --no-block nerve.target; kill -9 {pid}; true")
        # What was killed on its way down has failed, if it was not faster.
        wait_for(lambda: set(systemctl("is-active", "nerve.service", "nerve-wf.slice", check=False).stdout.split())
                 <= {"failed", "inactive"}, "all to be stopped")
        self.start()
        self.resumes(first, second)
