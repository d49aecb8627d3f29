#!/usr/bin/env python3
"""The checker: reads what nerve left, in its database, in cgroups and in systemd, and says which invariant it breaks.

    tests/suites/invariants.py [--told FILE] [--deeds FILE] [--database FILE] [--running] [--no-machine]

It knows nothing of how nerve works, only what must be true (I1 to I12, see LETTERS). To that end it adds the events up
by itself. What clients were told comes from a journal of JSON lines that tests write (`Told`), what roles did from a
file that they write (`DEED`); without them less can be seen. With `--running` runs may still be open.

It exits 0 when all holds, 1 when something does not, with a line for each: `I6: run …: round 3 is missing`.
"""

import argparse
import collections
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import re
import sqlite3
import struct
import subprocess
import sys

import livedb

LETTERS = {
    "I1": "every acknowledged start exists; one key is one run",
    "I2": "a run ends at most once, after that nothing happens to it; at rest it has ended",
    "I3": "status, exit code and result are a row of the table",
    "I4": "a run that has ended has no process",
    "I5": "a workflow has at most one worker",
    "I6": "rounds are dense, none disappears, none that was acknowledged is executed again",
    "I7": "137 and 143 are for who asked, and who asked for 137 gets it",
    "I8": "runs leave the queue in the order in which they came",
    "I9": "at rest no run is open",
    "I10": "the database is whole, and its tables are what the events add up to",
    "I11": "what clients were told is what the database says",
    "I12": "at rest nothing is left over",
}

STATE = pathlib.Path("/var/lib/nerve")
WORKERS = pathlib.Path("/sys/fs/cgroup/nerve.slice/nerve-wf.slice")
WORKER_STATE = "/var/lib/nerve-wf/*"
SCHEMA = 4

# For the script of a role: DEED.format(file=…, what="begin") appends what it does, in one write.
DEED = "echo $NERVE_RUN_ID $NERVE_ROUND $NERVE_ATTEMPT {what} >>{file}"

QUEUED, STARTED = "queued", "started"
# The table of statuses and exit codes: result -> (status, exit code). What has more behind a colon has it here, too.
TABLE = {
    "success": ("completed", 0),
    **dict.fromkeys(["exit-code:", "signal:", "exec-failed", "role-timeout", "oom-kill", "reply-too-large",
                     "template-error", "role-stalled", "bad-reply", "bad-route", "llm-error:", "no-route:"], ("failed", 1)),
    "max-rounds": ("failed", 2),
    "timeout": ("failed", 124),
    **dict.fromkeys(["drained", "imported"], ("interrupted", 130)),
    "killed": ("killed", 137),
    "aborted": ("aborted", 143),
    **dict.fromkeys(["queue-full", "blocked", "removed"], ("dropped", 75)),
    **dict.fromkeys(["worker-died", "worker-exit:", "start-limit-hit", "unit-refused", "thread-damaged"], ("crashed", 255)),
}
# So many deaths of a worker are remembered.
REMEMBERED_DEATHS = 100


def end_of(result):
    """(status, exit code) of a result; None when there is no such result."""
    word, colon, _ = result.partition(":")
    return TABLE.get(word + colon)


# ---- what clients were told and what roles did ----------------------------------------------------------------------

class Told:
    """A journal of what clients were told. Any number of processes and threads may write to it."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.path.touch()

    def add(self, kind, run, **more):
        line = json.dumps({"told": kind, "run": run, **more}) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())

    def started(self, run, workflow, key=None):
        """A start was acknowledged with this id."""
        self.add("started", run, workflow=workflow, key=key)

    def exited(self, run, code):
        """Who waited for the run was told this exit code."""
        self.add("exit", run, code=code)

    def kill_accepted(self, run):
        self.add("kill-accepted", run)

    def kill_refused(self, run):
        """Because the run had already ended, otherwise."""
        self.add("kill-refused", run)

    def abort_accepted(self, run):
        self.add("abort-accepted", run)

    def seen(self, run, status, rounds=0):
        """Somebody looked: the run was `status` and had so many rounds."""
        self.add("seen", run, status=status, rounds=rounds)

    def read(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def make_deeds(directory):
    """A file that roles of every user append to (DEED). Its directory is not sticky: in one that is, the kernel lets
    nobody open others' files for writing."""
    directory = pathlib.Path(directory)
    directory.mkdir(exist_ok=True)
    directory.chmod(0o777)
    path = directory / "deeds"
    path.touch()
    path.chmod(0o666)
    return path


def read_deeds(path):
    """[(run, round, attempt, begin or end)], in the order in which it was done."""
    deeds = []
    for line in pathlib.Path(path).read_text().splitlines():
        run, number, attempt, what = line.split()
        deeds.append((run, int(number), int(attempt), what))
    return deeds


# ---- the database ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Event:
    seq: int
    kind: str
    subject: str
    payload: dict
    at: int


def chained(before, row):
    """The hash of an event that follows the one with this hash."""
    sha = hashlib.sha256(before + struct.pack(">QQ", row["seq"], row["at"]))
    for text in (row["source"], row["type"], row["ref"], row["payload"], row["blob"] or ""):
        data = text.encode()
        sha.update(struct.pack(">Q", len(data)) + data)
    return sha.digest()


class History:
    """Writes events into a database that nobody has open, chained as nerved would."""

    def __init__(self, connection):
        self.connection = connection
        newest = connection.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
        self.seq, self.hash = newest or (0, bytes(32))

    def append(self, kind, subject, payload, at, source="workflow"):
        self.seq += 1
        row = {"seq": self.seq, "source": source, "type": kind, "ref": subject, "payload": payload, "blob": None, "at": at}
        self.hash = chained(self.hash, row)
        self.connection.execute("INSERT INTO events (seq, source, type, ref, payload, blob, at, hash) "
                                "VALUES (:seq, :source, :type, :ref, :payload, :blob, :at, :hash)",
                                {**row, "hash": self.hash})


class Database:
    """All that the database holds, of one moment."""

    def __init__(self, path):
        with livedb.connect(path) as connection:

            def rows(query):
                return [dict(row) for row in connection.execute(query)]

            self.faults = [row["integrity_check"] for row in rows("PRAGMA integrity_check")]
            self.dangling = rows("PRAGMA foreign_key_check")
            self.version, = connection.execute("PRAGMA user_version").fetchone()
            self.triggers = {row["name"] for row in rows("SELECT name FROM sqlite_master WHERE type = 'trigger'")}
            self.runs = {row["run"]: row for row in rows("SELECT * FROM workflow_runs ORDER BY seq")}
            self.workers = {row["workflow"]: json.loads(row["record"]) for row in rows("SELECT * FROM workers")}
            self.manager = {row["name"]: json.loads(row["value"]) for row in rows("SELECT * FROM manager")}
            self.definitions = {row["digest"] for row in rows("SELECT digest FROM definitions")}
            self.workflows = {row["name"]: row["definition"] for row in rows("SELECT * FROM workflows")}
            self.by_subject = collections.defaultdict(list)
            self.unchained = []
            before = {"seq": 0, "hash": bytes(32)}
            for row in rows("SELECT * FROM events ORDER BY seq"):
                # What is before a gap is in the archive.
                if row["seq"] == before["seq"] + 1 and row["hash"] != chained(before["hash"], row):
                    self.unchained.append(row["seq"])
                before = row
                event = Event(row["seq"], row["type"], row["ref"], json.loads(row["payload"]), row["at"])
                self.by_subject[(row["source"], row["ref"])].append(event)

    def events(self, run):
        return self.by_subject.get(("workflow", run), [])

    def of_runs(self):
        """{run: its events}"""
        return {ref: events for (source, ref), events in self.by_subject.items() if source == "workflow" and is_run(ref)}

    def of_workflows(self):
        """{workflow: the events of its worker}"""
        return {ref: events for (source, ref), events in self.by_subject.items()
                if source == "workflow" and not is_run(ref)}


def is_run(subject):
    """A run's id begins with a digit, the name of a workflow does not."""
    return re.fullmatch("[0-9][0-9a-f]{31}", subject) is not None


class Illegal(Exception):
    """An event that must not come there; the first argument is the invariant."""


class Run:
    """What a run's events add up to, by the rules of the model, told a second time."""

    def __init__(self, run):
        self.run = run
        self.status = None
        self.kill = self.abort = None
        self.rounds = self.attempt = self.failed = 0
        self.lost = self.routed = False
        self.place = None
        self.places = []
        self.started_at = self.ended_at = self.definition = self.result = None
        # The attempt in which each round was acknowledged, and whether it went well.
        self.acknowledged = {}

    def take(self, event):
        said = event.payload
        if said.get("type") != event.kind:
            raise Illegal("I10", f"event {event.seq} is {event.kind} and says {said.get('type')}")
        if self.status not in (None, QUEUED, STARTED):
            raise Illegal("I2", f"{event.kind} after its end")
        if (self.status is None) != (event.kind == "queued"):
            raise Illegal("I10", f"{event.kind} when it was {self.status}")
        handler = getattr(self, "on_" + event.kind.replace("-", "_"), None)
        if handler is None:
            raise Illegal("I10", f"event {event.kind} is unknown")
        handler(said, event.at)

    def on_queued(self, said, at):
        self.status = QUEUED
        self.accepted, self.created_at = said, at
        self.max_rounds = said.get("maxRounds")

    def on_started(self, said, at):
        if self.status != QUEUED:
            raise Illegal("I10", "started twice")
        self.status, self.started_at = STARTED, at
        self.definition, self.max_rounds = said["definition"], said["maxRounds"]

    def must_be_started(self, what):
        if self.status != STARTED:
            raise Illegal("I10", f"{what} while {self.status}")

    def on_dispatched(self, said, _):
        self.must_be_started("dispatched")
        if said["attempt"] != self.attempt + 1:
            raise Illegal("I6", f"attempt {said['attempt']} after attempt {self.attempt}")
        if self.kill or self.abort:
            raise Illegal("I7", "dispatched although its end was asked for")
        self.attempt, self.place, self.lost = said["attempt"], said["place"], False
        self.places.append(said["place"])

    def must_be_next(self, said):
        self.must_be_started("a round")
        if said["round"] != self.rounds + 1:
            raise Illegal("I6", f"round {said['round']} after round {self.rounds}")
        if self.place is None or self.lost:
            raise Illegal("I6", f"round {said['round']} when no worker had it")
        if self.kill:
            raise Illegal("I7", f"round {said['round']} after a kill was accepted")

    def on_attempt_failed(self, said, _):
        self.must_be_next(said)
        if said["attempt"] != self.failed + 1:
            raise Illegal("I6", f"attempt {said['attempt']} of a round after attempt {self.failed}")
        self.failed += 1

    def on_routed(self, said, _):
        self.must_be_next(said)
        if self.routed:
            raise Illegal("I6", f"round {said['round']} is routed twice")
        self.routed = True

    def on_thread_workflow_message(self, said, _):
        self.must_be_next(said)
        self.failed, self.routed = 0, False
        self.rounds += 1
        self.acknowledged[self.rounds] = (self.attempt, said["message"]["meta"].get("status") == "ok")

    def on_worker_lost(self, said, _):
        self.must_be_started("worker-lost")
        if self.place is None or self.lost or said["attempt"] != self.attempt:
            raise Illegal("I6", f"attempt {said['attempt']} was lost, which it did not have")
        self.lost = True

    def on_kill_requested(self, said, _):
        reason = said.get("reason")
        if reason is None and self.kill:
            reason = self.kill["reason"]
        self.kill = {"reason": reason}

    def on_abort_requested(self, said, _):
        if self.kill or self.abort:
            raise Illegal("I7", "an abort of what is being ended")
        self.abort = {"reason": said.get("reason")}

    def on_ended(self, said, at):
        result = said["result"]
        end = end_of(result)
        if end is None:
            raise Illegal("I3", f"ended with {result!r}, which is no result")
        asked = "killed" if self.kill else "aborted" if self.abort else None
        if asked != result and (asked or result in ("killed", "aborted")):
            raise Illegal("I7", f"ended {result}, and what was asked for is {asked}")
        if not asked and (end[0] == "dropped") != (self.status == QUEUED):
            raise Illegal("I3", f"ended {result} while {self.status}")
        self.status, self.result, self.ended_at = end[0], result, at

    def row(self):
        """The row of workflow_runs that this is, without `seq` and `tail`."""
        is_open = self.status in (QUEUED, STARTED)
        why = self.kill or self.abort
        end = end_of(self.result) if self.result else None
        return {
            "run": self.run, "workflow": self.accepted["workflow"], "status": self.status,
            "killing": int(is_open and self.kill is not None),
            "aborting": int(is_open and self.abort is not None and self.kill is None),
            "exit_code": end and end[1], "result": self.result, "reason": why and why["reason"],
            "rounds": self.rounds, "max_rounds": self.max_rounds, "dry_run": int(self.accepted["dryRun"]),
            "trigger": self.accepted["trigger"], "key": self.accepted.get("key"), "definition": self.definition,
            "created_at": self.created_at, "started_at": self.started_at, "ended_at": self.ended_at,
        }


def worker_record(events):
    """What a workflow's events add up to."""
    record = {"deaths": [], "blocked": None, "stopped": None, "draining": None}
    for event in events:
        said = event.payload
        if event.kind == "worker-died":
            record["deaths"] = [*record["deaths"], [said["invocation"], said["since"]]][-REMEMBERED_DEATHS:]
        elif event.kind == "workflow-blocked":
            record["blocked"] = [event.at, said["detail"]]
        elif event.kind == "worker-stopped":
            record["stopped"] = event.at
        elif event.kind == "worker-back":
            record["stopped"] = None
        elif event.kind == "workflow-reset":
            record |= {"deaths": [], "blocked": None, "stopped": None}
        elif event.kind == "worker-draining":
            record["draining"] = {"invocation": said["invocation"], "until": said.get("until"), "at": event.at}
        elif event.kind == "worker-drained":
            record["draining"] = None
        else:
            raise Illegal("I10", f"event {event.kind} is unknown")
    return record


# ---- the machine ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Machine:
    """What can be seen from outside of nerve."""

    # Cgroups of runs: {run: whether a process is in it}.
    cgroups: dict = dataclasses.field(default_factory=dict)
    # Worker processes by unit: {unit: [pid]}.
    workers: dict = dataclasses.field(default_factory=dict)
    # Worker units that systemd knows: {unit: (ActiveState, MainPID)}.
    units: dict = dataclasses.field(default_factory=dict)
    # Processes that carry the id of a run: {pid: run}.
    strays: dict = dataclasses.field(default_factory=dict)
    # Files that nobody needs any more.
    left: list = dataclasses.field(default_factory=list)

    @classmethod
    def look(cls):
        machine = cls()
        for directory in glob.glob(f"{WORKERS}/*/run-*"):
            machine.cgroups[directory.rpartition("/run-")[2]] = is_populated(directory)
        for path in glob.glob("/proc/[0-9]*"):
            with contextlib.suppress(OSError):
                pid = int(path[6:])
                environment = pathlib.Path(path, "environ").read_bytes().split(b"\0")
                run = next((word[13:].decode() for word in environment if word.startswith(b"NERVE_RUN_ID=")), None)
                if run is not None:
                    machine.strays[pid] = run
                unit = re.search(r"/(nerve-wf@[^/]*\.service)(/main)?$",
                                 pathlib.Path(path, "cgroup").read_text().strip())
                if unit and os.path.basename(os.readlink(f"{path}/exe")) == "nerve-worker":
                    machine.workers.setdefault(unit[1], []).append(pid)
        machine.units = worker_units()
        machine.left = left_files(machine.units)
        return machine


def is_populated(directory):
    try:
        return "populated 1" in pathlib.Path(directory, "cgroup.events").read_text().splitlines()
    except OSError:
        return False


def worker_units():
    """{unit: (ActiveState, MainPID)} of the worker units that systemd has."""
    shown = subprocess.run(["systemctl", "show", "--all", "--property=Id,ActiveState,MainPID", "nerve-wf@*.service"],
                           capture_output=True, text=True, check=True).stdout
    units = {}
    for block in shown.split("\n\n"):
        properties = dict(line.split("=", 1) for line in block.splitlines() if line)
        if properties:
            units[properties["Id"]] = (properties["ActiveState"], int(properties["MainPID"]))
    return units


def left_files(units):
    """Files that are needed only while something is going on, and unit files of units that are not there."""
    kept = {"nerve.db", "nerve.db-wal", "lock", "blobs", "archive"}
    left = [str(path) for path in STATE.iterdir() if path.name not in kept]
    for directory in ("runs", "threads"):
        left += glob.glob(f"{WORKER_STATE}/{directory}/*")
    left += [path for path in glob.glob("/run/systemd/transient/nerve-wf@*")
             if os.path.basename(path).removesuffix(".d") not in units]
    # Beside sockets there are definitions, and what tests want to go wrong.
    left += [path for path in glob.glob("/run/nerve/*")
             if not pathlib.Path(path).is_socket() and os.path.basename(path) not in ("workflows", "failpoints")]
    return left


# ---- the check ------------------------------------------------------------------------------------------------------

class Check:
    """Gathers what is broken."""

    def __init__(self, database, told=(), deeds=(), machine=None, at_rest=True):
        self.database, self.told, self.deeds = database, list(told), list(deeds)
        self.machine, self.at_rest = machine, at_rest
        self.broken = []
        self.runs = {}

    def fault(self, invariant, text):
        assert invariant in LETTERS
        self.broken.append(f"{invariant}: {text}")

    def all(self):
        self.is_whole()
        self.adds_up()
        self.keeps_order()
        self.agrees_with_the_told()
        self.executes_once()
        if self.machine is not None:
            self.leaves_no_process()
            if self.at_rest:
                self.leaves_nothing()
        return self.broken

    def is_whole(self):
        if self.database.faults != ["ok"]:
            self.fault("I10", f"integrity_check: {self.database.faults[:5]}")
        for row in self.database.dangling[:5]:
            self.fault("I10", f"foreign_key_check: {row}")
        if self.database.version != SCHEMA:
            self.fault("I10", f"schema version {self.database.version}, and this checker knows {SCHEMA}")
        if self.database.unchained:
            self.fault("I10", f"events {self.database.unchained[:5]} do not follow from those before them")
        for trigger in {"runs_end_once", "events_keep_what_was_said"} - self.database.triggers:
            self.fault("I2", f"trigger {trigger} is gone")

    def adds_up(self):
        for run, events in self.database.of_runs().items():
            self.run_adds_up(run, events)
        for run in self.database.runs.keys() - self.database.of_runs().keys():
            self.fault("I10", f"run {run} has a row and no events")
        for workflow, events in self.database.of_workflows().items():
            try:
                expected = worker_record(events)
            except Illegal as illegal:
                self.fault(illegal.args[0], f"workflow {workflow}: {illegal.args[1]}")
                continue
            stored = self.database.workers.get(workflow, {})
            for key, value in expected.items():
                if (stored.get(key) or None) != (value or None):
                    self.fault("I10", f"workflow {workflow}: {key} is {stored.get(key)}, its events say {value}")
        for workflow in self.database.workers.keys() - self.database.of_workflows().keys():
            self.fault("I10", f"workflow {workflow} has a worker's record and no events")
        for workflow, definition in self.database.workflows.items():
            last = (self.database.by_subject.get(("system", workflow)) or [None])[-1]
            if last is None or last.payload.get("definition") != definition:
                self.fault("I10", f"workflow {workflow} has definition {definition}, its last event says {last}")
        last = (self.database.by_subject.get(("system", "nerve")) or [None])[-1]
        if (last is not None and last.kind == "paused") != ("pause" in self.database.manager):
            self.fault("I10", f"pause is {self.database.manager.get('pause')}, the last event {last and last.kind}")

    def run_adds_up(self, run, events):
        model = self.runs[run] = Run(run)
        for event in events:
            try:
                model.take(event)
            except Illegal as illegal:
                self.fault(illegal.args[0], f"run {run}: {illegal.args[1]}")
                return
        ends = sum(event.kind == "ended" for event in events)
        if self.at_rest and ends == 0:
            self.fault("I9", f"run {run} is {model.status}")
        row = self.database.runs.get(run)
        if row is None:
            self.fault("I10", f"run {run} has events and no row")
            return
        if row["tail"] != run[::-1]:
            self.fault("I10", f"run {run}: tail is {row['tail']}")
        for column, value in model.row().items():
            stored = row[column]
            if column == "trigger":
                stored = json.loads(stored)
            if stored != value:
                # The end that people see is worth a letter of its own.
                invariant = "I3" if column in ("status", "exit_code", "result") and row["ended_at"] else "I10"
                self.fault(invariant, f"run {run}: {column} is {stored!r}, its events say {value!r}")
        if model.definition is not None and model.definition not in self.database.definitions:
            self.fault("I10", f"run {run}: its definition {model.definition} is not there")

    def keeps_order(self):
        """By number of event: runs of a workflow are started in the order in which they were queued."""
        left = collections.defaultdict(list)
        for run, events in self.database.of_runs().items():
            seqs = {event.kind: event.seq for event in events if event.kind in ("queued", "started")}
            if len(seqs) == 2:
                left[self.runs[run].accepted["workflow"]].append((seqs["started"], seqs["queued"], run))
        for workflow, starts in left.items():
            starts.sort()
            for (_, before, first), (_, after, second) in zip(starts, starts[1:]):
                if after < before:
                    self.fault("I8", f"workflow {workflow}: run {first} left the queue before run {second}, "
                                     f"which was there first")

    def agrees_with_the_told(self):
        keys = {}
        for entry in self.told:
            run, kind = entry["run"], entry["told"]
            row = self.database.runs.get(run)
            if row is None:
                self.fault("I1", f"run {run} is not there, and a client was told: {entry}")
                continue
            if kind == "started":
                if row["workflow"] != entry["workflow"]:
                    self.fault("I11", f"run {run} is of {row['workflow']}, and a client was told: {entry}")
                if entry.get("key") is not None:
                    first = keys.setdefault((entry["workflow"], entry["key"]), run)
                    if first != run:
                        self.fault("I1", f"key {entry['key']} is run {first} and run {run}")
                    if row["key"] != entry["key"]:
                        self.fault("I11", f"run {run} has the key {row['key']}, and a client was told: {entry}")
            elif kind == "exit":
                if row["exit_code"] != entry["code"]:
                    self.fault("I11", f"run {run}: a client was told {entry['code']}, the database says "
                                      f"{row['exit_code']} ({row['status']})")
            elif kind == "kill-accepted":
                if (row["status"] != "killed") if row["ended_at"] else not row["killing"]:
                    self.fault("I7", f"run {run} is {row['status']}, and a kill of it was accepted")
            elif kind == "kill-refused":
                if not row["ended_at"] or row["status"] == "killed":
                    self.fault("I7", f"run {run} is {row['status']}, and a kill of it was refused since it had ended")
            elif kind == "abort-accepted":
                events = [event.kind for event in self.database.events(run)]
                if "abort-requested" not in events:
                    self.fault("I7", f"run {run} knows of no abort, and one was accepted")
                elif row["ended_at"] and row["status"] not in ("aborted", "killed"):
                    self.fault("I7", f"run {run} is {row['status']}, and an abort of it was accepted")
            elif kind == "seen":
                if row["rounds"] < entry["rounds"]:
                    self.fault("I6", f"run {run} has {row['rounds']} rounds, and a client saw {entry['rounds']}")
                if entry["status"] not in (QUEUED, STARTED) and row["status"] != entry["status"]:
                    self.fault("I2", f"run {run} is {row['status']}, and a client saw it {entry['status']}")
                if entry["status"] == STARTED and row["status"] == QUEUED:
                    self.fault("I11", f"run {run} is queued again")
            else:
                raise ValueError(f"a client was told something unknown: {entry}")

    def executes_once(self):
        """What roles did, against what was acknowledged: a round is executed again only when its worker was lost, and
        never after it was acknowledged."""
        done = collections.Counter(self.deeds)
        for (run, number, attempt, what), count in done.items():
            if count > 1:
                self.fault("I6", f"run {run}: round {number}, attempt {attempt}: {what} {count} times")
        for run, number, attempt, what in done:
            model = self.runs.get(run)
            if model is None:
                self.fault("I1", f"run {run} is not there, and a role did its round {number}")
                continue
            acknowledged, _ = model.acknowledged.get(number, (None, None))
            if acknowledged is not None and attempt > acknowledged:
                self.fault("I6", f"run {run}: round {number} was acknowledged in attempt {acknowledged}, and "
                                 f"executed again in attempt {attempt}")
            if attempt > model.attempt:
                self.fault("I6", f"run {run}: attempt {attempt} was executed, and only {model.attempt} dispatched")
            if number > model.rounds + 1:
                self.fault("I6", f"run {run}: round {number} was executed, and only {model.rounds} acknowledged")
            before, _ = model.acknowledged.get(number - 1, (0, None))
            if attempt < before:
                self.fault("I6", f"run {run}: round {number} was executed in attempt {attempt}, and the one before "
                                 f"it acknowledged in attempt {before}")
        wrote = {run for run, *_ in done}
        for run in wrote & self.runs.keys():
            for number, (attempt, went_well) in self.runs[run].acknowledged.items():
                # One that failed may have been killed before it did anything.
                for what in ("begin", "end") if went_well else ():
                    if (run, number, attempt, what) not in done:
                        self.fault("I6", f"run {run}: round {number} was acknowledged in attempt {attempt}, and "
                                         f"there was no {what} of it")

    def leaves_no_process(self):
        ended = {run for run, row in self.database.runs.items() if row["ended_at"] is not None}
        for run, has_processes in self.machine.cgroups.items():
            if has_processes and (run in ended or run not in self.database.runs):
                self.fault("I4", f"run {run} has processes, and has ended or never was")
        for pid, run in self.machine.strays.items():
            if run in ended or run not in self.database.runs:
                self.fault("I4", f"process {pid} carries the id of run {run}, which has ended or never was")
        for unit, pids in self.machine.workers.items():
            if len(pids) > 1:
                self.fault("I5", f"{unit} has several workers: {pids}")
            state, main = self.machine.units.get(unit, ("absent", 0))
            if self.at_rest and main not in pids:
                self.fault("I5", f"{unit} is {state} with process {main}, and has the workers {pids}")

    def leaves_nothing(self):
        for run in self.machine.cgroups:
            self.fault("I12", f"the cgroup of run {run} is left")
        for path in self.machine.left:
            self.fault("I12", f"{path} is left")
        for unit, (state, _) in self.machine.units.items():
            if state not in ("active", "failed"):
                self.fault("I12", f"{unit} is {state} for ever")
            workflow = unit.partition("@")[2].removesuffix(".service")
            if not any(row["workflow"] == workflow for row in self.database.runs.values()):
                self.fault("I12", f"{unit} is there, and {workflow} never had a run")


def check(database=STATE / "nerve.db", told=None, deeds=None, machine=None, at_rest=True):
    """What is broken, a line each; `told` and `deeds` are files."""
    try:
        found = Database(database)
    except sqlite3.DatabaseError as error:
        return [f"I10: {database} cannot be read: {error}"]
    told, deeds = Told(told).read() if told else (), read_deeds(deeds) if deeds else ()
    return Check(found, told, deeds, machine, at_rest).all()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="; ".join(f"{letter}: {text}" for letter, text in LETTERS.items()))
    parser.add_argument("--database", default=STATE / "nerve.db", metavar="FILE", help="the database")
    parser.add_argument("--told", metavar="FILE", help="what clients were told")
    parser.add_argument("--deeds", metavar="FILE", help="what roles did")
    parser.add_argument("--running", action="store_true", help="runs may be open")
    parser.add_argument("--no-machine", action="store_true", help="look at the files only")
    options = parser.parse_args()
    broken = check(options.database, options.told, options.deeds,
                   None if options.no_machine else Machine.look(), not options.running)
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
