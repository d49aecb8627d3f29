"""nervectl as somebody new types it: every verb and option, its exit statuses, what it prints and what not."""

import contextlib
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import tempfile
import time
import unittest
import unittest.mock

import dbuswire
import nervebox
from nervebox import ctl, sh, systemctl, wait_for

RUN_KEYS = ["run", "workflow", "status", "killing", "aborting", "exitCode", "result", "reason", "rounds", "createdAt",
            "startedAt", "endedAt", "dryRun"]
SHOW_KEYS = [*RUN_KEYS, "prompt", "maxRounds", "trigger", "definition", "unit", "waits", "events"]
ROUND_KEYS = ["round", "role", "content", "meta", "timestamp"]

STEPS = {"roles": {"first": {"exec": ["/bin/sh", "-c", "echo one; echo to the journal >&2"]},
                   "second": {"exec": ["/bin/sh", "-c", "cat; echo two"],
                              "prompt": "{{ start.content }}:{{ first.content }}:{{ round }}"}},
         "graph": {"$START": "first", "first": {"ok": "second"}, "second": {"ok": "$END"}}}
COUNT = {"roles": {"a": {"exec": ["/bin/sh", "-c", "echo $NERVE_ROUND"]}}, "graph": {"$START": "a", "a": {"ok": "a"}},
         "max_rounds": 6}


class Cli(nervebox.Case):
    definitions = {
        "take-steps": STEPS,
        "count-up": COUNT,
        "fail-once": nervebox.command("echo why >&2; exit 7"),
        "sleep-long": nervebox.command("trap 'exit 0' TERM; echo up >&2; sleep infinity & wait", concurrency=4),
        "queue-up": nervebox.command("exec sleep infinity", max_queue=1),
        "say-controls": nervebox.command(r"printf 'a\033[31mb\rc\tdé\342\200\256e\n\007f'; printf '\033[2Jx\n' >&2; exit 1"),
        "tell-stories": nervebox.command("echo \"line of $NERVE_RUN_ID\" >&2; cat /dev/null; while [ ! -e \"$GO\" ]; do "
                                         "sleep 0.05; done; echo more >&2", worker={"Environment": "GO=/run/nervebox-go"}),
        "write-much": nervebox.command("i=0; while [ $i -lt 20000 ]; do echo some line of it; i=$((i+1)); done"),
        "broken-one": {"graph": {}},
    }

    def one_line(self, done):
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertTrue(done.stderr.startswith("nervectl: "), done.stderr)
        return done.stderr

    def run_of(self, workflow, *options):
        run, _ = nervebox.start(workflow, *options, wait=True)
        return run

    # ---- start --------------------------------------------------------------------------------------------------

    def test_start_prints_the_id_alone(self):
        done = ctl("workflow", "start", "take-steps")
        self.assertRegex(done.stdout, r"\A[0-9a-f]{32}\n\Z")
        self.assertEqual(done.stderr, "")
        # A UUIDv7
        self.assertEqual(done.stdout[12], "7")
        self.assertIn(done.stdout[16], "89ab")
        self.assertEqual(nervebox.ended(done.stdout.strip())["status"], "completed")

    def test_start_takes_a_prompt_in_each_form(self):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("from a file\n")
            file.flush()
            for options, text, expected in (
                    (["-p", "text"], None, "text"), (["--prompt", "text"], None, "text"), (["--prompt=te xt"], None, "te xt"),
                    (["-p", "-x"], None, "-x"), (["-p", ""], None, ""), ([], None, ""),
                    (["--prompt-file", file.name], None, "from a file\n"), (["--prompt-file", "-"], "stdin ü", "stdin ü"),
                    (["--prompt-file=-"], "", "")):
                with self.subTest(options=options):
                    run = ctl("workflow", "start", "take-steps", *options, "--wait", input=text).stdout.strip()
                    thread = nervebox.thread(run)
                    self.assertEqual(thread[0]["content"], expected)
                    self.assertEqual(thread[2]["content"], f"{expected}:one:2two")
                    self.assertEqual(nervebox.run_json(run)["prompt"], expected)

    def test_wait_exits_with_the_runs_code(self):
        for workflow, options, code, words in (("take-steps", [], 0, None), ("fail-once", [], 1, "exit-code:7"),
                                               ("count-up", [], 2, "max-rounds"), ("count-up", ["--max-rounds", "2"], 2, None)):
            with self.subTest(workflow=workflow, options=options):
                done = ctl("workflow", "start", workflow, "--wait", *options, check=code)
                self.assertRegex(done.stdout, r"\A[0-9a-f]{32}\n\Z")
                if code:
                    self.assertRegex(done.stderr, rf"\A(nervectl: )?run [0-9a-f]{{8}} failed \({code}, [^\n]*\n\Z")
                    self.assertIn(words or "", done.stderr)
                else:
                    self.assertEqual(done.stderr, "")

    def test_max_rounds_beats_the_file(self):
        run = self.run_of("count-up", None, "--max-rounds", "2")
        self.assertEqual([m["content"] for m in nervebox.thread(run)[1:]], ["1", "2"])
        self.assertEqual(nervebox.run_json(run)["maxRounds"], 2)

    def test_the_id_is_out_before_the_end_and_an_interrupted_wait_ends_nothing(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(signal=number):
                waiter = nervebox.Waiter("sleep-long")
                pids = nervebox.processes(waiter.run)
                waiter.process.send_signal(number)
                _, stderr = waiter.process.communicate(timeout=10)
                self.assertEqual(waiter.process.returncode, code)
                self.assertIn("goes on", stderr)
                self.assertEqual(nervebox.alive(pids), pids)

    def test_wait_of_a_killed_run(self):
        waiter = nervebox.Waiter("sleep-long")
        nervebox.processes(waiter.run)
        ctl("workflow", "kill", waiter.run, "--reason", "enough\x1b")
        self.assertEqual(waiter.process.wait(10), 137)
        stderr = waiter.process.communicate()[1]
        self.assertIn("killed (137, killed)", stderr)
        self.assertIn(r"enough\u{1b}", stderr)

    def test_wait_of_a_dropped_run(self):
        runs = [nervebox.start("queue-up")]
        waiter = nervebox.Waiter("queue-up")  # waits in the queue
        runs.append(nervebox.start("queue-up"))  # and is thrown out by this one
        self.assertEqual(waiter.process.wait(10), 75)
        self.assertIn("queue-full", waiter.process.communicate()[1])
        self.assertEqual(nervebox.row(waiter.run)["status"], "dropped")

    # ---- list ---------------------------------------------------------------------------------------------------

    def test_list_is_newest_first_and_cut(self):
        runs = [self.run_of("take-steps") for _ in range(3)] + [self.run_of("fail-once")]
        self.assertEqual([run["run"] for run in nervebox.listed()][:4], runs[::-1])
        self.assertEqual([run["run"] for run in nervebox.listed("-n", "2")], runs[:1:-1])
        self.assertEqual([run["run"] for run in nervebox.listed("fail-once", "-n", "1")], runs[3:])
        self.assertEqual({run["workflow"] for run in nervebox.listed("take-steps")}, {"take-steps"})
        self.assertEqual(nervebox.listed("no-such-workflow"), [])

    def test_list_shows_50_by_default(self):
        with contextlib.ExitStack() as stack:
            for _ in range(52):
                stack.enter_context(subprocess.Popen(["nervectl", "workflow", "start", "queue-up"],
                                                     stdout=subprocess.DEVNULL))
        self.assertEqual(len(nervebox.listed()), 50)
        self.assertGreaterEqual(len(nervebox.listed("-n", "10000")), 52)
        self.assertEqual(len(ctl("workflow", "list").stdout.splitlines()), 51)

    def test_active_leaves_out_what_has_ended(self):
        ended = self.run_of("take-steps")
        runs = [nervebox.start("queue-up") for _ in range(2)]
        nervebox.wait_status(runs[0], "started")
        active = nervebox.listed("--active")
        self.assertEqual([run["run"] for run in active], runs[::-1])
        self.assertEqual([run["status"] for run in active], ["queued", "started"])
        self.assertNotIn(ended, [run["run"] for run in active])
        self.assertEqual([run["run"] for run in nervebox.listed("queue-up", "--active", "-n", "1")], runs[1:])

    def test_json_of_runs(self):
        queued = [nervebox.start("queue-up") for _ in range(2)][1]
        for run, expected in ((self.run_of("take-steps"), {"status": "completed", "exitCode": 0, "result": "success",
                                                           "reason": None, "rounds": 2, "killing": False}),
                              (queued, {"status": "queued", "exitCode": None, "result": None, "reason": None, "rounds": 0,
                                        "startedAt": None, "endedAt": None, "killing": False})):
            with self.subTest(expected["status"]):
                row, shown = nervebox.row(run), nervebox.run_json(run)
                self.assertEqual(list(row), RUN_KEYS)
                self.assertEqual(list(shown), SHOW_KEYS)
                self.assertEqual({key: shown[key] for key in RUN_KEYS}, row)
                self.assertEqual({key: row[key] for key in expected}, expected)
                for key in ("createdAt", "startedAt", "endedAt"):
                    if row[key] is not None:
                        self.assertLess(abs(row[key] / 1e6 - time.time()), 120, key)
                self.assertEqual(shown["unit"], f"nerve-wf@{row['workflow']}.service")
                self.assertEqual((shown["dryRun"], shown["prompt"]), (False, ""))
                self.assertIsInstance(shown["trigger"], dict)
                self.assertIsInstance(shown["events"], list)
                for event in shown["events"]:
                    self.assertEqual(list(event), ["seq", "type", "timestamp", "payload"])
                self.assertEqual(sorted(event["seq"] for event in shown["events"]),
                                 [event["seq"] for event in shown["events"]])
        self.assertRegex(nervebox.run_json(self.run_of("take-steps"))["definition"], r"^[0-9a-f]{64}$")
        self.assertIsNone(nervebox.run_json(queued)["definition"])
        text = ctl("workflow", "show", queued, "-o", "json").stdout
        self.assertEqual(len(json.loads(text)), 1)

    def test_tables(self):
        run = self.run_of("fail-once")
        lines = ctl("workflow", "list", "-n", "1").stdout.splitlines()
        self.assertEqual(lines[0].split(), ["RUN", "WORKFLOW", "STATUS", "EXIT", "RESULT", "ROUNDS", "CREATED", "TIME"])
        self.assertEqual(lines[1].split()[:6], [run[-8:], "fail-once", "failed", "1", "exit-code:7", "1"])
        self.assertEqual(ctl("workflow", "list", "-o", "table", "-n", "1").stdout.splitlines()[0], lines[0])
        text = ctl("workflow", "show", run).stdout
        for words in (run, "failed (1, exit-code:7)", "nerve-wf@fail-once.service"):
            self.assertIn(words, text)
        text = ctl("thread", run).stdout
        self.assertIn("stderr: why", text)
        self.assertIn("(error, exit-code:7)", text)

    # ---- thread -------------------------------------------------------------------------------------------------

    def test_thread_is_in_order_and_n_counts_rounds(self):
        run = self.run_of("count-up", "go")
        whole = nervebox.thread(run)
        self.assertEqual([list(message) for message in whole], [ROUND_KEYS] * 7)
        self.assertEqual([message["round"] for message in whole], list(range(7)))
        self.assertEqual((whole[0]["role"], whole[0]["content"]), ("__start__", "go"))
        meta = whole[0]["meta"]
        self.assertEqual((meta["runId"], meta["maxRounds"], meta["dryRun"]), (run, 6, False))
        self.assertIn("trigger", meta)
        self.assertEqual((whole[1]["meta"]["status"], whole[1]["meta"]["exitCode"]), ("ok", 0))
        self.assertEqual([m["timestamp"] for m in whole], sorted(m["timestamp"] for m in whole))
        for count, expected in ((1, [6]), (3, [4, 5, 6]), (6, [1, 2, 3, 4, 5, 6])):
            with self.subTest(n=count):
                self.assertEqual([m["round"] for m in nervebox.thread(run, "-n", str(count))], expected)
        self.assertEqual([m["round"] for m in nervebox.thread(run, "-n", "100")][-6:], [1, 2, 3, 4, 5, 6])
        self.assertLess(nervebox.thread(run, "-n", "1")[0]["round"], 7)

    def test_more_than_there_is_is_the_rounds_alone(self):
        # -n counts rounds, and the start is none: whether it comes along must not hang on how many there are.
        run = self.run_of("count-up", "go")
        self.assertEqual([m["round"] for m in nervebox.thread(run, "-n", "7")],
                         [m["round"] for m in nervebox.thread(run, "-n", "6")])

    # ---- tails --------------------------------------------------------------------------------------------------

    def test_any_unique_tail_will_do(self):
        runs = [self.run_of("take-steps") for _ in range(20)]
        run = runs[0]
        for tail in (run, run[-8:], run[-12:].upper()):
            with self.subTest(tail=tail):
                self.assertEqual(nervebox.run_json(tail)["run"], run)
        ends = [run[-1] for run in nervebox.listed("-n", "10000") for run in [run["run"]]]
        common = next(end for end in ends if ends.count(end) > 1)
        for line in (["workflow", "show"], ["workflow", "kill"], ["thread"], ["logs"]):
            with self.subTest(line=line):
                self.one_line(ctl(*line, common, check=67))
                self.one_line(ctl(*line, "0" * 32, check=66))

    # ---- kill ---------------------------------------------------------------------------------------------------

    def test_kill_prints_nothing_and_returns_at_the_end(self):
        run = nervebox.start("sleep-long")
        pids = nervebox.processes(run, 2)
        done = ctl("workflow", "kill", run[-8:], "--reason", "too slow", "--grace", "2s")
        self.assertEqual((done.stdout, done.stderr), ("", ""))
        row = nervebox.row(run)
        self.assertEqual((row["status"], row["exitCode"], row["result"], row["reason"]), ("killed", 137, "killed", "too slow"))
        nervebox.assert_gone(run, pids)
        # Once more is no error.
        self.assertEqual(ctl("workflow", "kill", run).stderr, "")
        self.assertEqual(ctl("workflow", "kill", "--no-block", run).stderr, "")

    def test_no_block(self):
        run = nervebox.start("sleep-long")
        nervebox.processes(run)
        done = ctl("workflow", "kill", "--no-block", run)
        self.assertEqual((done.stdout, done.stderr), ("", ""))
        self.assertEqual(nervebox.ended(run)["exitCode"], 137)

    def test_what_has_ended_is_not_killed(self):
        for options in ([], ["--no-block"]):
            with self.subTest(options=options):
                run = self.run_of("fail-once")
                line = self.one_line(ctl("workflow", "kill", run, *options, check=68))
                self.assertIn("had already ended: failed (1, exit-code:7)", line)

    def test_of_several_all_are_tried_and_the_first_error_counts(self):
        over = self.run_of("take-steps")
        for errors, status in ((["0" * 32, over], 66), ([over, "0" * 32], 68), (["zzz", over], 65)):
            for options in ([], ["--no-block"]):
                with self.subTest(errors=errors, options=options):
                    runs = [nervebox.start("sleep-long") for _ in range(2)]
                    done = ctl("workflow", "kill", *options, runs[0], *errors, runs[1], check=status)
                    self.assertEqual(len(done.stderr.splitlines()), 2, done.stderr)
                    for run in runs:
                        self.assertEqual(nervebox.ended(run)["exitCode"], 137)

    def test_an_interrupted_kill_stays_in_force(self):
        run = nervebox.start("queue-up")
        nervebox.processes(run)
        sh("systemctl", "kill", "--signal=STOP", "--kill-whom=main", nervebox.unit_of("queue-up"))
        with subprocess.Popen(["nervectl", "workflow", "kill", "--grace", "3s", run], stderr=subprocess.PIPE,
                              text=True) as kill:
            wait_for(lambda: nervebox.row(run)["killing"], "the kill to be in force")
            self.assertIn("started (killing)", ctl("workflow", "list", "-n", "1").stdout)
            kill.send_signal(signal.SIGINT)
            self.assertIn("stays in force", kill.communicate(timeout=10)[1])
            self.assertEqual(kill.returncode, 130)
        self.assertEqual(nervebox.ended(run)["exitCode"], 137)

    # ---- logs ---------------------------------------------------------------------------------------------------

    def test_logs_are_of_that_run_alone(self):
        go = pathlib.Path("/run/nervebox-go")
        go.touch()
        self.addCleanup(go.unlink, missing_ok=True)
        runs = [self.run_of("tell-stories") for _ in range(3)]
        sh("journalctl", "--sync")
        for run in runs:
            text = ctl("logs", run).stdout
            self.assertIn(f"line of {run}", text)
            self.assertIn("more", text)
            for other in set(runs) - {run}:
                self.assertNotIn(other, text)
        self.assertEqual(len(ctl("logs", runs[0], "-n", "1").stdout.splitlines()), 1)

    def test_logs_follow(self):
        go = pathlib.Path("/run/nervebox-go")
        go.unlink(missing_ok=True)
        self.addCleanup(go.unlink, missing_ok=True)
        run = nervebox.start("tell-stories")
        with subprocess.Popen(["nervectl", "logs", "-f", run], stdout=subprocess.PIPE, bufsize=0) as follow:
            self.addCleanup(follow.kill)
            seen = b""

            def read_until(words):
                nonlocal seen
                deadline = time.monotonic() + 20
                while words not in seen:
                    ready = select.select([follow.stdout], [], [], max(0, deadline - time.monotonic()))[0]
                    self.assertTrue(ready, f"{words!r} did not come: {seen!r}")
                    seen += os.read(follow.stdout.fileno(), 4096)
            read_until(f"line of {run}".encode())
            self.assertNotIn(b"more", seen)
            go.touch()
            read_until(b"more")
            follow.send_signal(signal.SIGINT)
            follow.wait(10)

    # ---- validate, status, usage --------------------------------------------------------------------------------

    def test_validate_needs_no_daemon(self):
        with tempfile.TemporaryDirectory() as folder:
            good = nervebox.define("good-one", nervebox.command("true"), folder)
            bad = nervebox.define("bad-one", nervebox.command("true") | {"rouls": 1}, folder)
            environment = {"PATH": "/usr/bin:/bin", "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent"}
            done = ctl("validate", good, env=environment)
            self.assertEqual((done.stdout, done.stderr), ("good-one: ok\n", ""))
            done = ctl("validate", good, bad, f"{folder}/none.yaml", check=65, env=environment)
            self.assertEqual(done.stdout, "good-one: ok\n")
            self.assertRegex(done.stderr, rf"(?m)^ *--> {re.escape(str(bad))}:\d+:\d+$")
            self.assertRegex(done.stderr, r"(?m)^ *--> \S+/none\.yaml:1:1$")
            self.assertTrue(done.stderr.endswith("2 errors in 2 of 3 files\n"), done.stderr)
            done = ctl("validate", "--strict", "-", input=pathlib.Path(good).read_text(), env=environment)
            self.assertEqual((done.stdout, done.stderr), ("good-one: ok\n", ""))
            # Somebody without rights may look at his own file.
            os.chmod(folder, 0o755)
            self.assertEqual(sh("setpriv", "--reuid=65534", "--clear-groups", "nervectl", "validate", good).stdout,
                             "good-one: ok\n")
        self.assertIn("broken-one.yaml:", ctl("validate", check=65).stderr)

    def test_status(self):
        run = nervebox.start("sleep-long")
        nervebox.processes(run)
        text = ctl("status").stdout
        self.assertRegex(text, r"^nerve \d+\.\d+\.\d+, started ")
        self.assertIn("1 running, 0 queued", text)
        row = next(line.split() for line in text.splitlines() if line.startswith("sleep-long "))
        self.assertEqual(row[:5], ["sleep-long", "ready", "1/4", "0/100", str(nervebox.worker_pid("sleep-long"))])
        self.assertRegex(text, r"(?m)^/etc/nerve/workflows/broken-one\.yaml:\d+:\d+: error: ")
        self.assertIn("(broken)", next(line for line in text.splitlines() if line.startswith("broken-one ")))
        answer = json.loads(ctl("status", "-o", "json").stdout)
        self.assertEqual(len(answer), 1)
        self.assertEqual(list(answer[0]), ["version", "startedAt", "running", "queued", "maxActive", "paused", "diskFull", "workflows"])
        self.assertEqual((answer[0]["running"], answer[0]["paused"]), (1, None))
        found = next(workflow for workflow in answer[0]["workflows"] if workflow["name"] == "sleep-long")
        self.assertEqual((found["worker"], found["running"], found["concurrency"], found["overflow"], found["onFull"]),
                         ("ready", 1, 4, "queue", "evict"))
        self.assertEqual(found["mainPid"], nervebox.worker_pid("sleep-long"))

    def test_who_asked_is_kept(self):
        run = nervebox.start("sleep-long")
        trigger = nervebox.run_json(run)["trigger"]
        self.assertEqual((trigger["type"], trigger["uid"], trigger["comm"]), ("client", 0, "nervectl"))
        with subprocess.Popen(["nervectl", "workflow", "kill", run]) as kill:
            self.assertEqual(kill.wait(20), 0)
        by = next(event for event in nervebox.run_json(run)["events"] if event["type"] == "kill-requested")["payload"]["by"]
        self.assertEqual(by, {"uid": 0, "pid": kill.pid, "comm": "nervectl", "unit": "init.scope"})
        self.assertIn(f"by uid 0 (nervectl, pid {kill.pid}), grace 5s", ctl("workflow", "show", run).stdout)
        # And over the bus.
        run = nervebox.start("sleep-long")
        with subprocess.Popen(["nervectl", "workflow", "kill", run], env=ON_THE_BUS) as kill:
            self.assertEqual(kill.wait(20), 0)
        by = next(event for event in nervebox.run_json(run)["events"] if event["type"] == "kill-requested")["payload"]["by"]
        self.assertEqual(by, {"uid": 0, "pid": kill.pid, "comm": "nervectl", "unit": "init.scope"})

    def test_a_key_that_is_none(self):
        for key in ("", "x" * 129, "a\nb", "\x7f"):
            with self.subTest(key=key):
                self.assertIn("key", self.one_line(ctl("workflow", "start", "take-steps", "--key", key, check=65)))
                with dbuswire.Connection() as bus:
                    self.assertEqual(bus.call(*dbuswire.MANAGER, "StartRun", "ssa{sv}", "take-steps", "", {"key": key}).error,
                                     "org.nerve1.Error.InvalidArgument")

    def test_usage(self):
        for line in ([], ["workflow"], ["workflow", "start"], ["workflow", "begin"], ["frobnicate"], ["--frobnicate"],
                     ["workflow", "start", "a", "b"], ["workflow", "start", "a", "-p"],
                     ["workflow", "start", "a", "-p", "x", "--prompt-file", "y"],
                     ["workflow", "start", "a", "--max-rounds", "0"], ["workflow", "start", "a", "--max-rounds", "10001"],
                     ["workflow", "start", "a", "--max-rounds", "x"], ["workflow", "start", "a", "-p", "x", "-p", "y"],
                     ["workflow", "list", "-n", "0"], ["workflow", "list", "-n", "-1"], ["workflow", "list", "-o", "xml"],
                     ["workflow", "show"], ["workflow", "show", "1", "2"], ["workflow", "kill"],
                     ["workflow", "kill", "1", "--grace", "soon"], ["workflow", "kill", "1", "--grace", "2h"],
                     ["thread"], ["thread", "1", "-n", "-1"], ["logs"], ["status", "x"], ["workflow", "list", "--all"],
                     ["workflow", "start", "a", "--key"], ["workflow", "abort"], ["workflow", "abort", "1", "2"],
                     ["workflow", "drain"], ["workflow", "drain", "a", "--timeout", "soon"], ["workflow", "reset"],
                     ["pause", "x"], ["resume", "x"], ["reload", "x"], ["status", "-o", "table"]):
            with self.subTest(line=line):
                done = ctl(*line, check=64)
                self.assertEqual(done.stdout, "")
                self.assertRegex(done.stderr, "(?i)usage|--help")

    def test_help_and_version(self):
        for line in (["--help"], ["-h"], ["workflow", "--help"], ["workflow", "start", "--help"], ["workflow", "list", "-h"],
                     ["workflow", "show", "-h"], ["workflow", "kill", "-h"], ["thread", "-h"], ["logs", "-h"],
                     ["validate", "-h"], ["status", "-h"], ["workflow", "abort", "-h"], ["workflow", "drain", "--help"],
                     ["workflow", "reset", "-h"], ["pause", "-h"], ["resume", "-h"], ["reload", "--help"]):
            with self.subTest(line=line):
                done = ctl(*line)
                self.assertIn("Usage: nervectl", done.stdout)
                self.assertEqual(done.stderr, "")
                self.assertLessEqual(max(map(len, done.stdout.splitlines())), 120)
        self.assertRegex(ctl("--version").stdout, r"^nervectl \d+\.\d+\.\d+\n$")

    def test_unknown_and_broken(self):
        self.assertIn("no-such-workflow", self.one_line(ctl("workflow", "start", "no-such-workflow", check=66)))
        done = ctl("workflow", "start", "broken-one", check=65)
        self.assertIn("/etc/nerve/workflows/broken-one.yaml:", done.stderr)
        self.assertEqual(done.stdout, "")

    def test_a_reason_that_is_too_long(self):
        run = nervebox.start("queue-up")
        self.one_line(ctl("workflow", "kill", run, "--reason", "x" * 1025, check=65))
        self.assertFalse(nervebox.row(run)["killing"])
        ctl("workflow", "kill", run, "--reason", "x" * 1024, "--grace", "0")
        self.assertEqual(nervebox.row(run)["reason"], "x" * 1024)

    # ---- what goes to a terminal --------------------------------------------------------------------------------

    def test_control_characters_are_escaped(self):
        done = ctl("workflow", "start", "say-controls", "-p", "p\x1b[2J\u202eq", "--wait", check=1)
        run = done.stdout.strip()
        for line in (["thread", run], ["workflow", "show", run], ["workflow", "list"], ["logs", run]):
            with self.subTest(line=line):
                text = subprocess.run(["nervectl", *line], capture_output=True, check=True).stdout.decode()
                self.assertNotRegex(text, "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
        self.assertIn(r"a\u{1b}[31mb\rc" + "\td\u00e9" + r"\u{202e}e", ctl("thread", run).stdout)
        # JSON says it all, and says it in ASCII control-free text.
        text = ctl("thread", run, "-o", "json").stdout
        self.assertNotRegex(text, "[\x00-\x09\x0b-\x1f]")
        self.assertEqual(json.loads(text)[1]["content"], "a\x1b[31mb\rc\td\u00e9\u202ee\n\x07f")

    def test_a_broken_pipe_is_quiet(self):
        run = self.run_of("write-much")
        for line in (["thread", run], ["thread", run, "-o", "json"], ["workflow", "list"], ["workflow", "show", run],
                     ["status"], ["--help"], ["validate"]):
            with self.subTest(line=line):
                read, write = os.pipe()
                os.close(read)
                done = subprocess.run(["nervectl", *line], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
                os.close(write)
                if line != ["validate"]:
                    self.assertEqual(done.stderr, "")
                    self.assertEqual(done.returncode, 0)
                self.assertNotIn("panicked", done.stderr)
        with open("/dev/full", "w") as full:
            done = subprocess.run(["nervectl", "workflow", "list"], stdout=full, stderr=subprocess.PIPE, text=True,
                                  check=False)
            self.assertEqual(done.returncode, 74)
            self.one_line(done)

    def test_start_into_a_broken_pipe_starts(self):
        read, write = os.pipe()
        os.close(read)
        before = len(nervebox.listed("take-steps"))
        done = subprocess.run(["nervectl", "workflow", "start", "take-steps", "--wait"], stdout=write, check=False)
        os.close(write)
        self.assertEqual(done.returncode, 0)
        self.assertEqual(len(nervebox.listed("take-steps")), before + 1)

    def test_closed_descriptors(self):
        done = sh("sh", "-c", "nervectl workflow list <&- >&- 2>&-; echo $?")
        self.assertIn(done.stdout.strip(), ("0", "74"))


# nervectl as root of a machine whose nerve has no private socket.
ON_THE_BUS = {"PATH": "/usr/bin:/bin", "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={dbuswire.ADDRESS}"}
VERBS = (["workflow", "start", "say-good"], ["workflow", "start", "say-good", "--wait"], ["workflow", "list"],
         ["workflow", "list", "-o", "json"], ["workflow", "show", "3fa9"], ["workflow", "kill", "3fa9"],
         ["workflow", "kill", "--no-block", "3fa9"], ["thread", "3fa9"], ["logs", "3fa9"], ["status"],
         ["workflow", "abort", "3fa9"], ["workflow", "drain", "say-good"], ["workflow", "drain", "say-good", "--wait"],
         ["workflow", "reset", "say-good"], ["pause"], ["resume"], ["reload"])


class Away(nervebox.Case):
    """Without nerve, and without a bus."""

    definitions = {"say-good": nervebox.command("echo good")}

    def each_verb_says(self, words, env=None):
        for line in VERBS:
            with self.subTest(line=line):
                done = ctl(*line, check=69, timeout=10, **({"env": env} if env else {}))
                self.assertEqual(done.stdout, "")
                self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
                for word in words:
                    self.assertIn(word, done.stderr)

    def test_no_daemon(self):
        systemctl("stop", "nerve.service")
        try:
            self.each_verb_says(["nerve is not running", "systemctl start nerve"])
            # And nobody has started it for that.
            self.assertEqual(systemctl("is-active", "nerve.service", check=False).stdout.strip(), "inactive")
        finally:
            systemctl("start", "nerve.service")

    def test_no_daemon_and_no_bus(self):
        systemctl("stop", "nerve.service")
        dbuswire.systemctl_bus("stop")
        try:
            self.each_verb_says(["nerve is not running", "systemctl start nerve"])
        finally:
            dbuswire.systemctl_bus("start")
            systemctl("start", "nerve.service")
        wait_for(dbuswire.is_served, "nerve to be on the bus again")

    def test_no_bus(self):
        dbuswire.systemctl_bus("stop")
        try:
            self.each_verb_says(["bus"], ON_THE_BUS)
        finally:
            dbuswire.systemctl_bus("start")
        wait_for(dbuswire.is_served, "nerve to be on the bus again")
        self.assertEqual(nervebox.start("say-good", wait=True)[1], 0)

    def test_root_needs_no_bus(self):
        # With a worker that is there already, since only systemd could start one.
        nervebox.start("say-good", wait=True)
        for how, undo in ((("kill", "-s", "STOP", "dbus.service"), ("kill", "-s", "CONT", "dbus.service")),
                          (None, None)):
            with self.subTest(how=how):
                systemctl(*how) if how else dbuswire.systemctl_bus("stop")
                try:
                    self.assertRegex(ctl("status", timeout=20).stdout, r"(?m)^say-good ")
                    run, status = nervebox.start("say-good", wait=True)
                    self.assertEqual((status, nervebox.thread(run)[1]["content"]), (0, "good"))
                    self.assertIn(run[-8:], ctl("workflow", "list").stdout)
                finally:
                    systemctl(*undo) if undo else dbuswire.systemctl_bus("start")
                wait_for(dbuswire.is_served, "nerve to be on the bus again")

    def test_private_connections_do_not_wait_for_each_other(self):
        with contextlib.ExitStack() as stack:
            # One says nothing, one has greeted and says nothing more, one asks and does not read.
            stack.enter_context(dbuswire.connect_as(0, dbuswire.PRIVATE))
            stack.enter_context(dbuswire.Connection(address=dbuswire.PRIVATE, greet=False))
            deaf = stack.enter_context(dbuswire.Connection(address=dbuswire.PRIVATE, greet=False))
            for _ in range(1000):
                deaf.send(*dbuswire.MANAGER, "GetStatus")
            ctl("status", timeout=10)
            self.assertEqual(nervebox.start("say-good", wait=True)[1], 0)

    def test_too_many_private_connections_leave_the_bus(self):
        with contextlib.ExitStack() as stack:
            for _ in range(64):
                stack.enter_context(dbuswire.connect_as(0, dbuswire.PRIVATE))
            ctl("status", timeout=10)

    def test_a_bus_that_is_none(self):
        for address in ("unix:path=/nonexistent", "unix:path=/etc/passwd", "nonsense", "tcp:host=127.0.0.1,port=1"):
            with self.subTest(address=address):
                self.each_verb_says([], {"PATH": "/usr/bin:/bin", "DBUS_SYSTEM_BUS_ADDRESS": address})

    def test_a_daemon_that_dies_while_it_is_asked(self):
        for environment in (ON_THE_BUS, None):
            with self.subTest(environment):
                pid = nervebox.nerved_pid()
                os.kill(pid, signal.SIGSTOP)
                with subprocess.Popen(["nervectl", "workflow", "start", "say-good"], stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True, env=environment) as start:
                    if environment:
                        # It has asked when it waits with its request sent: the bus knows its connection.
                        wait_for(lambda: str(start.pid) in sh("busctl", "list", "--no-legend", check=False).stdout,
                                 "its connection")
                    wait_for(lambda: nervebox.process_state(start.pid) == "S", "nervectl to wait")
                    wait_for(lambda: "epoll" in pathlib.Path(f"/proc/{start.pid}/wchan").read_text(), "nervectl to wait")
                    os.kill(pid, signal.SIGKILL)
                    stdout, stderr = start.communicate(timeout=20)
                wait_for(dbuswire.is_served, "nerve to be back")
                self.assertIn(start.returncode, (74, 69))  # 69: it had not asked yet
                self.assertEqual((stdout, len(stderr.splitlines())), ("", 1))

    def test_wait_lives_through_a_restart_of_nerve_and_of_the_bus(self):
        go = pathlib.Path("/run/nervebox-go")
        go.unlink(missing_ok=True)
        self.addCleanup(go.unlink, missing_ok=True)
        path = nervebox.define("wait-here", nervebox.command("while [ ! -e /run/nervebox-go ]; do sleep 0.05; done; exit 9"))
        self.addCleanup(path.unlink)
        nervebox.restart_nerve()
        for environment in (ON_THE_BUS, {"PATH": "/usr/bin:/bin"}):
            with self.subTest(environment):
                go.unlink(missing_ok=True)
                self.outlive(go, environment)

    def outlive(self, go, environment):
        with unittest.mock.patch.dict(os.environ, environment, clear=True):
            waiter = nervebox.Waiter("wait-here")
        nervebox.processes(waiter.run)
        nervebox.restart_nerve()
        os.kill(nervebox.nerved_pid(), signal.SIGKILL)
        wait_for(dbuswire.is_served, "nerve to be back")
        dbuswire.systemctl_bus("restart")
        wait_for(dbuswire.is_served, "nerve to be back")
        # Both at once, and the bus last.
        systemctl("stop", "nerve.service")
        dbuswire.systemctl_bus("stop")
        systemctl("start", "nerve.service")
        dbuswire.systemctl_bus("start")
        wait_for(dbuswire.is_served, "nerve to be back")
        self.assertIsNone(waiter.process.poll())
        go.touch()
        self.assertEqual(waiter.process.wait(20), 1)
        self.assertIn("exit-code:9", waiter.process.communicate()[1])


if __name__ == "__main__":
    unittest.main()
