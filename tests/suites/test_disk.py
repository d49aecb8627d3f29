"""A disk that breaks under nerved, at each kind of call and at several moments of a run's life: nerved ends and is there
again, or, where the disk only takes no blob, waits; nothing that anybody was told is lost. strace puts the errors in."""

import contextlib
import signal
import subprocess

import nervebox
from nervebox import ctl, stored, stored_end, wait_for

# Which calls of a life fail. The log's writes are many and its syncs some; the last ones are those of a blob.
MOMENTS = {"pwrite64": (1, 8, 25), "fdatasync": (1, 3), "fsync": (1,), "mkdir": (1,), "rename": (1,)}
LONG = 100_000  # bytes of the first reply: a blob


class Disk(nervebox.Case):
    definitions = {"take-steps": {
        "roles": {"long": {"exec": ["/bin/sh", "-c", f"echo $NERVE_RUN_ID; head -c {LONG} /dev/zero | tr '\\0' x"]},
                  "short": {"exec": ["/bin/sh", "-c", "echo said"]}},
        "graph": {"$START": "long", "long": {"ok": "short"}, "short": {"ok": "$END"}}}}

    @contextlib.contextmanager
    def fails(self, pid, call, when, error):
        """The calls of this process fail."""
        strace = subprocess.Popen(
            ["strace", "--quiet=all", "-f", "-p", str(pid), "-e", f"trace={call}", "-e",
             f"inject={call}:error={error}:when={when}", "-o", "/dev/null"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            traced = f"TracerPid:\t{strace.pid}"
            with contextlib.suppress(FileNotFoundError):
                wait_for(lambda: traced in open(f"/proc/{pid}/status").read(), "strace at nerved")
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait()

    def life(self, call, when, error):
        """One run, with its key, however often nerved has to be asked; returns whether nerved died of it."""
        pid = nervebox.nerved_pid()
        key = f"{call}-{when}-{error}"
        told = []
        with self.fails(pid, call, when, error):
            def started():
                done = ctl("workflow", "start", "take-steps", "--key", key, check=False)
                if done.returncode == 0:
                    told.append(done.stdout.strip())
                # Whatever it says, it says so: unknown, refused for want of space, or nobody there.
                self.assertIn(done.returncode, (0, 69, 70, 74), done.stderr)
                return told
            wait_for(started, f"a start of {key}", 30)
            run = told[0]
            # Or it lives, says so, and waits for room.
            wait_for(lambda: stored(run)["ended_at"] or "takes no more blobs" in ctl("status", check=False).stdout,
                     f"the end of run {run}, or why not", 30)
        end = stored_end(run)
        self.assertEqual((end["status"], end["exit_code"], end["rounds"]), ("completed", 0, 2), key)
        self.answers()
        self.assertEqual([run], [one["run"] for one in nervebox.listed("-n", "10000") if one["run"] == run])
        said = nervebox.thread(run)
        self.assertEqual([one["content"][:32] for one in said[1:]], [run, "said"])
        self.assertGreater(len(said[1]["content"]), LONG)
        return nervebox.nerved_pid() != pid

    def answers(self):
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to answer")

    def test_every_call_of_a_life_fails(self):
        deaths = 0
        for call, moments in MOMENTS.items():
            for moment in moments:
                for when in (str(moment), f"{moment}+"):
                    for error in ("EIO", "ENOSPC"):
                        with self.subTest(call=call, when=when, error=error):
                            deaths += self.life(call, when, error)
        self.assertGreater(deaths, 10)
        with nervebox.database() as connection:
            (whole,), = connection.execute("PRAGMA integrity_check")
            self.assertEqual(whole, "ok")
