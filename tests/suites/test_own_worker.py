"""A worker of the user's own: the one that nerve-worker-protocol(7) prints does all that the stock worker does, and a bad
one hurts nobody but its own runs."""

import json
import pathlib
import re
import time

import nervebox
from nervebox import GATED, SCRATCH, WRITES, Case, GatedCase, command, ctl, row, start, wait_for

PAGE = pathlib.Path(__file__).resolve().parents[2] / "man/nerve-worker-protocol.7"


def printed():
    """The worker of the man page, as it is printed."""
    block = re.search(r'^\.\\" worker\.py\n\.Bd -literal\n(.*?)^\.Ed$', PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    return block.replace(r"\e", "\\")


def own(name, **keys):
    """A definition whose worker is this program below SCRATCH."""
    return {"worker": {"exec": ["/usr/bin/python3", str(SCRATCH / f"{name}.py")], **WRITES}, **keys}


class Printed(GatedCase):
    definitions = {"do-lines": own("printed", concurrency=2)}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        nervebox.replace(SCRATCH / "printed.py", printed())

    def begin(self, count=3):
        """A run of so many rounds that wait for leave; its first one has begun."""
        run = start("do-lines", "\n".join([GATED] * count))
        self.begun(run, 1)
        return run

    def whole(self, run, count):
        found = row(run)
        self.assertEqual((found["status"], found["exitCode"], found["result"], found["rounds"]),
                         ("completed", 0, "success", count), nervebox.run_json(run)["events"])
        self.assertEqual([one["content"] for one in nervebox.thread(run)[1:]],
                         [f"said {number}" for number in range(1, count + 1)])

    def test_it_is_short(self):
        self.assertLess(len(printed().splitlines()), 80)

    def test_run(self):
        run, status = start("do-lines", "echo one\necho two", wait=True)
        self.assertEqual(status, 0)
        self.assertEqual([(one["role"], one["content"]) for one in nervebox.thread(run)[1:]],
                         [("line", "one"), ("line", "two")])

    def test_a_round_that_fails_ends_it(self):
        for script, result in (("exit 3", "exit-code:3"), ("kill -SEGV $$", "signal:SIGSEGV")):
            run, status = start("do-lines", f"echo one\n{script}\necho three", wait=True)
            self.assertEqual((status, row(run)["result"], row(run)["rounds"]), (1, result, 2))

    def test_its_rounds_are_limited(self):
        run, status = start("do-lines", "echo one\necho two\necho three", "--max-rounds", "2", wait=True)
        self.assertEqual((status, row(run)["result"], row(run)["rounds"]), (2, "max-rounds", 2))

    def test_a_dry_run_executes_nothing(self):
        run, status = start("do-lines", "exit 3", "--dry-run", wait=True)
        self.assertEqual((status, nervebox.thread(run)[-1]["content"]), (0, ""))

    def test_kill_ends_one_run_and_no_other(self):
        run, other = self.begin(), self.begin()
        worker = nervebox.worker_pid("do-lines")
        ctl("workflow", "kill", "--grace", "1s", run)
        self.assertEqual((row(run)["exitCode"], row(run)["result"]), (137, "killed"))
        nervebox.assert_gone(run)
        self.completes(other, 3)
        self.once(other, 3)
        self.assertEqual(nervebox.worker_pid("do-lines"), worker)

    def test_kill_of_what_ignores_sigterm(self):
        run = start("do-lines", f"trap '' TERM; touch {SCRATCH}/$NERVE_RUN_ID.up; sleep 1000 & wait; wait")
        wait_for((SCRATCH / f"{run}.up").exists, "the role to be up", watch=[SCRATCH])
        worker = nervebox.worker_pid("do-lines")
        ctl("workflow", "kill", "--grace", "1s", run)
        self.assertEqual(row(run)["exitCode"], 137)
        nervebox.assert_gone(run)
        self.assertEqual(nervebox.worker_pid("do-lines"), worker)

    def test_abort_lets_the_round_end(self):
        run = self.begin()
        nervebox.abort(run, "--reason", "enough")
        self.go(run, 1)
        self.assertEqual(nervebox.stored_end(run)["exit_code"], 143)
        self.assertEqual((row(run)["rounds"], row(run)["reason"]), (1, "enough"))
        self.once(run, 1)

    def test_it_is_resumed_after_its_worker_died(self):
        run = self.begin()
        self.go(run, 1)
        self.begun(run, 2)
        nervebox.kill_process(nervebox.worker_pid("do-lines"))
        self.begun(run, 2, attempt=2)
        self.completes(run, 3)
        self.kept(run, 1)

    def test_it_goes_on_while_nerve_is_away(self):
        run = self.begin()
        worker = nervebox.worker_pid("do-lines")
        nervebox.systemctl("stop", "nerve.service")
        self.go(run)
        wait_for(lambda: ("end", 1, 1) in self.log(run), "the end of round 1", watch=[SCRATCH])
        nervebox.systemctl("start", "nerve.service")
        self.completes(run, 3)
        self.once(run, 3)
        self.assertEqual(nervebox.worker_pid("do-lines"), worker)

    def test_it_is_drained(self):
        run = self.begin(1)
        worker = nervebox.worker_pid("do-lines")
        nervebox.drain("do-lines")
        self.completes(run, 1)
        wait_for(lambda: nervebox.start_time(worker) is None, "the worker to exit")
        self.assertEqual(nervebox.happened("do-lines", "worker-died"), [])


# Says what it is told to: each line of the prompt is a frame, with RUN for the run's id, or Python that writes bytes.
LIAR = r"""
import contextlib, json, os, signal, socket
stream = socket.socket(socket.AF_UNIX)
stream.connect(os.environ["NERVE_SOCKET"])
def say(**frame):
    stream.sendall(json.dumps(frame).encode() + b"\n")
say(type="ready", protocol=1, workflow=os.environ["NERVE_WORKFLOW"], runs=[])
heard = open(f"SCRATCH/{os.environ['NERVE_WORKFLOW']}.heard", "a", buffering=1)
try:
    for line in stream.makefile():
        heard.write(line)
        frame = json.loads(line)
        if frame["type"] in ("start-thread", "resume-thread"):
            with contextlib.suppress(BrokenPipeError):
                exec(frame["prompt"], {"run": frame["runId"], "say": say, "stream": stream})
except OSError:
    pass
heard.write(json.dumps({"type": "closed"}) + "\n")
while True:
    signal.pause()
""".replace("SCRATCH", str(SCRATCH))

ROUND = ('say(type="thread-workflow-message", runId={run}, round={round}, '
         'message={{"role": {role!r}, "content": "x", "meta": {{"status": "ok"}}, "timestamp": 1}})')
END = 'say(type="thread-event", runId={run}, eventType={how!r}, exitCode={code}, result={result!r})'


class Bad(Case):
    definitions = {
        "tell-lies": own("liar") | {"worker": own("liar")["worker"] | {"StartLimitBurst": 100}},
        "not-obey": own("stubborn", concurrency=2),
        "say-nothing": own("silent") | {"worker": own("silent")["worker"] | {"StartLimitBurst": 2}},
        "not-be-there": {"worker": {"exec": ["/no/such/worker"], "StartLimitBurst": 2}},
        "do-honest-work": command("echo done"),
        "sleep-on": command("exec sleep 1000"),
    }

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        nervebox.replace(SCRATCH / "liar.py", LIAR)
        nervebox.replace(SCRATCH / "silent.py", "import signal\nsignal.pause()\n")
        nervebox.replace(SCRATCH / "stubborn.py", LIAR)

    def heard(self, word, workflow="tell-lies"):
        """Waits until the worker has heard a frame of this type; returns the last one."""
        path = SCRATCH / f"{workflow}.heard"
        def found():
            frames = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            return [frame for frame in frames if frame["type"] == word][-1:]
        return wait_for(found, f"the worker to hear {word}", watch=[SCRATCH])[0]

    def lie(self, program, victim=""):
        """A run whose worker says this; nobody but it is hurt."""
        (SCRATCH / "tell-lies.heard").unlink(missing_ok=True)
        nerved = nervebox.nerved_pid()
        run = start("tell-lies", program.replace("VICTIM", repr(victim)))
        yield run
        _, status = start("do-honest-work", wait=True)
        self.assertEqual((status, nervebox.nerved_pid()), (0, nerved))
        ctl("workflow", "kill", "--grace", "0", run)
        self.assertEqual((row(run)["exitCode"], row(run)["rounds"]), (137, 0))
        nervebox.systemctl("stop", nervebox.unit_of("tell-lies"))
        nervebox.wait_absent("tell-lies")
        nervebox.reset("tell-lies")

    def refused(self, program, why):
        """Its connection is closed, with an error that says why."""
        for _ in self.lie(program):
            self.heard("closed")
            self.assertIn(why, self.heard("error")["error"])

    def test_garbage(self):
        self.refused('stream.sendall(b"garbage\\n")', "not a message of this protocol")

    def test_a_line_without_an_end(self):
        self.refused('stream.sendall(b"x" * (9 << 20))', "longer than")

    def test_a_round_that_does_not_come_next(self):
        self.refused(ROUND.format(run="run", round=2, role="x"), "is not what comes next")

    def test_a_role_that_is_none(self):
        self.refused(ROUND.format(run="run", round=1, role="__start__"), "is not what comes next")

    def test_an_attempt_that_does_not_come_next(self):
        attempt = ROUND.format(run="run", round=1, role="x").replace("workflow-message", "attempt")
        self.refused(attempt.replace("round=1", "round=1, attempt=2, delayMs=0"), "is not what comes after attempt 0")

    def test_a_route_that_nobody_asked_for(self):
        self.refused('say(type="thread-route", runId=run, round=1, target="$END")', "no answer of the moderator")

    def test_a_kill_that_nobody_asked_for(self):
        self.refused(END.format(run="run", how="killed", code=137, result="killed"), "does not end killed here")

    def test_a_code_that_is_not_in_the_table(self):
        self.refused(END.format(run="run", how="completed", code=3, result="success"), "cannot end with code 3")

    def test_a_run_that_is_not_its_own(self):
        victim = start("sleep-on")
        nervebox.processes(victim)
        said = "\n".join([ROUND.format(run="VICTIM", round=1, role="main"),
                          END.format(run="VICTIM", how="completed", code=0, result="success")])
        for _ in self.lie(said, victim):
            self.assertEqual(self.heard("event-ack")["runId"], victim)
            self.assertEqual((row(victim)["status"], row(victim)["rounds"]), ("started", 0))
            self.assertTrue(nervebox.pids_of(nervebox.cgroup_of(victim)))
        ctl("workflow", "kill", "--grace", "0", victim)

    def test_a_flood(self):
        flood = 'for _ in range(200_000): say(type="error", error="x" * 100)\nsay(type="nothing")'
        for _ in self.lie(flood):
            _, status = start("do-honest-work", wait=True)
            self.assertEqual(status, 0)
            self.heard("closed")
        told = [one for one in nervebox.journal("_SYSTEMD_UNIT=nerve.service") if "worker says" in str(one["MESSAGE"])]
        self.assertLess(len(told), 100)

    def test_it_speaks_after_the_end(self):
        said = "\n".join([END.format(run="run", how="failed", code=1, result="exit-code:4"),
                          ROUND.format(run="run", round=1, role="x")])
        (SCRATCH / "tell-lies.heard").unlink(missing_ok=True)
        run, status = start("tell-lies", said, wait=True)
        self.assertEqual((status, row(run)["result"], row(run)["rounds"]), (1, "exit-code:4", 0))
        self.heard("event-ack")
        self.assertEqual(nervebox.events(run)[-1], "ended")

    def test_a_kill_that_it_does_not_obey_takes_its_unit(self):
        run, other = start("not-obey", "pass"), start("not-obey", "pass")
        wait_for(lambda: nervebox.count_events(other, "dispatched"), "both to be sent out")
        worker = nervebox.wait_ready("not-obey")
        begun = time.monotonic()
        ctl("workflow", "kill", "--grace", "1s", run)
        self.assertGreaterEqual(time.monotonic() - begun, 3)
        self.assertEqual((row(run)["exitCode"], row(run)["result"]), (137, "killed"))
        self.assertIsNone(nervebox.start_time(worker))
        nervebox.wait_event(other, "dispatched", 2)
        self.assertEqual([one["cause"] for one in nervebox.losses(other)], ["stopped"])
        self.assertEqual(nervebox.happened("not-obey", "worker-died"), [])
        ctl("workflow", "kill", "--grace", "0", other)
        self.assertEqual(row(other)["exitCode"], 137)

    def test_silence(self):
        _, status = start("say-nothing", wait=True)
        self.assertEqual(status, 255)
        self.assertEqual({one["cause"] for one in nervebox.happened("say-nothing", "worker-died")}, {"not-ready"})

    def test_a_program_that_is_not_there(self):
        run, status = start("not-be-there", wait=True)
        self.assertEqual((status, row(run)["result"]), (255, "worker-exit:203"))
        said = [str(one["MESSAGE"]) for one in nervebox.journal(f"_SYSTEMD_UNIT={nervebox.unit_of('not-be-there')}")]
        self.assertTrue([line for line in said if "cannot execute /no/such/worker" in line and "worker: {exec" in line], said)
