"""A workflow that a command routes: it is asked before each round, once; what it says is on record and holds."""

import nervebox
from nervebox import GATED, SCRATCH, WRITES, GatedCase, ctl, row, start

# Reads the thread, notes that it was asked, and answers what ANSWERS has for the number of rounds that are done.
ASKED = f"""
import json, os, sys, time
thread = json.load(sys.stdin)
done = len(thread) - 1
assert [one["round"] for one in thread] == list(range(done + 1)) and thread[0]["role"] == "__start__"
with open(f"{SCRATCH}/{{os.environ['NERVE_RUN_ID']}}.asked", "a") as asked:
    print(done, file=asked)
print(ANSWERS[done] if done < len(ANSWERS) else ANSWERS[-1])
"""


def moderated(script, role="echo said $NERVE_ROUND", moderator={}, **keys):
    return {"roles": {name: {"exec": ["/bin/sh", "-c", role]} for name in ("r1", "r2")},
            "moderator": {"exec": ["/usr/bin/python3", "-c", script], **moderator}, "worker": WRITES, **keys}


def answers(*answers):
    return ASKED.replace("ANSWERS", repr(answers))


class Moderator(GatedCase):
    definitions = {
        "go-through": moderated(answers("r1", "r2", "$END"), GATED),
        "go-round": moderated(answers("r1"), max_rounds=3),
        "after-an-error": moderated(answers("r1", "r2", "$END"), "[ $NERVE_ROLE = r2 ] || exit 9"),
        "answer-wrong": moderated(answers("r1", "nobody")),
        "answer-at-length": moderated("print('r' * 2000)"),
        "answer-nothing": moderated("pass"),
        "fail": moderated("import sys; sys.exit('no idea')"),
        "hang": moderated("import time; time.sleep(1000)", moderator={"timeout": "300ms"}),
        "hang-on": moderated("import time; time.sleep(1000)"),
    }

    def asked(self, run):
        return (SCRATCH / f"{run}.asked").read_text().split()

    def test_it_routes(self):
        run = start("go-through")
        self.completes(run, 2)
        self.assertEqual(self.asked(run), ["0", "1", "2"])
        routed = [event["payload"] for event in nervebox.run_json(run)["events"] if event["type"] == "routed"]
        self.assertEqual([(one["round"], one["target"]) for one in routed], [(1, "r1"), (2, "r2"), (3, "$END")])

    def test_max_rounds_holds(self):
        run, status = start("go-round", wait=True)
        self.assertEqual((status, row(run)["result"], row(run)["rounds"]), (2, "max-rounds", 3))

    def test_it_may_go_on_after_an_error(self):
        run, status = start("after-an-error", wait=True)
        self.assertEqual((status, row(run)["rounds"]), (0, 2))

    def bad(self, workflow, rounds, *words):
        run, status = start(workflow, wait=True)
        self.assertEqual((status, row(run)["result"], row(run)["rounds"]), (1, "bad-route", rounds))
        detail = nervebox.run_json(run)["events"][-1]["payload"]["detail"]
        for word in words:
            self.assertIn(word, detail)

    def test_an_answer_that_is_no_role(self):
        self.bad("answer-wrong", 1, '"nobody"', "r1, r2", "$END")

    def test_a_long_answer_is_cut(self):
        self.bad("answer-at-length", 0, '"' + "r" * 200 + '"', "r1, r2", "$END")

    def test_no_answer(self):
        self.bad("answer-nothing", 0, 'answered ""')

    def test_a_failure(self):
        self.bad("fail", 0, "exit-code:1", "no idea")

    def test_a_time_out(self):
        self.bad("hang", 0, "role-timeout")

    def test_a_kill_while_it_is_asked(self):
        run = start("hang-on")
        pids = nervebox.processes(run)
        ctl("workflow", "kill", "--grace", "1s", run)
        self.assertEqual(row(run)["exitCode"], 137)
        nervebox.assert_gone(run, pids)

    def test_a_resume_does_not_ask_again(self):
        run = start("go-through")
        self.begun(run, 1)
        nervebox.kill_process(nervebox.worker_pid("go-through"))
        self.begun(run, 1, attempt=2)
        self.go(run, 1)
        self.begun(run, 2, attempt=2)
        nervebox.restart_nerve()
        self.completes(run, 2)
        self.assertEqual(self.asked(run), ["0", "1", "2"])
