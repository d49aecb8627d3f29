"""Bad input: definitions, names, prompts, replies, and strangers on worker.sock. Each is refused with a clear error, or
ends as DESIGN.md says; nothing of it stops nerved, and nothing is lost."""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import unittest

import dbuswire
import invariants
import nervebox
from nervebox import ctl, sh, systemctl, wait_for

SOCKET = "/run/nerve/worker.sock"
PLACE = re.compile(r"^(?P<path>[^:]+):(?P<line>\d+):(?P<column>\d+): error: (?P<what>.+)$")
GOOD = nervebox.command("echo good")


def high_water(pid):
    """VmHWM of a process in KiB."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text).group(1))


def forget_high_water(pid):
    """Makes VmHWM begin anew at what is resident now."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


class Lives(nervebox.Case):
    """A class after whose tests nerved is the process that it was before."""

    def setUp(self):
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to be on the bus")
        self.nerved = nervebox.nerved_pid()

    def tearDown(self):
        self.assertEqual(nervebox.nerved_pid(), self.nerved, "nerved is another process")
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to be on the bus")
        run, status = nervebox.start("say-good", wait=True)
        self.assertEqual(status, 0, "nerve does not work any more")
        self.assertEqual(nervebox.thread(run)[1]["content"], "good")


# ---- definitions ----------------------------------------------------------------------------------------------------

def yaml(text):
    return "version: 1\nname: bad-one\n" + text


FINE = "roles:\n  a:\n    exec: [/bin/true]\ngraph:\n  $START: a\n  a: { ok: $END }\n"
# What is wrong: (text, line:column, words of the message).
BROKEN = {
    "no yaml": (yaml("roles: [\n"), None, "not valid YAML"),
    "a tab": (yaml("roles:\n\ta: 1\n"), None, "YAML"),
    "unknown key": (yaml(FINE + "concurency: 2\n"), "9:1", 'unknown key "concurency"'),
    "unknown key of a role": (yaml(FINE.replace("/bin/true]", "/bin/true]\n    shell: yes")), "6:5", 'unknown key "shell"'),
    "unknown key of worker": (yaml(FINE + "worker: { ExecStartPre: /bin/sh }\n"), "9:11", 'unknown key "ExecStartPre"'),
    "duplicate key": (yaml(FINE + "name: bad-one\n"), "9:1", "name"),
    "duplicate role": (yaml(FINE.replace("graph:", "  a:\n    exec: [/bin/false]\ngraph:")), "6:3", "a"),
    "route to nowhere": (yaml(FINE.replace("$END", "b")), "8:12", "no role b"),
    "unreachable role": (yaml(FINE.replace("graph:", "  b: { exec: [/bin/true] }\ngraph:").replace(
        "$END }", "$END }\n  b: { ok: $END }")), "6:3", "no route leads to role b"),
    "no route for ok": (yaml(FINE.replace("ok: $END", "error: $END")), None, "no route for ok"),
    "unknown status": (yaml(FINE.replace("ok: $END", "ok: $END, okay: $END")), None, "okay"),
    "unknown name in a prompt": (yaml(FINE.replace("/bin/true]", "/bin/true]\n    prompt: '{{ nobody.content }}'")),
                                 None, "nobody"),
    "broken template": (yaml(FINE.replace("/bin/true]", "/bin/true]\n    prompt: '{{ start.content'")), None, "prompt"),
    "another name": (yaml(FINE).replace("name: bad-one", "name: good-one"), "2:7", "good-one"),
    "name with a slash": (yaml(FINE).replace("name: bad-one", "name: a/b"), "2:7", '"a/b"'),
    "name with dots": (yaml(FINE).replace("name: bad-one", "name: .."), "2:7", '".."'),
    "name with a newline": (yaml(FINE).replace("name: bad-one", 'name: "a\\nb"'), "2:7", r'"a\nb"'),
    "name with a specifier": (yaml(FINE).replace("name: bad-one", 'name: "a%i"'), "2:7", '"a%i"'),
    "relative cwd": (yaml(FINE.replace("/bin/true]", "/bin/true]\n    cwd: here")), "6:10", "not absolute"),
    "empty exec": (yaml(FINE.replace("[/bin/true]", "[]")), "5:11", "empty"),
    "text for exec": (yaml(FINE.replace("[/bin/true]", "/bin/true")), "5:11", "list"),
    "no time": (yaml(FINE + "timeout: soon\n"), "9:10", "soon"),
    "another overflow": (yaml(FINE + "overflow: newest\n"), "9:11", "newest"),
    "no queue at all": (yaml(FINE + "max_queue: 1000001\n"), "9:12", "1000001"),
    "too much concurrency": (yaml(FINE + "concurrency: 257\n"), "9:14", "257"),
    "too many rounds": (yaml(FINE + "max_rounds: 10001\n"), "9:13", "10001"),
    "two documents": (yaml(FINE + "---\na: 1\n"), "9:1", "document"),
    "an alias": (yaml(FINE + "description: *x\n"), None, ""),
    "another version": (yaml(FINE).replace("version: 1", "version: 9"), "1:10", "version"),
    "not UTF-8": (yaml(FINE).encode() + b"description: \xff\n", "9:14", "UTF-8"),
    "a NUL": (yaml(FINE).encode() + b"description: a\0b\n", None, ""),
    "an escape": (yaml(FINE + "\x1b[31mred: 1\n"), None, ""),
    "too big": (yaml(FINE) + "#" * (256 * 1024), "1:1", "262144"),
    "too deep": (yaml("roles: " + "[" * 100_000 + "\n"), None, ""),
    "billion laughs": (yaml("a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\n" + FINE), None, ""),
    "a list": ("- a\n", "1:1", "list"),
    "NUL in exec": (yaml(FINE.replace("/bin/true", r'"a\0b"')), "5:12", ""),
    "specifier in a worker": (yaml(FINE + "worker: { Environment: A=%i }\n"), "9:24", "%"),
    "newline in a worker": (yaml(FINE + 'worker: { User: "a\\nExecStart=x" }\n'), "9:17", "User"),
    "relative path in a worker": (yaml(FINE + "worker: { ReadWritePaths: x/../y }\n"), "9:27", "absolute"),
    "a variable of nerve's": (yaml(FINE + "worker: { Environment: NERVE_SOCKET=/x }\n"), "9:24", "NERVE_SOCKET"),
}


class Definitions(Lives):
    definitions = {"say-good": GOOD}

    def validate(self, text):
        """(exit status, what it said) of a bad-one.yaml with this text."""
        with tempfile.TemporaryDirectory() as folder:
            path = nervebox.define("bad-one", text, folder)
            done = ctl("validate", path, check=False)
            self.assertNotRegex(done.stderr, r"panicked|[\x00-\x08\x0b-\x1f\x7f]")
            self.found = json.loads(ctl("validate", "-o", "json", path, check=done.returncode).stdout)
            return path, done

    def test_each_fault_has_its_place(self):
        for what, (text, place, words) in BROKEN.items():
            with self.subTest(what):
                path, done = self.validate(text)
                self.assertEqual(done.returncode, 65)
                self.assertEqual(done.stdout, "")
                self.assertEqual({fault["path"] for fault in self.found}, {str(path)})
                for fault in self.found:
                    self.assertIn(f"{path}:{fault['line']}:{fault['column']}\n", done.stderr)
                about = [f"{fault['line']}:{fault['column']}" for fault in self.found
                         if words in f"{fault['message']} ({fault['help']})" and fault["severity"] == "error"]
                self.assertTrue(about, f"nothing about {words!r} in {done.stderr[:2000]}")
                if place:
                    self.assertIn(place, about, done.stderr[:2000])

    def test_what_a_fault_says_can_be_acted_on(self):
        _, done = self.validate(yaml(FINE + "concurency: 2\n"))
        self.assertIn("concurrency", done.stderr)  # did you mean

    def test_nothing_is_accepted_that_only_looks_like_yaml(self):
        for text in ("", "\n", "# nothing\n", "null\n", "{}\n", "5\n", "!!python/object:os.system x\n", "\ufeff",
                     "%YAML 9.9\n---\n", "? a\n", "<<: *x\n"):
            with self.subTest(text=text):
                _, done = self.validate(text)
                # An empty file masks, and says so.
                self.assertEqual(done.returncode, 65 if text else 0)

    def test_aliases_do_not_multiply(self):
        lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
        lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        with tempfile.TemporaryDirectory() as folder:
            path = nervebox.define("bad-one", "\n".join(lines), folder)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            ctl("validate", path, check=65, timeout=10)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.assertLess(used.ru_utime - before.ru_utime, 2)

    def test_a_hundred_thousand_keys_are_refused_quickly(self):
        text = yaml(FINE) + "".join(f"k{i}: 1\n" for i in range(20_000))
        _, done = self.validate(text)
        self.assertEqual(done.returncode, 65)
        self.assertLess(len(done.stderr), 100_000)

    def test_files_that_are_no_files(self):
        with tempfile.TemporaryDirectory() as folder:
            os.mkfifo(f"{folder}/fifo.yaml")
            os.mkdir(f"{folder}/folder.yaml")
            os.symlink("/dev/zero", f"{folder}/zero.yaml")
            os.symlink("loop.yaml", f"{folder}/loop.yaml")
            os.symlink("nowhere", f"{folder}/dangling.yaml")
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(f"{folder}/socket.yaml")
                for name in ("fifo", "folder", "zero", "loop", "dangling", "socket", "absent"):
                    with self.subTest(name):
                        done = ctl("validate", f"{folder}/{name}.yaml", check=65, timeout=5)
                        self.assertRegex(done.stderr, rf"(?m)^error: .+\n *--> {folder}/{name}\.yaml:1:1$")


class Loaded(nervebox.Case):
    """What nerved makes of what is in its directories."""

    def faults(self):
        """The diagnostics of `nervectl status` by definition: {path: line}."""
        found = {}
        for line in ctl("status").stdout.splitlines():
            if match := PLACE.match(line):
                found.setdefault(match["path"], line)
        return found

    def tearDown(self):
        shutil.rmtree("/run/nerve/workflows", ignore_errors=True)
        for name in ("hello-there", "hidden-one", "bad-one"):
            for folder in ("/usr/lib/nerve/workflows", "/etc/nerve/workflows"):
                pathlib.Path(f"{folder}/{name}.yaml").unlink(missing_ok=True)

    def test_broken_definitions_stop_nothing(self):
        broken = {f"bad-{index}": text for index, (text, _, _) in enumerate(BROKEN.values())}
        nervebox.load({"say-good": GOOD, **broken})
        self.assertEqual(nervebox.start("say-good", wait=True)[1], 0)
        faults = self.faults()
        for name in broken:
            with self.subTest(name, what=list(BROKEN)[int(name[4:])]):
                self.assertIn(f"/etc/nerve/workflows/{name}.yaml", faults)
                done = ctl("workflow", "start", name, check=65)
                self.assertIn(f"/etc/nerve/workflows/{name}.yaml:", done.stderr)
        self.assertEqual(systemctl("is-failed", "nerve.service", check=False).stdout.strip(), "active")

    def test_the_last_good_one_stays_in_force_also_after_a_restart(self):
        nervebox.load({"say-good": GOOD})
        digest = nervebox.run_json(nervebox.start("say-good", wait=True)[0])["definition"]
        path = nervebox.define("say-good", yaml(FINE.replace("$END", "nowhere")).replace("bad-one", "say-good"))
        for _ in range(2):
            nervebox.restart_nerve()
            self.assertRegex(self.faults()[str(path)], r":8:12: error: .*no role nowhere")
            run, status = nervebox.start("say-good", wait=True)
            self.assertEqual((status, nervebox.thread(run)[1]["content"]), (0, "good"))
            self.assertEqual(nervebox.run_json(run)["definition"], digest)
        nervebox.define("say-good", nervebox.command("echo better"))
        nervebox.restart_nerve()
        self.assertEqual(self.faults(), {})
        self.assertEqual(nervebox.thread(nervebox.start("say-good", wait=True)[0])[1]["content"], "better")

    def test_a_run_keeps_what_it_began_with(self):
        begun = nervebox.command("read x; echo old")
        nervebox.load({"hold-on": {"roles": {"a": {"exec": ["/bin/sleep", "infinity"]}, "b": {"exec": ["/bin/echo", "old"]}},
                                   "graph": {"$START": "a", "a": {"ok": "$END", "error": "b"}, "b": {"ok": "$END"}}}})
        run = nervebox.start("hold-on")
        pids = nervebox.processes(run)
        nervebox.define("hold-on", begun | {"graph": {"$START": "nowhere"}})
        nervebox.restart_nerve()
        os.kill(next(iter(pids)), signal.SIGTERM)
        self.assertEqual(nervebox.ended(run)["status"], "completed")
        self.assertEqual(nervebox.thread(run)[2]["content"], "old")

    def test_file_names_that_are_no_workflow_names(self):
        nervebox.load({"say-good": GOOD})
        text = json.dumps({"version": 1, "name": "x", **GOOD})
        # `...yaml` is hidden, and the one that is no UTF-8 comes on top.
        names = ["..", "a b", "%i", "a%i", "A", "a_b", "-a", "1a", "a@b", "a\nb", "a\x1b[31m", "ä", "a" * 65, "\\x2d", "a.b"]
        for name in names:
            (nervebox.WORKFLOWS / f"{name}.yaml").write_text(text)
        (nervebox.WORKFLOWS / ".hidden.yaml").write_text(text)
        (nervebox.WORKFLOWS / "note.txt").write_text("x")
        pathlib.Path(os.fsdecode(bytes(nervebox.WORKFLOWS) + b"/\xff.yaml")).write_text(text)
        nervebox.restart_nerve()
        self.assertEqual(nervebox.start("say-good", wait=True)[1], 0)
        done = ctl("validate", check=65)
        self.assertNotRegex(done.stderr, r"[\x00-\x08\x0b-\x1f]")
        self.assertEqual(len([line for line in done.stderr.splitlines() if "no definition" in line]), len(names))
        self.assertNotIn(".hidden", done.stderr)
        listed = [line.split()[0] for line in ctl("status").stdout.splitlines() if ".yaml" in line]
        self.assertNotIn("..", listed)

    def refusal(self, path):
        """What `status` and `start` say about a definition that is there but not trusted."""
        nervebox.restart_nerve()
        name = pathlib.Path(path).stem
        fault = self.faults().get(str(path))
        self.assertIsNotNone(fault, ctl("status").stdout)
        self.assertIn("not trusted", fault)
        self.assertIn(fault.split(": ", 2)[2].split("(")[0], ctl("workflow", "start", name, check=65).stderr)
        self.assertEqual(systemctl("is-active", "nerve.service").stdout.strip(), "active")
        return fault

    def test_a_definition_that_others_may_change_is_refused_with_what_to_do(self):
        nervebox.load({"say-good": GOOD, "bad-one": GOOD})
        path = nervebox.WORKFLOWS / "bad-one.yaml"
        # The definition was good before, and then that stays in force: begin with one that nerve never took.
        path.unlink()
        with self.subTest("not root's"):
            path = nervebox.define("own-one", GOOD, owner=65534)
            fault = self.refusal(path)
            self.assertIn(f"chown root: {path}", fault)
        for mode in (0o664, 0o646, 0o666, 0o777):
            with self.subTest(mode=oct(mode)):
                path = nervebox.define(f"mode-{mode:o}", GOOD, mode=mode)
                self.assertIn(f"chmod go-w {path}", self.refusal(path))
        for path in nervebox.WORKFLOWS.glob("*.yaml"):
            path.chmod(0o644)
            os.chown(path, 0, 0)
        for folder in (nervebox.WORKFLOWS, nervebox.WORKFLOWS.parent):
            with self.subTest(folder=folder):
                self.addCleanup(folder.chmod, 0o755)
                folder.chmod(0o775)
                path = nervebox.define(f"behind-{folder.name}", GOOD)
                self.assertIn(f"chmod go-w {folder}", self.refusal(path))
                folder.chmod(0o755)
        with self.subTest("a folder of somebody else's"):
            os.chown(nervebox.WORKFLOWS, 65534, 0)
            self.addCleanup(os.chown, nervebox.WORKFLOWS, 0, 0)
            path = nervebox.define("behind-owner", GOOD)
            self.assertIn(f"chown root: {nervebox.WORKFLOWS}", self.refusal(path))
            os.chown(nervebox.WORKFLOWS, 0, 0)

    def test_a_link_is_as_trusted_as_what_it_goes_through(self):
        nervebox.load({"say-good": GOOD})
        folder = pathlib.Path(sh("mktemp", "-d", "/var/spool/nervebox.XXXXXX").stdout.strip())
        self.addCleanup(shutil.rmtree, folder)
        folder.chmod(0o777)
        nervebox.define("link-one", GOOD, folder)
        (nervebox.WORKFLOWS / "link-one.yaml").symlink_to(folder / "link-one.yaml")
        self.assertIn(f"chmod go-w {folder}", self.refusal(nervebox.WORKFLOWS / "link-one.yaml"))
        folder.chmod(0o755)
        nervebox.restart_nerve()
        self.assertEqual(nervebox.start("link-one", wait=True)[1], 0)

    def test_once_good_and_then_untrusted_the_good_one_stays(self):
        nervebox.load({"say-good": GOOD})
        path = nervebox.define("say-good", nervebox.command("echo evil"), mode=0o666)
        nervebox.restart_nerve()
        self.assertIn("not trusted", self.faults()[str(path)])
        self.assertEqual(nervebox.thread(nervebox.start("say-good", wait=True)[0])[1]["content"], "good")

    def test_an_empty_file_masks(self):
        shipped = pathlib.Path("/usr/lib/nerve/workflows")
        nervebox.load({"say-good": GOOD})
        nervebox.define("hello-there", nervebox.command("echo shipped"), shipped)
        nervebox.restart_nerve()
        self.assertEqual(nervebox.thread(nervebox.start("hello-there", wait=True)[0])[1]["content"], "shipped")
        with self.subTest("the administrator's wins"):
            nervebox.define("hello-there", nervebox.command("echo local"))
            nervebox.restart_nerve()
            self.assertEqual(nervebox.thread(nervebox.start("hello-there", wait=True)[0])[1]["content"], "local")
        for what, make in (("empty", lambda path: path.write_bytes(b"")),
                           ("/dev/null", lambda path: path.symlink_to("/dev/null"))):
            with self.subTest(what):
                path = nervebox.WORKFLOWS / "hello-there.yaml"
                path.unlink()
                make(path)
                nervebox.restart_nerve()
                self.assertIn("hello-there", ctl("workflow", "start", "hello-there", check=66).stderr)
                # It is shown until its worker is gone.
                wait_for(lambda: "hello-there" not in ctl("status").stdout, "it to be forgotten")
        with self.subTest("unmasked"):
            (nervebox.WORKFLOWS / "hello-there.yaml").unlink()
            nervebox.restart_nerve()
            self.assertEqual(nervebox.thread(nervebox.start("hello-there", wait=True)[0])[1]["content"], "shipped")


class Obstacles(nervebox.Case):
    """A unit of a worker's name that is not nerve's: it is never touched, and the run waits."""

    definitions = {"say-good": GOOD}
    UNIT = pathlib.Path("/etc/systemd/system") / nervebox.unit_of("say-good")
    TEXT = "[Service]\nExecStart=/bin/sleep infinity\n"

    def setUp(self):
        self.UNIT.write_text(self.TEXT)
        systemctl("daemon-reload")
        nervebox.restart_nerve()
        self.nerved = nervebox.nerved_pid()

    def tearDown(self):
        systemctl("stop", self.UNIT.name, check=False)
        self.UNIT.unlink(missing_ok=True)
        systemctl("daemon-reload")
        last = nervebox.nerved_pid()
        nervebox.load(self.definitions)
        self.assertEqual(last, self.nerved, "nerved is another process")

    def waits(self, words):
        """A run that waits, and all say why and what to do about it."""
        run = nervebox.start("say-good")
        nervebox.wait_worker("say-good", "obstructed")
        for said in (ctl("status").stdout, ctl("workflow", "show", run).stdout):
            self.assertIn(words, said)
        self.assertIsNone(nervebox.stored(run)["ended_at"])
        return run

    def goes_on(self, run):
        """Without the file."""
        self.UNIT.unlink()
        systemctl("daemon-reload")
        self.assertEqual(nervebox.ended(run)["exitCode"], 0)
        self.assertEqual(nervebox.properties(self.UNIT.name, "Transient")["Transient"], "yes")

    def test_a_unit_file_is_reported_and_left_alone(self):
        run = self.waits(f"{self.UNIT} stands in the way")
        self.assertEqual(self.UNIT.read_text(), self.TEXT)
        self.assertEqual(systemctl("is-active", self.UNIT.name, check=3).stdout.strip(), "inactive")
        self.goes_on(run)

    def test_a_running_service_is_reported_and_left_alone(self):
        systemctl("start", self.UNIT.name)
        pid = nervebox.main_pid(self.UNIT.name)
        run = self.waits(f"{self.UNIT} stands in the way")
        self.assertIn(f"systemctl stop {self.UNIT.name}", ctl("status").stdout)
        self.assertEqual(nervebox.main_pid(self.UNIT.name), pid)
        systemctl("stop", self.UNIT.name)
        self.goes_on(run)

    def test_a_failed_service_is_reported_and_left_failed(self):
        self.UNIT.write_text("[Service]\nExecStart=/bin/false\n")
        systemctl("daemon-reload")
        systemctl("start", self.UNIT.name)
        wait_for(lambda: systemctl("is-failed", self.UNIT.name, check=False).stdout.strip() == "failed", "it to fail")
        run = self.waits(str(self.UNIT))
        self.assertEqual(systemctl("is-failed", self.UNIT.name, check=False).stdout.strip(), "failed")
        systemctl("reset-failed", self.UNIT.name)
        self.goes_on(run)

    def test_a_masked_unit_is_reported(self):
        self.UNIT.unlink()
        self.UNIT.symlink_to("/dev/null")
        systemctl("daemon-reload")
        self.goes_on(self.waits(f"systemctl unmask {self.UNIT.name}"))

    def test_a_run_can_be_killed_whatever_is_in_the_way(self):
        systemctl("start", self.UNIT.name)
        pid = nervebox.main_pid(self.UNIT.name)
        run = nervebox.start("say-good")
        ctl("workflow", "kill", run, timeout=10)
        self.assertEqual(nervebox.ended(run)["exitCode"], 137)
        self.assertEqual(nervebox.main_pid(self.UNIT.name), pid)


class Names(Lives):
    definitions = {"say-good": GOOD}
    BAD = ("", "..", "../say-good", "a/b", "/etc/passwd", "say-good\n", "say\ngood", "%i", "%n", "say-good@", "-rf", "--",
           "SAY-GOOD", "say_good", "say good", "*", "say-good.service", "\\x2d", "${X}", "; id", "ä", "\x1b[31m", "a" * 65,
           "a" * 100_000, "say-good\u202e")

    def test_on_the_command_line(self):
        before = nervebox.listed()
        for name in self.BAD:
            if name == "-rf":
                continue  # an option, and that is a usage error
            for line in (["workflow", "start", "--", name], ["workflow", "list", "--", name]):
                with self.subTest(name=name[:80], line=line[:2]):
                    done = ctl(*line, check=65)
                    self.assertEqual(done.stdout, "")
                    self.assertEqual(len(done.stderr.splitlines()), 1)
                    self.assertNotRegex(done.stderr, "[\x00-\x08\x0b-\x1f\u202e]")
                    self.assertLess(len(done.stderr), 500)
        ctl("workflow", "start", "-rf", check=64)
        self.assertEqual(nervebox.listed(), before)

    def test_on_the_bus(self):
        before = nervebox.listed()
        with dbuswire.Connection() as bus:
            for name in self.BAD:
                with self.subTest(name=name[:80]):
                    for member, signature, arguments in (("StartRun", "ssa{sv}", (name, "", {})),
                                                         ("ListRuns", "a{sv}", ({"workflow": name},))):
                        reply = bus.call(*dbuswire.MANAGER, member, signature, *arguments)
                        self.assertEqual(reply.error, "org.nerve1.Error.InvalidArgument")
                        self.assertLess(len(reply.text), 500)
        self.assertEqual(nervebox.listed(), before)

    def test_runs(self):
        tails = ("", "xyz", "..", "3fa9'--", "%", "_", "g", "0x1", " 1", "1 ", "+1", "-1", "a" * 33, "\u0663", "1\n",
                 "' OR 1=1", "*")
        with dbuswire.Connection() as bus:
            for tail in tails:
                for member, signature, arguments in (("GetRun", "s", (tail,)), ("GetThread", "sa{sv}", (tail, {})),
                                                     ("KillRun", "sst", (tail, "", 0))):
                    with self.subTest(tail=tail, member=member):
                        self.assertEqual(bus.call(*dbuswire.MANAGER, member, signature, *arguments).error,
                                         "org.nerve1.Error.InvalidArgument")
        for tail in tails:
            for line in (["workflow", "show"], ["workflow", "kill"], ["thread"], ["logs"]):
                with self.subTest(tail=tail, line=line):
                    done = ctl(*line, "--", tail, check=65)
                    self.assertEqual(len(done.stderr.splitlines()), 1)

    def test_options_that_nerve_does_not_know(self):
        with dbuswire.Connection() as bus:
            for member, signature, arguments in (
                    ("StartRun", "ssa{sv}", ("say-good", "", {"maxRound": 1})),
                    ("StartRun", "ssa{sv}", ("say-good", "", {"maxRounds": "1"})),
                    ("StartRun", "ssa{sv}", ("say-good", "", {"maxRounds": 0})),
                    ("StartRun", "ssa{sv}", ("say-good", "", {"maxRounds": 10_001})),
                    ("StartRun", "ssa{sv}", ("say-good", "", {"environment": "LD_PRELOAD=x"})),
                    ("ListRuns", "a{sv}", ({"state": "x"},)), ("GetRun", "ss", ("1", "2")), ("GetRun", "", ()),
                    ("KillRun", "sst", ("1", "x" * 1025, 0)), ("KillRun", "sst", ("1", "", 2 ** 63))):
                with self.subTest(member=member, arguments=str(arguments)[:60]):
                    self.assertIsNotNone(bus.call(*dbuswire.MANAGER, member, signature, *arguments).error)
        self.assertEqual([run for run in nervebox.listed("--active")], [])


# ---- prompts --------------------------------------------------------------------------------------------------------

class Prompts(Lives):
    definitions = {"say-good": GOOD, "count-bytes": nervebox.command("wc -c", prompt="{{ start.content }}")}
    HUGE = 100 * 1024 * 1024

    def refused(self, *line, **more):
        before = nervebox.listed()
        done = ctl("workflow", "start", "count-bytes", *line, check=65, timeout=10, **more)
        self.assertEqual((done.stdout, len(done.stderr.splitlines())), ("", 1), done.stderr)
        self.assertEqual(nervebox.listed(), before)
        return done.stderr

    def test_100_mb_from_a_file(self):
        with tempfile.NamedTemporaryFile() as file:
            os.truncate(file.name, self.HUGE)
            self.assertIn("1048576", self.refused("--prompt-file", file.name))

    def test_100_mb_from_stdin(self):
        self.assertIn("1048576", self.refused("--prompt-file", "-", input="x" * self.HUGE))
        # What has no end is not read to its end.
        self.assertIn("1048576", self.refused("--prompt-file", "/dev/zero"))

    def test_100_mb_over_the_bus(self):
        # The bus itself takes no more than 32 MiB and hangs up; nerve sees what is below that.
        for size, survives in ((self.HUGE, False), (30 * 1024 * 1024, True), (1024 * 1024 + 1, True)):
            with self.subTest(size=size), dbuswire.Connection() as bus:
                with contextlib.suppress(BrokenPipeError, ConnectionError):
                    reply = bus.call(*dbuswire.MANAGER, "StartRun", "ssa{sv}", "count-bytes", "x" * size, {})
                    self.assertTrue(survives)
                    self.assertEqual(reply.error, "org.nerve1.Error.InvalidArgument")
                    self.assertLess(len(reply.text), 500)
                    continue
                self.assertFalse(survives)

    def test_busctl_cannot_do_it_either(self):
        done = sh("busctl", "call", *dbuswire.MANAGER, "StartRun", "ssa{sv}", "count-bytes", "x" * 131_000, "0")
        run = done.stdout.split('"')[1]
        self.assertEqual(nervebox.ended(run)["status"], "completed")

    def test_the_largest_prompt_arrives_whole(self):
        for text in ("x" * 1024 * 1024, "\x01" * 1024 * 1024, "ä" * 512 * 1024):
            with self.subTest(text=text[:1]):
                done = ctl("workflow", "start", "count-bytes", "--prompt-file", "-", "--wait", input=text)
                run = done.stdout.strip()
                self.assertEqual(nervebox.thread(run)[1]["content"], str(1024 * 1024))
                self.assertEqual(nervebox.run_json(run)["prompt"], text)
        self.refused("--prompt-file", "-", input="x" * (1024 * 1024 + 1))

    def test_nul_and_invalid_utf8(self):
        for data, words in ((b"a\0b", "NUL byte at offset 1"), (b"ab\xff", "UTF-8 at offset 2"),
                            (b"\xed\xa0\x80", "UTF-8 at offset 0"), (b"\xc0\x80", "UTF-8")):
            with self.subTest(data=data), tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                self.assertIn(words, self.refused("--prompt-file", file.name))
        done = subprocess.run([b"nervectl", b"workflow", b"start", b"count-bytes", b"-p", b"a\xff"], capture_output=True,
                              check=False)
        self.assertEqual((done.returncode, done.stdout), (65, b""))

    def test_invalid_utf8_straight_over_the_bus(self):
        # The bus itself refuses such a message and hangs up.
        for data in (b"a\0b", b"a\xff"):
            with self.subTest(data=data), dbuswire.Connection() as bus:
                with contextlib.suppress(ConnectionError):
                    self.assertIsNotNone(bus.call(*dbuswire.MANAGER, "StartRun", "ssa{sv}", "count-bytes", data, {}).error)

    def test_a_file_that_cannot_be_read(self):
        for path in ("/nonexistent", "/etc", "/proc/self/mem"):
            with self.subTest(path=path):
                self.assertIn(path, self.refused("--prompt-file", path))

    def test_hostile_text_is_only_text(self):
        text = "{{ 7 * 7 }} {% for x in y %} ${HOME} %i `id` $(id) \u202e \x1b[31m"
        done = ctl("workflow", "start", "count-bytes", "--wait", "-p", text)
        self.assertEqual(nervebox.thread(done.stdout.strip())[1]["content"], str(len(text.encode())))


# ---- replies --------------------------------------------------------------------------------------------------------

class Replies(Lives):
    definitions = {
        "say-good": GOOD,
        "miss-program": {"roles": {"a": {"exec": ["/nonexistent/program", "x"]}}, "graph": {"$START": "a", "a": {"ok": "$END"}}},
        "miss-name": {"roles": {"a": {"exec": ["no-such-program"]}}, "graph": {"$START": "a", "a": {"ok": "$END"}}},
        "run-text": {"roles": {"a": {"exec": ["/etc/passwd"]}}, "graph": {"$START": "a", "a": {"ok": "$END"}}},
        "miss-folder": nervebox.command("pwd", cwd="/nonexistent"),
        "handle-missing": {"roles": {"a": {"exec": ["/nonexistent"]}, "b": {"exec": ["/bin/echo", "saved"]}},
                           "graph": {"$START": "a", "a": {"ok": "$END", "error": "b"}, "b": {"ok": "$END"}}},
        "write-gigabyte": nervebox.command("head -c 1073741824 /dev/zero; echo finished >&2; exec sleep infinity"),
        "write-forever": nervebox.command("(setsid sh -c 'exec yes' &) ; exec yes"),
        "write-limit": nervebox.command("head -c 1048576 /dev/zero | tr '\\0' x; echo; echo"),
        "write-over": nervebox.command("head -c 1048577 /dev/zero | tr '\\0' x"),
        "write-grown": nervebox.command("head -c 400000 /dev/zero | tr '\\0' '\\377'"),
        "scold-a-lot": nervebox.command("head -c 52428800 /dev/zero | tr '\\0' x >&2; echo end >&2; echo done"),
        "scold-lines": nervebox.command("i=0; while [ $i -lt 2000 ]; do echo line $i >&2; i=$((i+1)); done; echo done"),
        "write-bytes": nervebox.command(r"printf 'a\377b\303'"),
        "write-nul": nervebox.command(r"printf 'a\000b'; printf 'c\000d' >&2"),
        "write-controls": nervebox.command("head -c 1048576 /dev/zero | tr '\\0' '\\001'"),
        "read-nothing": nervebox.command("exec <&-; echo deaf", prompt="{{ start.content * 1 if false else start.content }}"),
        "shut-pipes": nervebox.command("exec >&- 2>&-; exec sleep 0.1"),
        "scold-each-round": {"roles": {"a": {"exec": ["/bin/cat", "/etc/nervebox-noise"]}}, "max_rounds": 760,
                             "graph": {"$START": "a", "a": {"ok": "a"}}},
    }

    def end(self, workflow, status, code, result, timeout=nervebox.TIMEOUT):
        run = nervebox.start(workflow)
        end = nervebox.ended(run, timeout)
        self.assertEqual((end["status"], end["exitCode"], end["result"]), (status, code, result), nervebox.thread(run))
        nervebox.assert_gone(run)
        return run, nervebox.thread(run)

    def test_a_program_that_is_missing(self):
        for workflow, program in (("miss-program", "/nonexistent/program"), ("miss-name", "no-such-program"),
                                  ("run-text", "/etc/passwd"), ("miss-folder", "/nonexistent")):
            with self.subTest(workflow):
                _, thread = self.end(workflow, "failed", 1, "exec-failed")
                self.assertEqual((thread[1]["meta"]["status"], thread[1]["content"]), ("error", ""))
                self.assertIn(program, thread[1]["meta"]["stderr"])
        _, thread = self.end("handle-missing", "completed", 0, "success")
        self.assertEqual(thread[2]["content"], "saved")

    def test_validate_warns_of_a_missing_program(self):
        done = ctl("validate", nervebox.WORKFLOWS / "miss-program.yaml")
        self.assertRegex(done.stderr, r"(?m)^warning: .*/nonexistent/program.*\n *--> .*miss-program\.yaml:\d+:\d+$")

    def test_a_gigabyte_on_stdout_ends_the_round_at_once(self):
        nervebox.start("write-gigabyte", wait=True)  # the worker is warm
        worker = nervebox.worker_pid("write-gigabyte")
        for pid in (self.nerved, worker):
            forget_high_water(pid)
        before = {pid: high_water(pid) for pid in (self.nerved, worker)}
        run, thread = self.end("write-gigabyte", "failed", 1, "reply-too-large", timeout=10)
        self.assertEqual(thread[1]["content"], "")
        self.assertNotIn("finished", thread[1]["meta"]["stderr"])
        self.assertEqual(nervebox.worker_pid("write-gigabyte"), worker)
        for pid in before:
            self.assertLess(high_water(pid) - before[pid], 8 * 1024, "KiB more")
        row = nervebox.row(run)
        self.assertLess(row["endedAt"] - row["startedAt"], 5_000_000)

    def test_a_role_that_writes_for_ever_and_forks(self):
        self.end("write-forever", "failed", 1, "reply-too-large", timeout=10)

    def test_the_limit_is_after_decoding_and_without_trailing_newlines(self):
        _, thread = self.end("write-limit", "completed", 0, "success")
        self.assertEqual(len(thread[1]["content"]), 1024 * 1024)
        self.end("write-over", "failed", 1, "reply-too-large")
        self.end("write-grown", "failed", 1, "reply-too-large")

    def test_the_largest_line_of_the_protocol(self):
        _, thread = self.end("write-controls", "completed", 0, "success")
        self.assertEqual(thread[1]["content"], "\x01" * 1024 * 1024)

    def test_50_mb_on_stderr(self):
        nervebox.start("scold-lines", wait=True)
        nervebox.start("write-over", wait=True)
        forget_high_water(self.nerved)
        before = high_water(self.nerved)
        run = nervebox.start("scold-a-lot")
        worker = wait_for(lambda: nervebox.worker_pid("scold-a-lot"), "the worker")
        end = nervebox.ended(run)
        self.assertEqual(end["status"], "completed")
        self.assertEqual(nervebox.thread(run)[1]["content"], "done")
        stderr = nervebox.thread(run)[1]["meta"]["stderr"]
        self.assertLessEqual(len(stderr), 8 * 1024)
        self.assertTrue(stderr.endswith("xxxend\n"), stderr[-20:])
        self.assertLess(high_water(worker), 24 * 1024)
        self.assertLess(high_water(self.nerved) - before, 8 * 1024)

    def test_no_line_of_stderr_is_lost(self):
        run, _ = self.end("scold-lines", "completed", 0, "success")
        lines = [entry["MESSAGE"] for entry in nervebox.journal(f"NERVE_RUN_ID={run}", "NERVE_ROLE=main")]
        self.assertEqual(lines, [f"line {index}" for index in range(2000)])

    def test_invalid_utf8_becomes_replacement_characters_with_one_warning(self):
        run, thread = self.end("write-bytes", "completed", 0, "success")
        self.assertEqual(thread[1]["content"], "a\ufffdb\ufffd")
        warnings = [entry for entry in nervebox.journal(f"NERVE_RUN_ID={run}", "PRIORITY=4")
                    if "UTF-8" in str(entry["MESSAGE"])]
        self.assertEqual(len(warnings), 1)
        self.assertIn("UTF-8", ctl("logs", run).stdout)

    def test_a_nul_on_stdout_does_not_take_nerve_off_the_bus(self):
        # D-Bus has no NUL in strings: dbus-daemon hangs up on who sends one.
        run, status = nervebox.start("write-nul", wait=True)
        self.assertEqual(status, 0)
        with dbuswire.Connection() as bus:
            reply = bus.call(*dbuswire.MANAGER, "GetThread", "sa{sv}", run, {})
            self.assertNotIn(reply.error, ("org.freedesktop.DBus.Error.NoReply",))
            self.assertIsNone(reply.error)
        for line in (["thread", run], ["thread", run, "-o", "json"], ["workflow", "show", run], ["workflow", "list"]):
            with self.subTest(line=line):
                ctl(*line)
        self.assertTrue(nervebox.thread(run)[1]["content"].startswith("a"))

    def test_a_long_noisy_run_can_be_shown(self):
        # 48 KiB of JSON each round: together more than a message of the bus may have.
        noise = pathlib.Path("/etc/nervebox-noise")
        noise.write_text("#!/bin/sh\n")
        self.addCleanup(noise.unlink)
        run = nervebox.start("scold-each-round", "", "--max-rounds", "1")
        nervebox.stored_end(run)
        self.fill(run, 760)
        for line in (["workflow", "show", run, "-o", "json"], ["thread", run, "-o", "json"], ["status"]):
            with self.subTest(line=line):
                done = ctl(*line, check=False)
                self.assertEqual(done.returncode, 0, done.stderr)

    def fill(self, run, rounds):
        """Gives an ended run so many rounds, each with as much stderr as a role can say, in the database itself: to
        execute them takes a minute."""
        systemctl("stop", "nerve.service")
        try:
            with contextlib.closing(nervebox.sqlite3.connect(nervebox.DATABASE)) as connection, connection:
                payload, at = connection.execute(
                    "SELECT payload, at FROM events WHERE ref = ? AND payload LIKE '%\"message\"%'", [run]).fetchone()
                event = json.loads(payload)
                event["message"]["meta"]["stderr"] = "\x01" * 8192
                name, keeps = connection.execute(
                    "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'workflow_runs'").fetchone()
                connection.execute(f"DROP TRIGGER {name}")
                connection.execute("UPDATE workflow_runs SET rounds = ? WHERE run = ?", [rounds, run])
                connection.execute(keeps)
                history = invariants.History(connection)
                for number in range(2, rounds + 1):
                    event["round"] = number
                    history.append("thread-workflow-message", run, json.dumps(event), at)
        finally:
            systemctl("start", "nerve.service")
        self.nerved = nervebox.nerved_pid()

    def test_a_role_that_reads_nothing_or_shuts_its_pipes(self):
        done = ctl("workflow", "start", "read-nothing", "--wait", "--prompt-file", "-", input="x" * 1_000_000)
        self.assertEqual(nervebox.thread(done.stdout.strip())[1]["content"], "deaf")
        self.end("shut-pipes", "completed", 0, "success")


# ---- worker.sock ----------------------------------------------------------------------------------------------------

READY = json.dumps({"type": "ready", "protocol": 1, "workflow": "hold-on", "runs": []}).encode() + b"\n"

# Connects to nerve as a worker would and says how that ended: {"read": bytes that came, "sent": bytes that went}.
IMPOSTOR = r"""
import json, os, socket, sys
lines = sys.stdin.read()
stream = socket.socket(socket.AF_UNIX)
stream.settimeout(20)
stream.connect("/run/nerve/worker.sock")
try:
    stream.sendall(lines.encode())
    came = b""
    while chunk := stream.recv(4096):
        came += chunk
    print(json.dumps({"came": came.decode(), "end": "closed"}))
except (BrokenPipeError, ConnectionResetError):
    print(json.dumps({"came": "", "end": "reset"}))
"""


class Strangers(Lives):
    definitions = {
        "say-good": GOOD,
        "hold-on": nervebox.command("exec sleep infinity"),
        "pretend-worker": {"roles": {"main": {"exec": ["/usr/bin/python3", "-c", IMPOSTOR], "prompt": "{{ start.content }}"}},
                           "graph": {"$START": "main", "main": {"ok": "$END"}}},
    }

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.held = nervebox.start("hold-on")
        cls.pids = nervebox.processes(cls.held)

    def tearDown(self):
        self.assertEqual(nervebox.alive(self.pids), self.pids)
        row = nervebox.row(self.held)
        self.assertEqual((row["status"], row["rounds"]), ("started", 0))
        super().tearDown()

    def dropped(self, stream):
        """Waits until nerve hangs up, and says that nothing came."""
        with stream:
            stream.settimeout(10)
            try:
                self.assertEqual(stream.recv(1), b"")
            except ConnectionResetError:
                pass

    def test_root_is_a_stranger(self):
        self.dropped(dbuswire.connect_as(0, SOCKET))

    def test_nobody_is_a_stranger(self):
        self.dropped(dbuswire.connect_as(dbuswire.NOBODY, SOCKET))

    def test_nothing_of_a_stranger_is_read(self):
        systemctl("kill", "--kill-whom=main", "--signal=STOP", "nerve.service")
        try:
            with dbuswire.connect_as(0, SOCKET) as stream:
                stream.sendall(READY)  # waits in the socket until nerved takes the connection
                systemctl("kill", "--kill-whom=main", "--signal=CONT", "nerve.service")
                # Unread bytes make the kernel answer a close with a reset; read ones do not.
                with self.assertRaises(ConnectionResetError):
                    stream.recv(1)
        finally:
            systemctl("kill", "--kill-whom=main", "--signal=CONT", "nerve.service")

    def test_another_unit_is_a_stranger(self):
        for properties in ([], ["--slice=nerve-wf.slice"], ["--property=DynamicUser=yes", "--property=User=nw-hold-on"]):
            with self.subTest(properties=properties):
                done = sh("systemd-run", "--quiet", "--pipe", "--wait", *properties, "/usr/bin/python3", "-c", IMPOSTOR,
                          input=READY.decode(), check=False)
                self.assertIn('"came": ""', done.stdout, done.stderr)

    def test_a_unit_that_is_called_like_a_worker_but_is_none(self):
        # A workflow that nerve does not know, and a process that is the unit's main process: nothing to be had.
        ready = READY.decode().replace("hold-on", "no-workflow")
        done = sh("systemd-run", "--quiet", "--pipe", "--wait", "--unit=nerve-wf@no-workflow.service", "/usr/bin/python3",
                  "-c", IMPOSTOR, input=ready + "garbage\n", check=False)
        self.assertNotIn("start-thread", done.stdout)
        # One that speaks for another workflow than its own.
        done = sh("systemd-run", "--quiet", "--pipe", "--wait", "--unit=nerve-wf@no-workflow.service", "/usr/bin/python3",
                  "-c", IMPOSTOR, input=READY.decode(), check=False)
        self.assertNotIn("start-thread", done.stdout)
        self.assertNotIn("welcome", done.stdout)

    def test_a_role_is_no_worker(self):
        end = json.dumps({"type": "thread-event", "runId": self.held, "eventType": "completed", "exitCode": 0,
                          "result": "success"}) + "\n"
        for workflow in ("pretend-worker", "hold-on"):
            with self.subTest(workflow):
                run, status = nervebox.start("pretend-worker", READY.decode().replace("hold-on", workflow) + end, wait=True)
                self.assertEqual(status, 0, nervebox.thread(run))
                self.assertEqual(json.loads(nervebox.thread(run)[1]["content"])["came"], "")

    def test_a_process_that_moves_into_the_workers_cgroup_is_no_worker(self):
        cgroup = nervebox.worker_cgroup("hold-on") / "main"
        script = f"import os; open({str(cgroup / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n{IMPOSTOR}"
        done = sh("python3", "-c", script, input=READY.decode(), check=False)
        self.assertIn('"came": ""', done.stdout, done.stderr)

    def test_garbage_half_lines_and_floods(self):
        for data in (b"garbage\n", b'{"type":"ready"', b"\0" * 100_000, b"[" * 100_000 + b"\n", b"\n" * 10_000,
                     READY * 10_000, b"x" * (9 * 1024 * 1024), b""):
            with self.subTest(data=data[:20]), dbuswire.connect_as(0, SOCKET) as stream:
                stream.settimeout(10)
                try:
                    stream.sendall(data)
                    self.assertEqual(stream.recv(1), b"")
                except (BrokenPipeError, ConnectionResetError):
                    pass

    def test_1100_connections(self):
        forget_high_water(self.nerved)
        before, files = high_water(self.nerved), len(os.listdir(f"/proc/{self.nerved}/fd"))
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, limit[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(dbuswire.connect_as(0, SOCKET)) for _ in range(1100)]
            self.assertEqual(nervebox.start("say-good", wait=True)[1], 0)
            for stream in streams:
                self.dropped(stream)
        wait_for(lambda: len(os.listdir(f"/proc/{self.nerved}/fd")) <= files + 4, "nerved to close its descriptors")
        self.assertLess(high_water(self.nerved) - before, 8 * 1024)

    def test_1100_connections_while_nerved_stands_still(self):
        # They wait in the socket, and are all accepted at once.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limit[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        os.kill(self.nerved, signal.SIGSTOP)
        try:
            streams = []
            for _ in range(1100):
                stream = socket.socket(socket.AF_UNIX)
                stream.setblocking(False)
                streams.append(stream)
                with contextlib.suppress(BlockingIOError):
                    stream.connect(SOCKET)
        finally:
            os.kill(self.nerved, signal.SIGCONT)
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.setblocking(True)
                self.dropped(stream)

    def test_a_journal_that_stands_still_does_not_stop_nerved(self):
        # Every stranger is a line of nerved's log, and anybody may be a stranger.
        journald = nervebox.main_pid("systemd-journald.service")
        os.kill(journald, signal.SIGSTOP)
        try:
            for _ in range(600):
                dbuswire.connect_as(dbuswire.NOBODY, SOCKET).close()
            self.assertEqual(ctl("status", check=False, timeout=10).returncode, 0)
        except subprocess.TimeoutExpired:
            self.fail("nerved waits for the journal")
        finally:
            os.kill(journald, signal.SIGCONT)

    def test_big_messages_from_nobody_are_not_hoarded(self):
        forget_high_water(self.nerved)
        before = high_water(self.nerved)
        blob = "x" * (30 * 1024 * 1024)
        replies = []

        def ask(bus):
            serials = [bus.send(*dbuswire.MANAGER, "StartRun", "ssa{sv}", "hold-on", blob, {}) for _ in range(3)]
            replies.extend(bus.reply_to(serial).error for serial in serials)
        with contextlib.ExitStack() as connections:
            # Connected before there are threads: all of a process has the uid that one of them connects with.
            buses = [connections.enter_context(dbuswire.Connection(dbuswire.NOBODY)) for _ in range(3)]
            clients = [threading.Thread(target=ask, args=[bus]) for bus in buses]
            for client in clients:
                client.start()
            ctl("status")
            for client in clients:
                client.join()
        self.assertEqual(replies, ["org.nerve1.Error.NotPermitted"] * 9)
        # Nine were on their way at once; none may be there twice.
        self.assertLess(high_water(self.nerved) - before, 300 * 1024)


class Elsewhere(nervebox.Case):
    """What belongs to no other class: a second nerved, polkit."""

    definitions = {"say-good": GOOD}

    def test_a_second_nerved_says_so_and_goes(self):
        first = nervebox.nerved_pid()
        for environment in ({}, {"STATE_DIRECTORY": "/var/lib/nerve"}):
            with self.subTest(environment=environment):
                done = sh("/usr/libexec/nerve/nerved", check=1, timeout=10,
                          env={"PATH": "/usr/bin:/bin", **environment})
                self.assertIn("another nerved", done.stderr)
        self.assertEqual(nervebox.nerved_pid(), first)
        self.assertTrue(pathlib.Path(SOCKET).is_socket())
        self.assertEqual(nervebox.start("say-good", wait=True)[1], 0)

    def test_polkit_is_not_asked(self):
        with subprocess.Popen(["busctl", "monitor", "--json=short", "org.freedesktop.PolicyKit1"], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True) as monitor:
            try:
                # The monitor shows its own beginning: from then on it sees everything.
                nervebox.start("say-good", wait=True)
                with dbuswire.Connection(dbuswire.NOBODY) as bus:
                    bus.call(*dbuswire.MANAGER, "StartRun", "ssa{sv}", "say-good", "", {})
                ctl("workflow", "list")
            finally:
                monitor.send_signal(signal.SIGTERM)
            calls = monitor.stdout.read()
        self.assertNotIn("CheckAuthorization", calls)


if __name__ == "__main__":
    unittest.main()
