"""Abort: the run ends 143 at the next round boundary, with its reason, and no further role of it is executed.

Parity 008 and 142-149: see the names of the tests."""

import os
import signal
import time

import nervebox
from nervebox import GATED, WRITES, GatedCase, ctl, rounds, row, start, stored, systemctl, wait_for


def gated(count, **keys):
    return rounds(GATED, count, **{"worker": WRITES, **keys})


class Abort(GatedCase):
    definitions = {"take-three": gated(3), "take-one": gated(1), "take-two": gated(2), "take-turns": gated(2),
                   "stop-first": gated(2), "die-first": gated(2), "be-many": gated(2, concurrency=3),
                   "fail-next": rounds(f"{GATED}; exit 3", 2, worker=WRITES),
                   "ignore-term": rounds(f"trap '' TERM; {GATED}", 2, worker=WRITES),
                   "end-early": rounds("exit 0", 1)}

    def aborted(self, run, count, reason=None):
        """It ended so, after so many rounds, all of which are kept."""
        nervebox.stored_end(run)
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"], found["reason"], found["rounds"], found["killing"]),
                         ("aborted", 143, "aborted", reason, count, False))
        self.assertEqual([one["round"] for one in nervebox.thread(run)], list(range(count + 1)))
        kinds = nervebox.events(run)
        self.assertEqual((kinds[-1], kinds.count("ended"), kinds.count("abort-requested")), ("ended", 1, 1))
        nervebox.assert_gone(run)
        # No role of it was begun after those.
        self.assertLessEqual({number for _, number, _ in self.log(run)}, set(range(1, max(count, 1) + 1)))

    # ---- when

    def test_parity_008_144_at_the_next_round_boundary(self):
        waiter = nervebox.Waiter("take-three")
        run = waiter.run
        self.begun(run, 1)
        role, worker = self.role_pid(run), nervebox.worker_pid("take-three")
        nervebox.abort(run, "--reason", "it leads nowhere")
        self.assertEqual(stored(run)["aborting"], 1)
        self.assertEqual((row(run)["status"], row(run)["exitCode"], row(run)["reason"]), ("started", None, "it leads nowhere"))
        # The role is not disturbed and does all of its work.
        self.assertEqual(nervebox.alive(role), role)
        self.go(run)
        self.assertEqual(waiter.status(), 143)
        self.aborted(run, 1, "it leads nowhere")
        self.once(run, 1)
        self.assertEqual(nervebox.thread(run)[1]["content"], "said 1")
        self.assertEqual(nervebox.worker_pid("take-three"), worker)
        self.assertIn("it leads nowhere", ctl("workflow", "show", run).stdout)

    def test_of_the_only_round(self):
        run = start("take-one")
        self.begun(run, 1)
        nervebox.abort(run)
        self.go(run)
        self.aborted(run, 1)
        self.once(run, 1)

    def test_in_the_last_round(self):
        run = start("take-two")
        self.begun(run, 1)
        self.go(run, 1)
        self.begun(run, 2)
        nervebox.abort(run)
        self.go(run)
        self.aborted(run, 2)
        self.once(run, 2)

    def test_in_a_round_that_fails(self):
        run = start("fail-next")
        self.begun(run, 1)
        nervebox.abort(run)
        self.go(run)
        self.aborted(run, 1)

    def test_a_queued_run_ends_at_once(self):
        first, waiter = start("take-turns"), nervebox.Waiter("take-turns")
        self.begun(first, 1)
        nervebox.abort(waiter.run, "--reason", "never mind")
        self.assertEqual(waiter.status(), 143)
        self.aborted(waiter.run, 0, "never mind")
        self.assertIsNone(row(waiter.run)["startedAt"])
        self.assertEqual(self.log(waiter.run), [])
        self.completes(first, 2)

    def test_a_run_without_a_worker_ends_at_once(self):
        run = start("stop-first")
        self.begun(run, 1)
        self.go(run, 1)
        self.begun(run, 2)
        systemctl("stop", nervebox.unit_of("stop-first"))
        nervebox.wait_worker("stop-first", "stopped")
        nervebox.abort(run)
        self.assertEqual(nervebox.stored_end(run, 2)["exit_code"], 143)
        nervebox.reset("stop-first")
        # Its successor runs, and nothing of it ever again.
        self.completes(start("stop-first"), 2)
        self.assertEqual(self.log(run), [("begin", 1, 1), ("end", 1, 1), ("begin", 2, 1)])

    def test_the_worker_dies_before_the_boundary(self):
        run = start("die-first")
        self.begun(run, 1)
        nervebox.abort(run)
        nervebox.kill_process(nervebox.worker_pid("die-first"))
        nervebox.stored_end(run)
        self.aborted(run, 0)
        self.completes(start("die-first"), 2)
        self.assertEqual(self.log(run), [("begin", 1, 1)])

    def test_others_go_on_and_its_slot_is_free(self):
        *runs, waiting = [start("be-many") for _ in range(4)]
        for run in runs:
            self.begun(run, 1)
        nervebox.abort(runs[1])
        self.go(runs[1])
        self.aborted(runs[1], 1)
        self.begun(waiting, 1)
        for run in (runs[0], runs[2], waiting):
            self.completes(run, 2)
            self.once(run, 2)

    # ---- nerved comes and goes

    def test_nerved_is_killed_right_after(self):
        waiter = nervebox.Waiter("take-three")
        run = waiter.run
        self.begun(run, 1)
        nervebox.abort(run, "--reason", "why not")
        self.kill_nerved()
        self.assertEqual(stored(run)["aborting"], 1)
        self.go(run)
        self.assertEqual(waiter.status(), 143)
        self.aborted(run, 1, "why not")
        self.once(run, 1)

    def test_the_round_ends_while_nerved_is_away(self):
        run = start("take-three")
        self.begun(run, 1)
        role = self.role_pid(run)
        nervebox.abort(run)
        systemctl("stop", "nerve.service")
        self.go(run)
        wait_for(lambda: not nervebox.alive(role), "the role to end")
        systemctl("start", "nerve.service")
        self.aborted(run, 1)
        self.once(run, 1)

    def test_nerved_and_worker_are_killed_right_after(self):
        run = start("take-three")
        self.begun(run, 1)
        worker = nervebox.worker_pid("take-three")
        nervebox.abort(run)
        os.kill(nervebox.nerved_pid(), signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        self.assertEqual(nervebox.stored_end(run)["exit_code"], 143)
        self.answers()
        self.aborted(run, 0)
        self.assertEqual(self.log(run), [("begin", 1, 1)])

    # ---- who may still say something

    def refused(self, run, *words):
        done = nervebox.abort(run, "--reason", "once more", check=68)
        self.assertEqual((done.stdout, len(done.stderr.splitlines())), ("", 1))
        for word in words:
            self.assertRegex(done.stderr, word)
        # When.
        self.assertRegex(done.stderr, r"\b(now|ago)\b|\d\d:\d\d")

    def test_parity_147_twice(self):
        run = start("take-three")
        self.begun(run, 1)
        nervebox.abort(run, "--reason", "first")
        self.refused(run, "abort", r"uid 0\b")
        self.kill_nerved()
        self.refused(run, "abort", r"uid 0\b")
        self.go(run)
        self.aborted(run, 1, "first")
        # And of one that has been aborted.
        self.refused(run, "aborted", r"uid 0\b")
        self.assertEqual(row(run)["reason"], "first")

    def test_parity_147_of_an_ended_run(self):
        run, code = start("end-early", wait=True)
        self.assertEqual(code, 0)
        self.refused(run, "completed")
        self.assertEqual((row(run)["status"], row(run)["reason"]), ("completed", None))

    def test_of_a_killed_run_and_of_one_that_is_being_killed(self):
        run = start("ignore-term")
        self.begun(run, 1)
        ctl("workflow", "kill", "--grace", "600s", "--no-block", "--reason", "enough", run)
        self.refused(run, "kill", r"uid 0\b")
        ctl("workflow", "kill", "--grace", "0", run)
        self.refused(run, "killed", r"uid 0\b")
        self.assertEqual((row(run)["exitCode"], row(run)["reason"]), (137, "enough"))
        self.assertNotIn("abort-requested", nervebox.events(run))

    def test_a_kill_overrides_it(self):
        waiter = nervebox.Waiter("take-three")
        run = waiter.run
        self.begun(run, 1)
        pids = nervebox.processes(run)
        nervebox.abort(run, "--reason", "at leisure")
        ctl("workflow", "kill", "--reason", "at once", run)
        self.assertEqual(waiter.status(), 137)
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"], found["reason"]), ("killed", 137, "killed", "at once"))
        nervebox.assert_gone(run, pids)
        self.assertEqual(self.log(run), [("begin", 1, 1)])

    # ---- what is kept

    def test_parity_142_146_148_it_is_an_event_with_reason_and_author(self):
        run = start("take-one")
        self.begun(run, 1)
        nervebox.abort(run, "--reason", "it ate – all of it")
        asked = [event for event in nervebox.run_json(run)["events"] if event["type"] == "abort-requested"]
        self.assertEqual(len(asked), 1)
        self.assertEqual((asked[0]["payload"]["reason"], asked[0]["payload"]["by"]["uid"]), ("it ate – all of it", 0))
        self.assertEqual(next(one for one in nervebox.listed() if one["run"] == run)["reason"], "it ate – all of it")
        self.go(run)
        self.aborted(run, 1, "it ate – all of it")
        self.assertEqual(next(one for one in nervebox.listed() if one["run"] == run)["reason"], "it ate – all of it")

    def test_parity_143_what_is_said(self):
        run = start("take-one")
        self.begun(run, 1)
        self.assertEqual(len(nervebox.abort(run, "--reason", "x" * 1025, check=65).stderr.splitlines()), 1)
        self.assertEqual(stored(run)["aborting"], 0)
        nervebox.abort("f" * 32, check=66)
        begun = time.monotonic()
        self.assertEqual(nervebox.abort(run[-8:]).stdout, "")
        self.assertLess(time.monotonic() - begun, 2, "it waits for the round")
        self.go(run)
        self.aborted(run, 1)
