"""nerved, systemd and workers come and go: nothing is lost, nothing runs twice.

Parity 028, 032, 036, 041, 044, 058-062 and 072: workers come back, runs resume from their threads, queued runs keep what
they were started with."""

import os
import re
import signal
import time

import nervebox
from nervebox import GATED, SCRATCH, WRITES, GatedCase, command, ctl, rounds, row, start, stored, systemctl, wait_for


class Nerved(GatedCase):
    definitions = {
        "take-rounds": rounds(GATED, 3, worker=WRITES),
        "take-rounds-together": rounds(GATED, 2, worker=WRITES, concurrency=3),
        "fail-late": command(f"cd {SCRATCH}; echo begin 1 1 >>$NERVE_RUN_ID.log; until [ -e $NERVE_RUN_ID.go.all ]; do sleep 0.02; done; exit 7",
                             worker=WRITES),
        "time-out-late": command("exec sleep 1000", timeout="2s"),
        "sleep-on": command("exec sleep 1000", concurrency=4),
        "say-prompt": {"roles": {"r1": {"exec": ["/bin/sh", "-c", f"cat; until [ -e {SCRATCH}/go.prompts ]; do sleep 0.02; done"],
                                        "prompt": "{{ start.content }}"}},
                       "graph": {"$START": "r1", "r1": {"ok": "$END"}}, "worker": WRITES},
    }

    def across(self, disturb):
        """Through all of `disturb` the role keeps its pid, the worker too; the run ends right and --wait with it."""
        waiter = nervebox.Waiter("take-rounds", "across")
        run = waiter.run
        self.begun(run, 1)
        self.go(run, 1)
        self.begun(run, 2)
        role, worker = self.role_pid(run), nervebox.worker_pid("take-rounds")
        disturb()
        self.assertEqual(nervebox.alive(role), role)
        self.assertEqual(nervebox.worker_pid("take-rounds"), worker)
        self.assertEqual((row(run)["status"], row(run)["rounds"]), ("started", 1))
        self.go(run)
        self.assertEqual(waiter.status(), 0)
        self.whole(run, 3)
        self.once(run, 3)
        self.assertEqual(nervebox.worker_pid("take-rounds"), worker)
        self.assertNotIn("worker-lost", nervebox.events(run))
        self.assertEqual(nervebox.events(run).count("dispatched"), 1)
        nervebox.assert_gone(run, role)

    def test_restart(self):
        self.across(nervebox.restart_nerve)

    def test_kill_9(self):
        self.across(self.kill_nerved)

    def test_both_several_times(self):
        def disturb():
            for _ in range(3):
                self.kill_nerved()
                nervebox.restart_nerve()
        self.across(disturb)

    def test_stopped_and_started(self):
        def disturb():
            systemctl("stop", "nerve.service")
            systemctl("start", "nerve.service")
        self.across(disturb)

    def test_hung_and_killed(self):
        def disturb():
            os.kill(nervebox.nerved_pid(), signal.SIGSTOP)
            self.kill_nerved()
        self.across(disturb)

    def test_the_exit_code_survives(self):
        for disturb in (nervebox.restart_nerve, self.kill_nerved):
            waiter = nervebox.Waiter("fail-late")
            self.begun(waiter.run, 1)
            disturb()
            self.go(waiter.run)
            self.assertEqual(waiter.status(), 1)
            self.assertEqual(row(waiter.run)["result"], "exit-code:7")

    def test_a_timeout_goes_on(self):
        begun = time.monotonic()
        waiter = nervebox.Waiter("time-out-late")
        pids = nervebox.processes(waiter.run)
        self.kill_nerved()
        self.assertEqual(waiter.status(), 124)
        self.assertTrue(2 <= time.monotonic() - begun < 5, time.monotonic() - begun)
        nervebox.assert_gone(waiter.run, pids)

    def test_kill_works_after_a_restart(self):
        for disturb in (nervebox.restart_nerve, self.kill_nerved):
            waiter = nervebox.Waiter("sleep-on")
            pids = nervebox.processes(waiter.run)
            disturb()
            self.assertEqual(nervebox.alive(pids), pids)
            ctl("workflow", "kill", waiter.run)
            self.assertEqual(waiter.status(), 137)
            nervebox.assert_gone(waiter.run, pids)

    def test_queued_runs_survive_with_their_prompts(self):
        prompts = ["first", "second\nwith a line", "", "dritte – \u2028 \u0001 'quoted'"]
        runs = [start("say-prompt", prompt) for prompt in prompts]
        nervebox.processes(runs[0])
        systemctl("stop", "nerve.service")
        self.assertEqual([stored(run)["status"] for run in runs], ["started", *["queued"] * 3])
        systemctl("start", "nerve.service")
        self.kill_nerved()
        (SCRATCH / "go.prompts").touch()
        for run, prompt in zip(runs, prompts):
            found = nervebox.ended(run)
            self.assertEqual((found["status"], found["exitCode"]), ("completed", 0))
            self.assertEqual([one["content"] for one in nervebox.thread(run)], [prompt, prompt])
            self.assertEqual(nervebox.run_json(run)["prompt"], prompt)
        # In the order in which they were accepted.
        self.assertEqual(runs, sorted(runs, key=lambda run: row(run)["startedAt"]))

    # ---- stopped

    def test_stop_stays_stopped_while_workers_wait_and_nothing_is_lost(self):
        runs = [start("take-rounds-together") for _ in range(3)]
        for run in runs:
            self.begun(run, 1)
        roles, worker = {}, nervebox.worker_pid("take-rounds-together")
        for run in runs:
            roles[run] = self.role_pid(run)
        systemctl("stop", "nerve.service")
        # The job of the socket ends after that of the service.
        nervebox.wait_for(lambda: not os.path.exists("/run/nerve/worker.sock"), "the socket to be removed")
        for run in runs[:2]:
            self.assertEqual(nervebox.alive(roles[run]), roles[run])
        # A role ends meanwhile: its worker holds on to what it said, and begins no other round.
        for run in runs[:2]:
            self.go(run)
            wait_for(lambda: not nervebox.alive(roles[run]), f"the role of run {run} to end")
            wait_for(lambda: not nervebox.is_populated(nervebox.cgroup_of(run)), "its cgroup to be empty")
        # The worker asks for nerve all the time, for longer than its longest pause, and does not start it.
        quiet = time.monotonic() + 6
        wait_for(lambda: time.monotonic() > quiet or systemctl("is-active", "nerve.service", "nerve.socket", check=False).stdout
                 != "inactive\ninactive\n", "six seconds without nerve")
        self.assertEqual(systemctl("is-active", "nerve.service", "nerve.socket", check=False).stdout, "inactive\ninactive\n")
        self.assertEqual(nervebox.worker_pid("take-rounds-together"), worker)
        self.assertEqual(nervebox.alive(roles[runs[2]]), roles[runs[2]])
        for run in runs[:2]:
            self.assertEqual(self.log(run), [("begin", 1, 1), ("end", 1, 1)])
        ctl("status", check=69)
        systemctl("start", "nerve.service")
        self.go(runs[2])
        for run in runs:
            self.assertEqual(nervebox.ended(run)["exitCode"], 0)
            self.whole(run, 2)
            self.once(run, 2)
        self.assertEqual(nervebox.worker_pid("take-rounds-together"), worker)

    def test_a_waiting_client_outlives_a_nerve_that_is_stopped(self):
        waiter = nervebox.Waiter("fail-late")
        self.begun(waiter.run, 1)
        role = self.role_pid(waiter.run)
        systemctl("stop", "nerve.service")
        self.go(waiter.run)
        wait_for(lambda: not nervebox.alive(role), "the role to end")
        self.assertIsNone(waiter.process.poll(), "start --wait gave up")
        systemctl("start", "nerve.service")
        self.assertEqual(waiter.status(), 1)

    def test_target_stops_workers_first_and_the_runs_go_on_afterwards(self):
        runs = [start("take-rounds"), start("take-rounds")]
        self.begun(runs[0], 1)
        self.go(runs[0], 1)
        self.begun(runs[0], 2)
        pids = nervebox.processes(runs[0])
        systemctl("start", "nerve.target")
        systemctl("stop", "nerve.target")
        # It returns when all are gone.
        self.assertEqual(nervebox.alive(pids), {})
        self.assertFalse(nervebox.is_populated(nervebox.SLICE))
        states = systemctl("is-active", "nerve.service", "nerve.socket", "nerve-wf.slice", check=False).stdout.split()
        self.assertEqual(states, ["inactive"] * 3)
        self.order(nervebox.unit_of("take-rounds"), "nerve.service")
        self.assertEqual([stored(run)["status"] for run in runs], ["started", "queued"])
        systemctl("start", "nerve.target")
        self.answers()
        for run in runs:
            self.go(run)
            self.assertEqual(nervebox.ended(run)["exitCode"], 0)
            self.whole(run, 3)
        self.once(runs[1], 3)
        # The first round was done, the second was cut off and is done again, from its beginning, as attempt 2.
        self.assertEqual(self.log(runs[0]), [("begin", 1, 1), ("end", 1, 1), ("begin", 2, 1), ("begin", 2, 2), ("end", 2, 2),
                                             ("begin", 3, 2), ("end", 3, 2)])

    def order(self, first, second):
        """`first` was stopped before `second`, by the journal."""
        messages = [(entry.get("UNIT"), entry["MESSAGE"]) for entry in nervebox.journal("_PID=1", "-n", "200")]
        stopped = [unit for unit, message in messages if message.startswith("Stopped ")]
        last = {unit: place for place, unit in enumerate(stopped)}
        self.assertLess(last[first], last[second], messages)

    # ---- daemon-reload

    def test_daemon_reload_leaves_the_worker_as_it_is(self):
        waiter = nervebox.Waiter("take-rounds")
        run, unit = waiter.run, nervebox.unit_of("take-rounds")
        self.begun(run, 1)
        role, worker = self.role_pid(run), nervebox.worker_pid("take-rounds")
        # What counts on its own, and what tells how it is kept.
        moving = ("CPUUsageNSec", "MemoryCurrent", "MemoryAvailable", "MemoryPeak", "TasksCurrent", "IOReadBytes", "IOWriteBytes",
                  "WatchdogTimestamp", "WatchdogTimestampMonotonic", "EffectiveMemoryMax", "EffectiveMemoryHigh",
                  "StateChangeTimestamp", "StateChangeTimestampMonotonic", "NFileDescriptorStore")
        def still():
            # Lists come in any order; with ExecStart= systemd shows when it ran last, and forgets that.
            found = {name: re.sub(r" ; start_time=.*? ; status=\S+", "", value) for name, value in nervebox.properties(unit).items()}
            return {name: sorted(value.split()) for name, value in found.items() if name not in moving}

        before = still()
        for _ in range(5):
            systemctl("daemon-reload")
        after = still()
        changed = {name: (before.get(name), after.get(name)) for name in {*before, *after} if before.get(name) != after.get(name)}
        self.assertEqual(changed, {}, "(before, after) five daemon-reloads")
        self.assertEqual(ctl("status", check=False).returncode, 0, "nerve does not answer after a daemon-reload")
        self.assertEqual(nervebox.alive(role), role)
        self.go(run)
        self.assertEqual(waiter.status(), 0)
        self.assertEqual(nervebox.worker_pid("take-rounds"), worker)
        self.whole(run, 3)
        self.once(run, 3)

    def test_daemon_reload_while_workers_go(self):
        # systemd says a lot at a daemon-reload, and nerve asks it about a worker at the same time: neither may wait for
        # the other.
        run = start("sleep-on")
        for attempt in (1, 2):
            nervebox.wait_event(run, "dispatched", attempt)
            pids = nervebox.processes(run)
            nervebox.sh("sh", "-c", f"systemctl daemon-reload; systemctl kill -s KILL {nervebox.unit_of('sleep-on')}; "
                                    "systemctl daemon-reload; systemctl daemon-reload")
            self.assertEqual(ctl("status", check=False, timeout=60).returncode, 0, "nerve does not answer")
        nervebox.wait_event(run, "dispatched", 3)
        ctl("workflow", "kill", "--grace", "0", run)
        nervebox.assert_gone(run, pids)

    def test_many_workers_stop_at_once(self):
        names = [f"crowd-{number}" for number in range(20)]
        for name in names:
            nervebox.define(name, command("true"))
        nervebox.restart_nerve()
        for run in [start(name) for name in names]:
            self.assertEqual(nervebox.ended(run)["exitCode"], 0)
        systemctl("stop", "nerve-wf@crowd-*.service")
        self.assertEqual(ctl("status", check=False, timeout=60).returncode, 0, "nerve does not answer")
        for name in names:
            nervebox.wait_worker(name, "stopped")
            nervebox.reset(name)
        for run in [start(name) for name in names]:
            self.assertEqual(nervebox.ended(run)["exitCode"], 0)

    # ---- workers

    def test_worker_is_killed_during_round_3(self):
        waiter = nervebox.Waiter("take-rounds")
        run = waiter.run
        for number in (1, 2):
            self.begun(run, number)
            self.go(run, number)
        self.begun(run, 3)
        role, worker = self.role_pid(run), nervebox.worker_pid("take-rounds")
        os.kill(worker, signal.SIGKILL)
        self.begun(run, 3, attempt=2)
        # The first attempt's processes are gone before the second's begin.
        self.assertEqual(nervebox.alive(role), {})
        self.go(run)
        self.assertEqual(waiter.status(), 0)
        self.whole(run, 3)
        self.assertEqual(self.log(run), [("begin", 1, 1), ("end", 1, 1), ("begin", 2, 1), ("end", 2, 1), ("begin", 3, 1),
                                         ("begin", 3, 2), ("end", 3, 2)])
        self.assertEqual([kind for kind in nervebox.events(run) if kind in ("dispatched", "worker-lost")],
                         ["dispatched", "worker-lost", "dispatched"])
        lost = next(event for event in nervebox.run_json(run)["events"] if event["type"] == "worker-lost")
        self.assertIn("SIGKILL", str(lost["payload"]))
        self.assertNotEqual(nervebox.worker_pid("take-rounds"), worker)

    def test_worker_is_killed_while_nerve_is_stopped(self):
        run = start("take-rounds")
        self.begun(run, 1)
        role = self.role_pid(run)
        worker = nervebox.worker_pid("take-rounds")
        systemctl("stop", "nerve.service")
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: nervebox.worker_pid("take-rounds") not in (0, worker), "another worker")
        systemctl("start", "nerve.service")
        self.begun(run, 1, attempt=2)
        self.assertEqual(nervebox.alive(role), {})
        self.go(run)
        self.assertEqual(nervebox.ended(run)["exitCode"], 0)
        self.whole(run, 3)
        self.assertEqual(nervebox.events(run).count("worker-lost"), 1)

    def test_worker_is_stopped_by_an_administrator_and_the_run_goes_on_after_a_reset(self):
        run = start("take-rounds")
        self.begun(run, 1)
        role = self.role_pid(run)
        systemctl("stop", nervebox.unit_of("take-rounds"))
        self.assertEqual(nervebox.alive(role), {})
        nervebox.wait_worker("take-rounds", "stopped")
        self.assertEqual((row(run)["status"], self.log(run)), ("started", [("begin", 1, 1)]))
        nervebox.reset("take-rounds")
        self.begun(run, 1, attempt=2)
        self.go(run)
        self.assertEqual(nervebox.ended(run)["exitCode"], 0)
        self.whole(run, 3)


class Storm(GatedCase):
    """20 runs at concurrency 4 while nerved is killed three times."""

    # Each round takes a moment, so that nerved dies in the middle of many.
    WORK = f"cd {SCRATCH}; echo begin $NERVE_ROUND $NERVE_ATTEMPT >>$NERVE_RUN_ID.log; sleep 0.2; echo end $NERVE_ROUND $NERVE_ATTEMPT >>$NERVE_RUN_ID.log; echo said $NERVE_ROUND"
    definitions = {"take-four": rounds(WORK, 4, worker=WRITES, concurrency=4),
                   "take-four-more": rounds(WORK, 4, worker=WRITES, concurrency=4)}

    def test_20_runs_while_nerved_is_killed_three_times(self):
        runs = [start(name) for name in self.definitions for _ in range(10)]
        waiters = {}
        for name in self.definitions:
            wait_for(lambda: nervebox.worker_pid(name), f"the worker of {name}")
            waiters[name] = nervebox.Waiter(name)
        runs += [waiter.run for waiter in waiters.values()]
        workers = {name: nervebox.worker_pid(name) for name in self.definitions}
        done = lambda: sum((stored(run) or {"rounds": 0})["rounds"] for run in runs)
        most = 0
        for share in (0.1, 0.35, 0.6):
            wait_for(lambda: done() >= share * 4 * len(runs), f"{share:.0%} of all rounds")
            live = [run for run in runs if stored(run)["status"] == "started"]
            most = max(most, len(live))
            self.assertTrue(live, "nothing runs at this moment")
            self.kill_nerved()
        for run in runs:
            self.assertEqual(nervebox.stored_end(run, 60)["status"], "completed")
        self.assertGreaterEqual(most, 4)
        for run in runs:
            self.whole(run, 4)
            self.once(run, 4)
            nervebox.assert_gone(run)
        for name, waiter in waiters.items():
            self.assertEqual(waiter.status(), 0, name)
        self.assertEqual({name: nervebox.worker_pid(name) for name in self.definitions}, workers)
        with nervebox.database() as connection:
            self.assertEqual(connection.execute("PRAGMA integrity_check").fetchone()[0], "ok")

    def test_more_than_concurrency_never_runs_at_once(self):
        runs = [start("take-four") for _ in range(8)]
        self.kill_nerved()
        for run in runs:
            self.assertEqual(nervebox.stored_end(run, 60)["exit_code"], 0)
        spans = sorted([(row(run)["startedAt"], 1) for run in runs] + [(row(run)["endedAt"], -1) for run in runs])
        live = most = 0
        for _, step in spans:
            live += step
            most = max(most, live)
        self.assertEqual(most, 4)
