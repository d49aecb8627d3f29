"""sqlite3 shells at nerve's database: one that wants in while nerved has it, and one that was there before."""

import contextlib
import subprocess
import time

import dbuswire
import nervebox
from nervebox import DATABASE, ctl, start, systemctl, wait_for

LOG = DATABASE.with_name("nerve.db-wal")
COMMITS = 20_000
MOST = 64 << 20  # bytes of the log


class Held(nervebox.Case):
    definitions = {"pass-by": nervebox.command("true")}

    @contextlib.contextmanager
    def shell(self, *statements):
        """An sqlite3 shell that has said what these statements give."""
        shell = subprocess.Popen(["sqlite3", DATABASE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True)
        with shell:
            try:
                # No statement: a newer shell answers none of a database that is locked.
                shell.stdin.write(";\n".join([*statements, ".print here\n"]))
                shell.stdin.flush()
                said = []
                while not said or said[-1] not in ("here", ""):
                    said.append(shell.stdout.readline().strip())
                yield shell, said
            finally:
                shell.kill()

    def test_no_reader_and_no_lock_gets_in_and_the_log_stays_small(self):
        started = nervebox.properties("nerve.service", "NRestarts")
        with self.shell("BEGIN", "SELECT count(*) FROM events") as (_, reader), \
             self.shell("BEGIN EXCLUSIVE") as (_, writer), dbuswire.Connection() as bus:
            for said in (reader, writer):
                self.assertIn("database is locked", said[0])
            longest = 0
            for number in range(COMMITS // 2):
                for change in (("Pause", "s", "why"), ("Resume", "")):
                    self.assertIsNone(bus.call(*dbuswire.MANAGER, *change).error)
                if number % 100 == 0:
                    longest = max(longest, LOG.stat().st_size)
            self.assertLess(longest, MOST)
        run, code = start("pass-by", wait=True)
        self.assertEqual(code, 0, run)
        self.assertEqual(nervebox.properties("nerve.service", "NRestarts"), started)

    def test_who_holds_it_is_named_and_waited_for(self):
        systemctl("stop", "nerve.service")
        with self.shell("PRAGMA journal_mode", "BEGIN", "SELECT count(*) >= 0 FROM events") as (shell, said):
            self.assertEqual(said, ["wal", "1", "here"])
            since = f"--since=@{int(time.time())}"
            systemctl("start", "--no-block", "nerve.service")
            complaint = f"{DATABASE} is open in another program (pid {shell.pid}); close it there"
            def complaints():
                found = nervebox.journal("--unit=nerve.service", since)
                return [one for one in found if complaint in str(one.get("MESSAGE"))]
            wait_for(complaints, complaint, 30)
            # It goes on trying, and fills no journal with that.
            wait_for(lambda: len(complaints()) >= 2, "a second attempt", 30)
            first, second = (int(one["__REALTIME_TIMESTAMP"]) for one in complaints()[:2])
            self.assertGreater(second - first, 4_000_000)
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to start by itself")
        _, code = start("pass-by", wait=True)
        self.assertEqual(code, 0)
