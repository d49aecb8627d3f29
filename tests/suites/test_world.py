"""The world around nerve: the bus, systemd and the journal come and go, others take its names, time passes."""

import os
import pathlib
import re
import signal
import stat
import subprocess
import time

import dbuswire
import nervebox
from nervebox import GATED, SCRATCH, UNITS, WRITES, GatedCase, command, ctl, rounds, row, start, stored, systemctl, wait_for

PRIVATE = "/run/nerve/private"
WORK = (f"cd {SCRATCH}; echo begin $NERVE_ROUND $NERVE_ATTEMPT >>$NERVE_RUN_ID.log; sleep 0.15;"
        "echo end $NERVE_ROUND $NERVE_ATTEMPT >>$NERVE_RUN_ID.log; echo said $NERVE_ROUND")


def gated(count, **keys):
    return rounds(GATED, count, **{"worker": WRITES, **keys})


class WorldCase(GatedCase):
    def on_the_bus(self):
        """nerve has its name again, and answers there."""
        wait_for(lambda: nervebox.sh("busctl", "call", *dbuswire.MANAGER, "GetStatus", check=False).returncode == 0,
                 "nerve to be on the bus")

    def busy(self, workflow):
        """A run in round 2, with its worker."""
        run = start(workflow)
        self.begun(run, 1)
        self.go(run, 1)
        self.begun(run, 2)
        return run, nervebox.worker_pid(workflow)


class Bus(WorldCase):
    """dbus-daemon dies, is away, stands still."""

    definitions = {"take-rounds": gated(3, concurrency=2), "ignore-term": command("trap '' TERM; sleep 1000 & exec sleep 1000"),
                   "come-later": gated(1), "end-early": command("true")}

    def setUp(self):
        # systemd has a limit for the starts of the bus, and these are many.
        systemctl("reset-failed", "dbus.socket", "dbus.service")

    def tearDown(self):
        systemctl("kill", "-s", "CONT", "dbus.service", check=False)
        systemctl("reset-failed", "dbus.socket", "dbus.service")
        self.start_bus()
        super().tearDown()

    def stop_bus(self):
        systemctl("stop", "dbus.socket", "dbus.service")

    def start_bus(self):
        systemctl("start", "dbus.socket", "dbus.service")
        self.on_the_bus()

    def across(self, disturb):
        waiter = nervebox.Waiter("take-rounds")
        run = waiter.run
        self.begun(run, 1)
        role, worker, nerved = self.role_pid(run), nervebox.worker_pid("take-rounds"), nervebox.nerved_pid()
        disturb()
        self.go(run, 1)
        self.begun(run, 2)
        self.on_the_bus()
        self.completes(run, 3)
        self.assertEqual(waiter.status(), 0)
        self.once(run, 3)
        self.assertEqual(nervebox.alive(role), {})
        self.assertEqual((nervebox.worker_pid("take-rounds"), nervebox.nerved_pid()), (worker, nerved))
        self.assertEqual(nervebox.losses(run), [])
        # Units are started and heard of as before.
        nervebox.drain("come-later", "--wait")
        self.completes(start("come-later"), 1)

    def test_it_is_killed(self):
        self.across(lambda: systemctl("kill", "-s", "KILL", "dbus.service"))

    def test_it_is_restarted(self):
        self.across(lambda: systemctl("restart", "dbus.service"))

    def test_it_is_killed_five_times(self):
        def disturb():
            for _ in range(5):
                systemctl("kill", "-s", "KILL", "dbus.service")
                self.on_the_bus()
                systemctl("reset-failed", "dbus.socket", "dbus.service")
        self.across(disturb)

    def test_a_worker_dies_meanwhile(self):
        run, worker = self.busy("take-rounds")
        self.stop_bus()
        nervebox.kill_process(worker)
        wait_for(lambda: nervebox.worker_pid("take-rounds") not in (0, worker), "another worker")
        self.start_bus()
        self.begun(run, 2, attempt=2)
        self.completes(run, 3)
        self.kept(run, 3)
        self.assertEqual(len(nervebox.losses(run)), 1)

    # ---- the private socket

    def test_without_the_bus_root_has_its_own_way_in(self):
        run, worker = self.busy("take-rounds")
        self.stop_bus()
        self.assertIn("take-rounds", ctl("status").stdout)
        self.assertEqual(row(run)["status"], "started")
        self.assertEqual(nervebox.run_json(run)["rounds"], 1)
        self.assertEqual([one["round"] for one in nervebox.thread(run)], [0, 1])
        # Its worker is there: another run of it needs no systemd, and --wait no bus.
        waiter = nervebox.Waiter("take-rounds")
        self.begun(waiter.run, 1)
        self.go(waiter.run)
        self.assertEqual(waiter.status(), 0)
        # One that needs a worker waits for systemd to be heard again.
        later = start("come-later")
        self.go(later)
        ctl("pause", "--reason", "no bus")
        ctl("resume")
        nervebox.abort(run)
        self.go(run, 2)
        self.assertEqual(nervebox.stored_end(run)["exit_code"], 143)
        self.start_bus()
        nervebox.stored_end(later)
        self.whole(later, 1)
        self.assertEqual(nervebox.worker_pid("take-rounds"), worker)

    def test_without_the_bus_a_kill_works(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        self.stop_bus()
        ctl("workflow", "kill", "--grace", "1s", "--reason", "no way out", run, timeout=10)
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["reason"]), ("killed", 137, "no way out"))
        nervebox.assert_gone(run, pids)

    def test_without_the_bus_a_kill_of_a_run_whose_worker_hangs_works(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        worker = nervebox.worker_pid("ignore-term")
        self.stop_bus()
        os.kill(worker, signal.SIGSTOP)
        try:
            ctl("workflow", "kill", "--grace", "0", run, timeout=15)
            nervebox.assert_gone(run, pids)
            self.assertEqual(stored(run)["exit_code"], 137)
        finally:
            os.kill(worker, signal.SIGCONT)

    def test_the_private_socket_is_roots(self):
        def check():
            found = os.stat(PRIVATE)
            self.assertTrue(stat.S_ISSOCK(found.st_mode))
            self.assertEqual((stat.S_IMODE(found.st_mode), found.st_uid), (0o600, 0))
            with self.assertRaises(PermissionError):
                dbuswire.connect_as(dbuswire.NOBODY, PRIVATE)
        check()
        for disturb in (nervebox.restart_nerve, self.kill_nerved, self.stop_bus):
            disturb()
            check()
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        for verb in (["status"], ["workflow", "start", "end-early"], ["workflow", "list"]):
            done = nervebox.sh(*nobody, "nervectl", *verb, check=False)
            self.assertIn(done.returncode, (69, 77), done)
            self.assertEqual(done.stdout, "")

    # ---- a bus that stands still

    def test_a_bus_that_stands_still_holds_up_no_kill(self):
        run = start("ignore-term")
        pids = nervebox.processes(run, 2)
        other, worker = self.busy("take-rounds")
        systemctl("kill", "-s", "STOP", "dbus.service")
        ctl("workflow", "kill", "--grace", "0", run, timeout=30)
        nervebox.assert_gone(run, pids)
        self.go(other, 2)
        self.begun(other, 3)
        systemctl("daemon-reload")
        systemctl("kill", "-s", "CONT", "dbus.service")
        self.on_the_bus()
        self.completes(other, 3)
        self.once(other, 3)
        self.assertEqual(nervebox.worker_pid("take-rounds"), worker)
        self.completes(start("come-later"), 1)


class Systemd(WorldCase):
    """daemon-reload, daemon-reexec; the journal."""

    definitions = {name: rounds(WORK, 4, worker={**WRITES, "Environment": "COLOUR=red", "Nice": "3", "TasksMax": "200"}, concurrency=4)
                   for name in ("work-here", "work-there")} | {"take-rounds": gated(3), "speak-up": rounds(
                       f"echo before $NERVE_ROUND >&2; {GATED}; echo after $NERVE_ROUND >&2", 2, worker=WRITES)}
    # What nerve tells systemd about a worker.
    NAMES = ("Description", "Documentation", "Slice", "After", "CollectMode", "Type", "NotifyAccess", "ExecStart", "Environment",
             "Restart", "RestartUSec", "RestartPreventExitStatus", "StartLimitIntervalUSec", "StartLimitBurst", "TimeoutStartUSec",
             "TimeoutStopUSec", "WatchdogUSec", "KillMode", "Delegate", "OOMPolicy", "StateDirectory", "StateDirectoryMode",
             "StandardError", "SyslogIdentifier", "LogExtraFields", "LogRateLimitBurst", "User", "DynamicUser", "Group",
             "SupplementaryGroups", "MemoryMax", "TasksMax", "CPUQuotaPerSecUSec", "Nice", "ReadWritePaths", "ReadOnlyPaths",
             "PrivateNetwork", "InvocationID", "MainPID", "ControlGroup")

    def settings(self, workflow):
        """Lists come in any order; with ExecStart= systemd shows when it ran last, and forgets that."""
        found = nervebox.properties(nervebox.unit_of(workflow), *self.NAMES)
        self.assertEqual(found["Nice"], "3")
        return {name: sorted(re.sub(r" ; start_time=.*? ; status=\S+", "", value).split()) for name, value in found.items()}

    def under_load(self, disturb):
        workflows = ("work-here", "work-there")
        runs = [start(workflow) for _ in range(10) for workflow in workflows]
        for workflow in workflows:
            nervebox.wait_ready(workflow)
        before = {workflow: self.settings(workflow) for workflow in workflows}
        nerved = nervebox.nerved_pid()
        times = 0
        while any(stored(run)["ended_at"] is None for run in runs):
            disturb()
            times += 1
        self.assertGreaterEqual(times, 3, "the runs were over before it had begun")
        self.on_the_bus()
        for run in runs:
            self.whole(run, 4)
            self.once(run, 4)
            self.assertEqual(nervebox.losses(run), [])
        self.assertEqual({workflow: self.settings(workflow) for workflow in workflows}, before)
        self.assertEqual(nervebox.nerved_pid(), nerved)

    def test_daemon_reload_in_a_loop(self):
        self.under_load(lambda: systemctl("daemon-reload"))

    def test_daemon_reexec_in_a_loop(self):
        self.under_load(lambda: systemctl("daemon-reexec"))

    def test_a_worker_dies_during_a_daemon_reexec(self):
        run, worker = self.busy("take-rounds")
        with subprocess.Popen(["systemctl", "daemon-reexec"]) as reexec:
            nervebox.kill_process(worker)
            reexec.wait(nervebox.TIMEOUT)
        self.begun(run, 2, attempt=2)
        self.on_the_bus()
        self.completes(run, 3)
        self.kept(run, 3)
        self.assertEqual(len(nervebox.losses(run)), 1)
        nervebox.drain("take-rounds", "--wait")
        self.completes(start("take-rounds"), 3)

    def test_journald_is_restarted(self):
        run = start("speak-up")
        self.begun(run, 1)
        worker = nervebox.worker_pid("speak-up")
        systemctl("restart", "systemd-journald.service")
        self.go(run, 1)
        self.begun(run, 2)
        systemctl("kill", "-s", "KILL", "systemd-journald.service")
        self.go(run, 2)
        nervebox.stored_end(run)
        self.whole(run, 2)
        self.once(run, 2)
        self.assertEqual(nervebox.worker_pid("speak-up"), worker)
        # The thread has what the journal may have lost.
        self.assertEqual([one["meta"]["stderr"] for one in nervebox.thread(run)[1:]],
                         [f"before {number}\nafter {number}\n" for number in (1, 2)])
        wait_for(lambda: systemctl("is-active", "systemd-journald.service", check=False).returncode == 0, "journald to be back")
        self.answers()


class Second(WorldCase):
    """A second nerved, started by hand, says so and leaves."""

    definitions = {"take-rounds": gated(3)}

    def test_it_disturbs_nothing(self):
        run, worker = self.busy("take-rounds")
        first = nervebox.nerved_pid()
        seconds = [subprocess.Popen(["/usr/libexec/nerve/nerved"], env={"PATH": "/usr/bin:/bin"}, stdin=subprocess.DEVNULL,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        for second in seconds:
            _, said = second.communicate(timeout=nervebox.TIMEOUT)
            self.assertEqual(second.returncode, 1)
            self.assertIn("another nerved", said)
        self.assertEqual((nervebox.nerved_pid(), nervebox.worker_pid("take-rounds")), (first, worker))
        # Nor did it take a socket with it.
        for path in ("/run/nerve/worker.sock", PRIVATE):
            self.assertTrue(pathlib.Path(path).is_socket(), path)
        self.completes(run, 3)
        self.once(run, 3)


class Foreign(WorldCase):
    """A unit of the wanted name that is not nerve's: never touched; the run waits, with the reason, until it is gone."""

    definitions = {name: gated(1) for name in ("meet-file", "meet-service", "meet-transient", "meet-mask", "meet-and-die",
                                               "meet-after-all")}
    TEXT = "[Unit]\nDescription=somebody else's\n[Service]\nExecStart=/bin/sleep 1000\n"

    def setUp(self):
        # `systemctl` in the tests of this class is the administrator, who cleans up, too.
        self.addCleanup(systemctl, "daemon-reload")

    def unit(self, workflow, text=TEXT):
        """A unit file of somebody else's; None: it is masked."""
        path = UNITS / nervebox.unit_of(workflow)
        self.addCleanup(path.unlink, missing_ok=True)
        self.addCleanup(systemctl, "stop", path.name, check=False)
        if text is None:
            path.symlink_to("/dev/null")
        else:
            nervebox.replace(path, text)
        systemctl("daemon-reload")
        return path

    def waits(self, workflow, *words):
        """A run that waits, and says for what, whoever is asked. Returns it."""
        run = start(workflow)
        nervebox.wait_worker(workflow, "obstructed")
        for said in (ctl("status").stdout, ctl("workflow", "show", run).stdout):
            for word in (nervebox.unit_of(workflow), *words):
                self.assertIn(word, said)
        self.assertIsNone(stored(run)["ended_at"])
        self.assertEqual(self.log(run), [])
        return run

    def goes_on(self, *runs):
        for run in runs:
            self.begun(run, 1)
            self.completes(run, 1)
            self.once(run, 1)

    def test_a_unit_file(self):
        path = self.unit("meet-file")
        run = self.waits("meet-file", str(path))
        self.kill_nerved()
        nervebox.wait_worker("meet-file", "obstructed")
        self.assertEqual(path.read_text(), self.TEXT)
        self.assertEqual(systemctl("is-active", path.name, check=False).stdout.strip(), "inactive")
        path.unlink()
        systemctl("daemon-reload")
        self.goes_on(run)

    def test_a_running_service(self):
        path = self.unit("meet-service")
        systemctl("start", path.name)
        pid = nervebox.main_pid(path.name)
        run = self.waits("meet-service")
        for verb in (nervebox.drain, nervebox.reset):
            verb("meet-service", check=False)
        self.kill_nerved()
        nervebox.restart_nerve()
        self.assertEqual((nervebox.main_pid(path.name), stored(run)["ended_at"]), (pid, None))
        systemctl("stop", path.name)
        path.unlink()
        systemctl("daemon-reload")
        self.goes_on(run)
        self.assertEqual(nervebox.happened("meet-service", "worker-died"), [])
        self.assertEqual(nervebox.happened("meet-service", "worker-stopped"), [])

    def test_a_transient_service(self):
        unit = nervebox.unit_of("meet-transient")
        nervebox.sh("systemd-run", f"--unit={unit}", "sleep", "1000")
        self.addCleanup(systemctl, "stop", unit, check=False)
        pid = nervebox.main_pid(unit)
        run = self.waits("meet-transient")
        self.assertEqual(nervebox.main_pid(unit), pid)
        systemctl("stop", unit)
        self.goes_on(run)

    def test_a_mask(self):
        path = self.unit("meet-mask", None)
        run = self.waits("meet-mask", "masked")
        path.unlink()
        systemctl("daemon-reload")
        self.goes_on(run)

    def test_kill_and_abort_of_what_waits(self):
        path = self.unit("meet-and-die")
        systemctl("start", path.name)
        pid = nervebox.main_pid(path.name)
        first = self.waits("meet-and-die")
        second = start("meet-and-die")
        nervebox.abort(first)
        self.assertEqual(nervebox.stored_end(first, 3)["exit_code"], 143)
        ctl("workflow", "kill", second, timeout=10)
        self.assertEqual(row(second)["exitCode"], 137)
        self.assertEqual(nervebox.main_pid(path.name), pid)

    def test_it_comes_while_the_worker_is_away(self):
        # The worker was nerve's; when it has gone a file takes its place.
        workflow = "meet-after-all"
        self.goes_on(start(workflow))
        nervebox.drain(workflow, "--wait")
        path = self.unit(workflow)
        run = self.waits(workflow)
        path.unlink()
        systemctl("daemon-reload")
        self.goes_on(run)


class TimeOuts(WorldCase):
    """A run's time-out counts from its start, on a clock of its own, whoever is there to see it pass."""

    definitions = {"time-out-early": command("exec sleep 1000", timeout="1500ms"), "wait-long": gated(1, timeout="1500ms"),
                   "time-out-twice": gated(2, timeout="3s")}

    def timed_out(self, run):
        nervebox.stored_end(run)
        self.answers()
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"]), ("failed", 124, "timeout"))
        nervebox.assert_gone(run)

    def test_it_passes_while_nerved_is_away(self):
        run = start("time-out-early")
        pids = nervebox.processes(run)
        systemctl("stop", "nerve.service")
        # Its worker sees to it.
        wait_for(lambda: not nervebox.alive(pids), "the role to be ended")
        self.assertIsNone(stored(run)["ended_at"])
        systemctl("start", "nerve.service")
        self.timed_out(run)

    def test_it_passes_while_nerved_is_killed(self):
        waiter = nervebox.Waiter("time-out-early")
        nervebox.processes(waiter.run)
        for _ in range(3):
            self.kill_nerved()
        self.assertEqual(waiter.status(), 124)
        self.timed_out(waiter.run)

    def test_a_resumed_run_has_what_is_left_of_it(self):
        begun = time.monotonic()
        run = start("time-out-twice")
        self.begun(run, 1)
        self.go(run, 1)
        self.begun(run, 2)
        wait_for(lambda: time.monotonic() - begun > 1.5, "half of the time to pass")
        nervebox.kill_process(nervebox.worker_pid("time-out-twice"))
        self.begun(run, 2, attempt=2)
        self.timed_out(run)
        self.assertTrue(2.9 < time.monotonic() - begun < 6, time.monotonic() - begun)

    def test_it_passes_without_nerved_and_worker(self):
        run = start("time-out-twice")
        self.begun(run, 1)
        begun = time.monotonic()
        systemctl("stop", "nerve.service")
        os.kill(nervebox.worker_pid("time-out-twice"), signal.SIGKILL)
        wait_for(lambda: time.monotonic() - begun > 3, "the time-out to pass")
        systemctl("start", "nerve.service")
        self.timed_out(run)
        self.assertEqual(self.log(run)[0], ("begin", 1, 1))
        self.assertNotIn("end", [what for what, *_ in self.log(run)])

    def test_time_in_the_queue_does_not_count(self):
        first, second = start("wait-long"), start("wait-long")
        self.begun(first, 1)
        self.timed_out(first)
        self.begun(second, 1)
        self.completes(second, 1)
