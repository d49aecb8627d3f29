"""How runs end: each row of the table of statuses, as `workflow list` shows it and as `start --wait` exits; and what a
round is given and what is kept of it.

What the predecessor did and must stay, or was changed for the better: parity 001-003, 005 and 006 (exit codes and
statuses), 016 (the list shows the code), 042, 043 and 048-050 (starts and the queue), 109 and 111 (rounds)."""

import json
import os
import pathlib
import signal
import time

import nervebox
from nervebox import WRITES, Case, command, ctl, ended, row, start, stored, thread


def two_roles(coder, tester, **keys):
    """coder, tester, and back to coder when tester fails."""
    graph = {"$START": "coder", "coder": {"ok": "tester"}, "tester": {"ok": "$END", "error": "coder"}}
    return {"roles": {"coder": coder, "tester": tester}, "graph": graph, **keys}


def shell(script, **keys):
    return {"exec": ["/bin/sh", "-c", script], **keys}


# ---- the table ------------------------------------------------------------------------------------------------------

class EndsCase(Case):
    def ends(self, run, code, status, result):
        """The run ended so, by its row and by the exit status of --wait."""
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"]), (status, code, result))
        self.assertIs(found["killing"], False)
        self.assertIsNotNone(found["endedAt"])
        self.assertEqual(found, {key: nervebox.run_json(run)[key] for key in found})
        nervebox.assert_gone(run)

    def check(self, workflow, code, status, result, *options, prompt=None):
        run, waited = start(workflow, prompt, *options, wait=True)
        self.assertEqual(waited, code)
        self.ends(run, code, status, result)
        return run


class Ends(EndsCase):
    """Ends that the run's own roles and limits bring about."""

    definitions = {
        "end-well": command("true"),
        "end-with-three": command("exit 3"),
        "end-with-255": command("exit 255"),
        "end-by-signal": command("kill -SEGV $$"),
        "end-by-kill": command("kill -KILL $$"),
        "miss-program": {"roles": {"main": {"exec": ["/nonexistent/program", "x"]}},
                         "graph": {"$START": "main", "main": {"ok": "$END"}}},
        "miss-in-path": {"roles": {"main": {"exec": ["no-such-program-anywhere"]}},
                         "graph": {"$START": "main", "main": {"ok": "$END"}}},
        "miss-permission": {"roles": {"main": {"exec": ["/etc/hostname"]}},
                            "graph": {"$START": "main", "main": {"ok": "$END"}}},
        "miss-directory": command("true", cwd="/nonexistent"),
        "outlast-role": command("echo before; echo why >&2; exec sleep 1000", role_timeout="300ms"),
        "outlast-role-stubbornly": command("trap '' TERM; while :; do sleep 1000; done", role_timeout="300ms"),
        "say-too-much": command("head -c 1048577 /dev/zero | tr '\\0' x"),
        "say-for-ever": command("exec yes"),
        "say-just-enough": command("head -c 1048576 /dev/zero | tr '\\0' x; echo; echo"),
        "speak-of-the-silent": two_roles(shell("cat", prompt="{{ tester.content }}"), shell("true")),
        "go-round": {"roles": {"main": shell("true")}, "graph": {"$START": "main", "main": {"ok": "main"}},
                     "max_rounds": 3},
        "outlast-run": command("exec sleep 1000", timeout="300ms"),
        "outlast-run-in-rounds": {"roles": {"main": shell("sleep 0.1")}, "timeout": "500ms", "max_rounds": 10000,
                                  "graph": {"$START": "main", "main": {"ok": "main"}}},
        "never-end": command("exec sleep 1000"),
        "wait-its-turn": command("exec sleep 1000", max_queue=1),
        "end-by-time": command("exec sleep 1000", timeout="20s", role_timeout="200ms"),
    }

    def test_0_success(self):
        self.check("end-well", 0, "completed", "success")

    def test_1_exit_code(self):
        run = self.check("end-with-three", 1, "failed", "exit-code:3")
        self.assertEqual(thread(run)[1]["meta"]["exitCode"], 3)

    def test_1_exit_code_255_is_no_crash(self):
        self.check("end-with-255", 1, "failed", "exit-code:255")

    def test_1_signal(self):
        run = self.check("end-by-signal", 1, "failed", "signal:SIGSEGV")
        self.assertEqual(thread(run)[1]["meta"]["signal"], "SIGSEGV")

    def test_1_signal_kill_is_not_137(self):
        self.check("end-by-kill", 1, "failed", "signal:SIGKILL")

    def test_1_foreign_kill_is_not_137(self):
        waiter = nervebox.Waiter("never-end")
        for pid in nervebox.processes(waiter.run):
            os.kill(pid, signal.SIGKILL)
        self.assertEqual(waiter.status(), 1)
        self.ends(waiter.run, 1, "failed", "signal:SIGKILL")

    def test_1_exec_failed(self):
        run = self.check("miss-program", 1, "failed", "exec-failed")
        said = thread(run)[1]
        self.assertEqual(said["meta"]["status"], "error")
        self.assertIn("/nonexistent/program", said["meta"]["stderr"])
        self.assertNotIn("exitCode", said["meta"])

    def test_1_exec_failed_in_path(self):
        self.check("miss-in-path", 1, "failed", "exec-failed")

    def test_1_exec_failed_without_permission(self):
        self.check("miss-permission", 1, "failed", "exec-failed")

    def test_1_exec_failed_without_its_directory(self):
        self.check("miss-directory", 1, "failed", "exec-failed")

    def test_1_role_timeout(self):
        run = self.check("outlast-role", 1, "failed", "role-timeout")
        said = thread(run)[1]
        self.assertEqual((said["content"], said["meta"]["stderr"]), ("before", "why\n"))

    def test_1_role_timeout_of_a_role_that_ignores_sigterm(self):
        begun = time.monotonic()
        self.check("outlast-role-stubbornly", 1, "failed", "role-timeout")
        self.assertTrue(5 <= time.monotonic() - begun < 8, time.monotonic() - begun)

    def test_1_reply_too_large(self):
        self.check("say-too-much", 1, "failed", "reply-too-large")

    def test_1_reply_too_large_ends_the_round_at_once(self):
        self.check("say-for-ever", 1, "failed", "reply-too-large")

    def test_0_reply_of_just_the_limit(self):
        run = self.check("say-just-enough", 0, "completed", "success")
        self.assertEqual(thread(run)[1]["content"], "x" * 1048576)

    def test_1_template_error(self):
        run = self.check("speak-of-the-silent", 1, "failed", "template-error")
        self.assertTrue(thread(run)[1]["meta"]["stderr"], "it does not say why")

    def test_2_max_rounds(self):
        run = self.check("go-round", 2, "failed", "max-rounds")
        self.assertEqual([said["round"] for said in thread(run)], [0, 1, 2, 3])
        self.assertEqual(row(run)["rounds"], 3)

    def test_2_max_rounds_of_the_command_line(self):
        run = self.check("go-round", 2, "failed", "max-rounds", "--max-rounds", "5")
        self.assertEqual(row(run)["rounds"], 5)
        run = self.check("go-round", 2, "failed", "max-rounds", "--max-rounds", "1")
        self.assertEqual((row(run)["rounds"], nervebox.run_json(run)["maxRounds"]), (1, 1))

    def test_0_the_last_round_that_is_allowed_may_reach_the_end(self):
        self.check("end-well", 0, "completed", "success", "--max-rounds", "1")

    def test_124_timeout(self):
        begun = time.monotonic()
        self.check("outlast-run", 124, "failed", "timeout")
        self.assertLess(time.monotonic() - begun, 4)

    def test_124_timeout_over_several_rounds(self):
        run = self.check("outlast-run-in-rounds", 124, "failed", "timeout")
        self.assertTrue(1 <= row(run)["rounds"] < 6, row(run))

    def test_1_role_timeout_before_that_of_the_run(self):
        self.check("end-by-time", 1, "failed", "role-timeout")

    def test_137_killed(self):
        waiter = nervebox.Waiter("never-end")
        pids = nervebox.processes(waiter.run)
        ctl("workflow", "kill", waiter.run)
        self.assertEqual(waiter.status(), 137)
        self.ends(waiter.run, 137, "killed", "killed")
        nervebox.assert_gone(waiter.run, pids)

    def test_75_queue_full_drops_the_oldest_that_waits(self):
        first = start("wait-its-turn")
        nervebox.processes(first)
        oldest = nervebox.Waiter("wait-its-turn")
        newest = start("wait-its-turn")
        self.assertEqual(oldest.status(), 75)
        found = row(oldest.run)
        self.assertEqual((found["status"], found["exitCode"], found["result"]), ("dropped", 75, "queue-full"))
        self.assertIsNone(found["startedAt"])
        self.assertEqual([row(run)["status"] for run in (first, newest)], ["started", "queued"])
        ctl("workflow", "kill", first, newest)

    def test_every_end_is_one_event_and_the_row_agrees_with_the_events(self):
        for run in nervebox.listed("-n", "10000"):
            kinds = nervebox.events(run["run"])
            self.assertEqual(kinds[0], "queued", run)
            self.assertEqual(kinds.count("ended"), 0 if run["endedAt"] is None else 1, run)
            self.assertEqual(kinds.count("thread-workflow-message"), run["rounds"], run)


# A round that ends when it is told to.
WAITING = shell(f"until [ -e {nervebox.SCRATCH}/$NERVE_RUN_ID.go.$NERVE_ROUND ]; do sleep 0.02; done")


class WorkerEnds(EndsCase):
    """255: the worker went down under the run too often, or cannot be started."""

    definitions = {
        "lose-worker": command("exec sleep 1000"),
        "lose-worker-between": {"roles": {"main": WAITING}, "graph": {"$START": "main", "main": {"ok": "main"}}, "worker": WRITES},
        "lose-worker-for-ever": {"roles": {"main": WAITING}, "graph": {"$START": "main", "main": {"ok": "main"}}, "worker": WRITES},
        "lack-user": command("true", worker={"User": "nobody-of-this-name"}),
        "lack-group": command("true", worker={"User": "nerve", "Group": "no-group-of-this-name"}),
        "lack-path": command("true", worker={"ReadWritePaths": "/nonexistent/path"}),
        "wait-for-unmask": command("true"),
        "wait-for-space": command("true"),
        "stay-denied": command("true"),
    }

    def kill_worker(self, workflow, run, attempt):
        """Kills the worker that has this attempt of the run; it must be another one each time."""
        nervebox.wait_event(run, "dispatched", attempt)
        pid = nervebox.worker_pid(workflow)
        self.assertNotEqual(pid, 0)
        os.kill(pid, signal.SIGKILL)
        return pid

    def test_255_worker_died(self):
        waiter = nervebox.Waiter("lose-worker")
        pids = {}
        workers = set()
        for attempt in range(1, 4):
            nervebox.wait_event(waiter.run, "dispatched", attempt)
            pids.update(nervebox.processes(waiter.run))
            workers.add(self.kill_worker("lose-worker", waiter.run, attempt))
        self.assertEqual(waiter.status(), 255)
        self.ends(waiter.run, 255, "crashed", "worker-died")
        nervebox.assert_gone(waiter.run, pids)
        self.assertEqual(len(workers), 3)
        self.assertEqual(nervebox.events(waiter.run).count("worker-lost"), 3)

    def test_255_worker_died_counts_from_the_newest_round(self):
        run = start("lose-worker-between")
        go = lambda number: pathlib.Path(nervebox.SCRATCH, f"{run}.go.{number}").touch()
        for attempt in (1, 2):
            self.kill_worker("lose-worker-between", run, attempt)
        nervebox.wait_event(run, "dispatched", 3)
        go(1)
        nervebox.wait_rounds(run, 1)
        # A new round: two more are forgiven.
        for attempt in (3, 4):
            self.kill_worker("lose-worker-between", run, attempt)
        nervebox.wait_event(run, "dispatched", 5)
        self.assertEqual(stored(run)["status"], "started")
        self.kill_worker("lose-worker-between", run, 5)
        found = ended(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"]), ("crashed", 255, "worker-died"))
        nervebox.assert_gone(run)

    def test_255_start_limit_hit(self):
        # The sixth death within a minute is one too many, whatever was said between them.
        run = start("lose-worker-for-ever")
        for attempt in range(1, 7):
            self.kill_worker("lose-worker-for-ever", run, attempt)
            if attempt % 2 == 0 and attempt < 6:
                nervebox.wait_event(run, "dispatched", attempt + 1)
                pathlib.Path(nervebox.SCRATCH, f"{run}.go.{attempt // 2}").touch()
                nervebox.wait_rounds(run, attempt // 2)
        found = ended(run)
        self.ends(run, 255, "crashed", "start-limit-hit")
        nervebox.assert_gone(run)
        self.assertEqual(found["rounds"], 2)
        self.blocked("lose-worker-for-ever")

    def blocked(self, workflow):
        """It is blocked, and says how to reset it; a start waits for that."""
        self.assertEqual(nervebox.wait_worker(workflow, "blocked"), 0)
        self.assertIn(f"nervectl workflow reset {workflow}", ctl("status").stdout)

    def test_255_worker_exit_without_its_user(self):
        run = self.check("lack-user", 255, "crashed", "worker-exit:217")
        self.assertEqual(row(run)["rounds"], 0)
        # No worker will do better until somebody puts that right.
        self.blocked("lack-user")

    def test_255_worker_exit_without_its_group(self):
        self.check("lack-group", 255, "crashed", "worker-exit:216")
        self.blocked("lack-group")

    def test_255_worker_exit_without_a_path(self):
        self.check("lack-path", 255, "crashed", "worker-exit:226")
        self.blocked("lack-path")

    def test_255_unit_refused_with_an_error_of_dbus_itself(self):
        # An error that is named org.freedesktop.DBus.Error.…, as those are with which systemd refuses a property
        # (InvalidArgs), is no lost bus.
        path = pathlib.Path("/etc/dbus-1/system.d/nervebox.conf")

        def undo():
            path.unlink()
            nervebox.systemctl("reload", "dbus.service")

        path.write_text("""<busconfig><policy user="root">
            <deny send_destination="org.freedesktop.systemd1" send_interface="org.freedesktop.systemd1.Manager"
                  send_member="StartTransientUnit"/>
            </policy></busconfig>""")
        self.addCleanup(undo)
        nervebox.systemctl("reload", "dbus.service")
        run = self.check("stay-denied", 255, "crashed", "unit-refused")
        detail = nervebox.run_json(run)["events"][-1]["payload"].get("detail")
        self.assertIn("StartTransientUnit", detail or "", "it does not say what systemd said")
        # What is wrong may be put right: the next run starts the worker again.
        self.doCleanups()
        self.check("stay-denied", 0, "completed", "success")

    def obstructed(self, workflow, text, help):
        """With somebody else's unit file of that name (None: a mask) the run waits, and all say why and what `help`s; it
        goes on when the file is gone."""
        path = nervebox.UNITS / nervebox.unit_of(workflow)
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if text is None:
            path.symlink_to("/dev/null")
        else:
            path.write_text(text)
        self.addCleanup(path.unlink, missing_ok=True)
        run = start(workflow)
        nervebox.wait_worker(workflow, "obstructed")
        self.assertIn(help, ctl("status").stdout)
        self.assertIn(help, ctl("workflow", "show", run).stdout)
        self.assertIsNone(stored(run)["ended_at"])
        self.assertFalse(nervebox.is_populated(nervebox.worker_cgroup(workflow)), "it has started what is not its own")
        path.unlink()
        nervebox.systemctl("daemon-reload")
        self.assertEqual(ended(run)["exitCode"], 0)

    def test_a_masked_unit_is_waited_for(self):
        self.obstructed("wait-for-unmask", None, "systemctl unmask nerve-wf@wait-for-unmask.service")

    def test_a_unit_file_of_somebody_else_is_waited_for(self):
        self.obstructed("wait-for-space", "[Service]\nExecStart=/bin/true\n", "stands in the way")


# ---- rounds and what they are given ---------------------------------------------------------------------------------

SHOW = """{{ start.role }}|{{ start.content }}|{{ start.meta.maxRounds }}|{{ round }}|{{ run }}|{{ last.role }}|\
{{ last.content }}|{{ messages | length }}|{% for m in messages %}<{{ m.role }}:{{ m.content }}>{% endfor %}|\
{% if tester %}again {{ tester.content }} {{ tester.meta.exitCode }}{% else %}first{% endif %}"""


class Rounds(Case):
    definitions = {
        # tester fails twice, then is content.
        "repair-twice": two_roles(
            shell("cat", prompt=SHOW),
            shell("echo report $NERVE_ROUND; [ $NERVE_ROUND -ge 6 ] || exit 7")),
        "route-error": {"roles": {"main": shell("exit 4"), "medic": shell("cat", prompt="{{ main.meta.exitCode }}")},
                        "graph": {"$START": "main", "main": {"ok": "$END", "error": "medic"}, "medic": {"ok": "$END"}}},
        "route-exec-failed": {
            "roles": {"main": {"exec": ["/nonexistent"]}, "medic": shell("cat", prompt="{{ main.meta.result }}")},
            "graph": {"$START": "main", "main": {"ok": "$END", "error": "medic"}, "medic": {"ok": "$END"}}},
        "route-template-error": {
            "roles": {"main": shell("cat", prompt="{{ medic.content }}"), "medic": shell("cat", prompt="{{ last.meta.result }}")},
            "graph": {"$START": "main", "main": {"ok": "$END", "error": "medic"}, "medic": {"ok": "$END"}}},
        "route-timeout": {
            "roles": {"main": shell("exec sleep 1000", timeout="200ms"), "medic": shell("cat", prompt="{{ last.meta.result }}")},
            "graph": {"$START": "main", "main": {"ok": "$END", "error": "medic"}, "medic": {"ok": "$END"}}},
        "route-error-to-the-end": {"roles": {"main": shell("exit 4")},
                                   "graph": {"$START": "main", "main": {"ok": "$END", "error": "$END"}}},
        "trim-lines": command("printf ' a\\nb \\n\\n\\n'"),
        "say-nothing": command("true"),
        "keep-crlf": command("printf 'a\\r\\n'"),
        "read-nothing": command("readlink /proc/self/fd/0; wc -c"),
        "read-prompt": command("wc -c", prompt="{{ start.content }}"),
        "read-empty-prompt": command("wc -c", prompt=""),
        "ignore-prompt": command("exec true", prompt="{{ start.content }}"),
        "read-large-prompt": command("wc -c", prompt="{% for i in range(3) %}{{ start.content }}{% endfor %}"),
        "read-too-large-prompt": command("wc -c", prompt="{% for i in range(5) %}{{ start.content }}{% endfor %}"),
    }

    def said(self, workflow, prompt=None):
        """What the only round said, in a run that completed."""
        run, code = start(workflow, prompt, wait=True)
        self.assertEqual(code, 0, row(run))
        self.assertEqual(len(thread(run)), 2)
        return thread(run)[1]["content"]

    def test_several_rounds_and_all_that_a_prompt_can_name(self):
        run, code = start("repair-twice", "make it\nso", wait=True)
        self.assertEqual(code, 0)
        said = thread(run)
        self.assertEqual([one["round"] for one in said], list(range(7)))
        self.assertEqual([one["role"] for one in said], ["__start__", *["coder", "tester"] * 3])
        self.assertEqual([one["meta"].get("status") for one in said[1:]], ["ok", "error"] * 2 + ["ok", "ok"])
        self.assertEqual([one["meta"].get("result") for one in said[1:]], [None, "exit-code:7"] * 2 + [None, None])
        self.assertEqual([one["meta"].get("exitCode") for one in said[1:]], [0, 7, 0, 7, 0, 0])
        self.assertEqual([one["content"] for one in said[2::2]], ["report 2", "report 4", "report 6"])
        start_says = "__start__|make it\nso|50"
        first = f"{start_says}|1|{run}|__start__|make it\nso|1|<__start__:make it\nso>|first"
        self.assertEqual(said[1]["content"], first)
        second = (f"{start_says}|3|{run}|tester|report 2|3|<__start__:make it\nso><coder:{first}><tester:report 2>"
                  "|again report 2 7")
        self.assertEqual(said[3]["content"], second)
        self.assertTrue(said[5]["content"].endswith("<tester:report 2>" f"<coder:{second}>" "<tester:report 4>|again report 4 7"))
        times = [one["timestamp"] for one in said]
        self.assertEqual(times, sorted(times))

    def test_the_thread_begins_with_the_start(self):
        run, _ = start("say-nothing", "the prompt", wait=True)
        begin = thread(run)[0]
        self.assertEqual((begin["round"], begin["role"], begin["content"]), (0, "__start__", "the prompt"))
        trigger = begin["meta"].pop("trigger")
        self.assertEqual(begin["meta"], {"runId": run, "maxRounds": 50, "dryRun": False})
        self.assertGreater(trigger.pop("pid"), 1)
        self.assertEqual(trigger, {"type": "client", "uid": 0, "comm": "nervectl", "unit": "init.scope"})
        self.assertEqual(begin["timestamp"], row(run)["createdAt"])

    def test_thread_n_counts_rounds(self):
        run, _ = start("repair-twice", "x", wait=True)
        self.assertEqual([one["round"] for one in thread(run, "-n", "2")], [5, 6])
        self.assertEqual([one["round"] for one in thread(run, "-n", "6")], [1, 2, 3, 4, 5, 6])

    def test_an_error_is_routed(self):
        for workflow, told in (("route-error", "4"), ("route-exec-failed", "exec-failed"),
                               ("route-template-error", "template-error"), ("route-timeout", "role-timeout")):
            with self.subTest(workflow):
                run, code = start(workflow, wait=True)
                self.assertEqual((code, row(run)["result"]), (0, "success"))
                said = thread(run)
                self.assertEqual([one["role"] for one in said], ["__start__", "main", "medic"])
                self.assertEqual(said[1]["meta"]["status"], "error")
                self.assertEqual(said[2]["content"], told)

    def test_an_error_that_is_routed_to_the_end_completes(self):
        run, code = start("route-error-to-the-end", wait=True)
        self.assertEqual((code, row(run)["status"]), (0, "completed"))

    def test_content_is_stdout_without_trailing_newlines(self):
        self.assertEqual(self.said("trim-lines"), " a\nb ")
        self.assertEqual(self.said("say-nothing"), "")
        self.assertEqual(self.said("keep-crlf"), "a\r")

    def test_stdin_is_empty_without_a_prompt(self):
        self.assertEqual(self.said("read-nothing", "a start prompt").split(), ["/dev/null", "0"])

    def test_stdin_is_the_rendered_prompt(self):
        self.assertEqual(self.said("read-prompt", "123\n"), "4")
        self.assertEqual(self.said("read-empty-prompt"), "0")

    def test_a_role_that_does_not_read_its_prompt_is_no_error(self):
        run = ctl("workflow", "start", "ignore-prompt", "--prompt-file", "-", input="x" * 1048576).stdout.strip()
        self.assertEqual(ended(run)["result"], "success")

    def test_a_prompt_of_3_mib_arrives_and_one_of_5_mib_is_a_template_error(self):
        for workflow, result in (("read-large-prompt", "success"), ("read-too-large-prompt", "template-error")):
            run = ctl("workflow", "start", workflow, "--prompt-file", "-", input="x" * 1048576).stdout.strip()
            self.assertEqual(ended(run)["result"], result)
            if result == "success":
                self.assertEqual(thread(run)[1]["content"], str(3 * 1048576))


SURROUNDINGS = f"""
import json, os, sys
thread = os.environ["NERVE_THREAD"]
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
open("left-behind", "w").write("x")
os.makedirs("deep/er", exist_ok=True)
print(json.dumps({{
    "environ": [word.decode() for word in open("/proc/self/environ", "rb").read().split(b"\\0") if word],
    "cwd": os.getcwd(), "files": sorted(os.listdir(".")), "thread": open(thread).read(),
    "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + fd)),
    "sid": os.getsid(0), "pid": os.getpid(), "uid": os.getuid(), "cgroup": open("/proc/self/cgroup").read(),
    "blocked": status["SigBlk"].strip(), "ignored": status["SigIgn"].strip(),
}}))
"""
PYTHON = {"exec": ["python3", "-c", SURROUNDINGS]}
DIRECTORY = "/var/spool/nervebox"


class Surroundings(Case):
    """Environment, directory, thread file, journal."""

    definitions = {
        "look-around": {"roles": {"main": PYTHON, "second": PYTHON},
                        "graph": {"$START": "main", "main": {"ok": "second"}, "second": {"ok": "$END"}},
                        "worker": {"Environment": ["COLOUR=blue", '"PLACE=the sea"', "LANG=tlh"]}},
        "look-around-as-nerve": {"roles": {"main": PYTHON}, "graph": {"$START": "main", "main": {"ok": "$END"}},
                                 "worker": {"User": "nerve"}},
        "look-around-elsewhere": {"roles": {"main": {**PYTHON, "cwd": DIRECTORY}},
                                  "graph": {"$START": "main", "main": {"ok": "$END"}}, "worker": WRITES},
        "fail-at-once": command("echo x >file; exit 1"),
        "complain-loudly": command("echo first line >&2; printf 'no newline' >&2; echo out"),
        "complain-at-length": command("seq -f 'line %06g of many' 1 2000 >&2; exit 9"),
        "complain-in-bytes": command("printf 'bad \\377 byte\\n' >&2"),
    }

    def around(self, workflow, prompt=None):
        run, code = start(workflow, prompt, wait=True)
        self.assertEqual(code, 0, thread(run))
        return run, [json.loads(said["content"]) for said in thread(run)[1:]]

    def test_environment_is_what_is_promised_and_nothing_else(self):
        run, (first, second) = self.around("look-around")
        first_path = next(word for word in first["environ"] if word.startswith("PATH="))
        expected = {
            # systemd's own; it leaves out /sbin and /bin where they are links to /usr (Debian 13).
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin" + (":/sbin:/bin" if ":/sbin" in first_path else ""),
            "HOME": "/var/lib/nerve-wf/look-around", "USER": "nw-look-around", "LOGNAME": "nw-look-around",
            "NERVE_WORKFLOW": "look-around", "NERVE_RUN_ID": run, "NERVE_ROLE": "main", "NERVE_ROUND": "1",
            "NERVE_ATTEMPT": "1", "NERVE_RETRY": "0", "COLOUR": "blue", "PLACE": "the sea",
        }
        found = dict(word.split("=", 1) for word in first["environ"])
        thread_file = found.pop("NERVE_THREAD")
        self.assertTrue(thread_file.startswith("/"), thread_file)
        found.pop("LANG")  # asked for both ways: see the next test
        self.assertEqual(found, expected)
        found = dict(word.split("=", 1) for word in second["environ"])
        self.assertEqual((found["NERVE_ROLE"], found["NERVE_ROUND"]), ("second", "2"))

    def test_every_variable_is_there_once(self):
        _, (first, _) = self.around("look-around")
        names = [word.split("=", 1)[0] for word in first["environ"]]
        self.assertEqual(sorted(names), sorted(set(names)))

    def test_the_units_environment_beats_a_default(self):
        _, (first, _) = self.around("look-around")
        self.assertIn("LANG=tlh", first["environ"])

    def test_environment_of_a_static_user(self):
        _, (first,) = self.around("look-around-as-nerve")
        found = dict(word.split("=", 1) for word in first["environ"])
        self.assertEqual({name for name in found if not name.startswith("NERVE_")}, {"PATH", "HOME", "USER", "LOGNAME", "LANG"})
        self.assertEqual((found["USER"], found["LOGNAME"], found["HOME"], found["LANG"]), ("nerve", "nerve", "/var/lib/nerve-wf/look-around-as-nerve", "C.UTF-8"))

    def test_what_is_systemds_and_nerves_own_is_not_in_the_environment(self):
        for workflow in ("look-around", "look-around-as-nerve"):
            _, (first, *_) = self.around(workflow)
            names = {word.split("=", 1)[0] for word in first["environ"]}
            self.assertFalse(names & {"NOTIFY_SOCKET", "NERVE_SOCKET", "JOURNAL_STREAM", "INVOCATION_ID", "WATCHDOG_PID",
                                      "WATCHDOG_USEC", "SYSTEMD_EXEC_PID", "STATE_DIRECTORY", "NERVE_LOG", "LISTEN_FDS"})

    def test_a_role_is_a_session_of_its_own_with_three_descriptors_and_no_blocked_signals(self):
        run, (first, _) = self.around("look-around")
        self.assertEqual(first["sid"], first["pid"])
        self.assertEqual(first["fds"], [0, 1, 2])
        self.assertEqual(int(first["blocked"], 16), 0)
        # Python itself ignores SIGPIPE and SIGXFSZ; 32 and 33 are the C library's own, and nobody can reset them.
        self.assertEqual(int(first["ignored"], 16) & ~(1 << 12 | 1 << 24 | 3 << 31), 0)
        self.assertIn(f"/nerve-wf@look-around.service/run-{run}\n", first["cgroup"])

    def test_the_directory_is_fresh_the_runs_own_and_removed_at_the_end(self):
        run, (first, second) = self.around("look-around")
        self.assertEqual(pathlib.Path(first["cwd"]).name, run)
        self.assertEqual(pathlib.Path(first["cwd"]).parts[-3:-1], ("look-around", "runs"))
        self.assertEqual(first["files"], ["deep", "left-behind"])
        # The next round of the same run finds it as it was left.
        self.assertEqual(second["cwd"], first["cwd"])
        self.assertEqual(list(pathlib.Path("/var/lib/nerve-wf/look-around/runs").iterdir()), [])
        other, (first, _) = self.around("look-around")
        self.assertIn(other, first["cwd"])

    def test_the_directory_of_a_run_that_failed_is_removed_too(self):
        run, code = start("fail-at-once", wait=True)
        self.assertEqual(code, 1)
        self.assertEqual(list(pathlib.Path("/var/lib/nerve-wf/fail-at-once/runs").iterdir()), [])

    def test_a_directory_that_is_given_is_used_and_stays(self):
        _, (first,) = self.around("look-around-elsewhere")
        self.assertEqual(first["cwd"], DIRECTORY)
        self.assertTrue(pathlib.Path(DIRECTORY, "left-behind").exists())

    def test_the_thread_is_a_file_of_json_lines(self):
        run, around = self.around("look-around", "p")
        for number, one in enumerate(around, 1):
            self.assertTrue(one["thread"].endswith("\n"))
            lines = [json.loads(line) for line in one["thread"].splitlines()]
            self.assertEqual(lines, thread(run)[:number])
        self.assertEqual(list(pathlib.Path("/var/lib/nerve-wf/look-around/threads").iterdir()), [])

    def test_stderr_goes_to_the_journal_with_its_fields(self):
        run, code = start("complain-loudly", wait=True)
        self.assertEqual(code, 0)
        found = [entry for entry in nervebox.journal(f"NERVE_RUN_ID={run}") if "NERVE_ROLE" in entry]
        self.assertEqual([entry["MESSAGE"] for entry in found], ["first line", "no newline"])
        for entry in found:
            fields = {name: entry.get(name) for name in ("NERVE_WORKFLOW", "NERVE_RUN_ID", "NERVE_ROLE", "NERVE_ROUND", "_SYSTEMD_UNIT")}
            self.assertEqual(fields, {"NERVE_WORKFLOW": "complain-loudly", "NERVE_RUN_ID": run, "NERVE_ROLE": "main",
                                      "NERVE_ROUND": "1", "_SYSTEMD_UNIT": "nerve-wf@complain-loudly.service"})
        said = thread(run)[1]
        self.assertEqual((said["content"], said["meta"]["stderr"]), ("out", "first line\nno newline"))
        self.assertIn("first line", nervebox.sh("journalctl", "--no-pager", "-u", "nerve-wf@complain-loudly").stdout)

    def test_the_last_8_kib_of_stderr_are_kept_and_the_journal_has_every_line(self):
        run, _ = start("complain-at-length", wait=True)
        lines = [f"line {number:06} of many\n" for number in range(1, 2001)]
        self.assertEqual(thread(run)[1]["meta"]["stderr"], "".join(lines)[-8192:])
        found = [entry["MESSAGE"] + "\n" for entry in nervebox.journal(f"NERVE_RUN_ID={run}", "NERVE_ROLE=main")]
        self.assertEqual(found, lines)

    def test_stderr_that_is_not_utf_8_is_kept(self):
        run, code = start("complain-in-bytes", wait=True)
        self.assertEqual((code, thread(run)[1]["meta"]["stderr"]), (0, "bad \ufffd byte\n"))
