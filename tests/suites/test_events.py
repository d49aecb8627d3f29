"""The log as people see it: who asked for what, bounds, pages, what is followed; lists and threads in pages; times.

Parity 100, 101, 105, 111 and 112: see the names of the tests."""

import hashlib
import json
import re
import select
import signal
import subprocess
import threading
import time
import unittest

import dbuswire
import nervebox
from nervebox import GATED, TIMEOUT, WRITES, GatedCase, command, ctl, rounds, sh, start, systemctl, wait_for

NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")


def events(*options):
    """`events -o jsonl`, oldest first."""
    return [json.loads(line) for line in ctl("events", *options, "-o", "jsonl").stdout.splitlines()]


def chained(found):
    """Whether these events, from the first on, have the numbers and the hashes that the manual says."""
    before = bytes(32)
    for number, event in enumerate(found, 1):
        text = b"".join(len(part).to_bytes(8, "big") + part for part in (
            event["source"].encode(), event["type"].encode(), event["refId"].encode(), event["raw"].encode(),
            event.get("blob", "").encode()))
        if event["id"] != number:
            return f"event {event['id']} has the place of {number}"
        before = hashlib.sha256(before + number.to_bytes(8, "big") + event["timestamp"].to_bytes(8, "big") + text).digest()
        if before.hex() != event["hash"]:
            return f"event {number} has another hash"
    return None


def with_raw_payloads():
    """All events, each with its payload as it was written."""
    found = []
    for line in ctl("events", "-o", "jsonl").stdout.splitlines():
        event = json.loads(line)
        # The keys have an order, and no payload before its own.
        begin = line.index('"payload":') + len('"payload":')
        _, end = json.JSONDecoder().raw_decode(line, begin)
        found.append({**event, "raw": line[begin:end]})
    return found


class Following:
    """nervectl with -f, running."""

    def __init__(self, *words):
        self.process = subprocess.Popen(["nervectl", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        self.text = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def until(self, text):
        """Reads until this has come; returns all that has."""
        deadline = time.monotonic() + TIMEOUT
        while text.encode() not in self.text:
            ready = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))[0]
            more = self.process.stdout.read1(65536) if ready else b""
            if not more:
                raise AssertionError(f"{text!r} did not come, but {self.text[-2000:]!r}")
            self.text += more
        return self.text.decode()

    def ended(self):
        """What came to its end, and the exit status."""
        rest, said = self.process.communicate(timeout=TIMEOUT)
        return (self.text + rest).decode(), self.process.returncode, said.decode()


class Audit(GatedCase):
    definitions = {"take-rounds": rounds(GATED, 1, worker=WRITES), "say-hello": command("echo hello")}

    def asked(self, *words, check=True):
        """Has nervectl do something as a process of a unit; returns what the newest entry says, the caller checked."""
        unit = f"asker-{time.monotonic_ns()}.service"
        script = nervebox.replace(nervebox.SCRATCH / "ask", 'echo $$; exec nervectl "$@"\n')
        done = sh("systemd-run", "--quiet", "--wait", "--pipe", "--unit", unit, "sh", script, *words, check=check)
        pid, _, rest = done.stdout.partition("\n")
        newest = events("--source", "audit", "-n", "1")[0]
        payload = newest["payload"]
        who = {key: payload.pop(key) for key in ("uid", "pid", "comm", "unit")}
        self.assertEqual(who, {"uid": 0, "pid": int(pid), "comm": "nervectl", "unit": unit})
        return newest["type"], newest["refId"], payload, rest.strip()

    def test_each_verb_says_who_asked_for_what_and_what_came_of_it(self):
        done = {"outcome": "done"}
        kind, run, payload, said = self.asked("workflow", "start", "take-rounds", "--key", "k")
        self.assertEqual((kind, run, payload), ("start", said, done))
        self.assertEqual(self.asked("workflow", "start", "take-rounds", "--key", "k"),
                         ("start", run, {"outcome": "existing"}, run))
        self.assertEqual(self.asked("workflow", "start", "no-such-workflow", check=66)[:3],
                         ("start", "no-such-workflow", {"outcome": "unknown-workflow"}))
        self.begun(run, 1)
        self.assertEqual(self.asked("workflow", "abort", run, "--reason", "no more")[:3],
                         ("abort", run, {"outcome": "done", "reason": "no more"}))
        self.assertEqual(self.asked("workflow", "abort", run, check=68)[:3], ("abort", run, {"outcome": "ending"}))
        self.assertEqual(self.asked("workflow", "kill", run, "--reason", "too\nslow", "--grace", "0")[:3],
                         ("kill", run, {"outcome": "done", "reason": "too\nslow"}))
        nervebox.stored_end(run)
        self.assertEqual(self.asked("workflow", "kill", run)[:3], ("kill", run, {"outcome": "not-open"}))
        self.assertEqual(self.asked("workflow", "drain", "take-rounds")[:3], ("drain", "take-rounds", done))
        self.assertEqual(self.asked("workflow", "reset", "take-rounds")[:3], ("reset", "take-rounds", done))
        self.assertEqual(self.asked("pause", "--reason", "why")[:3], ("pause", "nerve", {"outcome": "done", "reason": "why"}))
        self.assertEqual(self.asked("resume")[:3], ("resume", "nerve", done))
        self.assertEqual(self.asked("reload")[:3], ("reload", "nerve", done))
        systemctl("reload", "nerve.service")
        self.assertEqual(events("--type", "reload", "-n", "1")[0]["payload"]["unit"], "nerve.service")
        # A signal says nothing of who sent it.
        systemctl("kill", "-s", "HUP", "--kill-who=main", "nerve.service")
        wait_for(lambda: events("--type", "reload", "-n", "1")[0]["payload"] == done, "the reload on record")
        text = ctl("events", "--source", "audit", "--ref", run[-8:]).stdout
        self.assertRegex(text, rf"(?m)^{utc()} +audit +kill +{run[-8:]} +done, by uid 0 \(nervectl, pid \d+\) "
                               r"in asker-\d+\.service: too\\nslow$")

    def test_denials_are_on_record_and_many_of_them_are_not_many(self):
        done = sh(*NOBODY, "sh", "-c", f"echo $$; exec nervectl pause", check=77)
        newest = events("--type", "denied", "-n", "1")[0]
        unit = newest["payload"].pop("unit")
        self.assertRegex(unit, r"\.(service|scope)$")
        self.assertEqual((newest["source"], newest["refId"], newest["payload"]),
                         ("audit", "Pause", {"uid": 65534, "pid": int(done.stdout), "comm": "nervectl",
                                               "outcome": "not permitted"}))
        sh(*NOBODY, "nervectl", "workflow", "kill", "3fa9c1d2", check=77)
        self.assertEqual(events("--type", "denied", "-n", "1")[0]["refId"], "KillRun")
        with dbuswire.Connection(dbuswire.NOBODY) as bus:
            for _ in range(300):
                self.assertEqual(bus.call(*dbuswire.MANAGER, "GetStatus").error, "org.nerve1.Error.NotPermitted")
        with dbuswire.Connection(1) as bus:
            bus.call(*dbuswire.MANAGER, "GetStatus")
        denied = events("--type", "denied", "--ref", "GetStatus")
        self.assertEqual(denied[-1]["payload"]["uid"], 1)
        of_nobody = [event for event in denied if event["payload"]["uid"] == 65534]
        self.assertLessEqual(len(of_nobody), 12)


def utc():
    return r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"


class Log(GatedCase):
    definitions = {"take-rounds": rounds(GATED, 3, worker=WRITES), "drop-extra": rounds(GATED, 1, worker=WRITES, overflow="drop")}

    def test_parity_100_101_bounds_filters_and_order(self):
        run = start("take-rounds")
        self.completes(run, 3)
        found = with_raw_payloads()
        self.assertIsNone(chained(found))
        everything = events()
        ids = [event["id"] for event in everything]
        self.assertEqual(ids, list(range(1, len(ids) + 1)))
        self.assertEqual(events("-n", "5"), everything[-5:])
        self.assertEqual(events("-n", "0"), [])
        self.assertEqual(events("-n", "2", "--type", "defined"),
                         [event for event in everything if event["type"] == "defined"][-2:])
        for reference in (run, run[-8:], run[-8:].upper()):
            self.assertEqual(events("--ref", reference), [event for event in everything if event["refId"] == run])
        self.assertEqual(events("--ref", "take-rounds", "--source", "system"),
                         [event for event in everything if event["refId"] == "take-rounds" and event["source"] == "system"])
        for unknown in ("no-such-workflow", "feedfeed"):
            said = ctl("events", "--archived", "--ref", unknown, "-o", "jsonl")
            self.assertEqual(said.stdout, "")
            self.assertIn(f"known as {unknown}", said.stderr)
        for event in everything[::3]:
            at = event["timestamp"]
            moment = f"@{at // 10**6}.{at % 10**6:06}"
            self.assertEqual(events("--since", moment, "--until", moment),
                             [other for other in everything if other["timestamp"] == at])
            self.assertEqual(events("--since", moment), [other for other in everything if other["timestamp"] >= at])
            self.assertEqual(events("--until", moment, "-n", "3"),
                             [other for other in everything if other["timestamp"] <= at][-3:])
        keys = list(found[0])
        self.assertEqual(keys, ["id", "source", "type", "refId", "payload", "timestamp", "hash", "raw"])
        as_json = json.loads(ctl("events", "-o", "json").stdout)
        self.assertEqual(as_json, everything)
        lines = ctl("events").stdout.splitlines()
        self.assertEqual(len(lines), len(everything) + 1)
        self.assertRegex(lines[0], "^TIME +SOURCE +TYPE +REF +WHAT$")

    def test_parity_105_pages_of_a_long_log_and_a_long_list_also_while_they_grow(self):
        holder = start("drop-extra")
        self.begun(holder, 1)
        starts = lambda: len(events("--source", "audit", "--type", "start"))
        before_all = starts()
        failures = []

        def flood():
            with dbuswire.Connection(0) as bus:
                for number in range(900):
                    reply = bus.call(*dbuswire.MANAGER, "StartRun", "ssa{sv}", "drop-extra", str(number), {})
                    if reply.error:
                        failures.append(reply.error)
        flooding = threading.Thread(target=flood)
        flooding.start()
        looks = 0
        while flooding.is_alive() or not looks:
            ids = [event["id"] for event in events()]
            self.assertEqual(ids, list(range(1, len(ids) + 1)))
            looks += 1
        flooding.join()
        self.assertEqual(failures, [])
        everything = events()
        self.assertGreater(len(everything), 2_700)  # a queued, an ended and a start of each
        self.assertEqual(events("-n", "2500"), everything[-2500:])
        self.assertEqual(starts() - before_all, 900)
        for options in ((), ("--status", "dropped"), ("--exit-code", "75", "drop-extra"),
                        ("--status", "dropped", "--status", "started")):
            with self.subTest(options=options):
                whole = nervebox.listed("-n", "100000", *options)
                self.assertGreaterEqual(len(whole), 900)
                self.assertEqual(whole, sorted(whole, key=lambda run: (run["createdAt"], run["run"]), reverse=True))
                paged, before = [], []
                while page := nervebox.listed("-n", "170", *before, *options):
                    paged += page
                    before = ["--before", page[-1]["run"][-8:]]
                self.assertEqual(paged, whole)
        self.assertEqual([run["run"] for run in nervebox.listed("--active")], [holder])
        middle = whole[400]["createdAt"]
        moment = f"@{middle // 10**6}.{middle % 10**6:06}"
        self.assertEqual(nervebox.listed("-n", "100000", "--since", moment, *options),
                         [run for run in whole if run["createdAt"] >= middle])
        self.assertEqual(nervebox.listed("-n", "100000", "--until", moment, *options),
                         [run for run in whole if run["createdAt"] <= middle])
        self.completes(holder, 1)

    def test_following_survives_nerve_and_ends_when_nobody_reads(self):
        with Following("events", "-f", "-n", "0", "--type", "queued") as following:
            following.until("WHAT\n")
            first = start("take-rounds")
            following.until(f" {first[-8:]} ")
            self.kill_nerved()
            second = start("take-rounds")
            following.until(f" {second[-8:]} ")
            nervebox.restart_nerve()
            third = start("take-rounds")
            text = following.until(f" {third[-8:]} ")
            self.assertEqual([line.split()[5] for line in text.splitlines()[1:]], [run[-8:] for run in (first, second, third)])
            following.process.stdout.close()
            self.assertEqual(following.process.wait(timeout=TIMEOUT), 0)
        everything = events()
        with Following("events", "-f", "-o", "jsonl") as following:
            text = following.until(everything[-1]["hash"])
            self.assertEqual([json.loads(line) for line in text.splitlines()], everything[-10:])
            following.process.send_signal(signal.SIGINT)
            self.assertEqual(following.ended()[1], -signal.SIGINT)
        ctl("events", "-f", "-o", "json", check=64)
        for run in (first, second, third):
            self.completes(run, 3)

    def test_parity_111_112_a_thread_in_pieces_and_as_it_grows(self):
        run = start("take-rounds", "the prompt")
        self.begun(run, 1)
        with Following("thread", run[-8:], "-f") as following:
            self.assertIn("the prompt", following.until("round 0"))
            self.go(run, 1)
            self.assertNotIn("round 2", following.until("said 1"))
            self.begun(run, 2)
            self.kill_nerved()
            self.go(run, 2)
            following.until("said 2")
            self.go(run)
            text, status, said = following.ended()
            self.assertEqual((status, said), (0, ""))
        nervebox.stored_end(run)
        self.assertEqual(text, ctl("thread", run).stdout)
        numbers = lambda *options: [one["round"] for one in nervebox.thread(run, *options)]
        self.assertEqual(numbers(), [0, 1, 2, 3])
        self.assertEqual(numbers("--before", "0"), [0, 1, 2, 3])
        self.assertEqual(numbers("--before", "3"), [0, 1, 2])
        self.assertEqual(numbers("--before", "3", "-n", "1"), [2])
        self.assertEqual(numbers("--before", "3", "-n", "9"), [1, 2])
        self.assertEqual(numbers("--before", "1"), [0])
        self.assertEqual(numbers("--before", "9", "-n", "2"), [2, 3])
        self.assertEqual(numbers("-n", "0"), [])
        # It has ended: there is nothing to wait for.
        self.assertEqual(ctl("thread", run, "-f", "-n", "1").stdout, ctl("thread", run, "-n", "1").stdout)
        ctl("thread", run, "-f", "-o", "json", check=64)


TIMES = """now;-1h;- 90;+5min;1h ago;2h 30min ago;1h left;today;yesterday;tomorrow;today UTC;2026-11-20;26-11-20;2026-1-2;
2026-11-20 10:36;2026-11-20 10:36:24;2026-07-20 10:36:24.5;10:36;9:05:07;10:36 UTC;Fri 2026-11-20;
Friday 2026-11-20 10:36;fri 2026-11-20 10:36:24 UTC;@1700000000;@1700000000.25;
2026-03-29 01:59;2026-03-29 03:00;2026-10-25 01:59;2026-10-25 03:00;2000-02-29;1970-01-02 UTC"""
ALSO = "2026-11-20T10:36:24;2026-11-20T10:36:24Z;2026-11-20T10:36:24.5Z;2026-11-20T10:36:24+05:30;2026-11-20 10:36:24 -08:00"  # newer systemds
NEVER = "soon;ago;-;@;1h;infinity;2026;2026-11;2026-13-01;2026-11-20 25:00;Mon 2026-11-20;2026-11-20 10:36 Nowhere/Land"


class Times(unittest.TestCase):
    """What is meant by a text, compared with what systemd means by it."""

    def ours(self, text, zone):
        done = sh("env", f"TZ={zone}", "nervectl", "events", "--since", text, "--until", "@0", check=False)
        found = re.search(r"--since is (.*) UTC, which is after", done.stderr)
        if not found:
            self.assertEqual(done.returncode, 64)
            return None
        return found.group(1)

    def systemds(self, text, zone):
        done = sh("env", f"TZ={zone}", "systemd-analyze", "timestamp", "--", text, check=False)
        if done.returncode:
            return None
        found = re.search(r"\(in UTC\): \w+ (\d+-\d+-\d+ \d+:\d+:\d+)|Normalized form: \w+ (\d+-\d+-\d+ \d+:\d+:\d+)[.\d]* UTC",
                          done.stdout)
        return found.group(1) or found.group(2)

    def test_times_are_those_of_systemd(self):
        # Not by name: the machine need not have these.
        for zone in ("UTC", "CET-1CEST,M3.5.0,M10.5.0/3", "EST5EDT,M3.2.0,M11.1.0"):
            for text in TIMES.replace("\n", "").split(";"):
                with self.subTest(zone=zone, text=text):
                    # The clock goes on between the two.
                    for _ in range(20):
                        before, ours, after = self.systemds(text, zone), self.ours(text, zone), self.systemds(text, zone)
                        self.assertTrue(before)
                        if before == after:
                            break
                    self.assertEqual(ours, before)
            for text in ALSO.split(";"):
                with self.subTest(zone=zone, text=text):
                    self.assertRegex(self.ours(text, zone) or "", "^2026-11-20 ")
                    self.assertIn(self.systemds(text, zone), (None, self.ours(text, zone)))

    def test_what_is_no_time_is_none_for_systemd_either(self):
        for text in NEVER.split(";"):
            with self.subTest(text=text):
                self.assertIsNone(self.systemds(text, "UTC"))
                self.assertIsNone(self.ours(text, "UTC"))


