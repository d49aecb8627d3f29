"""A kill against the natural end, five hundred times: one of them wins, and everybody is told the same.

The role of a run waits at a named pipe. Its end is begun by opening that, its death by a call on the bus, both within a
few milliseconds of each other and in either order."""

import collections
import os
import random
import struct
import subprocess
import time

import dbuswire
import invariants
import nervebox
from nervebox import SCRATCH, WRITES, Case, wait_for

RACES, TOGETHER = 500, 50
# How long before (negative) or after the role is let go the kill is sent, in seconds.
LEAD = (-0.004, 0.012)
GRACE_US = 200_000
BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
TOLD = SCRATCH / "told"
ENDS = {("killed", 137, "killed"), ("completed", 0, "success")}


def strings(body):
    """The strings that a message begins with."""
    found, at = [], 0
    while at + 4 <= len(body):
        size, = struct.unpack_from("<I", body, at)
        found.append(body[at + 4:at + 4 + size].decode())
        at += 4 + size + 1
        at += -at % 4
    return found


class Races(Case):
    definitions = {"end-or-die": {
        "roles": {"main": {"exec": ["/bin/sh", "-c", f"read name; exec cat {SCRATCH}/$name"], "prompt": "{{ start.content }}\n"}},
        "graph": {"$START": "main", "main": {"ok": "$END"}}, "worker": WRITES, "concurrency": TOGETHER}}

    def test_one_wins_and_all_are_told_the_same(self):
        seed = random.SystemRandom().randrange(10**9)
        choice = random.Random(seed)
        self.told = invariants.Told(TOLD)
        self.ended = collections.defaultdict(list)
        with dbuswire.Connection() as bus, dbuswire.Connection() as listener:
            rule = "type='signal',interface='org.nerve1.Manager',member='RunChanged'"
            self.assertIsNone(listener.call(*BUS, "AddMatch", "s", rule).error)
            for batch in range(RACES // TOGETHER):
                self.race(bus, choice, batch)
                self.listen(listener)
        with nervebox.database() as database:
            rows = {run: tuple(end) for run, *end in database.execute(
                "SELECT run, status, exit_code, result FROM workflow_runs")}
        self.assertEqual(len(rows), RACES)
        self.assertLessEqual(set(rows.values()), ENDS, f"seed {seed}")
        wins = collections.Counter(status for status, *_ in rows.values())
        # A race that one side always wins is none.
        self.assertGreater(min(wins["killed"], wins["completed"]), RACES // 20, f"{wins}, seed {seed}")
        # Who listened heard of each end once, and of the right one.
        self.assertEqual({run: [status] for run, (status, *_) in rows.items()}, dict(self.ended), f"seed {seed}")
        for run, (_, code, _) in rows.items():
            nervebox.assert_gone(run)
        wait_for(lambda: not [line for line in self.look() if line.startswith("I12")], "everything to be cleared away")
        self.assertEqual(self.look(), [], f"seed {seed}")

    def look(self):
        return invariants.check(told=TOLD, machine=invariants.Machine.look())

    def race(self, bus, choice, batch):
        """So many runs at once, each let go and killed at about the same time."""
        names = [f"race-{batch}-{number}" for number in range(TOGETHER)]
        for name in names:
            os.mkfifo(SCRATCH / name)
            (SCRATCH / name).chmod(0o666)
        serials = [bus.send(*dbuswire.MANAGER, "StartRun", "ssa{sv}", "end-or-die", name, {}) for name in names]
        runs = {name: reply.text for name, reply in zip(names, self.replies(bus, serials))}
        for run in runs.values():
            self.told.started(run, "end-or-die")
        pipes = {name: wait_for(lambda: self.reader(name), f"the role of {name}") for name in names}
        # One who waits as people do.
        waiting = subprocess.Popen(["nervectl", "workflow", "kill", "--grace", "0", runs[names[0]]],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deeds = []
        for place, name in enumerate(names):
            at = place * 0.004
            deeds += [(at, "go", name), (at + choice.uniform(*LEAD), "kill", name)]
        begun = time.monotonic() + 0.01
        kills = {}
        for at, deed, name in sorted(deeds):
            time.sleep(max(0, begun + at - time.monotonic()))  # the race is run at this pace; nothing is waited for
            if deed == "go":
                os.close(pipes[name])
            else:
                kills[name] = bus.send(*dbuswire.MANAGER, "KillRun", "sst", runs[name], "race", GRACE_US)
        for name, reply in zip(kills, self.replies(bus, list(kills.values()))):
            if reply.error is None:
                self.told.kill_accepted(runs[name])
            else:
                self.assertEqual(reply.error, "org.nerve1.Error.AlreadyEnded", reply.text)
                self.told.kill_refused(runs[name])
        wait_for(lambda: not nervebox.open_runs(), "all runs to end")
        _, complaint = waiting.communicate(timeout=nervebox.TIMEOUT)
        self.assertIn(waiting.returncode, (0, 68), complaint)
        (self.told.kill_accepted if waiting.returncode == 0 else self.told.kill_refused)(runs[names[0]])
        for run in (runs[name] for name in choice.sample(names, 5)):
            shown = nervebox.row(run)
            self.told.seen(run, shown["status"], shown["rounds"])
            self.told.exited(run, shown["exitCode"])

    def reader(self, name):
        """A pipe at whose other end the role waits."""
        try:
            return os.open(SCRATCH / name, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return None

    def replies(self, bus, serials):
        """Those to all calls, in their order; they come in any."""
        found = {}
        while len(found) < len(serials):
            serial, reply = bus.receive()
            if serial in serials and reply.kind in (2, 3):
                found[serial] = reply
        return [found[serial] for serial in serials]

    def listen(self, listener):
        """What the signals said; a call of one's own comes back after all that was sent before."""
        serial = listener.send(*BUS, "GetId")
        while True:
            answered, message = listener.receive()
            if answered == serial:
                return
            if message.kind == 4 and message.fields.get(3) == "RunChanged":
                run, status = strings(message.body)
                if status in ("killed", "completed"):
                    self.ended[run].append(status)
