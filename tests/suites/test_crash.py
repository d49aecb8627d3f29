"""Workers die: their runs resume, the guilty run is found, and who dies too often is blocked until somebody says otherwise.

Parity 019, 021, 023, 024, 028-031, 038, 039, 051-053, 055-059 and 073: see the names of the tests."""

import os
import signal
import time

import nervebox
from nervebox import GATED, SCRATCH, WRITES, GatedCase, Tried, ctl, rounds, row, start, stored, systemctl, wait_for

# Kills its worker when the prompt says so; else it is gated. `read` fails for want of a newline and has read all the same.
GUILTY = 'read -r word || :; if [ "$word" = guilty ]; then kill -KILL $PPID; sleep 1000; fi; ' + GATED


# What a worker's journal ends with: much more than is quoted of it.
WORDS = [f"word {number:04} of many" for number in range(400)]
SPEAK = f"seq -f 'word %04g of many' 0 399 >&2; {GATED}"


def gated(count, **keys):
    return rounds(GATED, count, **{"worker": WRITES, **keys})


def prompted(definition):
    """Its roles read the prompt of the start."""
    for role in definition["roles"].values():
        role["prompt"] = "{{ start.content }}"
    return definition


class Deaths(GatedCase):
    """One death, of each kind. A workflow for each, since deaths add up."""

    definitions = {**{f"die-of-{name}": gated(3) for name in ("segv", "abrt", "kill", "term", "watchdog", "cgroup",
                                                              "neighbour", "both")},
                   "live-on": gated(1), "speak-at-last": rounds(SPEAK, 1, worker=WRITES), "exit-three": gated(2), "exit-zero": gated(2), "crash-with-three": gated(1),
                   "die-with-many": gated(2, concurrency=3)}

    def dies(self, workflow, end, causes, code=None, number=None):
        """The worker dies in round 2 and the run goes on there, in another worker."""
        waiter = nervebox.Waiter(workflow)
        run = waiter.run
        self.begun(run, 1)
        self.go(run, 1)
        self.begun(run, 2)
        role, worker = self.role_pid(run), nervebox.worker_pid(workflow)
        invocation = nervebox.properties(nervebox.unit_of(workflow), "InvocationID")["InvocationID"]
        end(worker)
        self.begun(run, 2, attempt=2)
        self.assertEqual(nervebox.alive(role), {}, "a process of the first attempt lives beside the second")
        self.assertEqual((stored(run)["status"], stored(run)["rounds"]), ("started", 1))
        self.completes(run, 3)
        self.assertEqual(waiter.status(), 0)
        self.assertEqual(self.log(run), [("begin", 1, 1), ("end", 1, 1), ("begin", 2, 1), ("begin", 2, 2), ("end", 2, 2),
                                         ("begin", 3, 2), ("end", 3, 2)])
        (lost,) = nervebox.losses(run)
        self.assertIn(lost["cause"], causes)
        self.assertEqual((lost.get("code"), lost.get("signal"), lost["invocation"], lost["attempt"]),
                         (code, number, invocation, 1))
        self.assertEqual(nervebox.events(run).count("dispatched"), 2)
        self.assertNotIn(nervebox.worker_pid(workflow), (0, worker))
        (died,) = nervebox.happened(workflow, "worker-died")
        self.assertEqual(died["invocation"], invocation)
        return run, invocation

    def by(self, number):
        return lambda worker: nervebox.kill_process(worker, number)

    def test_segv(self):
        self.dies("die-of-segv", self.by(signal.SIGSEGV), ("signal", "core-dump"), number="SIGSEGV")

    def test_abrt(self):
        self.dies("die-of-abrt", self.by(signal.SIGABRT), ("signal", "core-dump"), number="SIGABRT")

    def test_kill(self):
        run, invocation = self.dies("die-of-kill", self.by(signal.SIGKILL), ("signal",), number="SIGKILL")
        shown = ctl("workflow", "show", run).stdout
        for word in ("worker-lost", "SIGKILL", invocation):
            self.assertIn(word, shown)

    def test_parity_028_exit_0_that_nobody_asked_for(self):
        # A worker ends with 0 on SIGTERM; systemd does not restart it then, so nerve does.
        self.dies("die-of-term", self.by(signal.SIGTERM), ("exit-code",), code=0)

    def test_all_of_the_unit_is_killed(self):
        kill = lambda worker: (nervebox.worker_cgroup("die-of-cgroup") / "cgroup.kill").write_text("1")
        self.dies("die-of-cgroup", kill, ("signal",), number="SIGKILL")

    def test_watchdog(self):
        def hang(worker):
            # Its own is 30 s; root may say otherwise in its name.
            os.kill(worker, signal.SIGSTOP)
            nervebox.sh("systemd-notify", f"--pid={worker}", "WATCHDOG_USEC=500000",
                        env={**os.environ, "NOTIFY_SOCKET": "/run/systemd/notify"})
        self.dies("die-of-watchdog", hang, ("watchdog",), number="SIGABRT")

    def exits(self, workflow, code):
        with nervebox.worker_that(workflow, f"lines = connected(); heard('start-thread'); sys.exit({code})"):
            waiter = nervebox.Waiter(workflow)
            self.begun(waiter.run, 1, attempt=2)
            self.completes(waiter.run, 2)
        self.assertEqual(waiter.status(), 0)
        self.assertEqual([what[2] for what in self.log(waiter.run)], [2] * 4)
        (lost,) = nervebox.losses(waiter.run)
        self.assertEqual((lost["cause"], lost["code"], lost["attempt"]), ("exit-code", code, 1))

    def test_exit_3(self):
        self.exits("exit-three", 3)

    def test_parity_059_exit_0_with_a_run_is_no_success(self):
        self.exits("exit-zero", 0)

    def test_255_worker_exit(self):
        # It ends with 3 as soon as it has the run, each time.
        act = "mark.unlink(); lines = connected(); heard('start-thread', 'resume-thread'); sys.exit(3)"
        with nervebox.worker_that("crash-with-three", act):
            run, code = start("crash-with-three", wait=True)
            found = row(run)
            self.assertEqual((code, found["status"], found["exitCode"], found["result"]), (255, "crashed", 255, "worker-exit:3"))
            self.assertEqual([(lost["cause"], lost["code"], lost["attempt"]) for lost in nervebox.losses(run)],
                             [("exit-code", 3, attempt) for attempt in (1, 2, 3)])

    def test_parity_019_021_each_workflow_has_a_worker_and_a_death_of_its_own(self):
        other, run = start("live-on"), start("die-of-neighbour")
        self.begun(other, 1)
        self.begun(run, 1)
        bystander, worker = nervebox.worker_pid("live-on"), nervebox.worker_pid("die-of-neighbour")
        self.assertNotEqual(bystander, worker)
        nervebox.kill_process(worker)
        self.begun(run, 1, attempt=2)
        for one, count in ((other, 1), (run, 3)):
            self.completes(one, count)
        self.assertEqual(nervebox.worker_pid("live-on"), bystander)
        self.once(other, 1)
        self.assertEqual(nervebox.losses(other), [])

    def test_parity_058_073_all_runs_of_the_worker_resume_and_those_that_wait_still_wait(self):
        *runs, waiting = [start("die-with-many") for _ in range(4)]
        for run in runs:
            self.begun(run, 1)
        self.go(runs[0], 1)
        self.begun(runs[0], 2)
        nervebox.kill_process(nervebox.worker_pid("die-with-many"))
        self.begun(runs[0], 2, attempt=2)
        for run in runs[1:]:
            self.begun(run, 1, attempt=2)
        self.assertEqual(stored(waiting)["status"], "queued")
        for run in [*runs, waiting]:
            self.completes(run, 2)
        self.kept(runs[0], 2)
        self.once(waiting, 2)
        self.assertEqual([len(nervebox.losses(run)) for run in (*runs, waiting)], [1, 1, 1, 0])

    def test_nerved_dies_with_its_worker(self):
        run = start("die-of-both")
        self.begun(run, 1)
        self.go(run, 1)
        self.begun(run, 2)
        worker, nerved = nervebox.worker_pid("die-of-both"), nervebox.nerved_pid()
        os.kill(nerved, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        self.begun(run, 2, attempt=2)
        self.answers()
        self.completes(run, 3)
        self.kept(run, 3)
        (lost,) = nervebox.losses(run)
        self.assertEqual(lost["attempt"], 1)

    # ---- what is said of it

    def test_parity_038_039_the_journal_quotes_its_last_words(self):
        workflow, run = "speak-at-last", start("speak-at-last")
        self.begun(run, 1)
        unit = nervebox.unit_of(workflow)
        wait_for(lambda: WORDS[-1] in [entry["MESSAGE"] for entry in nervebox.journal(f"_SYSTEMD_UNIT={unit}")], "its words")
        nervebox.kill_process(nervebox.worker_pid(workflow))
        self.begun(run, 1, attempt=2)
        said = wait_for(lambda: [str(entry["MESSAGE"]) for entry in nervebox.journal("_SYSTEMD_UNIT=nerve.service")
                                 if WORDS[-1] in str(entry["MESSAGE"])], "nerve to quote it")
        self.assertEqual(len(said), 1, said)
        for word in (workflow, "SIGKILL", WORDS[-60]):
            self.assertIn(word, said[0])
        self.assertNotIn(WORDS[-120], said[0], "more than 2 KiB are quoted")
        self.completes(run, 1)


class Guilty(GatedCase):
    """One run kills its worker each time: it ends, and its siblings go on."""

    definitions = {"find-guilty": prompted(rounds(GUILTY, 2, worker=WRITES, concurrency=4)),
                   "forgive-progress": gated(4)}

    def test_parity_059_the_guilty_run_crashes_and_its_siblings_complete(self):
        siblings = [start("find-guilty", "innocent") for _ in range(3)]
        for run in siblings:
            self.begun(run, 1)
            self.go(run, 1)
            self.begun(run, 2)
        guilty = nervebox.Waiter("find-guilty", "guilty")
        # After two deaths each resumes alone: until then no sibling says a thing, then each at once.
        for run in siblings:
            nervebox.wait_event(run, "worker-lost", 2)
            self.go(run)
        self.assertEqual(guilty.status(), 255)
        found = row(guilty.run)
        self.assertEqual((found["status"], found["exitCode"], found["result"], found["rounds"]), ("crashed", 255, "worker-died", 0))
        self.assertEqual([(lost["cause"], lost["signal"], lost["attempt"]) for lost in nervebox.losses(guilty.run)],
                         [("signal", "SIGKILL", attempt) for attempt in (1, 2, 3)])
        nervebox.assert_gone(guilty.run)
        for run in siblings:
            nervebox.stored_end(run)
            self.whole(run, 2)
            self.kept(run, 2)
            self.assertEqual(len(nervebox.losses(run)), 2, "it was not alone when it was found out")
        self.assertEqual(len(nervebox.happened("find-guilty", "worker-died")), 3)
        # And nothing of it is left: the next run is as good as the first.
        after = start("find-guilty", "innocent")
        self.completes(after, 2)
        self.assertEqual(nervebox.losses(after), [])

    def test_a_new_round_is_a_new_beginning(self):
        run = start("forgive-progress")
        attempt = 1
        for number in (1, 2):
            for _ in range(2):
                self.begun(run, number, attempt)
                nervebox.kill_process(nervebox.worker_pid("forgive-progress"))
                attempt += 1
            self.begun(run, number, attempt)
            self.go(run, number)
        self.begun(run, 3, attempt)
        self.completes(run, 4)
        self.kept(run, 4)
        self.assertEqual(len(nervebox.losses(run)), 4)


class NotReady(GatedCase):
    """A worker that is not ready in 5 s is killed, and that is a death."""

    definitions = {"stay-mute": gated(1), "start-for-ever": gated(1)}

    def test_parity_023_024_a_worker_that_does_not_get_ready_is_killed(self):
        # One is up for systemd and never connects, the other does not come up.
        with nervebox.worker_that("stay-mute", "time.sleep(1000)"), nervebox.drop_in("start-for-ever", self.slow()):
            begun = time.monotonic()
            runs = {name: start(name) for name in ("stay-mute", "start-for-ever")}
            for name, run in runs.items():
                self.begun(run, 1)
                self.assertTrue(4.5 < time.monotonic() - begun < 10, time.monotonic() - begun)
                (died,) = nervebox.happened(name, "worker-died")
                self.assertEqual(died["cause"], "not-ready")
                # It never had the run.
                self.assertEqual(nervebox.losses(run), [])
                self.completes(run, 1)
                self.once(run, 1)

    def slow(self):
        """A drop-in with which the first start takes for ever."""
        program = nervebox.replace(SCRATCH / "start-for-ever.sh", f"[ -e {SCRATCH}/started-once ] && exit 0\n"
                                   f"touch {SCRATCH}/started-once\nexec sleep 1000\n")
        return f"[Service]\nExecStartPre=/bin/sh {program}\n"


class Strange(GatedCase):
    """Workers that say what they should not."""

    definitions = {"report-error": gated(1), "say-nonsense": gated(1), "end-with-42": gated(1)}

    def test_parity_052_an_error_of_a_worker_is_logged_and_ends_nothing(self):
        act = ("lines = connected(); heard('start-thread'); said(type='error', error='out of paper 4711'); "
               "heard('nothing')")
        with nervebox.worker_that("report-error", act):
            run = start("report-error")
            wait_for(lambda: any("out of paper 4711" in str(entry["MESSAGE"]) for entry in nervebox.journal("-n", "200")),
                     "the error to be logged")
            self.assertEqual(stored(run)["status"], "started")
            nervebox.kill_process(nervebox.worker_pid("report-error"))
            self.completes(run, 1)

    def test_parity_053_what_nobody_understands_costs_the_connection_and_nothing_else(self):
        act = "lines = connected(); heard('start-thread'); said(type='nonsense', runId='x'); heard('error'); sys.exit(7)"
        nerved = nervebox.nerved_pid()
        with nervebox.worker_that("say-nonsense", act):
            run = start("say-nonsense")
            self.completes(run, 1)
        self.assertEqual(nervebox.nerved_pid(), nerved)
        # It was told so: else it would have ended with another status.
        self.assertEqual([lost["code"] for lost in nervebox.losses(run)], [7])

    def test_parity_051_a_failure_with_a_code_of_its_own_is_1_and_the_code_is_kept(self):
        act = ("lines = connected(); run = heard('start-thread')['runId']; "
               "said(type='thread-workflow-message', runId=run, round=1, message=dict(role='r1', content='no', timestamp=1, "
               "meta=dict(status='error', exitCode=42, stderr='', result='exit-code:42'))); "
               "said(type='thread-event', runId=run, eventType='failed', exitCode=1, result='exit-code:42'); "
               "heard('event-ack'); sys.exit(0)")
        with nervebox.worker_that("end-with-42", act):
            run, code = start("end-with-42", wait=True)
        found = row(run)
        self.assertEqual((code, found["status"], found["exitCode"], found["result"]), (1, "failed", 1, "exit-code:42"))


class Limit(GatedCase):
    """Six deaths within a minute, or what the definition says, and the workflow is blocked until it is reset."""

    definitions = {"fill-limit": gated(2), "drop-extra": gated(1, overflow="drop"), "keep-latest": gated(1, overflow="latest"),
                   "die-twice": gated(1, worker={**WRITES, "StartLimitBurst": 2}),
                   "die-slowly": gated(1, worker={**WRITES, "StartLimitBurst": 2, "StartLimitIntervalSec": "3s"}),
                   "come-and-go": gated(1), "be-reset-often": gated(1), "wait-in-vain": gated(1)}

    def work(self, workflow):
        """A run, to its end; then its worker is idle. Returns the worker."""
        self.completes(start(workflow), len(self.definitions[workflow]["roles"]))
        return nervebox.wait_ready(workflow)

    def deaths(self, workflow, times):
        """So many deaths of the idle worker, each of one that was ready; but for the last its successor is, too."""
        worker = nervebox.wait_ready(workflow)
        for _ in range(times - 1):
            nervebox.kill_process(worker)
            worker = nervebox.wait_ready(workflow, after=worker)
        nervebox.kill_process(worker)
        return worker

    def block(self, workflow, times=6):
        self.work(workflow)
        self.deaths(workflow, times)
        nervebox.wait_worker(workflow, "blocked")

    def explained(self, text, workflow):
        """It says how it stands and what to do about it."""
        self.assertIn("blocked", text)
        self.assertIn(f"nervectl workflow reset {workflow}", text)

    def test_parity_029_030_031_055_056_057_the_sixth_death_blocks_until_a_reset(self):
        workflow = "fill-limit"
        self.work(workflow)
        # That each was ready before it died clears nothing.
        worker = nervebox.wait_ready(workflow, after=self.deaths(workflow, 5))
        waiter = nervebox.Waiter(workflow)
        self.begun(waiter.run, 1)
        waiting = start(workflow)
        self.assertEqual(nervebox.happened(workflow, "workflow-blocked"), [])
        nervebox.kill_process(worker)
        self.assertEqual(waiter.status(), 255)
        found = row(waiter.run)
        self.assertEqual((found["status"], found["exitCode"], found["result"]), ("crashed", 255, "start-limit-hit"))
        nervebox.assert_gone(waiter.run)
        nervebox.wait_worker(workflow, "blocked")
        self.assertEqual(stored(waiting)["status"], "queued")
        self.assertEqual(len(nervebox.happened(workflow, "worker-died")), 6)
        # Nothing gets past it, and everything says why.
        tried = Tried(workflow)
        self.explained(tried.said, workflow)
        self.explained(ctl("status").stdout, workflow)
        for run in (waiting, tried.run):
            self.explained(ctl("workflow", "show", run).stdout, workflow)
        for disturb in (nervebox.restart_nerve, self.kill_nerved, lambda: systemctl("daemon-reload"), nervebox.reload):
            disturb()
            nervebox.wait_worker(workflow, "blocked")
            self.assertEqual([stored(run)["status"] for run in (waiting, tried.run)], ["queued"] * 2)
            self.assertEqual(nervebox.worker_pid(workflow), 0)
        nervebox.reset(workflow)
        for run in (waiting, tried.run):
            self.begun(run, 1)
            self.completes(run, 2)
            self.once(run, 2)
        # All is forgotten: one more is one, not the seventh.
        self.assertNotEqual(nervebox.status(workflow)["worker"], "blocked")
        nervebox.wait_ready(workflow, after=self.deaths(workflow, 2))
        self.work(workflow)

    def test_drop_refuses(self):
        workflow = "drop-extra"
        self.block(workflow)
        for options in ((), ("--wait",)):
            tried = Tried(workflow, *options, check=75)
            found = row(tried.run)
            self.assertEqual((found["status"], found["exitCode"], found["result"]), ("dropped", 75, "blocked"))
            self.explained(tried.said, workflow)
        nervebox.reset(workflow)
        self.work(workflow)

    def test_latest_keeps_the_newest(self):
        workflow = "keep-latest"
        self.block(workflow)
        older, newer = start(workflow), start(workflow)
        self.assertEqual((nervebox.stored_end(older)["result"], stored(newer)["status"]), ("queue-full", "queued"))
        nervebox.reset(workflow)
        self.completes(newer, 1)

    def test_a_run_that_waits_can_be_killed_and_aborted(self):
        workflow = "wait-in-vain"
        self.block(workflow)
        killed, aborted = start(workflow), start(workflow)
        ctl("workflow", "kill", killed)
        nervebox.abort(aborted)
        self.assertEqual([nervebox.stored_end(run)["exit_code"] for run in (killed, aborted)], [137, 143])
        # No worker, nothing to drain; and that lifts no block.
        nervebox.drain(workflow, "--wait")
        nervebox.wait_worker(workflow, "blocked")

    def test_the_definition_says_how_many(self):
        self.block("die-twice", times=2)
        self.assertEqual(len(nervebox.happened("die-twice", "worker-died")), 2)

    def test_the_definition_says_how_fast(self):
        workflow = "die-slowly"
        self.work(workflow)
        self.deaths(workflow, 1)
        died = time.monotonic()
        nervebox.wait_ready(workflow)
        wait_for(lambda: time.monotonic() - died > 3.2, "the first death to be forgotten")
        worker = nervebox.wait_ready(workflow, after=self.deaths(workflow, 1))
        self.work(workflow)
        nervebox.kill_process(worker)
        nervebox.wait_worker(workflow, "blocked")

    def test_cold_starts_and_drains_count_for_nothing(self):
        workers = set()
        for _ in range(10):
            workers.add(self.work("come-and-go"))
            nervebox.drain("come-and-go", "--wait")
        self.assertEqual(len(workers), 10)
        self.assertEqual(nervebox.happened("come-and-go", "worker-died"), [])
        self.assertEqual(nervebox.happened("come-and-go", "workflow-blocked"), [])
        self.work("come-and-go")

    def test_resets_forget(self):
        # Nine deaths in a minute, and never six without a reset between.
        self.work("be-reset-often")
        for _ in range(3):
            nervebox.wait_ready("be-reset-often", after=self.deaths("be-reset-often", 3))
            nervebox.reset("be-reset-often")
        self.work("be-reset-often")
        self.assertEqual(nervebox.happened("be-reset-often", "workflow-blocked"), [])

    def test_what_is_not_there_cannot_be_reset(self):
        self.assertIn("no-such-flow", nervebox.reset("no-such-flow", check=66).stderr)
