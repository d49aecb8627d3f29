"""Blobs, check, backup and restore, on the installed thing.

Parity 121-123."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sqlite3
import tempfile
import threading
import time

import nervebox
from nervebox import DATABASE, SCRATCH, STATE, command, ctl, ended, row, sh, start, systemctl

NERVED = "/usr/libexec/nerve/nerved"


def blob_path(digest):
    return STATE / "blobs" / digest[:2] / digest[2:]


def check(**more):
    return ctl("store", "check", **more).stdout


def offline(status=0):
    """`nerved --check` of a store that nobody has open."""
    return sh(NERVED, "--check", check=status)


class Blobs(nervebox.Case):
    def put(self, content, *more):
        digest = ctl("blob", "put", "-", input=content).stdout.strip()
        self.assertEqual(digest, hashlib.sha256(content).hexdigest())
        return digest

    def get(self, digest):
        return sh("nervectl", "blob", "get", digest, input=b"").stdout

    def test_what_is_put_is_got(self):
        content = os.urandom(3_000_000)
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            digest = ctl("blob", "put", file.name).stdout.strip()
        self.assertEqual(digest, hashlib.sha256(content).hexdigest())
        for again in (digest, digest.upper(), f"  {digest}\n"):
            self.assertEqual(self.get(again), content)
            ctl("blob", "exists", again)
        self.assertEqual(ctl("blob", "put", "-", input=content).stdout.decode().strip(), digest)
        self.assertEqual(blob_path(digest).stat().st_size, len(content))
        self.assertIn(digest, ctl("blob", "list").stdout)
        self.assertIn('"size": 3000000', ctl("blob", "list", "-o", "json").stdout)

    def test_there_is_no_such_blob(self):
        for digest in ("0" * 64, "0" * 63, "", "../../../etc/passwd", "g" * 64):
            self.assertIn("no such blob", ctl("blob", "get", digest, check=66).stderr)
            ctl("blob", "exists", digest, check=66)

    def test_a_damaged_one_is_never_served_and_put_anew(self):
        digest = ctl("blob", "put", "-", input="what it was").stdout.strip()
        blob_path(digest).write_text("what it is")
        found = hashlib.sha256(b"what it is").hexdigest()
        said = ctl("blob", "get", digest, check=70)
        self.assertEqual(said.stdout, "")
        self.assertIn(digest, said.stderr)
        self.assertIn(found, said.stderr)
        faults = ctl("store", "check", check=65).stdout
        self.assertIn(f"blob {digest} is damaged", faults)
        self.assertIn(found, faults)
        again = ctl("blob", "put", "-", input="what it was")
        self.assertEqual(again.stdout.strip(), digest)
        self.assertIn("damaged", again.stderr)
        self.assertIn("nothing is wrong", check())

    def test_what_is_no_file_is_refused(self):
        self.assertIn("cannot read", ctl("blob", "put", "/nonexistent", check=65).stderr)
        ctl("blob", "put", "/etc", check=65)


class DamagedThread(nervebox.Case):
    definitions = {"say-on": command("cat >/dev/null", concurrency=4)}

    def test_it_ends_its_run_and_no_other(self):
        restarts = nervebox.properties("nerve.service", "NRestarts")
        ctl("pause")
        runs = []
        for letter in "abc":
            prompt = letter * 70_000
            run = ctl("workflow", "start", "say-on", "--prompt-file", "-", input=prompt).stdout.strip()
            runs.append((run, blob_path(hashlib.sha256(prompt.encode()).hexdigest())))
        runs[0][1].write_text("else")
        runs[1][1].unlink()
        ctl("resume")
        for run, path in runs[:2]:
            end = ended(run)
            self.assertEqual((end["status"], end["exitCode"], end["result"]), ("crashed", 255, "thread-damaged"))
            digest = path.parent.name + path.name
            shown = ctl("workflow", "show", run).stdout
            self.assertIn(digest, shown)
            said = ctl("thread", run, check=70).stderr
            self.assertIn(f"blob {digest} is", said)
        self.assertEqual(ended(runs[2][0])["exitCode"], 0)
        self.assertEqual(ended(start("say-on"))["exitCode"], 0)
        self.assertEqual(nervebox.properties("nerve.service", "NRestarts"), restarts)
        faults = ctl("store", "check", check=65).stdout
        for _, path in runs[:2]:
            self.assertIn(path.parent.name + path.name, faults)
        for letter in "ab":
            ctl("blob", "put", "-", input=letter * 70_000)
        self.assertIn("nothing is wrong", check())
        self.assertEqual(len(nervebox.thread(runs[0][0])), 1)


class Backup(nervebox.Case):
    definitions = {"say-much": command("head -c 2000 /dev/zero | tr '\\0' x", concurrency=8),
                   "wait-long": command(f"until [ -e {SCRATCH}/go.backup ]; do sleep 0.05; done",
                                        worker=nervebox.WRITES)}

    def setUp(self):
        self.place = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.place)

    def test_under_load_and_restored(self):
        """As nerve-store(7) says."""
        waits = start("wait-long")
        nervebox.wait_event(waits, "dispatched")
        stop, errors = threading.Event(), []

        def load():
            while not stop.is_set():
                try:
                    start("say-much", "x" * 66_000)
                except AssertionError as error:
                    errors.append(error)
                    return

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            nervebox.wait_for(lambda: len(nervebox.listed("-n", "10000")) > 20, "some load")
            for number in range(3):
                told = ctl("store", "backup", self.place / f"{number}.db").stdout.split()
            checked = check()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        self.assertEqual(errors, [])
        self.assertIn("nothing is wrong", checked)
        backup = self.place / "2.db"
        self.assertEqual(backup.stat().st_mode & 0o777, 0o600)
        shutil.copy(backup, self.place / "look.db")
        with contextlib.closing(sqlite3.connect(self.place / "look.db")) as copy:
            self.assertEqual(copy.execute("PRAGMA integrity_check").fetchone(), ("ok",))
            newest = copy.execute("SELECT seq, lower(hex(hash)) FROM events ORDER BY seq DESC LIMIT 1").fetchone()
            runs = copy.execute("SELECT run, ended_at IS NULL FROM workflow_runs").fetchall()
        self.assertEqual(told, ["event", str(newest[0]), newest[1]])
        self.assertIn((waits, 1), runs)
        ctl("workflow", "kill", "--grace", "0", *nervebox.open_runs(), check=False)
        after = start("say-much")
        ended(after)
        (self.place / "archive").mkdir()
        shutil.copytree(STATE / "blobs", self.place / "blobs")
        systemctl("stop", "nerve.target")
        aside = DATABASE.rename(STATE / "aside.db")
        self.assertIn("restore a backup", sh(NERVED, check=1).stderr)
        aside.rename(DATABASE)
        systemctl("start", "nerve")
        shutil.copy(backup, self.place / "nerve.db")
        # Twice, the second time into another directory.
        for number in (1, 2):
            time.sleep(1.1)
            self.assertIn("nothing is wrong", self.restored().stdout)
            self.assertEqual(len(list(STATE.glob("damaged-*/nerve.db"))), number)
        listed = {element["run"] for element in nervebox.listed("-n", "10000")}
        self.assertEqual({run for run, _ in runs}, listed)
        self.assertNotIn(after, listed)
        (SCRATCH / "go.backup").touch()
        self.assertEqual(ended(waits)["exitCode"], 0)
        for run, is_open in runs:
            if is_open:
                ended(run)
        self.assertIn("nothing is wrong", check())

    def restored(self):
        """What the lines of the page do, with our place for theirs."""
        page = (pathlib.Path(__file__).parents[2] / "man/nerve-store.7").read_text()
        lines = page.partition(".Sh RESTORE\n.Bd -literal -offset indent\n")[2].partition(".Ed\n")[0]
        self.addCleanup(lambda: [shutil.rmtree(path) for path in STATE.glob("damaged-*")])
        return sh("sh", "-c", lines.replace("/srv/backup", str(self.place)))

    def test_an_existing_file_is_left_alone(self):
        there = self.place / "there"
        there.write_text("mine")
        self.assertIn("exists", ctl("store", "backup", there, check=65).stderr)
        self.assertEqual(there.read_text(), "mine")
        ctl("store", "backup", self.place / "none/there", check=65)
        self.assertIn("standard output", ctl("store", "backup", "-", check=64).stderr)


class Check(nervebox.Case):
    definitions = {"say-hello": command("echo hello")}

    def test_what_was_changed_is_found(self):
        run = start("say-hello", "the prompt")
        ended(run)
        self.assertIn("is in use by another nerved", sh(NERVED, "--check", check=1).stderr)
        before = check()
        systemctl("stop", "nerve")
        log = STATE / "nerve.db-wal"
        # With the log, if there is one, and without.
        self.assertIn("nothing is wrong", offline().stdout)
        with contextlib.closing(sqlite3.connect(DATABASE)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.assertFalse(log.exists())
        whole = DATABASE.read_bytes()
        try:
            self.assertIn("nothing is wrong", offline().stdout)
            for statement, fault in (
                    ("UPDATE events SET payload = replace(payload, 'the prompt', 'a prompt') WHERE type = 'queued' AND ref = ?",
                     "is not what it was"),
                    ("UPDATE workflow_runs SET exit_code = 1 WHERE run = ?", f"run {run}: its exit_code is 1"),
                    ("DELETE FROM events WHERE type = 'started' AND ref = ?", "is missing")):
                with self.subTest(statement):
                    with contextlib.closing(sqlite3.connect(DATABASE)) as database:
                        triggers = database.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
                        for name, _ in triggers:
                            database.execute(f"DROP TRIGGER {name}")
                        self.assertEqual(database.execute(statement, (run,)).rowcount, 1)
                        for _, text in triggers:
                            database.execute(text)
                        database.commit()
                        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    changed = DATABASE.read_bytes()
                    self.assertIn(fault, offline(65).stdout)
                    self.assertEqual(DATABASE.read_bytes(), changed)
                    DATABASE.write_bytes(whole)
            # What no nerved starts with.
            dropped = []
            for what in ("TABLE workers", "INDEX runs_by_tail", "TABLE events"):
                DATABASE.write_bytes(whole)
                with contextlib.closing(sqlite3.connect(DATABASE)) as database:
                    database.execute(f"DROP {what}")
                    database.commit()
                    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                dropped.append(DATABASE.read_bytes())
            for damaged in (whole[:8192] + bytes(len(whole) - 8192), bytes(100) + whole[100:], whole[:50],
                            pathlib.Path("/bin/true").read_bytes(), *dropped):
                with self.subTest(damaged[:20]):
                    DATABASE.write_bytes(damaged)
                    refused = sh(NERVED, check=1).stderr
                    self.assertIn("nerved --check", refused)
                    self.assertIn("nerve-store(7)", refused)
                    offline(65)
                    self.assertEqual(DATABASE.read_bytes(), damaged)
        finally:
            DATABASE.write_bytes(whole)
            log.unlink(missing_ok=True)
            systemctl("start", "nerve")
        self.assertEqual(row(run)["status"], "completed")
        self.assertIn("nothing is wrong", check())
        self.assertIn("nothing is wrong", before)

    def test_json(self):
        report = json.loads(ctl("store", "check", "-o", "json").stdout)
        self.assertEqual((report["faults"], report["more"], len(report["hash"])), ([], 0, 64))
