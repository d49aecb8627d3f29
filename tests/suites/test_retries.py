"""Retries: an attempt that failed is an event, the next one comes when it is due, whatever happens meanwhile, and a kill,
an abort or the run's time-out does not wait for it."""

import time

import nervebox
from nervebox import SCRATCH, WRITES, Case, ctl, row, start, stored_end

# Says which attempt it is, and when, and fails until the attempt `last`.
TRY = f"echo $NERVE_RETRY $NERVE_ATTEMPT $(date +%s%6N) >>{SCRATCH}/$NERVE_RUN_ID.log; "


def tried(script, retry, **keys):
    role = {"exec": ["/bin/sh", "-c", TRY + script], "retry": retry}
    return {"roles": {"main": role}, "graph": {"$START": "main", "main": {"ok": "$END"}}, "worker": WRITES, **keys}


class Retries(Case):
    definitions = {
        "try-thrice": tried("[ $NERVE_RETRY = 2 ] || exit 75; echo said", {"attempts": 3, "backoff": "100ms", "on": ["exit-code:75"]}),
        "give-up": tried("echo no; exit 75", {"attempts": 2, "backoff": "10ms", "on": ["exit-code"]}),
        "try-once": tried("exit 3", {"attempts": 5, "backoff": "10ms", "on": ["role-timeout", "exit-code:75"]}),
        "leave-children": tried("sleep 1000 & [ $NERVE_RETRY = 1 ] || exit 1; wc -l </sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/cgroup.procs",
                                {"attempts": 2, "backoff": "10ms"}),
        "wait-long": tried("exit 1", {"attempts": 2, "backoff": "1h", "max_backoff": "1h"}),
        "wait-too-long": tried("exit 1", {"attempts": 2, "backoff": "1h", "max_backoff": "1h"}, timeout="1s"),
        "wait-some": tried("[ $NERVE_RETRY = 1 ] || exit 1; echo said", {"attempts": 2, "backoff": "4s"}),
    }

    def attempts(self, run):
        """The events of the attempts that failed, with their times."""
        events = nervebox.run_json(run)["events"]
        return [event for event in events if event["type"] == "attempt-failed"]

    def log(self, run):
        """(failed attempts, dispatch, µs since the epoch) of each attempt that began."""
        return [tuple(map(int, line.split())) for line in (SCRATCH / f"{run}.log").read_text().splitlines()]

    def waiting(self, workflow):
        run = start(workflow)
        nervebox.wait_event(run, "attempt-failed")
        return run

    def test_until_it_is_well(self):
        run, status = start("try-thrice", wait=True)
        self.assertEqual(status, 0)
        self.assertEqual([retry for retry, _, _ in self.log(run)], [0, 1, 2])
        failed = [event["payload"] for event in self.attempts(run)]
        self.assertEqual([(one["round"], one["attempt"], one["message"]["meta"]["result"]) for one in failed],
                         [(1, 1, "exit-code:75"), (1, 2, "exit-code:75")])
        for one, most in zip(failed, (100_000, 200_000)):
            self.assertTrue(most // 2 <= one["delayUs"] <= most, one)
        self.assertEqual([(one["round"], one["content"]) for one in nervebox.thread(run)[1:]], [(1, "said")])
        self.assertEqual(row(run)["rounds"], 1)

    def test_as_often_as_it_may(self):
        run, status = start("give-up", wait=True)
        self.assertEqual((status, row(run)["result"], len(self.attempts(run))), (1, "exit-code:75", 1))
        self.assertEqual([one["content"] for one in nervebox.thread(run)[1:]], ["no"])

    def test_not_after_what_it_is_not_for(self):
        run, status = start("try-once", wait=True)
        self.assertEqual((status, row(run)["result"], self.attempts(run)), (1, "exit-code:3", []))

    def test_no_attempt_begins_before_the_one_before_it_is_gone(self):
        run, status = start("leave-children", wait=True)
        self.assertEqual(status, 0)
        # sh, its sleep, and what reads them: nothing of the first attempt.
        self.assertLessEqual(int(nervebox.thread(run)[1]["content"]), 4)

    def test_a_kill_does_not_wait(self):
        run = self.waiting("wait-long")
        begun = time.monotonic()
        ctl("workflow", "kill", run)
        self.assertLess(time.monotonic() - begun, 2)
        self.assertEqual((row(run)["exitCode"], len(self.log(run))), (137, 1))

    def test_an_abort_does_not_wait(self):
        run = self.waiting("wait-long")
        nervebox.abort(run)
        self.assertEqual(stored_end(run, timeout=5)["exit_code"], 143)
        self.assertEqual((row(run)["rounds"], len(self.log(run))), (0, 1))

    def test_a_time_out_does_not_wait(self):
        run, status = start("wait-too-long", wait=True)
        self.assertEqual((status, row(run)["result"], len(self.attempts(run))), (124, "timeout", 1))

    def kept(self, run, dispatch):
        """The second attempt came when it was due, in this dispatch."""
        stored_end(run)
        self.assertEqual(row(run)["exitCode"], 0)
        failed = self.attempts(run)[0]
        due = failed["timestamp"] + failed["payload"]["delayUs"]
        (_, _, _), (retry, attempt, begun) = self.log(run)
        self.assertEqual((retry, attempt), (1, dispatch))
        self.assertTrue(-200_000 < begun - due < 2_000_000, (begun - due, failed))

    def test_its_end_is_kept_over_a_restart_of_nerve(self):
        run = self.waiting("wait-some")
        nervebox.restart_nerve()
        self.kept(run, 1)

    def test_its_end_is_kept_over_the_death_of_the_worker(self):
        run = self.waiting("wait-some")
        nervebox.kill_process(nervebox.worker_pid("wait-some"))
        self.kept(run, 2)

    def test_its_end_is_kept_over_the_death_of_both(self):
        run = self.waiting("wait-some")
        nervebox.systemctl("stop", "nerve.service")
        nervebox.kill_process(nervebox.worker_pid("wait-some"))
        nervebox.systemctl("start", "nerve.service")
        self.kept(run, 2)

    def test_show_has_them(self):
        run = self.waiting("wait-long")
        shown = ctl("workflow", "show", run).stdout
        self.assertRegex(shown, r"attempt-failed +exit-code:1; attempt 1 of round 1 by main, again after ([3-5]\dmin|1h)")
        ctl("workflow", "kill", run)
