"""Kill: the run ends 137 with no process left, and only that run; whatever its processes, its worker or the bus do.

Parity 004 and 007-015 (137 only when asked for and only with an empty cgroup; at once; in every state), 018 (the slot is
free afterwards)."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time

import nervebox
from nervebox import SCRATCH, WRITES, Case, command, ctl, row, start, stored, wait_for

GRACE = 1  # seconds, of the kills that need one
SLACK = 5  # seconds after the grace: the 2 that the worker has to confirm, and a busy machine

# Ignores SIGTERM in every process. `exec sleep` inherits the ignored signal.
STUBBORN = "trap '' TERM; sleep 1000 & exec sleep 1000"
# A grandchild in a session of its own whose parents are gone; it ignores SIGTERM and SIGHUP and lets go of the pipes.
DAEMON = "setsid sh -c 'trap \"\" TERM HUP; setsid sleep 1000 & exit' >/dev/null 2>&1 </dev/null &"
# Forks for ever, as fast as it can; each child forks in turn and dies, so that a signal to a list of pids comes too late.
STORM = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(4):
    if os.fork() == 0:
        while True:
            try:
                if os.fork():
                    os._exit(0)
            except OSError:
                pass
os.setsid() if os.getpid() != os.getsid(0) else None
while True:
    signal.pause()
"""


def one_role(*argv, **keys):
    return {"roles": {"main": {"exec": list(argv)}}, "graph": {"$START": "main", "main": {"ok": "$END"}}, **keys}


class Kill(Case):
    definitions = {
        "sleep-on": command("exec sleep 1000"),
        "ignore-term": command(STUBBORN, concurrency=4),
        "obey-term": command(f"trap 'echo bye >{SCRATCH}/$NERVE_RUN_ID.bye; exit 0' TERM; echo >{SCRATCH}/$NERVE_RUN_ID.up; "
                             "sleep 1000 & wait", worker=WRITES),
        "make-daemons": command(f"{DAEMON} {DAEMON} exec sleep 1000"),
        "end-before-its-daemons": command(f"{DAEMON} trap 'exit 0' TERM; sleep 1000 & wait"),
        "fork-for-ever": one_role("python3", "-c", STORM),
        "run-both": command(f"sleep 1000 & until [ -e {SCRATCH}/$NERVE_RUN_ID.go ]; do sleep 0.05; done; kill $!",
                            concurrency=2, worker=WRITES),
        "run-one": command("exec sleep 1000"),
        "start-late": command("exec sleep 1000"),
        "end-early": command("true"),
        "fail-early": command("exit 3"),
        "leave-children": {
            "roles": {"main": {"exec": ["/bin/sh", "-c", f"sleep 1000 & {DAEMON} exit 0"]},
                      "look": {"exec": ["/bin/sh", "-c", "cat /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/cgroup.procs"]}},
            "graph": {"$START": "main", "main": {"ok": "look"}, "look": {"ok": "$END"}}},
        "leave-children-holding-pipes": command("setsid sleep 1000 & echo said"),
        "leave-a-storm": {"roles": {"main": {"exec": ["python3", "-c", STORM.replace("while True:\n    signal.pause()", "os._exit(0)")]},
                                    "look": {"exec": ["true"]}},
                          "graph": {"$START": "main", "main": {"ok": "look"}, "look": {"ok": "$END"}}},
        "fail-with-children": command("sleep 1000 & exit 5"),
        "time-out-with-children": command(f"{DAEMON} trap '' TERM; sleep 1000 & wait; wait", role_timeout="100ms"),
    }

    def kill(self, *runs, grace=GRACE, within=None, check=True):
        """Kills as a person does, and has it return in a sane time."""
        begun = time.monotonic()
        done = ctl("workflow", "kill", "--grace", f"{grace}s", *runs, check=check)
        took = time.monotonic() - begun
        self.assertLess(took, (grace + SLACK) if within is None else within)
        self.assertEqual(done.stdout, "")
        return took

    def gone(self, run, pids, reason=None):
        """It is killed, on record, and nothing of it is left."""
        nervebox.assert_gone(run, pids)
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"], found["killing"], found["reason"]),
                         ("killed", 137, "killed", False, reason))
        self.assertEqual(nervebox.alive(pids), {})
        wait_for(lambda: not nervebox.cgroup_of(run).exists(), "the run's cgroup to be removed", 5)

    # ---- what the role does

    def test_role_sleeps(self):
        waiter = nervebox.Waiter("sleep-on")
        pids = nervebox.processes(waiter.run)
        self.kill(waiter.run, within=GRACE)
        self.gone(waiter.run, pids)
        self.assertEqual(waiter.status(), 137)

    def test_role_is_asked_first(self):
        run = start("obey-term")
        wait_for((SCRATCH / f"{run}.up").exists, "the role to be up", watch=[SCRATCH])
        pids = nervebox.processes(run, 2)
        self.kill(run, grace=5, within=3)
        self.gone(run, pids)
        self.assertTrue((SCRATCH / f"{run}.bye").exists(), "the role was given no chance")

    def test_role_ignores_sigterm(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        took = self.kill(run)
        self.assertGreaterEqual(took, GRACE)
        self.gone(run, pids)

    def test_role_ignores_sigterm_and_there_is_no_grace(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        self.kill(run, grace=0, within=2)
        self.gone(run, pids)

    def test_role_is_stopped(self):
        run = start("sleep-on")
        pids = nervebox.processes(run)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: nervebox.process_state(pid) == "T", f"process {pid} to stop")
        self.kill(run)
        self.gone(run, pids)

    def test_role_is_stopped_and_ignores_sigterm(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: nervebox.process_state(pid) == "T", f"process {pid} to stop")
        self.kill(run)
        self.gone(run, pids)

    def test_role_double_forks_with_setsid(self):
        run = start("make-daemons")
        pids = wait_for(lambda: (found := nervebox.pids_of(nervebox.cgroup_of(run))) and len(self.daemons(found)) == 2 and found,
                        "two daemons")
        self.kill(run)
        self.gone(run, pids)

    def test_role_ends_on_sigterm_but_its_daemon_does_not(self):
        run = start("end-before-its-daemons")
        pids = wait_for(lambda: (found := nervebox.pids_of(nervebox.cgroup_of(run))) and len(found) >= 3
                        and self.daemons(found) and found, "a daemon")
        self.kill(run)
        self.gone(run, pids)

    def daemons(self, pids):
        """Those of PID 1 that lead a session: sleep under setsid."""
        found = []
        for pid in pids:
            with contextlib.suppress(OSError, IndexError):
                fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                name = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
                if name == "sleep" and fields[1] == "1" and int(fields[3]) == pid:
                    found.append(pid)
        return found

    def test_role_forks_in_a_storm(self):
        run = start("fork-for-ever")
        first = nervebox.processes(run, 4)
        cgroup = nervebox.cgroup_of(run)
        # It storms: none of the first children is there any more but the parent.
        seen = wait_for(lambda: (found := nervebox.pids_of(cgroup)) and len(set(found) - set(first)) >= 3 and found, "a storm")
        self.kill(run)
        self.gone(run, {**first, **seen})

    # ---- what happens to the worker

    def test_worker_is_stopped(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        worker = nervebox.worker_pid("ignore-term")
        os.kill(worker, signal.SIGSTOP)
        try:
            took = self.kill(run)
            self.assertGreaterEqual(took, GRACE)
            nervebox.assert_gone(run, pids)
            self.assertEqual((row(run)["status"], row(run)["exitCode"]), ("killed", 137))
            self.assertEqual(nervebox.process_state(worker), "T")
        finally:
            os.kill(worker, signal.SIGCONT)
        # It goes on, learns of it, and takes the next run.
        self.gone(run, pids)
        other = start("ignore-term")
        more = nervebox.processes(other, 2)
        self.assertEqual(nervebox.worker_pid("ignore-term"), worker)
        self.kill(other)
        self.gone(other, more)

    def test_worker_was_killed_by_hand_a_moment_before(self):
        for grace in (0, GRACE):
            with self.subTest(grace=grace):
                run = start("ignore-term")
                pids = nervebox.processes(run, 2)
                os.kill(nervebox.worker_pid("ignore-term"), signal.SIGKILL)
                self.kill(run, grace=grace)
                self.gone(run, pids)
                self.assertNotIn("thread-workflow-message", nervebox.events(run))

    def test_worker_is_killed_by_hand_while_the_kill_is_under_way(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        ctl("workflow", "kill", "--grace", "30s", "--no-block", run)
        self.assertIs(row(run)["killing"], True)
        self.assertEqual(row(run)["status"], "started")
        os.kill(nervebox.worker_pid("ignore-term"), signal.SIGKILL)
        # Its successor is told, with the grace that was asked for; somebody in a hurry shortens it.
        self.kill(run, grace=0)
        self.gone(run, pids)

    def test_worker_is_being_started(self):
        for moment in ("at once", "as soon as it is being started"):
            with self.subTest(moment):
                nervebox.drain("start-late", "--wait")
                wait_for(lambda: "start-late" not in nervebox.systemctl("list-units", "--all", "--plain", "nerve-wf@*").stdout,
                         "the worker's unit to be gone")
                run = start("start-late")
                if moment != "at once":
                    wait_for(lambda: nervebox.properties(nervebox.unit_of("start-late"), "ActiveState")["ActiveState"]
                             in ("activating", "active"), "the worker to be started")
                self.kill(run)
                # What was started for it may come up, but not with this run.
                wait_for(lambda: nervebox.properties(nervebox.unit_of("start-late"), "ActiveState")["ActiveState"]
                         in ("active", "inactive"), "the worker to be up")
                self.gone(run, {})
                self.assertEqual(row(run)["rounds"], 0)
                # And the worker takes the next one.
                other = start("start-late")
                pids = nervebox.processes(other)
                self.kill(other)
                self.gone(other, pids)

    def test_worker_is_stopped_before_it_has_said_ready(self):
        run = start("start-late")
        pids = nervebox.processes(run)
        worker = nervebox.worker_pid("start-late")
        os.kill(worker, signal.SIGKILL)
        # Caught on its way up, its successor holds nothing and says nothing.
        successor = wait_for(lambda: (pid := nervebox.worker_pid("start-late")) not in (0, worker) and pid, "another worker")
        with contextlib.suppress(ProcessLookupError):
            os.kill(successor, signal.SIGSTOP)
        try:
            self.kill(run)
            self.assertEqual((row(run)["status"], row(run)["exitCode"]), ("killed", 137))
            nervebox.assert_gone(run, pids)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(successor, signal.SIGCONT)

    # ---- which runs

    def test_run_is_still_queued(self):
        first = start("run-one")
        pids = nervebox.processes(first)
        waiter = nervebox.Waiter("run-one")
        self.assertEqual(row(waiter.run)["status"], "queued")
        self.kill(waiter.run, within=1)
        self.assertEqual(waiter.status(), 137)
        self.gone(waiter.run, {})
        self.assertIsNone(row(waiter.run)["startedAt"])
        self.assertEqual(nervebox.alive(pids), pids)
        self.assertEqual(row(first)["status"], "started")
        self.kill(first)
        self.gone(first, pids)

    def background(self, run):
        """The run's shell and its `sleep 1000`; the `sleep 0.05` come and go."""
        def found():
            pids = nervebox.pids_of(nervebox.cgroup_of(run))
            lasting = {}
            for pid, begun in pids.items():
                with contextlib.suppress(OSError):
                    if "1000" in pathlib.Path(f"/proc/{pid}/cmdline").read_text():
                        lasting[pid] = begun
            return lasting if len(lasting) == 2 else None
        return wait_for(found, f"two lasting processes of run {run}")

    def test_one_of_two_runs_of_the_same_worker(self):
        doomed, other = start("run-both"), start("run-both")
        pids = nervebox.processes(doomed, 2)
        worker = nervebox.worker_pid("run-both")
        background = self.background(other)
        self.kill(doomed)
        self.gone(doomed, pids)
        self.assertEqual(nervebox.alive(background), background)
        self.assertEqual(row(other)["status"], "started")
        (SCRATCH / f"{other}.go").touch()
        self.assertEqual(nervebox.ended(other)["exitCode"], 0)
        self.assertEqual([said["role"] for said in nervebox.thread(other)], ["__start__", "main"])
        self.assertEqual(nervebox.worker_pid("run-both"), worker)

    def test_one_of_two_runs_of_a_worker_that_is_stopped(self):
        # nerved's own rung of the ladder is as exact as the worker's.
        doomed, other = start("run-both"), start("run-both")
        pids = nervebox.processes(doomed, 2)
        background = self.background(other)
        worker = nervebox.worker_pid("run-both")
        os.kill(worker, signal.SIGSTOP)
        try:
            self.kill(doomed)
            nervebox.assert_gone(doomed, pids)
            self.assertEqual(nervebox.alive(background), background)
        finally:
            os.kill(worker, signal.SIGCONT)
        (SCRATCH / f"{other}.go").touch()
        self.assertEqual(nervebox.ended(other)["exitCode"], 0)
        self.gone(doomed, pids)

    def test_the_slot_is_free_afterwards(self):
        first, second = start("run-one"), start("run-one")
        pids = nervebox.processes(first)
        self.kill(first)
        more = nervebox.processes(second)
        self.kill(second)
        self.gone(first, pids)
        self.gone(second, more)

    def test_several_runs(self):
        runs = [start(workflow) for workflow in ("ignore-term", "sleep-on", "make-daemons", "run-one", "run-one")]
        pids = {run: nervebox.processes(run) for run in runs[:-1]}
        # All are asked first, so all graces pass at once.
        self.kill(*runs, within=GRACE + SLACK)
        for run in runs:
            self.gone(run, pids.get(run, {}))

    def test_several_runs_all_are_tried_and_the_first_error_is_the_status(self):
        over, _ = start("end-early", wait=True)
        run = start("sleep-on")
        pids = nervebox.processes(run)
        self.kill("0" * 32, over, run, check=66)
        self.gone(run, pids)
        other = start("sleep-on")
        pids = nervebox.processes(other)
        self.kill(over, "0" * 32, other, check=68)
        self.gone(other, pids)

    # ---- how it is asked

    def test_twice(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        ctl("workflow", "kill", "--grace", "30s", "--no-block", "--reason", "first", run)
        found = row(run)
        self.assertEqual((found["status"], found["killing"], found["exitCode"]), ("started", True, None))
        self.assertIn("started (killing)", ctl("workflow", "list").stdout)
        # The second one is in a hurry; the reason stays.
        self.kill(run)
        self.gone(run, pids, "first")
        # Killing what is killed is done already.
        self.kill(run)
        self.assertEqual(row(run)["reason"], "first")

    def test_of_an_ended_run_is_68(self):
        for workflow, code in (("end-early", 0), ("fail-early", 1)):
            run, _ = start(workflow, wait=True)
            done = ctl("workflow", "kill", run, check=68)
            self.assertEqual(done.stdout, "")
            self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
            self.assertEqual(row(run)["exitCode"], code)

    def test_the_reason_is_kept(self):
        run = start("sleep-on")
        pids = nervebox.processes(run)
        ctl("workflow", "kill", "--reason", "it ate – all of it", run)
        self.gone(run, pids, "it ate – all of it")
        self.assertIn("it ate – all of it", ctl("workflow", "show", run).stdout)

    def test_an_interrupted_wait_leaves_the_kill_in_force(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        waiting = subprocess.Popen(["nervectl", "workflow", "kill", "--grace", "1s", run], text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with waiting:
            wait_for(lambda: stored(run)["killing"], "the kill to be durable")
            waiting.send_signal(signal.SIGINT)
            self.assertEqual(waiting.wait(5), 130)
            self.assertIn("in force", waiting.stderr.read())
        self.assertEqual(nervebox.ended(run, GRACE + SLACK)["exitCode"], 137)
        self.gone(run, pids)

    def test_by_hand_through_systemd_is_no_kill(self):
        # `systemctl kill` of the worker's unit is not a request: the run is resumed.
        run = start("sleep-on")
        pids = nervebox.processes(run)
        nervebox.systemctl("kill", "-s", "KILL", nervebox.unit_of("sleep-on"))
        nervebox.wait_event(run, "dispatched", 2)
        self.assertEqual(nervebox.alive(pids), {})
        more = nervebox.processes(run)
        self.assertEqual(row(run)["status"], "started")
        self.kill(run)
        self.gone(run, more)

    # ---- with nobody there to help

    def test_without_dbus(self):
        # Accepted, then the bus is stopped, or hangs: the kill needs it no more.
        for how, undo in ((("kill", "-s", "STOP", "dbus.service"), ("kill", "-s", "CONT", "dbus.service")),
                          (("stop", "dbus.socket", "dbus.service"), ("start", "dbus.socket", "dbus.service"))):
            with self.subTest(how[0]):
                run = start("ignore-term")
                pids = nervebox.processes(run, 2)
                ctl("workflow", "kill", "--grace", "1s", "--no-block", run)
                begun = time.monotonic()
                nervebox.systemctl(*how)
                try:
                    found = nervebox.stored_end(run, GRACE + SLACK)
                    self.assertEqual((found["status"], found["exit_code"], found["killing"]), ("killed", 137, 0))
                    nervebox.assert_gone(run, pids)
                    self.assertLess(time.monotonic() - begun, GRACE + SLACK)
                finally:
                    nervebox.systemctl(*undo)
                self.back(run, pids)

    def test_without_dbus_and_worker(self):
        # The worker hangs too: nerved does it.
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        ctl("workflow", "kill", "--grace", "1s", "--no-block", run)
        worker = nervebox.worker_pid("ignore-term")
        nervebox.systemctl("kill", "-s", "STOP", "dbus.service")
        try:
            os.kill(worker, signal.SIGSTOP)
            found = nervebox.stored_end(run, GRACE + SLACK)
            self.assertEqual((found["status"], found["exit_code"]), ("killed", 137))
            nervebox.assert_gone(run, pids)
        finally:
            os.kill(worker, signal.SIGCONT)
            nervebox.systemctl("kill", "-s", "CONT", "dbus.service")
        self.back(run, pids)

    def back(self, run, pids):
        """The bus is there again, and nerve on it."""
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to be back on the bus")
        self.gone(run, pids)
        other, code = start("end-early", wait=True)
        self.assertEqual(code, 0, "nothing runs after the bus was away")
        nervebox.assert_gone(other)

    def test_while_nerved_is_killed(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        ctl("workflow", "kill", "--grace", "1s", "--no-block", "--reason", "why not", run)
        os.kill(nervebox.nerved_pid(), signal.SIGKILL)
        self.assertEqual(nervebox.stored_end(run, 2 * (GRACE + SLACK))["exit_code"], 137)
        nervebox.assert_gone(run, pids)
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to be back")
        self.gone(run, pids, "why not")

    # ---- after every round

    def test_after_a_round_no_process_is_left(self):
        run, code = start("leave-children", wait=True)
        self.assertEqual(code, 0, nervebox.thread(run))
        # What the second round found in its cgroup: itself (sh, cat, sed), and none of the first's.
        said = nervebox.thread(run)
        self.assertLessEqual(len(said[2]["content"].split()), 3)
        self.gone_after(run)

    def gone_after(self, run):
        nervebox.assert_gone(run)
        wait_for(lambda: not nervebox.cgroup_of(run).exists(), "the run's cgroup to be removed", 5)

    def test_after_a_round_whose_children_hold_its_pipes(self):
        begun = time.monotonic()
        run, code = start("leave-children-holding-pipes", wait=True)
        self.assertEqual((code, nervebox.thread(run)[1]["content"]), (0, "said"))
        self.assertLess(time.monotonic() - begun, 4)
        self.gone_after(run)

    def test_after_a_round_whose_children_fork_in_a_storm(self):
        begun = time.monotonic()
        run, code = start("leave-a-storm", wait=True)
        self.assertEqual(code, 0, nervebox.thread(run))
        self.assertLess(time.monotonic() - begun, 5)
        self.gone_after(run)

    def test_after_a_round_that_failed_or_timed_out(self):
        for workflow, result in (("fail-with-children", "exit-code:5"), ("time-out-with-children", "role-timeout")):
            run, code = start(workflow, wait=True)
            self.assertEqual((code, row(run)["result"]), (1, result))
            self.gone_after(run)

    @classmethod
    def tearDownClass(cls):
        nervebox.systemctl("kill", "-s", "CONT", "dbus.service", check=False)
        super().tearDownClass()
