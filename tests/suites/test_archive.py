"""Old days go into files and come back, and for people nothing changes; with failpoints, wherever nerved dies in it."""

import contextlib
import json
import os
import pathlib
import unittest

import nervebox
from aged import age
from nervebox import ctl, systemctl, wait_for

FILES = nervebox.STATE / "archive/logs"
POINTS = pathlib.Path("/run/nerve/failpoints")
DROP_IN = pathlib.Path("/run/systemd/system/nerve.service.d/failpoints.conf")
LONG = "l\u00f6ng" * 30_000


def archive(*options, check=True):
    done = ctl("store", "archive", "-o", "json", *options, check=check)
    return json.loads(done.stdout)[0] if done.stdout else None


def log():
    """All events, wherever they are, but those about the archive itself: {seq: type}; none may be missing, nor be there
    twice."""
    with nervebox.database() as connection:
        live = [tuple(row) for row in connection.execute("SELECT seq, type FROM events")]
        listed = [file for file, in connection.execute("SELECT file FROM archive")]
    assert sorted(listed) == sorted(path.name for path in FILES.glob("*")), (listed, list(FILES.glob("*")))
    for file in listed:
        for line in (FILES / file).read_text().splitlines():
            event = json.loads(line)
            live.append((event["id"], event["type"]))
    numbers = sorted(number for number, _ in live)
    assert numbers == list(range(1, len(numbers) + 1)), "an event is missing, or there twice"
    return {number: kind for number, kind in live if kind not in ("archived", "restored", "archive", "restore")}


def events(*options):
    """Lines of the log."""
    return ctl("events", "-o", "jsonl", *options).stdout.splitlines()


def readable(runs):
    return [(nervebox.thread(run), nervebox.run_json(run)) for run in runs]


class Archive(nervebox.GatedCase):
    definitions = {
        "say-hello": nervebox.command("cat; echo hello", prompt="{{ start.content }}"),
        # Hexadecimal, as runs' ids are: each of its events is about it, and of no run.
        "a": nervebox.command("true"),
        "take-rounds": nervebox.rounds(nervebox.GATED, 2, worker=nervebox.WRITES),
    }

    def setUp(self):
        nervebox.load(self.definitions)
        self.ended = [nervebox.start("say-hello", prompt, wait=True)[0] for prompt in ("one", "two")]
        self.ended.append(nervebox.start("say-hello", None, "--prompt-file", self.long(), wait=True)[0])
        self.open = nervebox.start("take-rounds")
        self.begun(self.open, 1)
        age(40)
        self.answers()
        self.before, self.said = log(), readable(self.ended)

    def long(self):
        path = nervebox.SCRATCH / "long"
        path.write_text(LONG)
        return path

    def test_for_people_nothing_changes(self):
        planned = archive("--dry-run")["days"]
        self.assertEqual(sum(day["rows"] for day in planned), len(self.before) - len(self.events_of(self.open)))
        self.assertFalse(FILES.exists())
        everything = [line for line in ctl("events", "-o", "jsonl").stdout.splitlines() if '"source":"audit"' not in line]
        of_a = events("--ref", "a")
        self.assertEqual(json.loads(of_a[0])["type"], "defined")
        done = archive("--vacuum")
        self.assertEqual(events("--archived", "--ref", "a"), of_a)
        self.assertIn("--archived", ctl("events", "--ref", "a").stderr)
        self.assertEqual(done["days"], planned)
        # And so does the log, byte for byte.
        again = ctl("events", "--archived", "-o", "jsonl").stdout.splitlines()
        numbers = [json.loads(line)["id"] for line in again]
        self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
        self.assertLessEqual(set(everything), set(again))
        self.assertNotIn(everything[0], ctl("events", "-o", "jsonl").stdout.splitlines())
        gone = ctl("events", "--ref", self.ended[0][-8:], "--until", "-1d")
        self.assertIn("--archived", gone.stderr)
        for options in (["-n", "3"], ["--type", "ended"], ["--ref", self.ended[0][-8:]], ["--until", "-35d"]):
            some = ctl("events", "--archived", "-o", "jsonl", *options).stdout.splitlines()
            self.assertTrue(some and set(some) < set(again), options)
        self.assertIsNotNone(done["freed"])
        self.assertEqual(log(), self.before)
        self.assertEqual(readable(self.ended), self.said)
        self.assertEqual(self.said[2][1]["prompt"], LONG)
        self.assertEqual(archive()["days"], [])
        # The open run knows nothing of it.
        self.completes(self.open, 2)
        # What stayed of it goes later, into another file.
        again = archive("--older-than", "39d")["days"]
        self.assertTrue(all(day["file"].endswith(".2.jsonl") for day in again), again)
        self.whole(self.open, 2)
        nervebox.restart_nerve()
        self.assertEqual(readable(self.ended), self.said)
        self.whole(self.open, 2)

    def test_a_day_comes_back(self):
        day = archive()["days"][0]["day"]
        ctl("store", "restore", day)
        self.assertEqual(log(), self.before)
        self.assertEqual(readable(self.ended), self.said)
        for wrong, why in ((day, "nothing of"), ("yesterday", "is no day")):
            self.assertIn(why, ctl("store", "restore", wrong, check=65).stderr)
        self.assertEqual(archive()["days"][0]["day"], day)
        self.assertEqual(log(), self.before)

    def test_a_damaged_file_is_named(self):
        file = pathlib.Path(archive()["days"][0]["file"])
        file.write_text(file.read_text().replace("hello", "hullo"))
        for argv in (("events", "--archived"), ("thread", self.ended[0]), ("workflow", "show", self.ended[0]), ("store", "restore", file.name[:10])):
            self.assertIn(str(file), ctl(*argv, check=70).stderr)
        ctl("workflow", "list")

    def test_the_timer_archives_as_nerve_yaml_says(self):
        self.assertEqual(nervebox.properties("nerve-archive.timer", "ActiveState")["ActiveState"], "active")
        nervebox.replace(nervebox.SETTINGS, "archive: {compress: zstd}\nretention: {runs: 2}\n")
        nervebox.reload()
        planned = archive("--dry-run")
        self.assertEqual(planned["forgotten"], 1)
        self.assertIn("runs that would be forgotten: 1\n", ctl("store", "archive", "--dry-run").stdout)
        of_one = events("--ref", self.ended[0])
        systemctl("start", "nerve-archive.service")
        self.assertTrue([path for path in FILES.iterdir() if path.name.endswith(".jsonl.zst")])
        # The oldest of three that have ended is beyond the two that are kept, and the open one does not count.
        self.assertEqual(ctl("workflow", "show", self.ended[0], check=66).stdout, "")
        self.assertEqual(readable(self.ended[1:]), self.said[1:])
        for name in (self.ended[0][-8:], self.ended[0][-8:].upper(), self.ended[0].upper()):
            found = events("--archived", "--ref", name)
            self.assertEqual((found[:-1], json.loads(found[-1])["type"]), (of_one, "forgotten"))
        systemctl("stop", "nerve.service")
        self.assertEqual(nervebox.properties("nerve-archive.timer", "ActiveState")["ActiveState"], "inactive")
        systemctl("start", "nerve.service")
        self.answers()

    def events_of(self, run):
        with nervebox.database() as connection:
            return connection.execute("SELECT seq FROM events WHERE ref = ?", [run]).fetchall()


def has_failpoints():
    nerved = pathlib.Path("/usr/libexec/nerve/nerved")
    return nerved.exists() and os.fsencode(POINTS) in nerved.read_bytes()


@unittest.skipUnless(has_failpoints(), "needs tests/box run --failpoints")
class Failpoints(Archive):
    """F31 to F35 are on the way into the archive, F36 to F38 on the way back."""

    @classmethod
    def setUpClass(cls):
        POINTS.mkdir(exist_ok=True)
        DROP_IN.parent.mkdir(parents=True, exist_ok=True)
        DROP_IN.write_text(f"[Service]\nReadWritePaths={POINTS}\n")
        systemctl("daemon-reload")
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        DROP_IN.unlink()
        with contextlib.suppress(OSError):
            DROP_IN.parent.rmdir()
        systemctl("daemon-reload")

    def dies(self, point, *argv):
        (POINTS / point).write_text("abort")
        self.assertNotEqual(ctl(*argv, check=False).returncode, 0)
        self.assertTrue((POINTS / f"{point}.reached").exists(), point)
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to answer")
        self.assertEqual(readable(self.ended), self.said)

    def test_nerved_dies_on_the_way(self):
        for point in ("F31", "F32", "F33", "F34"):
            with self.subTest(point=point):
                self.dies(point, "store", "archive")
                archive()
                self.assertEqual(log(), self.before)
                self.assertEqual(readable(self.ended), self.said)
                for day in sorted({path.name[:10] for path in FILES.iterdir()}):
                    ctl("store", "restore", day)
        archive()
        for point in ("F36", "F37", "F38"):
            with self.subTest(point=point):
                day = sorted(path.name[:10] for path in FILES.iterdir())[0]
                self.dies(point, "store", "restore", day)
                archive()
                self.assertEqual(log(), self.before)
                self.assertEqual(readable(self.ended), self.said)

    test_for_people_nothing_changes = test_a_day_comes_back = test_a_damaged_file_is_named = None
    test_the_timer_archives_as_nerve_yaml_says = None
