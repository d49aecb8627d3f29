"""A soak: hundreds of runs in flight while nerved, workers, roles, the bus and systemd itself are killed or restarted at
random. Afterwards every run has ended as its workflow says it must; "some run failed" is nobody's excuse.

Everything is chosen from one seed, which is printed. What comes of a choice depends on the machine."""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import dbuswire
import invariants
import nervebox
from nervebox import SCRATCH, WRITES, wait_for

TOLD, SHARED = SCRATCH / "told", SCRATCH / "shared"
# After the last fault all runs have so long to end, in seconds.
PATIENCE = 60
# What is done to the machine, and how often in comparison.
WEIGHTS = {"nerved": 30, "worker": 25, "role": 25, "bus": 8, "daemon-reload": 8, "daemon-reexec": 4}
# dbus.service may be started five times in ten seconds; in between nobody can be asked anything.
BUS_PAUSE = 4
# A worker that is killed more often in a minute runs into its limit, which is not what is tested here.
WORKER_KILLS = 4
# Clients that wait for the end of the run they start.
WAITERS = 8

FAILS, SUCCEEDS, KILLED = ("failed", 1, "exit-code:3"), ("completed", 0, "success"), ("killed", 137, "killed")
ROLE_DIED = ("failed", 1, "signal:SIGKILL")


class Plan:
    """A workflow and how its runs end."""

    def __init__(self, number, choice, concurrency):
        self.name = f"soak-{number}"
        count = choice.randint(2, 4)
        sort = choice.choice(["plain", "plain", "again", "failing"])
        self.end = FAILS if sort == "failing" else SUCCEEDS
        # A role that is killed fails its run, unless the graph has another way.
        self.bears_a_dead_role = sort == "again"
        names = [f"r{index}" for index in range(1, count + 1)]
        roles, graph = {}, {"$START": names[0]}
        for name, after in zip(names, [*names[1:], "$END"]):
            last = "exit 3" if sort == "failing" and after == "$END" else "exit 0"
            begin, end = (invariants.DEED.format(file=SHARED / "deeds", what=what) for what in ("begin", "end"))
            script = f"{begin}; sleep {choice.uniform(0.3, 2):.2f}; {end}; {last}"
            roles[name] = {"exec": ["/bin/sh", "-c", script]}
            graph[name] = {"ok": after, **({"error": name} if sort == "again" else {})}
        self.definition = {"roles": roles, "graph": graph, "worker": WRITES, "concurrency": concurrency}

    def ends(self, asked, role_died):
        """How a run may have ended, if it was `asked` to die, and if a role of it was killed."""
        allowed = {self.end}
        if asked:
            allowed.add(KILLED)
        if role_died and not self.bears_a_dead_role:
            allowed.add(ROLE_DIED)
        return allowed


class Soak:
    def __init__(self, seconds, runs, faults, seed):
        self.seconds, self.faults = seconds, faults
        self.choice = random.Random(seed)
        number = max(2, min(8, runs // 10))
        self.each = runs // number
        plans = [Plan(index, self.choice, self.each) for index in range(1, number + 1)]
        self.plans = {plan.name: plan for plan in plans}
        self.over = threading.Event()
        self.asked, self.role_died = set(), set()
        self.done = collections.Counter()
        self.worker_kills = collections.defaultdict(list)
        self.bus_killed = -BUS_PAUSE
        self.problems = []

    def run(self):
        """Does it all and returns what is wrong."""
        nervebox.load({name: plan.definition for name, plan in self.plans.items()})
        self.deeds = invariants.make_deeds(SHARED)
        self.told = invariants.Told(TOLD)
        choices = [random.Random(self.choice.random()) for _ in range(WAITERS + 2)]
        threads = [threading.Thread(target=self.guarded, args=(what, choice), daemon=True)
                   for what, choice in zip([self.feed, self.kill, *[self.wait] * WAITERS], choices)]
        for thread in threads:
            thread.start()
        self.harm()
        self.over.set()
        ended = self.settle()
        for thread in threads:
            thread.join(30)
            if thread.is_alive():
                self.problems.append("a client was never told how its run ended")
        if ended:
            self.judge()
        return self.problems

    def guarded(self, what, choice):
        try:
            what(choice)
        except Exception as error:
            self.problems.append(f"the soak itself failed to {what.__name__}: {error!r}")
            raise

    # ---- load

    def feed(self, _):
        """Keeps so many runs of each workflow open."""
        bus = None
        while not self.over.is_set():
            try:
                bus = bus or dbuswire.Connection()
                for name in self.missing():
                    reply = bus.call(*dbuswire.MANAGER, "StartRun", "ssa{sv}", name, "", {})
                    if reply.error is None:
                        self.told.started(reply.text, name)
                        self.done["starts"] += 1
                    else:
                        # Nobody knows, or nobody was there to be asked.
                        self.done["starts unanswered"] += 1
                        break
            except OSError:
                bus = None
            self.over.wait(0.05)

    def missing(self):
        with nervebox.database() as database:
            rows = database.execute("SELECT workflow, count(*) FROM workflow_runs WHERE ended_at IS NULL GROUP BY workflow")
            there = dict(tuple(row) for row in rows)
        return [name for name in self.plans for _ in range(self.each - there.get(name, 0))]

    def wait(self, choice):
        """Starts runs and waits for them, one after the other."""
        while not self.over.is_set():
            name = choice.choice(sorted(self.plans))
            waiter = subprocess.run(["nervectl", "workflow", "start", name, "--wait"], stdin=subprocess.DEVNULL,
                                    capture_output=True, text=True)
            run = waiter.stdout.strip()
            if run:
                self.told.started(run, name)
                self.told.exited(run, waiter.returncode)
                self.done["waits"] += 1
            else:
                self.over.wait(0.1)

    def kill(self, choice):
        """Kills a run now and then, as people do."""
        while not self.over.wait(choice.uniform(0.2, 1)):
            runs = sorted(self.open_runs())
            if not runs:
                continue
            run = choice.choice(runs)
            self.asked.add(run)
            done = nervebox.ctl("workflow", "kill", "--grace", "100ms", run, check=False, timeout=PATIENCE)
            if done.returncode == 0:
                self.told.kill_accepted(run)
                self.told.exited(run, 137)
            elif done.returncode == 68:
                self.told.kill_refused(run)
            self.done[f"kills: {done.returncode}"] += 1

    def open_runs(self, status=None):
        """{run: workflow}"""
        with nervebox.database() as database:
            return {row["run"]: row["workflow"] for row in database.execute(
                "SELECT run, workflow FROM workflow_runs WHERE ended_at IS NULL AND status = coalesce(?, status)", [status])}

    # ---- faults

    def harm(self):
        begun = time.monotonic()
        for at in sorted(self.choice.uniform(0, self.seconds) for _ in range(self.faults)):
            self.over.wait(max(0, begun + at - time.monotonic()))
            # One that is not possible now is another one instead.
            while not self.one_fault(self.choice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]):
                self.over.wait(0.01)
        self.over.wait(max(0, begun + self.seconds - time.monotonic()))

    def one_fault(self, kind):
        did = {"nerved": self.kill_nerved, "worker": self.kill_worker, "role": self.kill_role, "bus": self.kill_bus,
               "daemon-reload": self.manager, "daemon-reexec": self.manager}[kind](kind)
        if did:
            self.done[f"fault: {kind}"] += 1
        return did

    def kill_nerved(self, _):
        return self.kill_9(nervebox.nerved_pid())

    def kill_9(self, pid):
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def kill_worker(self, _):
        now = time.monotonic()
        name = self.choice.choice(sorted(self.plans))
        recent = [(at, seq) for at, seq in self.worker_kills[name] if now - at < 60]
        if len(recent) >= WORKER_KILLS or not self.bears_a_dead_worker(name, recent):
            return False
        with nervebox.database() as database:
            seq, = database.execute("SELECT max(seq) FROM events").fetchone()
        if not self.kill_9(nervebox.worker_pid(name)):
            return False
        self.worker_kills[name] = [*recent, (now, seq)]
        return True

    def bears_a_dead_worker(self, name, recent):
        """Runs crash when they lose their worker again and again before they say anything. None does here, so each run
        of the workflow has to have said something since the last time, and the last time must be known."""
        with nervebox.database() as database:
            if recent and not database.execute(
                    "SELECT count(*) FROM events JOIN workflow_runs ON run = ref WHERE type = 'dispatched' AND workflow = ? "
                    "AND events.seq > ?", [name, recent[-1][1]]).fetchone()[0]:
                return False
            lost, = database.execute(
                "SELECT count(*) FROM workflow_runs WHERE workflow = ? AND status = 'started' AND (SELECT type FROM events "
                "WHERE ref = run AND type IN ('worker-lost', 'thread-workflow-message') ORDER BY seq DESC LIMIT 1) = "
                "'worker-lost'", [name]).fetchone()
            return lost == 0

    def kill_role(self, _):
        runs = self.open_runs("started")
        if not runs:
            return False
        run = self.choice.choice(sorted(runs))
        pids = sorted(nervebox.pids_of(nervebox.SLICE / nervebox.unit_of(runs[run]) / f"run-{run}"))
        if not pids:
            return False
        self.role_died.add(run)
        return self.kill_9(self.choice.choice(pids))

    def kill_bus(self, _):
        now = time.monotonic()
        if now - self.bus_killed < BUS_PAUSE or not self.kill_9(nervebox.main_pid("dbus.service")):
            return False
        self.bus_killed = now
        return True

    def manager(self, verb):
        nervebox.systemctl(verb)
        return True

    # ---- afterwards

    def settle(self):
        begun = time.monotonic()
        try:
            wait_for(lambda: not self.open_runs(), "all runs to end", PATIENCE)
        except AssertionError as error:
            self.problems.append(f"I9: {error}; {self.stuck()}")
            return False
        self.done["seconds until all had ended"] = round(time.monotonic() - begun)
        # What a run left behind that ended while its worker was dead is cleared away when the next worker goes.
        for name in self.plans:
            nervebox.ctl("workflow", "drain", name, "--wait", check=False)
        try:
            wait_for(lambda: not [line for line in self.check() if line.startswith("I12")], "everything to be cleared away")
        except AssertionError:
            pass  # the check that counts says what is left
        return True

    def stuck(self):
        with nervebox.database() as database:
            return [(run, [kind for kind, in database.execute("SELECT type FROM events WHERE ref = ? ORDER BY seq", [run])])
                    for run in sorted(self.open_runs())[:5]]

    def check(self):
        return invariants.check(told=TOLD, deeds=self.deeds, machine=invariants.Machine.look())

    def judge(self):
        self.problems += self.check()
        with nervebox.database() as database:
            rows = database.execute("SELECT run, workflow, status, exit_code, result FROM workflow_runs").fetchall()
            for kind, count in database.execute("SELECT type, count(*) FROM events GROUP BY type"):
                self.done[f"event: {kind}"] = count
        for run, workflow, *end in rows:
            allowed = self.plans[workflow].ends(run in self.asked, run in self.role_died)
            if tuple(end) not in allowed:
                self.problems.append(f"run {run} of {workflow} ended {tuple(end)}, and may have ended {allowed}")
            self.done[f"ended: {end[0]}"] += 1
        failed = nervebox.systemctl("list-units", "--failed", "--plain", "--no-legend", "nerve*").stdout.strip()
        if failed:
            self.problems.append(f"failed units: {failed}")
        if nervebox.ctl("status", check=False).returncode != 0:
            self.problems.append("nerve does not answer")


def soak(seconds, runs, faults, seed, say=print):
    """A soak; returns what is wrong, a line each."""
    say(f"soak: seed {seed}, {seconds} s, {runs} runs in flight, {faults} faults")
    one = Soak(seconds, runs, faults, seed)
    problems = one.run()
    for what, count in sorted(one.done.items()):
        say(f"{count:8} {what}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=600, help="how long there are faults")
    parser.add_argument("--runs", type=int, default=200, help="runs in flight")
    parser.add_argument("--faults", type=int, default=300, help="how many faults")
    parser.add_argument("--seed", type=int, default=None, help="what everything is chosen from")
    options = parser.parse_args()
    if not pathlib.Path("/run/systemd/container").exists():
        sys.exit("run this in the throwaway machine: make soak")
    seed = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    problems = soak(options.seconds, options.runs, options.faults, seed, lambda text: print(text, flush=True))
    for problem in problems:
        print(problem)
    print(f"seed {seed}: {len(problems)} problems")
    return 1 if problems else 0
