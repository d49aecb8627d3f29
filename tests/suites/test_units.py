"""What nerved hears of worker units: who stopped one, how one died, what stands in the way of one.

It is read in nerved's log, which at NERVE_LOG=debug says all that systemd's units are reported as."""

import os
import pathlib
import re
import signal

import nervebox
from nervebox import Case, command, properties, systemctl, wait_for

DEBUG = pathlib.Path("/run/systemd/system/nerve.service.d/nervebox-debug.conf")
SLOW = pathlib.Path("/run/systemd/system/nerve-wf@slow.service.d/nervebox-slow.conf")
UNITS = pathlib.Path("/etc/systemd/system")
REPORT = re.compile(r'unit of .*: Some\(Unit \{ read: \d+, state: (\w+), invocation: "(\w*)", .* death: (None|Some\(.*\)), '
                    r'stop: (\w+),')


def reports(workflow):
    """Every report of the workflow's unit: (state, invocation, death, stop)."""
    found = [REPORT.match(entry["MESSAGE"]) for entry in nervebox.journal("_COMM=nerved", f"NERVE_WORKFLOW={workflow}")]
    return [match.groups() for match in found if match]


def invocation(workflow):
    return properties(nervebox.unit_of(workflow), "InvocationID")["InvocationID"]


class Units(Case):
    definitions = {name: command("sleep 600") for name in ("stop", "slice", "restart", "leave", "crash", "again", "hasty", "slow",
                                                           "down")}
    definitions |= {"quick": command("true"), "blocked": command("true")}

    @classmethod
    def setUpClass(cls):
        DEBUG.parent.mkdir(parents=True, exist_ok=True)
        DEBUG.write_text("[Service]\nEnvironment=NERVE_LOG=debug\n")
        systemctl("daemon-reload")
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        DEBUG.unlink()
        systemctl("daemon-reload")
        super().tearDownClass()

    def busy(self, workflow):
        """Starts a run and returns the invocation that works on it."""
        nervebox.processes(nervebox.start(workflow))
        return invocation(workflow)

    def reported(self, workflow, predicate, what):
        """Waits for a report, and returns it."""
        return wait_for(lambda: next((report for report in reports(workflow) if predicate(*report)), None), what)

    def gone(self, workflow, count=1):
        """Waits until it was reported so many times that the unit is gone, with how it ended; returns who stopped it."""
        ends = wait_for(lambda: len(ends := [report for report in reports(workflow)
                                             if report[0] == "Absent" and report[2:] != ("None", "Nobody")]) >= count and ends,
                        f"{count} ends of {workflow}")
        return [stop for _, _, _, stop in ends]

    def test_a_stop_of_an_idle_worker(self):
        nervebox.start("quick", wait=True)
        systemctl("stop", nervebox.unit_of("quick"))
        self.assertEqual(self.gone("quick"), ["Operator"])

    def test_a_stop_of_a_busy_worker(self):
        self.busy("stop")
        systemctl("stop", nervebox.unit_of("stop"))
        self.assertEqual(self.gone("stop")[:1], ["Operator"])

    def test_a_stop_of_a_worker_that_has_just_begun(self):
        nervebox.start("hasty")
        wait_for(lambda: invocation("hasty"), "an invocation")
        systemctl("stop", nervebox.unit_of("hasty"))
        self.assertEqual(self.gone("hasty")[:1], ["Operator"])

    def test_a_stop_of_the_slice(self):
        self.busy("slice")
        systemctl("stop", "nerve-wf.slice")
        self.assertEqual(self.gone("slice")[:1], ["Operator"])

    def test_a_restart_is_never_a_stop(self):
        old = self.busy("restart")
        systemctl("restart", nervebox.unit_of("restart"))
        new = invocation("restart")
        self.reported("restart", lambda state, which, _, stop: state == "Active" and which == new and stop == "Nobody",
                      "the new invocation")
        ends = [report for report in reports("restart") if report[:2] == ("Starting", old) and report[2] != "None"]
        self.assertEqual({stop for _, _, _, stop in ends}, {"Operator"})
        self.assertNotIn("Operator", [stop for state, _, _, stop in reports("restart") if state == "Absent"])

    def test_a_worker_that_leaves_was_stopped_by_nobody(self):
        self.busy("leave")
        os.kill(nervebox.worker_pid("leave"), signal.SIGTERM)
        self.assertEqual(self.gone("leave")[:1], ["Nobody"])

    def test_a_crash_is_told_with_the_invocation_that_died(self):
        old = self.busy("crash")
        os.kill(nervebox.worker_pid("crash"), signal.SIGKILL)
        state, _, death, stop = self.reported(
            "crash", lambda state, which, death, _: state == "Starting" and which == old and death != "None", "the death")
        self.assertIn('cause: Signal, code: None, signal: Some("SIGKILL")', death)
        self.assertEqual((state, stop), ("Starting", "Nobody"))
        self.reported("crash", lambda state, which, death, _: state == "Active" and which not in ("", old) and death == "None",
                      "the new invocation, without a death")

    def test_deaths_are_heard_of_after_a_reexec(self):
        old = self.busy("again")
        for verb in ("daemon-reload", "daemon-reexec"):
            systemctl(verb)
            os.kill(nervebox.worker_pid("again"), signal.SIGKILL)
            self.reported("again", lambda _, which, death, __, old=old: which == old and "SIGKILL" in death,
                          f"the death after {verb}")
            self.reported("again", lambda state, which, *_, old=old: state == "Active" and which not in ("", old),
                          "the new invocation")
            old = invocation("again")

    def test_a_masked_unit_is_in_the_way_until_it_is_unmasked(self):
        name = nervebox.unit_of("blocked")
        file = UNITS / name
        file.symlink_to("/dev/null")
        try:
            run = nervebox.start("blocked")
            self.reported_foreign("blocked", f"{name} is masked: systemctl unmask {name}")
            self.assertIsNone(nervebox.stored(run)["ended_at"])
        finally:
            file.unlink()
        systemctl("daemon-reload")
        self.assertEqual(nervebox.ended(run)["exitCode"], 0)

    def reported_foreign(self, workflow, words):
        wait_for(lambda: any(words in entry["MESSAGE"] and "state: Foreign" in entry["MESSAGE"]
                             for entry in nervebox.journal("_COMM=nerved", f"NERVE_WORKFLOW={workflow}")), words)

    def test_what_goes_down_with_nerve_was_stopped_by_no_operator(self):
        # Another one holds up the stop of nerve, which would leave unheard what happens in its last moment.
        SLOW.parent.mkdir(parents=True, exist_ok=True)
        SLOW.write_text("[Service]\nExecStopPost=/bin/sleep 2\n")
        systemctl("daemon-reload")
        try:
            self.busy("slow")
            self.busy("down")
            systemctl("start", "nerve.target")
            systemctl("stop", "nerve.target")
            self.assertEqual(self.gone("down"), ["GoingDown"])
        finally:
            SLOW.unlink()
            systemctl("daemon-reload")
            systemctl("start", "nerve.service")
