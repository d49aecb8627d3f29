"""A hundred thousand runs wait and a hundred run: nerve is killed, and is there again at once, and small."""

import json
import os
import pathlib
import signal
import sqlite3
import time
import uuid

import invariants
import nervebox
from nervebox import DATABASE, Case, ctl, start, stored, systemctl, wait_for

QUEUED, RUNNING = 100_000, 100
SECONDS, MEMORY = 2, 64 << 20


class Restart(Case):
    definitions = {
        "crowd": nervebox.command("exec sleep 1000", concurrency=RUNNING, max_queue=1_000_000),
        "pass-by": nervebox.command("exit 0"),
    }

    def tearDown(self):
        """All runs end with the class: to kill them one by one would take a while."""

    def test_it_serves_soon_and_is_small(self):
        running = [start("crowd") for _ in range(RUNNING)]
        waiting = start("crowd")
        wait_for(lambda: len(self.roles(running)) == RUNNING, f"{RUNNING} roles", 60)
        # Each of a hundred thousand calls would take its commit. These are rows as nerve writes them.
        systemctl("stop", "nerve.service")
        added = self.enqueue(waiting, QUEUED - 1)
        systemctl("start", "nerve.service")
        self.answers()
        roles = self.roles(running)
        self.assertEqual(len(roles), RUNNING)

        pid = nervebox.nerved_pid()
        begun = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: nervebox.nerved_pid() not in (0, pid), "another nerved")
        self.answers()
        took = time.monotonic() - begun
        self.assertLess(took, SECONDS)
        # Nothing was started twice or lost.
        self.assertEqual(self.roles(running), roles)
        self.assertEqual(self.counts(), {"started": RUNNING, "queued": QUEUED})
        status, = json.loads(ctl("status", "-o", "json").stdout)
        self.assertEqual((status["running"], status["queued"]), (RUNNING, QUEUED))

        # It works as ever.
        self.assertEqual(len(nervebox.listed("-n", "50")), 50)
        doomed = added[len(added) // 2]
        ctl("workflow", "kill", doomed)
        self.assertEqual((stored(doomed)["status"], stored(doomed)["exit_code"]), ("killed", 137))
        _, code = start("pass-by", wait=True)
        self.assertEqual(code, 0)
        # When one ends the next one, and no other, takes its place.
        ctl("workflow", "kill", "--grace", "0", running[0])
        nervebox.wait_status(waiting, "started")
        self.assertEqual(self.counts()["queued"], QUEUED - 2)

        memory = self.memory(nervebox.nerved_pid())
        print(f"serving again after {took:.2f} s; memory in bytes: {memory}")
        self.assertLess(memory["VmHWM"], MEMORY, memory)
        self.assertEqual(invariants.check(at_rest=False), [])

    def answers(self):
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to answer")

    def roles(self, runs):
        """{run: its first process}, by the cgroups of their worker."""
        found = {}
        for run in runs:
            pids = nervebox.pids_of(nervebox.worker_cgroup("crowd") / f"run-{run}")
            if pids:
                found[run] = min(pids.items())
        return found

    def counts(self):
        with nervebox.database() as database:
            return dict(tuple(row) for row in database.execute(
                "SELECT status, count(*) FROM workflow_runs WHERE workflow = 'crowd' AND ended_at IS NULL GROUP BY status"))

    def enqueue(self, like, count):
        """Adds so many runs that wait like this one; returns their ids."""
        first = uuid.UUID(like).int
        runs = [f"{first + number:032x}" for number in range(1, count + 1)]
        database = sqlite3.connect(DATABASE, isolation_level=None)
        database.execute("BEGIN")
        payload, at = database.execute(
            "SELECT payload, at FROM events WHERE ref = ? AND type = 'queued'", [like]).fetchone()
        history = invariants.History(database)
        for run in runs:
            history.append("queued", run, payload, at)
        columns = [row[1] for row in database.execute("PRAGMA table_info(workflow_runs)")
                   if row[1] not in ("seq", "run", "tail")]
        names = ", ".join(columns)
        database.executemany(
            f"INSERT INTO workflow_runs (run, tail, {names}) SELECT ?1, ?2, {names} FROM workflow_runs WHERE run = ?3",
            [(run, run[::-1], like) for run in runs])
        database.execute("COMMIT")
        database.close()
        return runs

    def memory(self, pid):
        """What is resident of a process, in bytes: the most that ever was, what is now, and how much of it is its own."""
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return {name: int(fields[name].split()[0]) << 10 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}
