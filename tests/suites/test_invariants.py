#!/usr/bin/env python3
"""The checker is trusted because it was seen to fail: each fault planted here is found, and a sound database has none.

It needs no machine: `tests/suites/test_invariants.py`."""

import json
import pathlib
import re
import sqlite3
import sys
import tempfile
import unittest

import invariants
from invariants import Machine

SCHEMA = pathlib.Path(__file__).resolve().parents[2] / "src/store/schema.rs"


def run_id(number):
    return f"0193{number:028x}"


# Finished after its worker died once; killed; dropped; aborted in the queue; another that finished, with a key.
FINISHED, KILLED, DROPPED, ABORTED, KEYED = map(run_id, range(1, 6))
UNKNOWN = run_id(99)
BY = {"uid": 0, "pid": 7, "comm": "nervectl"}


def migrations():
    """The schema that nerved makes, from its source."""
    text = re.search(r"const MIGRATIONS[^=]*= \[(.*?)\n\];", SCHEMA.read_text(), re.DOTALL)[1]
    return re.findall(r'"((?:[^"\\]|\\.)*)"', re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))


def version():
    """Its number."""
    return int(re.search(r"const VERSION: u32 = (\d+);", SCHEMA.read_text())[1])


def queued(workflow="fix-test", **more):
    return "queued", {"workflow": workflow, "prompt": "do it", "maxRounds": None, "dryRun": False,
                      "trigger": {"type": "client", "uid": 0}, **more}


def started():
    return "started", {"definition": "d1", "maxRounds": 50, "since": {"bootId": "b", "bootUs": 1}}


def dispatched(attempt):
    place = {"invocation": f"i{attempt}", "cgroup": "/nerve.slice/nerve-wf.slice/nerve-wf@fix-test.service"}
    return "dispatched", {"place": place, "attempt": attempt, "bootId": "b"}


def said(number, status="ok"):
    return "thread-workflow-message", {"round": number, "message": {
        "role": "main", "content": "said", "meta": {"status": status}, "timestamp": 1}}


def failed(number, attempt):
    return "attempt-failed", {**said(number, "error")[1], "attempt": attempt, "delayUs": 1, "since": {"bootId": "b", "bootUs": 2}}


def routed(number, target="main"):
    return "routed", {"round": number, "target": target}


def lost(attempt):
    return "worker-lost", {"invocation": f"i{attempt}", "attempt": attempt, "cause": "signal", "signal": "SIGKILL"}


def kill(reason="why", **more):
    return "kill-requested", {"reason": reason, "graceUs": 5_000_000, "by": BY, **more}


def abort(reason="enough"):
    return "abort-requested", {"reason": reason, "by": BY}


def ended(result):
    return "ended", {"result": result}


LIVES = [
    (FINISHED, [queued(), started(), dispatched(1), routed(1), said(1), failed(2, 1), lost(1), dispatched(2), routed(2),
                failed(2, 2), said(2), ended("success")]),
    (KILLED, [queued(), started(), dispatched(1), said(1, "error"), kill(), ended("killed")]),
    (DROPPED, [queued(), ended("queue-full")]),
    (ABORTED, [queued(), abort(), ended("aborted")]),
    (KEYED, [queued(key="k1"), started(), dispatched(1), said(1), ended("success")]),
]
ROWS = {
    FINISHED: {"status": "completed", "exit_code": 0, "result": "success", "rounds": 2},
    KILLED: {"status": "killed", "exit_code": 137, "result": "killed", "reason": "why", "rounds": 1},
    DROPPED: {"status": "dropped", "exit_code": 75, "result": "queue-full"},
    ABORTED: {"status": "aborted", "exit_code": 143, "result": "aborted", "reason": "enough"},
    KEYED: {"status": "completed", "exit_code": 0, "result": "success", "rounds": 1, "key": "k1"},
}
DEEDS = [(FINISHED, 1, 1, "begin"), (FINISHED, 1, 1, "end"), (FINISHED, 2, 1, "begin"), (FINISHED, 2, 2, "begin"),
         (FINISHED, 2, 2, "end"), (KILLED, 1, 1, "begin"), (KILLED, 2, 1, "begin"), (KEYED, 1, 1, "begin"),
         (KEYED, 1, 1, "end")]


class Sound(unittest.TestCase):
    """A sound database, and ways to damage it."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = pathlib.Path(directory.name, "nerve.db")
        self.database = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(self.database.close)
        self.database.execute("PRAGMA synchronous = OFF")
        for migration in migrations():
            self.database.executescript(migration)
        self.database.execute(f"PRAGMA user_version = {version()}")
        self.database.execute("INSERT INTO definitions VALUES ('d1', x'00')")
        self.triggers = self.database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        self.told = invariants.Told(pathlib.Path(directory.name, "told"))
        self.deeds = list(DEEDS)
        self.machine = Machine()
        for run, life in LIVES:
            for event in life:
                self.append(run, *event)
            self.add_row(run, life, **ROWS[run])
        self.append("fix-test", "worker-died", {"invocation": "i1", "cause": "signal", "signal": "SIGKILL",
                                                "since": {"bootId": "b", "bootUs": 9}})
        self.sql("INSERT INTO workers VALUES ('fix-test', ?)", json.dumps(
            {"deaths": [["i1", {"bootId": "b", "bootUs": 9}]], "blocked": None, "stopped": None, "draining": None}))
        self.append("nerve", "paused", {"reason": "lunch", "by": BY}, source="system")
        self.append("nerve", "resumed", {"by": BY}, source="system")
        self.append("fix-test", "defined", {"definition": "d1"}, source="system")
        self.sql("INSERT INTO workflows VALUES ('fix-test', 'd1')")
        self.chain()

    def add_row(self, run, life, **columns):
        kinds = [kind for kind, _ in life]
        has_started = "started" in kinds
        columns = {
            "run": run, "tail": run[::-1], "workflow": life[0][1]["workflow"], "killing": 0, "rounds": 0,
            "max_rounds": 50 if has_started else None, "dry_run": 0, "trigger": '{"uid": 0, "type": "client"}',
            "definition": "d1" if has_started else None, "created_at": 1, "started_at": 1 if has_started else None,
            "ended_at": 1 if kinds[-1] == "ended" else None, **columns}
        self.sql(f"INSERT INTO workflow_runs ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
                 *columns.values())

    def append(self, subject, kind, payload, source="workflow"):
        self.sql("INSERT INTO events (source, type, ref, payload, at, hash) VALUES (?, ?, ?, ?, 1, x'')", source, kind,
                 subject, json.dumps({"type": kind, **payload}))

    def chain(self):
        before = bytes(32)
        for row in self.database.execute("SELECT seq, source, type, ref, payload, blob, at FROM events ORDER BY seq").fetchall():
            row = dict(zip(("seq", "source", "type", "ref", "payload", "blob", "at"), row))
            before = invariants.chained(before, row)
            self.sql("UPDATE events SET hash = ? WHERE seq = ?", before, row["seq"])

    def sql(self, statement, *values):
        """Changes the database, triggers or not."""
        for name, _ in self.triggers:
            self.database.execute(f"DROP TRIGGER IF EXISTS {name}")
        self.database.execute(statement, values)
        for _, text in self.triggers:
            self.database.execute(text)

    def drop_event(self, run, kind, nth=0):
        seqs = self.database.execute("SELECT seq FROM events WHERE ref = ? AND type = ? ORDER BY seq", (run, kind))
        self.sql("DELETE FROM events WHERE seq = ?", seqs.fetchall()[nth][0])

    def change_event(self, run, kind, nth=0, **changes):
        rows = self.database.execute("SELECT seq, payload FROM events WHERE ref = ? AND type = ? ORDER BY seq", (run, kind))
        seq, payload = rows.fetchall()[nth]
        self.sql("UPDATE events SET payload = ? WHERE seq = ?", json.dumps(json.loads(payload) | changes), seq)

    def insert_before_end(self, run, kind, payload):
        """An event just before the run's last."""
        seqs = [seq for seq, in self.database.execute("SELECT seq FROM events ORDER BY seq DESC")]
        end, = self.database.execute("SELECT max(seq) FROM events WHERE ref = ?", (run,)).fetchone()
        for seq in seqs:
            if seq >= end:
                self.sql("UPDATE events SET seq = ? WHERE seq = ?", seq + 1, seq)
        self.sql("INSERT INTO events VALUES (?, 'workflow', ?, ?, ?, NULL, 1, x'')", end, kind, run,
                 json.dumps({"type": kind, **payload}))

    def set(self, run, **columns):
        for column, value in columns.items():
            self.sql(f"UPDATE workflow_runs SET {column} = ? WHERE run = ?", value, run)

    def broken(self, at_rest=True):
        deeds = self.path.with_name("deeds")
        deeds.write_text("".join(" ".join(map(str, deed)) + "\n" for deed in self.deeds))
        return invariants.check(self.path, self.told.path, deeds, self.machine, at_rest)

    def finds(self, invariant, words=""):
        broken = self.broken()
        self.assertTrue([line for line in broken if line.startswith(f"{invariant}: ") and words in line],
                        f"no {invariant} with {words!r} in {broken}")

    def test_nothing_is_broken(self):
        self.told.started(FINISHED, "fix-test")
        self.told.started(KEYED, "fix-test", "k1")
        self.told.started(KEYED, "fix-test", "k1")
        self.told.exited(FINISHED, 0)
        self.told.exited(KILLED, 137)
        self.told.exited(DROPPED, 75)
        self.told.kill_accepted(KILLED)
        self.told.kill_refused(FINISHED)
        self.told.abort_accepted(ABORTED)
        self.told.seen(FINISHED, "started", 1)
        self.told.seen(FINISHED, "completed", 2)
        self.told.seen(KILLED, "queued")
        self.machine = Machine(workers={"nerve-wf@fix-test.service": [7]},
                               units={"nerve-wf@fix-test.service": ("active", 7)})
        self.assertEqual(self.broken(), [])

    def test_runs_may_be_open_while_it_runs(self):
        life = [queued(), started(), dispatched(1), said(1), kill()]
        for event in life:
            self.append(UNKNOWN, *event)
        self.add_row(UNKNOWN, life, status="started", killing=1, rounds=1, reason="why")
        self.told.kill_accepted(UNKNOWN)
        self.machine.cgroups[UNKNOWN] = True
        self.machine.strays[8] = UNKNOWN
        self.chain()
        self.assertEqual(self.broken(at_rest=False), [])
        self.finds("I9", UNKNOWN)
        self.finds("I12", UNKNOWN)


class Faults(Sound):
    """Each of these is found."""

    test_nothing_is_broken = test_runs_may_be_open_while_it_runs = None

    def test_a_start_that_was_acknowledged_is_gone(self):
        self.told.started(UNKNOWN, "fix-test")
        self.finds("I1", UNKNOWN)

    def test_a_key_is_two_runs(self):
        self.told.started(KEYED, "fix-test", "k1")
        self.told.started(FINISHED, "fix-test", "k1")
        self.finds("I1", "key k1")

    def test_a_role_ran_of_a_run_that_is_not_there(self):
        self.deeds.append((UNKNOWN, 1, 1, "begin"))
        self.finds("I1", UNKNOWN)

    def test_it_ended_twice(self):
        self.append(FINISHED, *ended("success"))
        self.finds("I2", "after its end")

    def test_something_happened_after_the_end(self):
        self.append(DROPPED, *started())
        self.finds("I2", "after its end")

    def test_the_trigger_is_gone(self):
        self.database.execute("DROP TRIGGER runs_end_once")
        self.finds("I2", "runs_end_once")

    def test_a_terminal_status_changed(self):
        self.told.seen(FINISHED, "failed", 2)
        self.finds("I2", "a client saw it failed")

    def test_the_exit_code_is_not_of_the_table(self):
        self.set(FINISHED, exit_code=3)
        self.finds("I3", "exit_code")

    def test_the_status_is_not_of_the_result(self):
        self.set(FINISHED, status="failed")
        self.finds("I3", "status")

    def test_the_result_is_none(self):
        self.change_event(FINISHED, "ended", result="so-so")
        self.finds("I3", "so-so")

    def test_a_run_that_was_started_is_dropped(self):
        self.change_event(FINISHED, "ended", result="queue-full")
        self.set(FINISHED, status="dropped", exit_code=75, result="queue-full")
        self.finds("I3", "queue-full while started")

    def test_a_process_is_left(self):
        self.machine.cgroups[FINISHED] = True
        self.finds("I4", FINISHED)

    def test_a_process_escaped(self):
        self.machine.strays[4711] = KILLED
        self.finds("I4", "4711")

    def test_a_process_of_no_run(self):
        self.machine.cgroups[UNKNOWN] = True
        self.finds("I4", UNKNOWN)

    def test_two_workers(self):
        self.machine = Machine(workers={"nerve-wf@fix-test.service": [7, 8]},
                               units={"nerve-wf@fix-test.service": ("active", 7)})
        self.finds("I5", "several")

    def test_a_worker_that_is_not_the_units(self):
        self.machine = Machine(workers={"nerve-wf@fix-test.service": [7]})
        self.finds("I5", "absent")

    def test_a_round_is_missing(self):
        self.drop_event(FINISHED, "thread-workflow-message")
        self.finds("I6", "round 2 after round 0")

    def test_a_round_is_there_twice(self):
        self.insert_before_end(FINISHED, *said(2))
        self.finds("I6", "round 2 after round 2")

    def test_a_failed_attempt_is_missing(self):
        self.change_event(FINISHED, "attempt-failed", 1, attempt=3)
        self.finds("I6", "attempt 3 of a round after attempt 1")

    def test_a_round_is_routed_twice(self):
        self.insert_before_end(FINISHED, *routed(3))
        self.insert_before_end(FINISHED, *routed(3, "$END"))
        self.finds("I6", "round 3 is routed twice")

    def test_a_round_of_no_worker(self):
        self.drop_event(FINISHED, "dispatched", 1)
        self.finds("I6", "no worker had it")

    def test_an_attempt_is_missing(self):
        self.change_event(FINISHED, "dispatched", 1, attempt=3)
        self.finds("I6", "attempt 3 after attempt 1")

    def test_a_loss_of_another_attempt(self):
        self.change_event(FINISHED, "worker-lost", attempt=2)
        self.finds("I6", "attempt 2 was lost")

    def test_a_round_disappeared_that_was_seen(self):
        self.told.seen(FINISHED, "started", 3)
        self.finds("I6", "a client saw 3")

    def test_an_acknowledged_round_was_executed_again(self):
        self.deeds.append((FINISHED, 1, 2, "begin"))
        self.finds("I6", "executed again in attempt 2")

    def test_a_round_was_executed_twice_in_one_attempt(self):
        self.deeds.append((FINISHED, 2, 2, "begin"))
        self.finds("I6", "begin 2 times")

    def test_a_round_was_executed_before_the_one_before_was_acknowledged(self):
        self.deeds.append((KILLED, 3, 1, "begin"))
        self.finds("I6", "round 3 was executed, and only 1")

    def test_an_old_worker_executed_a_round(self):
        self.insert_before_end(FINISHED, *said(3))
        self.set(FINISHED, rounds=3)
        self.deeds += [(FINISHED, 3, 2, "begin"), (FINISHED, 3, 2, "end"), (FINISHED, 3, 1, "begin")]
        self.finds("I6", "round 3 was executed in attempt 1")

    def test_an_attempt_was_executed_that_was_not_dispatched(self):
        self.deeds.append((KILLED, 2, 2, "begin"))
        self.finds("I6", "only 1 dispatched")

    def test_a_round_was_acknowledged_that_nobody_executed(self):
        self.deeds.remove((FINISHED, 2, 2, "end"))
        self.finds("I6", "no end of it")

    def test_killed_and_nobody_asked(self):
        self.drop_event(KILLED, "kill-requested")
        self.finds("I7", "asked for is None")

    def test_an_exit_of_137_that_nobody_asked_for(self):
        self.change_event(FINISHED, "ended", result="killed")
        self.set(FINISHED, status="killed", exit_code=137, result="killed")
        self.finds("I7", "asked for is None")

    def test_aborted_and_nobody_asked(self):
        self.drop_event(ABORTED, "abort-requested")
        self.finds("I7", "asked for is None")

    def test_asked_to_die_and_completed(self):
        self.change_event(KILLED, "ended", result="success")
        self.set(KILLED, status="completed", exit_code=0, result="success")
        self.finds("I7", "asked for is killed")

    def test_a_round_after_the_kill(self):
        self.insert_before_end(KILLED, *said(2))
        self.finds("I7", "after a kill")

    def test_dispatched_after_the_kill(self):
        self.insert_before_end(KILLED, *dispatched(2))
        self.finds("I7", "dispatched although")

    def test_a_kill_was_accepted_and_forgotten(self):
        self.told.kill_accepted(FINISHED)
        self.finds("I7", "a kill of it was accepted")

    def test_a_kill_was_refused_and_happened(self):
        self.told.kill_refused(KILLED)
        self.finds("I7", "refused")

    def test_an_abort_was_accepted_and_forgotten(self):
        self.told.abort_accepted(FINISHED)
        self.finds("I7", "knows of no abort")

    def test_one_jumped_the_queue(self):
        run = run_id(6)
        life = [queued(), started(), dispatched(1), ended("exec-failed")]
        for event in life:
            self.append(run, *event)
        self.add_row(run, life, status="failed", exit_code=1, result="exec-failed")
        self.chain()
        self.assertEqual(self.broken(), [])
        # The one that was queued first is started last.
        self.sql("UPDATE events SET seq = seq + 1000 WHERE ref = ? AND type <> 'queued'", FINISHED)
        self.finds("I8", f"before run {FINISHED}")

    def test_a_run_is_open(self):
        self.drop_event(KEYED, "ended")
        self.set(KEYED, status="started", exit_code=None, result=None, ended_at=None)
        self.finds("I9", KEYED)

    def test_a_row_is_not_what_the_events_say(self):
        for column, value in (("rounds", 7), ("reason", "other"), ("killing", 1), ("aborting", 1), ("max_rounds", 3),
                              ("started_at", 9), ("created_at", 9), ("workflow", "other"), ("key", "k9"),
                              ("trigger", '{"type": "timer"}'), ("dry_run", 1), ("tail", "x"), ("definition", None)):
            with self.subTest(column):
                before, = self.database.execute(f"SELECT {column} FROM workflow_runs WHERE run = ?", (KILLED,)).fetchone()
                self.set(KILLED, **{column: value})
                self.finds("I10", column)
                self.set(KILLED, **{column: before})
        self.assertEqual(self.broken(), [])

    def test_a_row_without_events(self):
        self.sql("DELETE FROM events WHERE ref = ?", DROPPED)
        self.finds("I10", "no events")

    def test_events_without_a_row(self):
        self.sql("DELETE FROM workflow_runs WHERE run = ?", DROPPED)
        self.finds("I10", "no row")

    def test_the_first_event_is_missing(self):
        self.drop_event(FINISHED, "queued")
        self.finds("I10", "when it was None")

    def test_an_event_that_is_another_inside(self):
        self.change_event(KILLED, "kill-requested", type="abort-requested")
        self.finds("I10", "says abort-requested")

    def test_a_definition_is_gone(self):
        self.database.execute("PRAGMA foreign_keys = OFF")
        self.sql("DELETE FROM definitions")
        self.finds("I10", "foreign_key_check")
        self.finds("I10", "is not there")

    def test_a_death_of_a_worker_was_forgotten(self):
        self.sql("UPDATE workers SET record = '{\"deaths\": []}'")
        self.finds("I10", "deaths")

    def test_a_block_was_forgotten(self):
        self.append("fix-test", "workflow-blocked", {"detail": "six deaths"})
        self.finds("I10", "blocked")

    def test_a_stop_that_nobody_wanted(self):
        self.sql("UPDATE workers SET record = json_set(record, '$.stopped', 5)")
        self.finds("I10", "stopped")

    def test_the_pause_was_forgotten(self):
        self.append("nerve", "paused", {"reason": None, "by": BY}, source="system")
        self.finds("I10", "pause")

    def test_history_was_changed(self):
        self.change_event(FINISHED, "queued", prompt="do something else")
        self.finds("I10", "do not follow")

    def test_another_definition_is_in_force(self):
        self.sql("INSERT INTO definitions VALUES ('d2', x'01')")
        self.sql("UPDATE workflows SET definition = 'd2'")
        self.finds("I10", "definition d2")

    def test_the_schema_is_unknown(self):
        self.database.execute("PRAGMA user_version = 77")
        self.finds("I10", "77")

    def test_an_index_is_damaged(self):
        self.database.execute("PRAGMA writable_schema = ON")
        self.database.execute("UPDATE sqlite_master SET sql = replace(sql, 'IS NULL', 'IS NOT NULL') "
                              "WHERE name = 'runs_open'")
        self.finds("I10", "integrity_check")

    def test_the_file_is_damaged(self):
        self.database.close()
        with open(self.path, "r+b") as file:
            file.write(b"not a database")
        self.finds("I10", "cannot be read")

    def test_a_client_was_told_another_code(self):
        self.told.exited(KILLED, 0)
        self.finds("I11", "told 0")

    def test_a_client_was_told_a_code_of_a_run_that_is_open(self):
        self.test_a_run_is_open()
        self.told.exited(KEYED, 0)
        self.finds("I11", "told 0")

    def test_a_client_was_told_another_workflow(self):
        self.told.started(FINISHED, "other")
        self.finds("I11", "other")

    def test_a_client_saw_it_started_and_it_is_queued(self):
        self.append(UNKNOWN, *queued())
        self.add_row(UNKNOWN, [queued()], status="queued")
        self.told.seen(UNKNOWN, "started")
        self.finds("I11", "queued again")

    def test_things_are_left_over(self):
        self.machine = Machine(cgroups={FINISHED: False}, left=["/var/lib/nerve/nerve.db.tmp"], units={
            "nerve-wf@fix-test.service": ("deactivating", 0), "nerve-wf@other.service": ("failed", 0)})
        for words in (f"cgroup of run {FINISHED}", "nerve.db.tmp", "deactivating", "other never had a run"):
            self.finds("I12", words)

    def test_every_invariant_has_a_fault_that_breaks_it(self):
        source = pathlib.Path(__file__).read_text()
        self.assertEqual({letter for letter in re.findall(r'finds\("(I\d+)"', source)}, set(invariants.LETTERS))


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    unittest.main()
