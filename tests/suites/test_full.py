"""The disk is full to the last byte: what runs ends, nothing begins, and all goes on when there is room again."""

import contextlib
import os
import signal

import nervebox
from nervebox import SCRATCH, STATE, Tried, ctl, start, stored, systemctl, wait_for

HALF = 100
SIZE = "192m"


def until(gate, script="echo done"):
    """A role that does its work once the gate has been opened."""
    return f"cat {SCRATCH}/{gate} >/dev/null; {script}"


class Full(nervebox.Case):
    definitions = {
        "end": nervebox.command(until("end"), concurrency=HALF, max_queue=1_000),
        "fall": nervebox.command("exec sleep 1000", concurrency=HALF),
        "follow": nervebox.command(until("follow"), concurrency=1),
        "talk": nervebox.command(until("talk", "head -c 200000 /dev/zero | tr '\\0' x"), concurrency=1),
    }

    @classmethod
    def setUpClass(cls):
        nervebox.sweep()
        nervebox.sh("mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0700", "nerve", STATE)
        nervebox.load(cls.definitions)

    @classmethod
    def tearDownClass(cls):
        nervebox.sweep()
        nervebox.sh("umount", STATE)
        nervebox.load({})

    def available(self):
        found = os.statvfs(STATE)
        return found.f_bavail * found.f_frsize

    @contextlib.contextmanager
    def filled(self):
        """With a file that leaves no byte to anybody else."""
        path = STATE / "fill"
        with open(path, "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        try:
            self.assertEqual(self.available(), 0)
            yield
        finally:
            path.unlink()

    def open(self, gate):
        """Opens a gate for those who wait there."""
        with open(SCRATCH / gate, "wb"):
            pass

    def began(self, run):
        wait_for(lambda: nervebox.pids_of(nervebox.cgroup_of(run)), f"the role of run {run}")

    def ends(self):
        """Every run as it ended: {run: (status, exit code)}."""
        with nervebox.database() as connection:
            rows = connection.execute("SELECT run, status, exit_code FROM workflow_runs WHERE ended_at IS NOT NULL")
            return {row["run"]: (row["status"], row["exit_code"]) for row in rows}

    def test_what_runs_ends_and_what_waits_goes_on_when_there_is_room(self):
        for gate in ("end", "follow", "talk"):
            os.mkfifo(SCRATCH / gate)
            (SCRATCH / gate).chmod(0o666)
        end = [start("end") for _ in range(HALF)]
        fall = [start("fall") for _ in range(HALF)]
        first, second, talk = start("follow"), start("follow"), start("talk")
        for run in [*end, *fall, first, talk]:
            self.began(run)
        pid = nervebox.nerved_pid()

        with self.filled():
            refused = Tried("end", check=70)
            self.assertEqual(refused.run, "")
            backup = ctl("store", "backup", SCRATCH / "backup.db", check=70)
            self.assertIn("/var/lib/nerve/nerve.db: No space left on device", backup.stderr)
            self.assertIn("no space left on device (ENOSPC): 0.0 MiB are available in /var/lib/nerve", refused.said)
            self.assertIn("disk full: no space left on device", ctl("status").stdout)
            wait_for(lambda: "disk full" in systemctl("status", "nerve.service").stdout, "systemctl status to say so")

            for gate in ("end", "follow", "talk"):
                self.open(gate)
            ctl("workflow", "kill", "--grace", "0", *fall)
            expected = {**{run: ("completed", 0) for run in [*end, first]}, **{run: ("killed", 137) for run in fall}}
            wait_for(lambda: self.ends().keys() >= expected.keys(), "200 ends", 60)
            self.assertEqual(self.ends(), expected)
            self.assertEqual(self.available(), 0)
            # Nothing took its place, and what does not fit is neither lost nor acknowledged.
            self.assertEqual(stored(second)["status"], "queued")
            self.assertEqual((stored(talk)["status"], stored(talk)["rounds"]), ("started", 0))
            # One that dies there is back, and knows all of it.
            self.assertEqual((nervebox.nerved_pid(), nervebox.properties("nerve.service", "NRestarts")["NRestarts"]), (pid, "0"))
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: ctl("status", check=False).returncode == 0 and nervebox.nerved_pid() != pid, "another nerved")
            self.assertEqual(self.ends(), expected)
            Tried("end", check=70)
            pid = nervebox.nerved_pid()

        # Nobody does anything for it.
        nervebox.wait_status(second, "started")
        self.began(second)
        self.open("follow")
        for run in (second, talk):
            self.assertEqual(nervebox.ended(run)["exitCode"], 0)
        self.assertEqual(len(nervebox.thread(talk)[1]["content"]), 200_000)
        self.assertEqual(nervebox.nerved_pid(), pid)
        self.assertNotIn("disk full", ctl("status").stdout)
        last = start("follow")
        self.began(last)
        self.open("follow")
        self.assertEqual(nervebox.ended(last)["exitCode"], 0)
