"""What people write workflows with: a workspace, `workflow try`, `install`, `start --follow`, tables on a terminal.

A terminal is a pty: what nervectl writes there is what a person would see."""

import fcntl
import os
import pathlib
import pty
import re
import shutil
import signal
import struct
import subprocess
import termios

import nervebox
from aged import age
from nervebox import Case, WORKFLOWS, command, ctl, ended, sh, start, wait_for

ROOT = pathlib.Path("/srv/workspaces")
OWN = ROOT / "house-keeping"
HOSTILE = "\033]0;title\007\033[2J\u202etxt\u009b31m"


# A worker that says what it hears in files, and heeds nothing.
DEAF = """
import json, os, pathlib, signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
link = socket.socket(socket.AF_UNIX)
link.connect(os.environ["NERVE_SOCKET"])
ready = {"type": "ready", "protocol": 1, "workflow": os.environ["NERVE_WORKFLOW"], "runs": []}
link.sendall(json.dumps(ready).encode() + b"\\n")
for line in link.makefile():
    heard = {"start-thread": "up", "kill-thread": "told"}.get(json.loads(line)["type"])
    if heard:
        pathlib.Path(sys.argv[1], heard).touch()
"""


def on_terminal(*argv, columns=80, environment=None):
    """What a command writes to a terminal so wide, stdout and stderr alike, and its exit status."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=side, stderr=side,
                               env={**os.environ, "TERM": "xterm", **(environment or {})})
    os.close(side)
    written = b""
    try:
        while chunk := os.read(main, 65536):
            written += chunk
    except OSError:  # EIO: the other end is closed
        pass
    os.close(main)
    return written.decode(), process.wait(timeout=60)


def yaml(name, exec="[cat]", more=""):
    return (f"version: 1\nname: {name}\nroles:\n  first:\n    exec: {exec}\n    prompt: '{{{{ start.content }}}}'\n"
            f"{more}graph:\n  $START: first\n  first: {{ ok: $END }}\n")


class Workspace(Case):
    definitions = {}

    def setUp(self):
        super().setUp()
        # Without what another test has installed.
        shutil.rmtree("/etc/nerve/workspaces", ignore_errors=True)
        nervebox.load({})
        shutil.rmtree(ROOT, ignore_errors=True)
        ROOT.mkdir(parents=True)
        ctl("init", OWN)
        self.addCleanup(shutil.rmtree, ROOT)

    def test_a_new_workspace_is_valid_runs_and_is_installed(self):
        file = OWN / "workflows/report-disk-usage.yaml"
        self.assertIn("report-disk-usage: ok", ctl("validate", file).stdout)
        tried = ctl("workflow", "try", file, "-p", "/usr/share/doc").stdout
        self.assertRegex(tried, r"--- round 1: measure \(ok\), \S+\n(.*\n)+\n--- round 2: report \(ok\)")
        self.assertIn("/usr/share/doc/", tried)
        shown = ctl("install", OWN).stdout
        self.assertIn("+name: report-disk-usage", shown)
        installed = WORKFLOWS / file.name
        self.assertEqual(installed.read_text(), file.read_text())
        self.assertEqual((installed.stat().st_uid, installed.stat().st_mode & 0o7777), (0, 0o644))
        self.assertEqual(ctl("install", OWN).stdout, "Nothing changes.\n")
        # nerved has it already.
        followed = ctl("workflow", "start", "report-disk-usage", "-f", "-p", "/usr/share/doc").stdout
        self.assertRegex(followed, r"\A[0-9a-f]{32}\n--- round 1: measure \(ok\), \S+\n")
        self.assertIn("--- round 2: report (ok), ", followed)

    def test_what_is_wrong_or_not_ours_is_left_alone(self):
        (OWN / "workflows/keep-books.yaml").write_text("version: 1\nname: keep-books\nrolls: {}\n")
        (OWN / "workflows/count-beans.yaml").write_text("version: 1\nname: beans\n")
        said = ctl("install", OWN, check=65).stderr
        for word in ("rolls", "beans"):
            self.assertIn(word, said)
        self.assertFalse((WORKFLOWS / "report-disk-usage.yaml").exists())
        for name in ("keep-books", "count-beans"):
            (OWN / f"workflows/{name}.yaml").write_text(yaml(name))
        (WORKFLOWS / "keep-books.yaml").write_text(yaml("keep-books", "[tac]"))
        self.assertIn("--force", ctl("install", OWN, check=65).stderr)
        self.assertFalse((WORKFLOWS / "count-beans.yaml").exists())
        ctl("install", OWN, "--force")
        (OWN / "workflows/count-beans.yaml").unlink()
        self.assertIn("+++ /dev/null", ctl("install", OWN, "--dry-run").stdout)
        self.assertTrue((WORKFLOWS / "count-beans.yaml").exists())
        ctl("install", OWN)
        self.assertFalse((WORKFLOWS / "count-beans.yaml").exists())
        self.assertTrue((WORKFLOWS / "keep-books.yaml").exists())

    def test_nobody_else_installs(self):
        self.assertIn("only root", sh("runuser", "-u", "nobody", "--", "nervectl", "install", OWN, check=77).stderr)
        sh("runuser", "-u", "nobody", "--", "nervectl", "install", "--dry-run", OWN)


class Try(Case):
    definitions = {
        # Tries a definition from inside a role of a dynamic user, as develop-workflow's tester does.
        "try-another": {"roles": {"tester": {"exec": ["nervectl", "workflow", "try", str(ROOT / "inner.yaml"), "-p", "hi"]}},
                        "graph": {"$START": "tester", "tester": {"ok": "$END"}}},
        "read-thread": {"roles": {"first": {"exec": ["echo", "one"]},
                                  "second": {"exec": ["nervectl", "thread", "-n", "1", "-o", "json"]},
                                  "third": {"exec": ["nervectl", "thread"]}},
                        "graph": {"$START": "first", "first": {"ok": "second"}, "second": {"ok": "third"},
                                  "third": {"ok": "$END"}}},
    }

    def setUp(self):
        super().setUp()
        shutil.rmtree(ROOT, ignore_errors=True)
        ROOT.mkdir(parents=True)
        self.addCleanup(shutil.rmtree, ROOT)

    def write(self, text):
        (ROOT / "inner.yaml").write_text(text)
        return ROOT / "inner.yaml"

    def test_the_readme_shows_roles_that_can_be_tried(self):
        readme = pathlib.Path(__file__).parents[2].joinpath("README.md").read_text()
        _, shown = readme.split("## LLMs and agents as roles", 1)
        roles = re.search(r"```yaml\n(.*?)```", shown, re.S)[1]
        definition = self.write(f"version: 1\nname: inner\n{roles}")
        said = ctl("workflow", "try", definition, "--dry-run", "-p", "mend it").stdout
        self.assertEqual(re.findall(r"^--- round \d: (\w+ \(\w+\))", said, re.M), ["coder (ok)", "critic (good)"])

    def assert_nothing_left(self):
        self.assertEqual(list(pathlib.Path("/tmp").glob("nerve-try-*")), [])
        self.assertEqual(list(nervebox.CGROUPS.rglob("nerve-try-*")), [])

    def test_a_role_tries_a_definition_that_is_not_installed(self):
        self.write(yaml("inner"))
        run = start("try-another")
        self.assertEqual(ended(run)["exitCode"], 0, ctl("thread", run).stdout)
        self.assertIn("--- round 1: first (ok)", ctl("thread", run).stdout)
        self.assert_nothing_left()

    def test_it_ends_as_the_run_does_and_ctrl_c_leaves_nothing(self):
        file = self.write(yaml("inner", "[sh, -c, 'echo no >&2; exit 3']"))
        done = ctl("workflow", "try", file, check=1)
        self.assertIn("stderr: no", done.stdout)
        self.assertIn("exit-code:3", done.stderr)
        file = self.write(yaml("inner", f"[sh, -c, 'setsid sleep 7777 & echo up > {ROOT}/up; wait']"))
        for number in (signal.SIGINT, signal.SIGHUP):
            (ROOT / "up").unlink(missing_ok=True)
            process = subprocess.Popen(["nervectl", "workflow", "try", file], stdout=subprocess.DEVNULL)
            wait_for((ROOT / "up").exists, "the role to run")
            process.send_signal(number)
            self.assertEqual(process.wait(timeout=30), 137)
            self.assertEqual(sh("pgrep", "-xf", "sleep 7777", check=1).stdout, "")
            self.assert_nothing_left()

    def test_root_has_the_credentials_of_the_machine_and_others_what_they_say(self):
        store = pathlib.Path("/etc/credstore/token-of-trial")
        store.parent.mkdir(mode=0o700, exist_ok=True)
        store.write_text("of the machine\n")
        self.addCleanup(store.unlink)
        (ROOT / store.name).write_text("of mine\n")
        # Of a secret nothing but its length is shown.
        file = self.write(yaml("inner", "[sh, -c, 'echo ${#TOKEN}']", f"    env: {{TOKEN: {{credential: {store.name}}}}}\n"))
        self.assertIn("\n14\n", ctl("workflow", "try", file).stdout)
        own = sh("env", f"CREDENTIALS_DIRECTORY={ROOT}", "nervectl", "workflow", "try", file).stdout
        self.assertIn("\n7\n", own)

    def own_worker(self, what_it_does):
        worker = ROOT / "worker.py"
        worker.write_text("""#!/usr/bin/env python3
import json, os, socket
stream = socket.socket(socket.AF_UNIX)
stream.connect(os.environ["NERVE_SOCKET"])
frames = stream.makefile("rw")
def say(**frame):
    print(json.dumps(frame), file=frames, flush=True)
def ask(**frame):
    say(**frame)
    return json.loads(frames.readline())
ask(type="ready", protocol=1, workflow="inner", runs=[])
run = json.loads(frames.readline())["runId"]
message = {"role": "mine", "content": "", "meta": {"status": "ok"}, "timestamp": 1}
""" + what_it_does)
        worker.chmod(0o755)
        return self.write(f"version: 1\nname: inner\nmax_rounds: 2\nworker: {{exec: [{worker}]}}\n")

    def test_max_rounds_binds_a_worker_of_ones_own(self):
        file = self.own_worker("""
for round in range(1, 100):
    ask(type="thread-workflow-message", runId=run, round=round, message=message)
""")
        done = ctl("workflow", "try", file, check=70)
        self.assertEqual(re.findall(r"round \d+", done.stdout), ["round 1", "round 2"])
        self.assertIn("round 3 of a run that may have 2", done.stderr)
        self.assert_nothing_left()

    def test_what_nerved_does_not_take_a_trial_does_not_take(self):
        for does, said in (
                ("frames.write('x' * 9_000_000)", "longer than 8388608 bytes"),
                ("ask(type='thread-workflow-message', runId=run, round=1, message=message | {'content': 'x' * 2_000_000})",
                 "its content has 2000000 bytes"),
                ("ask(type='thread-event', runId=run, eventType='completed', exitCode=3, result='success')",
                 '"completed" with exitCode 3 and the result "success"; that result takes "completed" with 0')):
            done = ctl("workflow", "try", self.own_worker(does), check=70)
            self.assertIn(said, done.stderr)
            self.assert_nothing_left()

    def test_a_worker_need_not_wait_for_the_acknowledgement_of_the_end(self):
        ends = "say(type='thread-event', runId=run, eventType='failed', exitCode=2, result='max-rounds')\nstream.close()\n"
        for _ in range(10):
            self.assertIn("max-rounds", ctl("workflow", "try", self.own_worker(ends), check=2).stderr)

    def test_attempts_are_no_rounds_and_who_has_no_manager_is_told(self):
        file = self.write(yaml("inner", "[sh, -c, 'exit 3']", "    retry: {attempts: 2, backoff: 1ms}\n"))
        done = ctl("workflow", "try", file, check=1).stdout
        self.assertEqual(re.findall(r"--- (.*round 1): first", done), ["attempt 1 failed: round 1", "round 1"])
        nobody = sh("runuser", "-u", "nobody", "--", "nervectl", "workflow", "try", file, check=69)
        self.assertIn("takes root, or a user manager", nobody.stderr)

    def test_a_user_has_a_scope_and_stdin(self):
        sh("useradd", "--create-home", "tester-of-trials")
        self.addCleanup(sh, "userdel", "--remove", "--force", "tester-of-trials", check=False)
        uid = sh("id", "-u", "tester-of-trials").stdout.strip()
        self.addCleanup(nervebox.systemctl, "stop", f"user@{uid}.service")
        # It asks logind, which other tests have left without a bus.
        nervebox.systemctl("restart", "systemd-logind.service")
        nervebox.systemctl("start", f"user@{uid}.service")
        file = self.write(yaml("inner"))
        as_user = ["runuser", "-u", "tester-of-trials", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}",
                   "nervectl", "workflow", "try"]
        self.assertIn("\nfrom stdin\n", sh(*as_user, file, "--prompt-file", "-", input="from stdin\n").stdout)
        done = sh(*as_user, "-", input=file.read_text())
        self.assertIn("--- round 1: first (ok)", done.stdout)
        self.assert_nothing_left()

    def test_a_worker_that_does_not_heed_ctrl_c_is_killed(self):
        (ROOT / "deaf.py").write_text(DEAF)
        file = self.write(f"version: 1\nname: inner\nworker:\n  exec: [/usr/bin/python3, {ROOT}/deaf.py, {ROOT}]\n")
        for patience in ("short", "long"):
            for name in ("up", "told"):
                (ROOT / name).unlink(missing_ok=True)
            process = subprocess.Popen(["nervectl", "workflow", "try", file], stdout=subprocess.DEVNULL)
            wait_for((ROOT / "up").exists, "the run to begin")
            process.send_signal(signal.SIGINT)
            wait_for((ROOT / "told").exists, "the worker to be told")
            if patience == "short":
                process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(timeout=30), 137)
            self.assert_nothing_left()

    def test_a_role_reads_its_thread_without_nerve(self):
        run = start("read-thread")
        self.assertEqual(ended(run)["exitCode"], 0)
        thread = ctl("thread", run).stdout
        self.assertIn('"content": "one"', thread)
        self.assertIn("--- round 0: start", thread[thread.index("round 3: third"):])
        self.assertIn("nervectl thread RUN", ctl("thread", check=64).stderr)


class Terminal(Case):
    definitions = {
        "say-hostile-things": {"roles": {"first": {"exec": ["cat"], "prompt": "{{ start.content }}"},
                                         "second": {"exec": ["sh", "-c", "printf '\\033[2Jboom' >&2; exit 1"]}},
                               "graph": {"$START": "first", "first": {"ok": "second"}, "second": {"ok": "$END"}}},
        "hold-on": command("read line < /run/nervebox-gate; echo done"),
    }

    def assert_harmless(self, text):
        # What is ours: colours, erasing the spinner's line, line ends.
        rest = re.sub("\033\\[(0|3[123])m|\r\033\\[K|\033\\[K|\r", "", text)
        odd = [c for c in rest if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066"]
        self.assertEqual(odd, [], rest)

    def test_what_others_wrote_is_harmless_everywhere(self):
        text, status = on_terminal("nervectl", "workflow", "start", "say-hostile-things", "-f", "-p", HOSTILE)
        self.assertEqual(status, 1)
        self.assert_harmless(text)
        self.assertIn(r"\u{1b}[2Jboom", text)
        run = ctl("workflow", "list", "-o", "json").stdout.split('"')[3]
        for verb in (["workflow", "list"], ["workflow", "show", run], ["thread", run], ["events"], ["status"]):
            text, status = on_terminal("nervectl", *verb, columns=60)
            self.assertEqual(status, 0, text)
            self.assert_harmless(text)

    def test_tables_fit_and_colours_are_for_terminals_that_want_them(self):
        ctl("workflow", "start", "say-hostile-things", "--wait", check=1)
        narrow, _ = on_terminal("nervectl", "workflow", "list", columns=64)
        plain = re.sub("\033\\[[0-9]*m", "", narrow)
        self.assertLessEqual(max(map(len, plain.splitlines())), 64, plain)
        self.assertIn("\033[31mfailed", narrow)
        for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            self.assertNotIn("\033[", on_terminal("nervectl", "workflow", "list", environment=environment)[0])
        piped = ctl("workflow", "list").stdout
        self.assertIn("say-hostile-things", piped)
        self.assertNotIn("\033[", piped)

    def test_follow_survives_a_restart_and_ctrl_c_leaves_the_run(self):
        gate = pathlib.Path("/run/nervebox-gate")
        os.mkfifo(gate, 0o666)
        gate.chmod(0o666)
        self.addCleanup(gate.unlink)
        for end in ("restart", "interrupt"):
            process = subprocess.Popen(["nervectl", "workflow", "start", "hold-on", "-f"], stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True)
            run = process.stdout.readline().strip()
            nervebox.wait_status(run, "started")
            if end == "restart":
                nervebox.systemctl("restart", "nerve")
                gate.write_text("go\n")
                out, _ = process.communicate(timeout=60)
                self.assertEqual(process.returncode, 0)
                self.assertRegex(out, r"--- round 1: \w+ \(ok\), \S+.*\ndone\n")
            else:
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=60)
                self.assertEqual(process.returncode, 130)
                self.assertIn("nervectl workflow kill", said)
                gate.write_text("go\n")
                self.assertEqual(ended(run)["exitCode"], 0)

    def test_a_run_whose_events_are_archived_is_followed_to_its_end(self):
        start("say-hostile-things", "of old", "--key", "once", wait=True)
        age(40)
        ctl("store", "archive")
        again = ctl("workflow", "start", "say-hostile-things", "-p", "of old", "--key", "once", "-f", check=1)
        self.assertIn("--- round 1: first (ok)", again.stdout)

    def test_a_rehearsal_is_marked_wherever_it_is_shown(self):
        run = ctl("workflow", "start", "say-hostile-things", "--dry-run").stdout.strip()
        shown = ended(run)
        self.assertTrue(shown["dryRun"])
        self.assertIn("(dry run)", ctl("workflow", "list").stdout)
        self.assertIn("Dry run: yes", ctl("workflow", "show", run).stdout)
