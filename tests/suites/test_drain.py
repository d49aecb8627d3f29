"""Workers are replaced without a run noticing: drains that somebody asks for, and definitions that change.

Parity 020, 022, 025-027, 033-036, 040, 054, 064-071 and 075: see the names of the tests."""

import os
import signal
import subprocess
import time

import nervebox
from nervebox import GATED, WORKFLOWS, WRITES, GatedCase, Tried, command, ctl, rounds, row, start, stored, systemctl, wait_for


def gated(count=1, **keys):
    return rounds(GATED, count, **{"worker": WRITES, **keys})


class DrainCase(GatedCase):
    def idle(self, workflow):
        """Its worker, with nothing to do."""
        self.completes(start(workflow), len(self.definitions[workflow]["roles"]))
        return nervebox.wait_ready(workflow)

    def draining(self, workflow):
        nervebox.wait_worker(workflow, "draining")
        self.assertIn("draining", ctl("status").stdout)

    def waits(self, *runs):
        for run in runs:
            self.assertEqual((stored(run)["status"], self.log(run)), ("queued", []))


class Drain(DrainCase):
    """`nervectl workflow drain`"""

    definitions = {name: gated(concurrency=2) for name in (
        "have-none", "be-idle", "be-busy", "be-asked-twice", "wait-for-it", "hurry-up", "end-in-time", "live-through", "outlive-nerve",
        "crash-meanwhile", "be-many", "be-queued", "hang-idle", "lose-start")} | {"take-rounds": gated(3), "be-stubborn": command(
            "trap '' TERM; while :; do sleep 1000; done")}

    def test_parity_067_without_a_worker_it_is_done_at_once(self):
        for options in ((), ("--wait",), ("--timeout", "5s", "--wait")):
            nervebox.drain("have-none", *options, timeout=5)
        self.assertEqual(nervebox.worker_pid("have-none"), 0, "it started one to drain it")
        self.assertEqual(nervebox.happened("have-none", "worker-draining"), [])
        self.completes(start("have-none"), 1)

    def test_parity_022_034_035_069_an_idle_worker_goes_and_the_next_run_has_another(self):
        worker = self.idle("be-idle")
        nervebox.drain("be-idle", "--wait")
        self.assertNotEqual(nervebox.worker_pid("be-idle"), worker)
        nervebox.wait_absent("be-idle")
        # It was told to, and ended with 0: no death, nothing failed.
        self.assertNotEqual(nervebox.properties(nervebox.unit_of("be-idle"), "ActiveState")["ActiveState"], "failed")
        self.assertEqual(nervebox.happened("be-idle", "worker-died"), [])
        self.assertNotIn(self.idle("be-idle"), (0, worker))

    def test_parity_020_040_065_069_a_busy_worker_is_replaced_when_its_last_run_has_ended(self):
        workflow = "be-busy"
        self.assertEqual(nervebox.status(workflow)["worker"], "absent")
        waiter = nervebox.Waiter(workflow)
        self.begun(waiter.run, 1)
        worker = nervebox.wait_ready(workflow)
        self.assertEqual(worker, nervebox.worker_pid(workflow))
        role = self.role_pid(waiter.run)
        nervebox.drain(workflow, timeout=5)
        self.draining(workflow)
        # There is a slot, and no worker for it.
        second = start(workflow)
        self.waits(second)
        self.assertEqual(nervebox.alive(role), role)
        self.go(waiter.run)
        self.assertEqual(waiter.status(), 0)
        self.whole(waiter.run, 1)
        self.begun(second, 1)
        self.assertNotIn(nervebox.wait_ready(workflow), (0, worker))
        self.completes(second, 1)
        for run in (waiter.run, second):
            self.once(run, 1)
            self.assertEqual(nervebox.losses(run), [])
        self.assertEqual(nervebox.happened(workflow, "worker-died"), [])

    def test_the_runs_later_rounds_are_not_interrupted_either(self):
        run = start("take-rounds")
        self.begun(run, 1)
        worker = nervebox.worker_pid("take-rounds")
        nervebox.drain("take-rounds")
        for number in (1, 2):
            self.go(run, number)
            self.begun(run, number + 1)
            self.assertEqual(nervebox.worker_pid("take-rounds"), worker)
        self.completes(run, 3)
        self.once(run, 3)

    def test_wait_waits(self):
        run = start("wait-for-it")
        self.begun(run, 1)
        with subprocess.Popen(["nervectl", "workflow", "drain", "wait-for-it", "--wait"], stdin=subprocess.DEVNULL) as waiting:
            self.draining("wait-for-it")
            self.assertIsNone(waiting.poll())
            self.completes(run, 1)
            self.assertEqual(waiting.wait(nervebox.TIMEOUT), 0)
        nervebox.wait_absent("wait-for-it")

    def test_parity_036_066_after_the_timeout_what_is_left_is_interrupted(self):
        waiters = [nervebox.Waiter("hurry-up") for _ in range(2)]
        for waiter in waiters:
            self.begun(waiter.run, 1)
        worker, waiting = nervebox.worker_pid("hurry-up"), start("hurry-up")
        begun = time.monotonic()
        nervebox.drain("hurry-up", "--timeout", "500ms", "--wait")
        self.assertTrue(0.5 <= time.monotonic() - begun < 5, time.monotonic() - begun)
        for waiter in waiters:
            self.assertEqual(waiter.status(), 130)
            found = row(waiter.run)
            self.assertEqual((found["status"], found["exitCode"], found["result"]), ("interrupted", 130, "drained"))
            nervebox.assert_gone(waiter.run)
        # Those that waited were not its own.
        self.begun(waiting, 1)
        self.assertNotEqual(nervebox.worker_pid("hurry-up"), worker)
        self.completes(waiting, 1)

    def test_a_role_that_ignores_sigterm_is_interrupted_too(self):
        run = start("be-stubborn")
        pids = nervebox.processes(run)
        nervebox.drain("be-stubborn", "--timeout", "200ms")
        self.assertEqual(nervebox.stored_end(run)["exit_code"], 130)
        nervebox.assert_gone(run, pids)

    def test_what_ends_in_time_ends_as_it_would(self):
        run = start("end-in-time")
        self.begun(run, 1)
        nervebox.drain("end-in-time", "--timeout", "60s")
        self.completes(run, 1)
        nervebox.wait_absent("end-in-time")

    def test_twice_and_in_a_hurry(self):
        run = start("be-asked-twice")
        self.begun(run, 1)
        nervebox.drain("be-asked-twice")
        nervebox.drain("be-asked-twice")
        self.draining("be-asked-twice")
        nervebox.drain("be-asked-twice", "--timeout", "200ms")
        self.assertEqual(nervebox.stored_end(run)["exit_code"], 130)

    def test_it_survives_nerved(self):
        workflow = "live-through"
        first = start(workflow)
        self.begun(first, 1)
        worker = nervebox.worker_pid(workflow)
        nervebox.drain(workflow)
        second = start(workflow)
        for disturb in (nervebox.restart_nerve, self.kill_nerved):
            disturb()
            self.draining(workflow)
            self.waits(second)
        self.completes(first, 1)
        self.once(first, 1)
        self.begun(second, 1)
        self.assertNotEqual(nervebox.worker_pid(workflow), worker)

    def test_its_timeout_passes_while_nerved_is_away(self):
        run = start("outlive-nerve")
        self.begun(run, 1)
        nervebox.drain("outlive-nerve", "--timeout", "300ms")
        os.kill(nervebox.nerved_pid(), signal.SIGKILL)
        self.assertEqual(nervebox.stored_end(run)["exit_code"], 130)
        nervebox.assert_gone(run)

    def test_parity_071_a_crash_ends_the_drain(self):
        workflow = "crash-meanwhile"
        first = start(workflow)
        self.begun(first, 1)
        worker = nervebox.worker_pid(workflow)
        nervebox.drain(workflow)
        second = start(workflow)
        self.waits(second)
        nervebox.kill_process(worker)
        # What comes is the fresh one that was wanted: for both.
        self.begun(first, 1, attempt=2)
        self.begun(second, 1)
        after = nervebox.wait_ready(workflow)
        self.assertNotEqual(after, worker)
        for run in (first, second):
            self.completes(run, 1)
        self.assertEqual(nervebox.wait_ready(workflow), after)

    def test_a_drain_of_a_worker_that_hangs(self):
        workflow = "hang-idle"
        worker = self.idle(workflow)
        os.kill(worker, signal.SIGSTOP)
        nervebox.drain(workflow)
        run = start(workflow)
        # Nobody has to wait for 30 s here: root may shorten its watchdog's time in its name.
        nervebox.sh("systemd-notify", f"--pid={worker}", "WATCHDOG_USEC=500000",
                    env={**os.environ, "NOTIFY_SOCKET": "/run/systemd/notify"})
        self.begun(run, 1)
        self.assertNotEqual(nervebox.worker_pid(workflow), worker)
        self.completes(run, 1)

    def test_parity_025_many_at_once(self):
        workflow = "be-many"
        runs, drains = [], []
        for _ in range(5):
            run = start(workflow)
            self.go(run)
            runs.append(run)
            drains.append(subprocess.Popen(["nervectl", "workflow", "drain", workflow, "--wait"], stdin=subprocess.DEVNULL))
        self.assertEqual([one.wait(nervebox.TIMEOUT) for one in drains], [0] * 5)
        for run in runs:
            self.completes(run, 1)
            self.once(run, 1)
        self.assertEqual(nervebox.happened(workflow, "worker-died"), [])

    def test_a_run_that_waits_for_the_fresh_worker_can_be_killed(self):
        first = start("be-queued")
        self.begun(first, 1)
        nervebox.drain("be-queued")
        second = start("be-queued")
        ctl("workflow", "kill", second)
        self.assertEqual(row(second)["exitCode"], 137)
        self.completes(first, 1)

    def test_what_is_not_there(self):
        self.assertIn("no-such-flow", nervebox.drain("no-such-flow", check=66).stderr)

    # ---- undeliverable

    def test_parity_026_027_054_a_start_that_cannot_be_delivered_goes_to_the_next_worker(self):
        # Its worker is gone at the moment in which it would be sent.
        with nervebox.worker_that("lose-start", "lines = connected(); heard('welcome'); os._exit(1)"):
            runs = [start("lose-start") for _ in range(3)]
            for run in runs:
                self.completes(run, 1)
                self.assertEqual([what for what, *_ in self.log(run)], ["begin", "end"])
        found = nervebox.status("lose-start")
        self.assertEqual((found["running"], found["queued"]), (0, 0))
        # Both slots are there.
        more = [start("lose-start") for _ in range(2)]
        for run in more:
            self.begun(run, 1)


def coloured(colour, *, count=2, **keys):
    """Rounds that wait and then say which environment they see."""
    return rounds(GATED.replace("echo said $NERVE_ROUND", "echo $COLOUR"), count,
                  worker={**WRITES, "Environment": f"COLOUR={colour}"}, **keys)


class NewWorker(DrainCase):
    """The `worker:` section changes: it holds for the next worker, and nobody is interrupted for it."""

    definitions = {name: coloured("red", concurrency=2) for name in ("turn-blue", "turn-blue-by-reload", "turn-blue-idle",
                                                                     "turn-blue-across", "turn-blue-and-back")}

    def said(self, run):
        self.go(run)
        self.assertEqual(nervebox.stored_end(run)["status"], "completed")
        return {one["content"] for one in nervebox.thread(run)[1:]}

    def turned(self, workflow, disturb):
        runs = [start(workflow) for _ in range(2)]
        for run in runs:
            self.begun(run, 1)
        worker = nervebox.worker_pid(workflow)
        role = self.role_pid(runs[0])
        nervebox.define(workflow, coloured("blue", concurrency=2))
        disturb()
        self.draining(workflow)
        third = start(workflow)
        self.waits(third)
        self.assertEqual(nervebox.alive(role), role)
        # The first ends and the second still runs, with a round to come: still nobody is told to go.
        self.assertEqual(self.said(runs[0]), {"red"})
        self.waits(third)
        self.go(runs[1], 1)
        self.begun(runs[1], 2)
        self.assertEqual(nervebox.worker_pid(workflow), worker)
        self.assertEqual(self.said(runs[1]), {"red"})
        self.begun(third, 1)
        self.assertNotIn(nervebox.worker_pid(workflow), (0, worker))
        self.assertEqual(self.said(third), {"blue"})
        for run in (*runs, third):
            self.once(run, 2)
            self.assertEqual(nervebox.losses(run), [])
        self.assertEqual(nervebox.happened(workflow, "worker-died"), [])

    def test_parity_070_a_changed_file(self):
        self.turned("turn-blue", lambda: None)

    def test_parity_070_a_reload(self):
        self.turned("turn-blue-by-reload", nervebox.reload)

    def test_parity_070_a_restart_of_nerved(self):
        self.turned("turn-blue-across", self.kill_nerved)

    def test_parity_070_an_idle_worker_is_replaced_at_once(self):
        workflow = "turn-blue-idle"
        self.assertEqual(self.said(start(workflow)), {"red"})
        worker = nervebox.wait_ready(workflow)
        nervebox.define(workflow, coloured("blue", concurrency=2))
        wait_for(lambda: nervebox.worker_pid(workflow) != worker, "the worker to go")
        self.assertEqual(self.said(start(workflow)), {"blue"})
        # Once only: the new one is as it should be.
        again = nervebox.wait_ready(workflow)
        nervebox.reload()
        self.assertEqual(self.said(start(workflow)), {"blue"})
        self.assertEqual(nervebox.worker_pid(workflow), again)

    def test_a_change_that_is_taken_back(self):
        workflow = "turn-blue-and-back"
        first = start(workflow)
        self.begun(first, 1)
        worker = nervebox.worker_pid(workflow)
        nervebox.define(workflow, coloured("blue", concurrency=2))
        self.draining(workflow)
        second = start(workflow)
        self.waits(second)
        nervebox.define(workflow, coloured("red", concurrency=2))
        # The worker is as it should be again: the slot is used.
        self.begun(second, 1)
        self.assertEqual(nervebox.worker_pid(workflow), worker)
        for run in (first, second):
            self.assertEqual(self.said(run), {"red"})


def saying(word, **keys):
    """Two rounds; the second says this."""
    definition = rounds(GATED, 2, worker=WRITES, **keys)
    definition["roles"]["r2"] = {"exec": ["echo", word]}
    return definition


class NewDefinition(DrainCase):
    """Files come, change, break and go."""

    definitions = {name: saying("old") for name in ("change-by-file", "change-by-reload", "break-and-mend", "break-by-reload",
                                                    "be-removed", "be-removed-by-reload", "be-removed-meanwhile")}

    def tearDown(self):
        super().tearDown()
        for name, definition in self.definitions.items():
            nervebox.define(name, definition)

    def word(self, run):
        self.go(run)
        self.assertEqual(nervebox.stored_end(run)["status"], "completed")
        return nervebox.thread(run)[-1]["content"]

    def reloaded(self, workflow):
        if workflow.endswith("by-reload"):
            nervebox.reload()

    def changed(self, workflow):
        first, second = start(workflow), start(workflow)
        self.begun(first, 1)
        worker = nervebox.worker_pid(workflow)
        # The number shows that nerve has taken it.
        nervebox.define(workflow, saying("new", max_queue=7))
        self.reloaded(workflow)
        wait_for(lambda: nervebox.status(workflow)["maxQueue"] == 7, "the new definition")
        self.kill_nerved()
        self.assertEqual(self.word(first), "old")
        self.assertEqual(self.word(second), "new")
        self.assertNotEqual(*(nervebox.run_json(run)["definition"] for run in (first, second)))
        self.assertEqual(nervebox.worker_pid(workflow), worker, "nothing that the worker is made of has changed")

    def test_parity_075_a_changed_file(self):
        self.changed("change-by-file")

    def test_parity_075_a_reload(self):
        self.changed("change-by-reload")

    def test_parity_064_a_new_file_can_be_started(self):
        for workflow in ("come-new", "come-new-by-reload"):
            ctl("workflow", "start", workflow, check=66)
            path = nervebox.define(workflow, saying("fresh"))
            self.addCleanup(path.unlink)
            self.reloaded(workflow)
            wait_for(lambda: nervebox.status(workflow), f"{workflow} to be known")
            self.assertEqual(self.word(start(workflow)), "fresh")

    def removed(self, workflow):
        first, second = nervebox.Waiter(workflow), nervebox.Waiter(workflow)
        self.begun(first.run, 1)
        worker, path = nervebox.worker_pid(workflow), WORKFLOWS / f"{workflow}.yaml"
        path.unlink()
        self.reloaded(workflow)
        self.assertEqual(second.status(), 75)
        found = row(second.run)
        self.assertEqual((found["status"], found["exitCode"], found["result"]), ("dropped", 75, "removed"))
        said = ctl("workflow", "start", workflow, check=66)
        self.assertEqual(said.stdout, "")
        self.assertIn(workflow, said.stderr)
        self.kill_nerved()
        self.assertEqual(nervebox.worker_pid(workflow), worker)
        # What runs goes on as it began; then its worker goes, and none comes.
        self.assertEqual(self.word(first.run), "old")
        self.assertEqual(first.status(), 0)
        nervebox.wait_absent(workflow)
        self.assertEqual(nervebox.happened(workflow, "worker-died"), [])
        nervebox.define(workflow, saying("again"))
        self.reloaded(workflow)
        wait_for(lambda: nervebox.status(workflow), f"{workflow} to be known again")
        self.assertEqual(self.word(start(workflow)), "again")

    def test_parity_033_064_a_removed_file(self):
        self.removed("be-removed")

    def test_parity_033_064_a_removed_file_and_a_reload(self):
        self.removed("be-removed-by-reload")

    def test_parity_068_removed_during_a_drain(self):
        workflow = "be-removed-meanwhile"
        run = start(workflow)
        self.begun(run, 1)
        nervebox.drain(workflow)
        (WORKFLOWS / f"{workflow}.yaml").unlink()
        wait_for(lambda: ctl("workflow", "start", workflow, check=False).returncode == 66, "it to be unknown")
        self.assertEqual(self.word(run), "old")
        nervebox.wait_absent(workflow)
        nervebox.restart_nerve()
        self.assertEqual(nervebox.worker_pid(workflow), 0)

    def broken(self, workflow):
        self.assertEqual(self.word(start(workflow)), "old")
        worker = nervebox.worker_pid(workflow)
        first = start(workflow)
        self.begun(first, 1)
        nerved = nervebox.nerved_pid()
        path = nervebox.define(workflow, "version: 1\nroles: {r1: [\n")
        self.reloaded(workflow)
        wait_for(lambda: nervebox.status(workflow).get("error"), "the fault to be noticed")
        self.assertIn(f"{path}:", ctl("status").stdout)
        self.assertEqual(nervebox.nerved_pid(), nerved)
        # The last good one stays, also for a nerved that never saw it.
        for disturb in (lambda: None, self.kill_nerved):
            disturb()
            tried = Tried(workflow)
            self.assertIn(f"{path}:", tried.said)
            self.assertEqual(self.word(first), "old")
            self.assertEqual(self.word(tried.run), "old")
            first = tried.run
        self.assertEqual(nervebox.worker_pid(workflow), worker)
        nervebox.define(workflow, saying("mended"))
        self.reloaded(workflow)
        wait_for(lambda: not nervebox.status(workflow).get("error"), "it to be mended")
        tried = Tried(workflow)
        self.assertEqual((self.word(tried.run), tried.said), ("mended", ""))

    def test_a_broken_file(self):
        self.broken("break-and-mend")

    def test_a_broken_file_and_a_reload(self):
        self.broken("break-by-reload")

    def test_a_reload_reports_success_and_keeps_the_process(self):
        nerved = nervebox.nerved_pid()
        for _ in range(5):
            nervebox.reload()
        self.answers()
        self.assertEqual(nervebox.nerved_pid(), nerved)
        self.assertEqual(systemctl("is-active", "nerve.service").stdout.strip(), "active")
