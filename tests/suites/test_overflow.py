"""Who gets a slot, who waits, who is dropped: concurrency, overflow, max_queue, on_full; settings that change while runs
go on; idempotent starts; max_active; the pause.

Parity 045-050, 055, 063 and 074: see the names of the tests and their first lines."""

import subprocess

import nervebox
from nervebox import GATED, SETTINGS, WRITES, GatedCase, Tried, command, ctl, rounds, row, start, stored, wait_for


def gated(**keys):
    """One round that waits for leave."""
    return rounds(GATED, 1, worker=WRITES, **keys)


class OverflowCase(GatedCase):
    def statuses(self, *runs):
        return [stored(run)["status"] for run in runs]

    def numbers(self, workflow):
        """What `status` says of the workflow: (running, queued)."""
        found = nervebox.status(workflow)
        return found["running"], found["queued"]

    def dropped(self, run, result="queue-full"):
        """It was dropped, and nothing of it ever ran."""
        nervebox.stored_end(run)
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"], found["startedAt"], found["rounds"]),
                         ("dropped", 75, result, None, 0))
        self.assertEqual(self.log(run), [])
        kinds = nervebox.events(run)
        self.assertEqual((kinds[0], kinds[-1], kinds.count("ended")), ("queued", "ended", 1))
        self.assertNotIn("dispatched", kinds)

    def refused(self, workflow, result="queue-full"):
        """Starts are dropped at once, with --wait or without: the id on stdout, why on stderr. Returns what was said."""
        for options in ((), ("--wait",)):
            tried = Tried(workflow, *options, check=75)
            self.assertRegex(tried.run, "^[0-9a-f]{32}$")
            self.assertIn("dropped", tried.said)
            self.assertIn(result, tried.said)
            self.dropped(tried.run, result)
        return tried.said


class Overflow(OverflowCase):
    definitions = {
        "take-two": gated(concurrency=2),
        "take-one": gated(),
        "drop-extra": gated(overflow="drop"),
        "keep-latest": gated(overflow="latest"),
        "evict-oldest": gated(max_queue=2),
        "refuse-extra": gated(max_queue=1, on_full="refuse"),
        "queue-none": gated(max_queue=0),
        "end-in-many-ways": rounds(f'[ "$NERVE_ROUND" = 1 ] || exit 0; {GATED}', 2, worker=WRITES, timeout="2s"),
    }

    def test_parity_045_what_a_start_that_says_nothing_asks_for(self):
        run = start("take-one")
        self.completes(run, 1)
        begin = nervebox.thread(run)[0]
        self.assertEqual((begin["content"], begin["meta"]["maxRounds"], begin["meta"]["dryRun"]), ("", 50, False))

    def test_parity_047_074_no_more_than_concurrency_and_the_order_is_kept(self):
        runs = [start("take-two", str(number)) for number in range(6)]
        for run in runs[:2]:
            self.begun(run, 1)
        self.assertEqual(self.numbers("take-two"), (2, 4))
        self.assertEqual(self.statuses(*runs), ["started"] * 2 + ["queued"] * 4)
        # Whichever ends, the one that has waited longest is next; one end, one start.
        for number, ended in enumerate((1, 0, 2, 3)):
            self.completes(runs[ended], 1)
            self.begun(runs[number + 2], 1)
            self.assertEqual(self.statuses(*runs[number + 3:]), ["queued"] * (3 - number))
        for run in runs[4:]:
            self.completes(run, 1)
        self.assertEqual(runs, sorted(runs, key=lambda run: (row(run)["startedAt"], run)))
        self.assertEqual(self.numbers("take-two"), (0, 0))

    def test_parity_050_every_end_makes_room(self):
        ways = {
            "completed": lambda run: self.go(run),
            "failed": lambda run: None,  # by its time-out
            "killed": lambda run: ctl("workflow", "kill", "--grace", "0", run),
            "aborted": lambda run: (nervebox.abort(run), self.go(run)),
        }
        runs = [start("end-in-many-ways") for _ in range(len(ways) + 1)]
        for (status, end), run, after in zip(ways.items(), runs, runs[1:]):
            self.begun(run, 1)
            self.assertEqual(self.statuses(after), ["queued"])
            end(run)
            self.assertEqual(nervebox.stored_end(run)["status"], status)
        self.begun(runs[-1], 1)
        self.assertEqual(self.numbers("end-in-many-ways"), (1, 0))

    def test_parity_046_drop_nothing_waits(self):
        first = start("drop-extra")
        self.begun(first, 1)
        self.refused("drop-extra")
        self.assertEqual(self.numbers("drop-extra"), (1, 0))
        # With room again there is no reason to.
        self.completes(first, 1)
        second = Tried("drop-extra")
        self.assertEqual(second.said, "")
        self.completes(second.run, 1)

    def test_latest_keeps_the_newest_that_waits(self):
        first = start("keep-latest")
        self.begun(first, 1)
        second = nervebox.Waiter("keep-latest")
        self.assertEqual(self.statuses(second.run), ["queued"])
        third = start("keep-latest")
        self.assertEqual(second.status(), 75)
        self.dropped(second.run)
        fourth = start("keep-latest")
        self.dropped(third)
        self.assertEqual(self.statuses(first, fourth), ["started", "queued"])
        self.completes(first, 1)
        self.completes(fourth, 1)

    def test_parity_049_a_full_queue_evicts_the_oldest_that_waits(self):
        first, *waiting = [start("evict-oldest") for _ in range(3)]
        self.begun(first, 1)
        newest = Tried("evict-oldest")
        self.assertEqual(newest.said, "", "a run that gets in is no reason to say anything")
        self.dropped(waiting[0])
        self.assertEqual(self.statuses(first, waiting[1], newest.run), ["started", "queued", "queued"])
        for run in (first, waiting[1], newest.run):
            self.completes(run, 1)

    def test_a_full_queue_that_refuses_keeps_those_that_wait(self):
        first, second = start("refuse-extra"), start("refuse-extra")
        self.begun(first, 1)
        self.refused("refuse-extra")
        self.assertEqual(self.statuses(first, second), ["started", "queued"])
        for run in (first, second):
            self.completes(run, 1)

    def test_a_queue_for_none(self):
        # A run with a free slot needs no place in the queue.
        first = start("queue-none")
        self.begun(first, 1)
        self.refused("queue-none")
        self.completes(first, 1)
        self.completes(start("queue-none"), 1)

    def test_parity_048_a_hundred_may_wait(self):
        self.assertEqual(nervebox.status("take-one")["maxQueue"], 100)


class Live(OverflowCase):
    """Settings are read live, from a file that changes and at a reload, and none of them touches the worker."""

    definitions = {name: gated() for name in ("raise-by-file", "raise-by-reload", "lower-by-file", "lower-by-reload",
                                              "shrink-by-file", "shrink-by-reload", "drop-from-now")}

    def change(self, workflow, **keys):
        """Another definition, and nerve has taken it."""
        nervebox.define(workflow, gated(**keys))
        if workflow.endswith("by-reload"):
            nervebox.reload()
        wanted = {"concurrency": keys.get("concurrency", 1), "maxQueue": keys.get("max_queue", 100)}
        wait_for(lambda: {key: nervebox.status(workflow)[key] for key in wanted} == wanted, f"{workflow} to be {wanted}")

    def raised(self, workflow):
        self.change(workflow)
        runs = [start(workflow) for _ in range(4)]
        self.begun(runs[0], 1)
        worker = nervebox.worker_pid(workflow)
        self.assertEqual(self.statuses(*runs), ["started", *["queued"] * 3])
        self.change(workflow, concurrency=3)
        for run in runs[1:3]:
            self.begun(run, 1)
        self.assertEqual(self.statuses(runs[3]), ["queued"])
        self.assertEqual(self.numbers(workflow), (3, 1))
        for run in runs:
            self.completes(run, 1)
            self.once(run, 1)
        self.assertEqual(nervebox.worker_pid(workflow), worker)

    def test_parity_063_more_slots_are_used_at_once(self):
        self.raised("raise-by-file")

    def test_parity_063_more_slots_are_used_at_once_after_a_reload(self):
        self.raised("raise-by-reload")

    def lowered(self, workflow):
        self.change(workflow, concurrency=3)
        runs = [start(workflow) for _ in range(5)]
        for run in runs[:3]:
            self.begun(run, 1)
        worker = nervebox.worker_pid(workflow)
        roles = [self.role_pid(run) for run in runs[:3]]
        self.change(workflow, concurrency=1)
        for role in roles:
            self.assertEqual(nervebox.alive(role), role, "a run was ended for want of a slot")
        # Two of three go before the next one comes.
        for run in runs[:2]:
            self.completes(run, 1)
            self.assertEqual(self.statuses(*runs[3:]), ["queued"] * 2)
        self.completes(runs[2], 1)
        self.begun(runs[3], 1)
        self.assertEqual(self.statuses(runs[4]), ["queued"])
        for run in runs[3:]:
            self.completes(run, 1)
            self.once(run, 1)
        self.assertEqual(nervebox.worker_pid(workflow), worker)

    def test_fewer_slots_let_the_surplus_finish(self):
        self.lowered("lower-by-file")

    def test_fewer_slots_let_the_surplus_finish_after_a_reload(self):
        self.lowered("lower-by-reload")

    def shrunk(self, workflow):
        self.change(workflow, max_queue=3)
        first, *waiting = [start(workflow) for _ in range(4)]
        self.begun(first, 1)
        worker = nervebox.worker_pid(workflow)
        self.change(workflow, max_queue=1)
        for run in waiting[:2]:
            self.dropped(run)
        self.assertEqual(self.statuses(first, waiting[2]), ["started", "queued"])
        for run in (first, waiting[2]):
            self.completes(run, 1)
        self.assertEqual(nervebox.worker_pid(workflow), worker)

    def test_a_smaller_queue_evicts_the_oldest(self):
        self.shrunk("shrink-by-file")

    def test_a_smaller_queue_evicts_the_oldest_after_a_reload(self):
        self.shrunk("shrink-by-reload")

    def test_another_policy_holds_for_the_next_start(self):
        first = start("drop-from-now")
        self.begun(first, 1)
        worker = nervebox.worker_pid("drop-from-now")
        self.change("drop-from-now", overflow="drop", max_queue=7)
        self.refused("drop-from-now")
        self.completes(first, 1)
        self.assertEqual(nervebox.worker_pid("drop-from-now"), worker)


class Keys(OverflowCase):
    """`--key` makes a start idempotent."""

    definitions = {"take-key": gated(concurrency=2), "take-key-too": gated(), "fail-with-key": command("exit 3"),
                   "take-many": gated(concurrency=20)}

    def again(self, run, workflow, key, prompt):
        tried = Tried(workflow, "--key", key, prompt=prompt)
        self.assertEqual(tried.run, run)

    def runs_of(self, workflow):
        return [found["run"] for found in nervebox.listed(workflow)]

    def test_the_same_key_is_the_same_run_whatever_happened_since(self):
        before = self.runs_of("take-key")
        run = start("take-key", "one", "--key", "monday")
        self.again(run, "take-key", "monday", "one")
        self.begun(run, 1)
        self.again(run, "take-key", "monday", "one")
        self.kill_nerved()
        self.again(run, "take-key", "monday", "one")
        self.completes(run, 1)
        self.again(run, "take-key", "monday", "one")
        self.kill_nerved()
        self.again(run, "take-key", "monday", "one")
        self.once(run, 1)
        self.assertEqual(self.runs_of("take-key"), [run, *before])

    def test_another_key_and_no_key_are_other_runs(self):
        runs = {start("take-key", "x", *options) for options in (("--key", "a"), ("--key", "b"), (), ())}
        self.assertEqual(len(runs), 4)

    def test_a_key_is_its_workflows_own(self):
        one, other = start("take-key", "x", "--key", "shared"), start("take-key-too", "y", "--key", "shared")
        self.assertNotEqual(one, other)
        self.assertEqual(row(other)["workflow"], "take-key-too")

    def test_another_prompt_is_an_error_and_starts_nothing(self):
        run = start("take-key", "this", "--key", "tuesday")
        before = self.runs_of("take-key")
        for prompt in ("that", None, "this "):
            tried = Tried("take-key", "--key", "tuesday", prompt=prompt, check=65)
            self.assertEqual(tried.run, "")
            self.assertIn(run[-8:], tried.said, "it does not say which run has the key")
            self.assertEqual(len(tried.said.splitlines()), 1, tried.said)
        self.assertEqual(self.runs_of("take-key"), before)

    def test_wait_waits_for_the_run_that_there_is(self):
        run, code = start("fail-with-key", "x", "--key", "k", wait=True)
        self.assertEqual(code, 1)
        self.assertEqual(start("fail-with-key", "x", "--key", "k", wait=True), (run, 1))

    def test_20_starts_at_once_are_one_run(self):
        before = self.runs_of("take-many")
        starts = [subprocess.Popen(["nervectl", "workflow", "start", "take-many", "-p", "x", "--key", "once"],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                  for _ in range(20)]
        answers = [(*one.communicate(timeout=30), one.returncode) for one in starts]
        self.assertEqual({code for _, _, code in answers}, {0}, answers)
        ids = {stdout.strip() for stdout, _, _ in answers}
        self.assertEqual(len(ids), 1, answers)
        self.assertEqual(self.runs_of("take-many"), [*ids, *before])
        self.begun(run := ids.pop(), 1)
        self.completes(run, 1)
        self.once(run, 1)

    def test_a_key_that_is_too_long(self):
        self.completes(start("take-key", "x", "--key", "k" * 128), 1)
        self.assertEqual(Tried("take-key", "--key", "k" * 129, check=65).run, "")


class MostActive(OverflowCase):
    """`max_active` in nerve.yaml: most runs at a time over all workflows."""

    definitions = {"run-here": gated(concurrency=3), "run-there": gated(concurrency=3)}

    def allow(self, most):
        nervebox.replace(SETTINGS, f"max_active: {most}\n")
        nervebox.reload()

    def test_the_oldest_over_all_workflows_is_next(self):
        self.addCleanup(nervebox.reload)
        self.addCleanup(SETTINGS.unlink, missing_ok=True)
        self.allow(2)
        wait_for(lambda: nervebox.overview().get("maxActive") == 2, "max_active to be 2")
        runs = [start(workflow) for workflow in ("run-here", "run-there", "run-here", "run-there", "run-there")]
        for run in runs[:2]:
            self.begun(run, 1)
        self.assertEqual(self.statuses(*runs), ["started"] * 2 + ["queued"] * 3)
        # The end of a run of the one workflow makes room for the other's.
        self.completes(runs[1], 1)
        self.begun(runs[2], 1)
        self.assertEqual(self.statuses(*runs[3:]), ["queued"] * 2)
        self.kill_nerved()
        self.assertEqual(self.statuses(*runs[3:]), ["queued"] * 2)
        self.completes(runs[0], 1)
        self.begun(runs[3], 1)
        self.assertEqual(self.statuses(runs[4]), ["queued"])
        # Raised, it acts at once; the workers stay.
        workers = [nervebox.worker_pid(workflow) for workflow in self.definitions]
        self.allow(4)
        self.begun(runs[4], 1)
        for run in runs[2:]:
            self.completes(run, 1)
        self.assertEqual([nervebox.worker_pid(workflow) for workflow in self.definitions], workers)


class Pause(OverflowCase):
    """`nervectl pause`: nothing leaves a queue; what has started goes on."""

    definitions = {"take-rounds": rounds(GATED, 2, worker=WRITES, concurrency=2), "drop-extra": gated(overflow="drop"),
                   "keep-latest": gated(overflow="latest")}

    def setUp(self):
        self.addCleanup(ctl, "resume")

    def paused(self):
        """`status` says so, and why."""
        said = ctl("status").stdout
        self.assertRegex(said, "(?i)paused")
        self.assertIn("the disk is being moved", said)

    def test_what_has_started_goes_on_and_the_rest_waits_across_restarts(self):
        first = start("take-rounds")
        self.begun(first, 1)
        ctl("pause", "--reason", "the disk is being moved")
        self.paused()
        tried = Tried("take-rounds")
        self.assertRegex(tried.said, "(?i)paused")
        self.assertIn("nervectl resume", tried.said)
        second = nervebox.Waiter("take-rounds")
        self.assertEqual(self.statuses(tried.run, second.run), ["queued"] * 2)
        self.go(first, 1)
        self.begun(first, 2)
        self.kill_nerved()
        self.paused()
        nervebox.restart_nerve()
        self.paused()
        self.completes(first, 2)
        self.assertEqual(self.statuses(tried.run, second.run), ["queued"] * 2)
        self.assertEqual(self.numbers("take-rounds"), (0, 2))
        ctl("resume")
        self.begun(tried.run, 1)
        self.begun(second.run, 1)
        self.assertNotRegex(ctl("status").stdout, "(?i)paused")
        for run in (tried.run, second.run):
            self.completes(run, 2)
            self.once(run, 2)
        self.assertEqual(second.status(), 0)

    def test_without_a_reason_and_twice(self):
        ctl("pause")
        self.assertRegex(ctl("status").stdout, "(?i)paused")
        ctl("pause", "--reason", "the disk is being moved")
        self.paused()
        ctl("resume")
        ctl("resume")
        self.completes(start("take-rounds"), 2)

    def test_drop_refuses_and_latest_keeps_the_newest(self):
        ctl("pause", "--reason", "the disk is being moved")
        self.assertIn("the disk is being moved", self.refused("drop-extra", "blocked"))
        older, newer = start("keep-latest"), start("keep-latest")
        self.dropped(older)
        self.assertEqual(self.statuses(newer), ["queued"])
        ctl("resume")
        self.completes(newer, 1)
        self.completes(start("drop-extra"), 1)

    def test_a_run_that_waits_can_be_killed_and_aborted(self):
        ctl("pause", "--reason", "the disk is being moved")
        killed, aborted = start("take-rounds"), start("take-rounds")
        ctl("workflow", "kill", killed)
        nervebox.abort(aborted)
        self.assertEqual([nervebox.stored_end(run)["exit_code"] for run in (killed, aborted)], [137, 143])
