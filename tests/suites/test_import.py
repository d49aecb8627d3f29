"""`nervectl store import`: the histories that the real @uncaged/nerve-store wrote, in nerve."""

import contextlib
import hashlib
import json
import pathlib
import shutil
import sqlite3
import tempfile

import nervebox
from nervebox import ctl

FIXTURE = pathlib.Path(__file__).resolve().parents[1] / "fixtures/predecessor"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())["logs"]
CODES = {"completed": 0, "failed": 1, "crashed": 255, "dropped": 75, "interrupted": 130, "killed": 137,
         "queued": 130, "started": 130}


def new_id(old_id):
    return hashlib.sha256(old_id.encode()).hexdigest()[:32]


def fingerprint(directory):
    """Every file below it, with what it holds."""
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def bring(file, *options, check=True):
    return ctl("store", "import", file, *options, check=check)


def count(what="events WHERE source <> 'audit'"):
    with nervebox.database() as database:
        return database.execute(f"SELECT count(*) FROM {what}").fetchone()[0]


class Import(nervebox.Case):
    def setUp(self):
        nervebox.load({})
        self.old = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.old)
        shutil.copytree(FIXTURE, self.old, dirs_exist_ok=True)

    def test_everything_is_there_and_twice_changes_nothing(self):
        # Parity 108, 109, 110, 111.
        before = fingerprint(self.old)
        said = bring(self.old / "logs.db", "--blobs", self.old / "blobs").stdout
        runs, blobs = EXPECTED["runs"], EXPECTED["blobs"]
        events = EXPECTED["rows"] + len(runs) + len(blobs)
        self.assertEqual(said, f"imported {len(runs)} runs, {events} events\n")
        self.assertEqual(fingerprint(self.old), before)
        self.assertEqual({row["run"] for row in nervebox.listed()}, {new_id(old_id) for old_id in runs})
        for old_id, expected in runs.items():
            with self.subTest(run=old_id):
                self.check_run(old_id, expected)
        for digest in blobs:
            kept = nervebox.STATE / "blobs" / digest[:2] / digest[2:]
            self.assertEqual(hashlib.sha256(kept.read_bytes()).hexdigest(), digest)
        self.assertEqual(nervebox.overview()["running"] + nervebox.overview()["queued"], 0)
        total = count()
        again = bring(self.old / "logs.db", "--blobs", self.old / "blobs").stdout
        self.assertEqual(again, "imported 0 runs, 0 events\n")
        self.assertEqual(count(), total)
        # Each of the old rows is one event.
        with nervebox.database() as database:
            sources = dict(database.execute(
                "SELECT source, count(*) FROM events WHERE seq IN (SELECT seq FROM imported) GROUP BY source"))
        self.assertEqual(sources["system"], 2)
        self.assertEqual(sources["sense"], 1)
        self.assertEqual(sources["client"], len(runs) + len(blobs) + 1)
        nervebox.restart_nerve()
        self.assertEqual(nervebox.run_json("broken")["status"], "crashed")

    def check_run(self, old_id, expected):
        run = nervebox.run_json(old_id)
        self.assertEqual(run["run"], new_id(old_id))
        self.assertEqual(nervebox.run_json(new_id(old_id)), run)
        is_open = expected["status"] in ("queued", "started")
        self.assertEqual(run["status"], "interrupted" if is_open else expected["status"])
        kept = expected["exitCode"]
        self.assertEqual(run["exitCode"], CODES[expected["status"]] if kept is None else kept)
        self.assertEqual(run["workflow"], expected["workflow"])
        self.assertEqual(run["trigger"], {"type": "import", "oldId": old_id})
        self.assertEqual(run["rounds"], len(expected["thread"]))
        launch = expected["launch"] or {"prompt": "", "maxRounds": None}
        self.assertEqual(run["prompt"], launch["prompt"])
        self.assertEqual(run["maxRounds"], launch["maxRounds"])
        self.assertEqual(run["dryRun"], launch.get("dryRun", False))
        thread = nervebox.thread(old_id)
        self.assertEqual([message["round"] for message in thread], list(range(len(expected["thread"]) + 1)))
        self.assertEqual((thread[0]["role"], thread[0]["content"]), ("__start__", launch["prompt"]))
        said = [(message["role"], message["content"], message["timestamp"]) for message in thread[1:]]
        old = [(message["role"], message["content"], message["timestamp"] * 1000) for message in expected["thread"]]
        self.assertEqual(said, old)
        if said:
            self.assertEqual(nervebox.thread(old_id, "-n", "1")[0]["content"], old[-1][1])

    def test_codes_that_were_not_kept_are_those_of_the_status(self):
        bring(self.old / "before.db")
        for status, code in CODES.items():
            run = nervebox.run_json(f"old-{status}")
            self.assertEqual(run["exitCode"], code, status)
            is_open = status in ("queued", "started")
            self.assertEqual(run["status"], "interrupted" if is_open else status)
            self.assertEqual(run["result"] == "imported", is_open, status)

    def test_a_log_beside_the_database_is_read_and_what_is_new_is_added(self):
        bring(self.old / "logs.db")
        total, runs = count(), count("workflow_runs")
        with contextlib.closing(sqlite3.connect(self.old / "logs.db", isolation_level=None)) as old:
            old.execute("INSERT INTO workflow_runs VALUES ('new', 'deploy', 'completed', 1776000000000, 0)")
            row = "INSERT INTO logs (source, type, ref_id, payload, timestamp) VALUES ('workflow', ?, ?, ?, 1776000000000)"
            old.execute(row, ["started", "new", '{"prompt": "p", "maxRounds": 1}'])
            # The run has come over as interrupted; a run that has ended never changes.
            late = '{"role": "late", "content": "late"}'
            old.execute(row, ["thread_workflow_message", "works", late])
            for is_open in (True, False):
                with self.subTest(is_open=is_open):
                    there = self.old / ("there" if is_open else "copied")
                    there.mkdir()
                    for path in self.old.glob("logs.db*"):
                        if is_open or not path.name.endswith("-shm"):
                            shutil.copy(path, there)
                    self.assertTrue((there / "logs.db-wal").stat().st_size)
                    before = fingerprint(there)
                    said = bring(there / "logs.db", "--archive", self.old / "archive/logs").stdout
                    expected = "imported 1 runs, 3 events\n" if is_open else "imported 0 runs, 0 events\n"
                    self.assertEqual(said, expected)
                    self.assertEqual(fingerprint(there), before)
        # And the audit of the second import.
        self.assertEqual((count(), count("workflow_runs")), (total + 3, runs + 1))
        self.assertEqual(nervebox.run_json("new")["prompt"], "p")
        self.assertEqual(len(nervebox.thread("works")), 2)
        with nervebox.database() as database:
            late = database.execute("SELECT type FROM events WHERE payload = ?", [late]).fetchone()
        self.assertEqual(late["type"], "thread_workflow_message")

    def test_what_is_no_history_is_refused_and_nothing_is_imported(self):
        file = self.old / "logs.db"
        whole = file.read_bytes()

        def changed(statement):
            with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as old:
                old.execute("PRAGMA journal_mode = DELETE")
                old.execute(statement)

        faults = {
            "no SQLite database": lambda: file.write_bytes(b"no database" * 200),
            "no table logs": lambda: changed("ALTER TABLE logs RENAME TO log"),
            "has a column color": lambda: changed("ALTER TABLE workflow_runs ADD COLUMN color TEXT"),
            "unknown status": lambda: changed("UPDATE workflow_runs SET status = 'odd' WHERE run_id = 'works'"),
            "damaged": lambda: file.write_bytes(whole[:20480] + b"\xff" * 40960 + whole[61440:]),
            "No such file": file.unlink,
        }
        for words, spoil in faults.items():
            with self.subTest(words=words):
                file.write_bytes(whole)
                spoil()
                self.assertIn(words, bring(file, "--blobs", self.old / "blobs", check=65).stderr)
        file.write_bytes(whole)
        day = self.old / "archive/logs/2026-03-01.jsonl"
        day.write_bytes(day.read_bytes()[:-10])
        self.assertIn("2026-03-01.jsonl:", bring(file, check=65).stderr)
        shutil.rmtree(self.old / "archive")
        self.assertIn("--archive", bring(file, check=65).stderr)
        self.assertEqual(count("workflow_runs"), 0)
        self.assertEqual(count("imported"), 0)
        for digest in EXPECTED["blobs"]:
            self.assertFalse((nervebox.STATE / "blobs" / digest[:2] / digest[2:]).exists())

    def test_a_day_of_the_archive_that_is_missing_is_named_and_nothing_is_imported(self):
        file, day = self.old / "logs.db", self.old / "archive/logs/2026-03-01.jsonl"
        moved = day.rename(self.old / "moved")
        said = bring(file, check=65).stderr
        for words in ("rows 1 to 10 ", "2026-03-01.jsonl", "--archive", "nothing was imported"):
            self.assertIn(words, said)
        self.assertEqual((count("workflow_runs"), count("imported")), (0, 0))
        moved.rename(day)
        bring(file)
        self.check_run("run-archived", EXPECTED["runs"]["run-archived"])

    def test_what_is_lost_for_good_can_be_left_out(self):
        file, archive = self.old / "logs.db", self.old / "archive/logs"
        (archive / "2026-03-01.jsonl").unlink()
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as old:
            old.execute("DELETE FROM meta WHERE key = 'archived_up_to'")
        said = bring(file, "--archive", archive)
        self.assertIn("rows 1 to 10 ", said.stderr)
        self.assertEqual(said.stdout, f"imported {len(EXPECTED['runs'])} runs, 37 events\n")

    def test_rows_that_come_before_their_run_become_part_of_it(self):
        bring(self.old / "before.db", "--archive", self.old / "archive/logs")
        bring(self.old / "logs.db", "--blobs", self.old / "blobs")
        for old_id, expected in EXPECTED["runs"].items():
            with self.subTest(run=old_id):
                self.check_run(old_id, expected)
        self.assertEqual(bring(self.old / "logs.db").stdout, "imported 0 runs, 0 events\n")
        self.assertEqual(bring(self.old / "before.db").stdout, "imported 0 runs, 0 events\n")
        ctl("store", "check")

    def test_a_damaged_blob_is_named_and_the_rest_is_imported(self):
        digest = EXPECTED["blobs"][0]
        (self.old / "blobs" / digest[:2] / digest[2:]).write_bytes(b"something else")
        said = bring(self.old / "logs.db", "--blobs", self.old / "blobs", check=65)
        self.assertIn(digest, said.stderr)
        self.assertIn(hashlib.sha256(b"something else").hexdigest(), said.stderr)
        self.assertFalse((nervebox.STATE / "blobs" / digest[:2] / digest[2:]).exists())
        self.assertEqual(count("workflow_runs"), len(EXPECTED["runs"]))
