"""Roles: their environment, exit codes and silence, agents, replies with a meta, corrections, dry runs. How an LLM can
fail is in test_llm, how retries survive restarts in test_retries."""

import hashlib
import json
import pathlib

import nervebox
import openai
from nervebox import SETTINGS, ctl, ended, replace, start, thread

CREDSTORE = pathlib.Path("/etc/credstore")
SECRET = "canary-7f3a9b20"


def one(**role):
    """A workflow of one role, whose every status ends it."""
    statuses = role.get("meta", {}).get("properties", {}).get("status", {}).get("enum", ["ok"])
    return {"roles": {"main": role}, "graph": {"$START": "main", "main": {status: "$END" for status in statuses}}}


def shell(script, **keys):
    return one(exec=["/bin/sh", "-c", script], **keys)


class RoleCase(nervebox.Case):
    def said(self, workflow, *options, prompt=None, result=None):
        """The one round of a run of it, which ended with this result; `success` when none is named."""
        run = ended(start(workflow, prompt, *options))
        self.run_id = run["run"]
        said = thread(self.run_id)[-1]
        self.assertEqual(run["result"], result or "success", said)
        if result:
            self.assertEqual((said["meta"]["status"], said["meta"]["result"], run["exitCode"]), ("error", result, 1))
        nervebox.assert_gone(self.run_id)
        return said

    def failed_attempts(self):
        return nervebox.count_events(self.run_id, "attempt-failed")


class Commands(RoleCase):
    definitions = {
        "have-variables": shell("echo $GREETING $HOME; echo key $TOKEN; echo key $TOKEN >&2",
                                env={"GREETING": "hello you", "HOME": "/elsewhere", "TOKEN": {"credential": "token"}}),
        "hash-secret": shell('printf %s "$TOKEN" | sha256sum', env={"TOKEN": {"credential": "token"}}),
        "split-secret": shell('printf "%8180s${TOKEN}tail" >&2; printf "a%s" "${TOKEN%????}" >&2; echo ${TOKEN#????} >&2',
                              env={"TOKEN": {"credential": "token"}}),
        "lack-credential": shell("true", env={"TOKEN": {"credential": "nowhere"}}),
        "exit-three": shell("echo three; exit 3", ok_codes=[0, 3]),
        "exit-zero": shell("echo zero", ok_codes=[3]),
        "fall-silent": shell("echo begun; trap 'echo told; exit 0' TERM; while :; do sleep 1000 & wait; done", stall="1s"),
        "talk-on": shell("for i in 1 2 3 4 5 6; do echo . >&2; sleep 0.3; done; echo done", stall="1s"),
        "try-again": shell("echo try $NERVE_RETRY; exit $((75 * ($NERVE_RETRY < 2)))",
                           retry={"attempts": 3, "backoff": "10ms", "on": ["exit-code:75"]}),
        "try-not-again": shell("exit 74", retry={"attempts": 3, "backoff": "10ms", "on": ["exit-code:75"]}),
        "try-in-vain": shell("exit 75", retry={"attempts": 3, "backoff": "10ms"}),
    }

    @classmethod
    def setUpClass(cls):
        CREDSTORE.mkdir(mode=0o700, exist_ok=True)
        replace(CREDSTORE / "token", SECRET + "\n", mode=0o600)
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        (CREDSTORE / "token").unlink()
        super().tearDownClass()

    def test_variables_and_credentials_are_in_the_environment_and_credentials_nowhere_else(self):
        said = self.said("have-variables")
        self.assertEqual(said["content"], "hello you /elsewhere\nkey [redacted]")
        self.assertEqual(said["meta"]["stderr"], "key [redacted]\n")
        lines = [entry["MESSAGE"] for entry in nervebox.journal(f"NERVE_RUN_ID={self.run_id}", "NERVE_ROLE=main")]
        self.assertEqual(lines, ["key [redacted]"])

    def test_a_credential_is_handed_over_without_its_last_newline(self):
        said = self.said("hash-secret")
        self.assertEqual(said["content"].split()[0], hashlib.sha256(SECRET.encode()).hexdigest())

    def test_a_secret_across_two_reads_is_found(self):
        stderr = self.said("split-secret")["meta"]["stderr"]
        self.assertIn("[redacted]tail", stderr)
        self.assertNotIn(SECRET, stderr)

    def test_a_credential_that_is_not_there_fails_the_round_and_says_where_to_put_it(self):
        said = self.said("lack-credential", result="exec-failed")
        self.assertIn("/etc/credstore/nowhere", said["meta"]["stderr"])

    def test_codes_that_are_ok(self):
        said = self.said("exit-three")
        self.assertEqual((said["content"], said["meta"]["status"], said["meta"]["exitCode"]), ("three", "ok", 3))
        self.assertEqual(self.said("exit-zero", result="exit-code:0")["content"], "zero")

    def test_a_role_that_falls_silent_is_stopped_and_what_it_said_is_kept(self):
        said = self.said("fall-silent", result="role-stalled")
        self.assertEqual(said["content"], "begun\ntold")

    def test_a_role_that_talks_is_not(self):
        self.assertEqual(self.said("talk-on")["content"], "done")

    def test_it_is_tried_again_for_what_it_names(self):
        said = self.said("try-again")
        self.assertEqual((said["content"], said["meta"]["attempts"], self.failed_attempts()), ("try 2", 3, 2))
        self.assertNotIn("attempts", self.said("try-not-again", result="exit-code:74")["meta"])
        self.assertEqual(self.failed_attempts(), 0)

    def test_a_round_that_fails_to_the_last_fails(self):
        self.assertEqual(self.said("try-in-vain", result="exit-code:75")["meta"]["attempts"], 3)
        self.assertEqual(self.failed_attempts(), 2)


SCHEMA = {"type": "object", "properties": {"status": {"enum": ["done", "again"]}, "count": {"type": "integer"}},
          "required": ["status", "count"]}


def replies(*texts, **keys):
    """Says these texts, one in each attempt, and what it read."""
    cases = "".join(f"{number}) cat <<'END'\n{text}\nEND\n;;\n" for number, text in enumerate(texts))
    return shell(f"cat >&2; case $NERVE_RETRY in\n{cases}esac", meta=SCHEMA, **keys)


class Metas(RoleCase):
    WRONG = "---\nstatus: done\ncount: many\n---\nwrong"
    definitions = {
        "say-frontmatter": replies("---\nstatus: done\ncount: 3\nextra: yes\n---\n\nthe text"),
        "say-object": replies('{"status": "again", "count": 4}'),
        "say-fenced": replies('before\n```json\n{"status": "done", "count": 5}\n```\nafter'),
        "say-right-later": replies("nothing of the kind", WRONG, "---\nstatus: done\ncount: 6\n---\nright", prompt="Count."),
        "say-never": replies("first", "second", WRONG),
        "say-never-twice": replies("1", "2", "3", "4", "5", "---\nstatus: done\ncount: 6\n---\nright",
                                   retry={"attempts": 2, "backoff": "10ms", "on": ["bad-reply"]}),
        "say-error": replies("", "---\nstatus: done\ncount: 6\n---\nright"),
        "route-by-meta": {
            "roles": {"main": {"exec": ["/bin/sh", "-c", "echo \"{\\\"status\\\": \\\"$(case $NERVE_ROUND in 1) echo again;; *) echo "
                                        "done; esac)\\\", \\\"count\\\": $NERVE_ROUND}\""], "meta": SCHEMA}},
            "graph": {"$START": "main", "main": {"done": "$END", "again": "main"}}},
    }

    def check(self, workflow, content, status, count, attempts):
        said = self.said(workflow)
        meta = said["meta"]
        self.assertEqual((said["content"], meta["status"], meta["count"], meta.get("attempts"), meta["exitCode"]),
                         (content, status, count, attempts, 0))
        return meta

    def test_each_form_of_a_reply(self):
        self.assertEqual(self.check("say-frontmatter", "the text", "done", 3, None)["extra"], "yes")
        self.check("say-object", "", "again", 4, None)
        self.check("say-fenced", "before\n\nafter", "done", 5, None)

    def test_a_role_is_told_what_is_wrong_until_it_is_right(self):
        meta = self.check("say-right-later", "right", "done", 6, 3)
        self.assertEqual(self.failed_attempts(), 2)
        heard = meta["stderr"]
        self.assertTrue(heard.startswith("Count.\n\nYour reply was:\n\n---\nstatus: done\ncount: many\n---\nwrong"), heard)
        self.assertIn("/count", heard)

    def test_after_two_corrections_it_is_a_bad_reply_which_is_kept(self):
        said = self.said("say-never", result="bad-reply")
        self.assertEqual((said["content"], said["meta"]["attempts"]), (self.WRONG, 3))
        self.assertIn("/count", said["meta"]["stderr"])

    def test_a_bad_reply_can_be_tried_again_with_corrections_of_its_own(self):
        self.check("say-never-twice", "right", "done", 6, 6)

    def test_an_empty_reply_is_corrected_too(self):
        self.check("say-error", "right", "done", 6, 2)

    def test_the_status_routes(self):
        run = ended(start("route-by-meta"))
        self.assertEqual((run["result"], run["rounds"]), ("success", 2))


# What agent CLIs are like: argv and stdin in, one of three forms out.
AGENT = r"""
import json, os, sys
form, words = sys.argv[1], sys.argv[2:]
heard = sys.stdin.read()
said = f"words {words} heard {heard!r}"
if form == "text": print(said)
if form == "json": print(json.dumps({"result": said, "usage": {"in": 3, "out": 4}}))
if form == "jsonl":
    print("a warning that is no JSON")
    for kind, text in [("thought", "hm"), ("said", "not the last"), ("said", said), ("thought", "ah")]:
        print(json.dumps({"type": kind, "text": text}))
    print(json.dumps({"type": "end", "usage": {"in": 5}}))
if form == "empty": print("{}")
if form == "large": print(json.dumps({"padding": "x" * (2 * 1024 * 1024), "result": "small"}))
if form == "huge": print(json.dumps({"result": "x" * (1024 * 1024 + 1)}))
if form == "fail": print(json.dumps({"result": "no credit"})); sys.exit(7)
if form == "meta": print("---\nstatus: done\ncount: 1\n---\n" + said)
"""
PROGRAM = nervebox.SCRATCH / "agent.py"


def preset(form, **keys):
    return {"exec": ["/usr/bin/python3", str(PROGRAM), form], **keys}


class Agents(RoleCase):
    presets = {
        "text": preset("text"),
        "argument": preset("text", prompt="argument"),
        "json": preset("json", reply={"json": "/result"}, usage={"input": "/usage/in", "output": "/usage/out", "cost": "/usd"}),
        "jsonl": preset("jsonl", reply={"jsonl": "/text", "where": {"/type": "said"}}, usage={"input": "/usage/in"}),
        **{form: preset(form, reply={"json": "/result"}) for form in ("empty", "large", "huge", "fail")},
        "meta": preset("meta"),
    }
    definitions = {
        **{f"ask-{name}": one(agent={"name": name, "args": ["--model", "m"]}, prompt="do {{ start.content }}") for name in presets},
        "ask-meta": one(agent="meta", prompt="count", meta=SCHEMA),
        "ask-nobody": one(agent="nobody", prompt="x"),
        "ask-at-length": one(agent="argument", prompt="{% for i in range(1000) %}" + "x" * 200 + "{% endfor %}"),
    }

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        replace(PROGRAM, AGENT)
        replace(SETTINGS, json.dumps({"agents": cls.presets}))
        nervebox.reload()

    def test_the_prompt_is_on_stdin_or_the_last_argument(self):
        self.assertEqual(self.said("ask-text", prompt="it")["content"], "words ['--model', 'm'] heard 'do it'")
        self.assertEqual(self.said("ask-argument", prompt="it")["content"], "words ['--model', 'm', 'do it'] heard ''")

    def test_a_reply_in_json_with_its_usage(self):
        said = self.said("ask-json", prompt="it")
        self.assertEqual(said["content"], "words ['--model', 'm'] heard 'do it'")
        self.assertEqual(said["meta"]["usage"], {"input": 3, "output": 4})

    def test_a_reply_in_the_last_line_that_matches(self):
        said = self.said("ask-jsonl", prompt="it")
        self.assertEqual(said["content"], "words ['--model', 'm'] heard 'do it'")
        self.assertEqual(said["meta"]["usage"], {"input": 5})

    def test_a_reply_of_another_form_is_a_bad_one_and_kept(self):
        said = self.said("ask-empty", result="bad-reply")
        self.assertEqual(said["content"], "{}")
        self.assertIn("no reply at /result", said["meta"]["stderr"])

    def test_the_reply_is_limited_not_what_is_around_it(self):
        self.assertEqual(self.said("ask-large")["content"], "small")
        self.assertEqual(self.said("ask-huge", result="reply-too-large")["content"], "")

    def test_an_agent_that_fails_says_why(self):
        self.assertEqual(self.said("ask-fail", result="exit-code:7")["content"], "no credit")

    def test_it_is_told_which_meta_is_expected(self):
        said = self.said("ask-meta")
        self.assertEqual((said["meta"]["status"], said["meta"]["count"]), ("done", 1))
        self.assertIn("heard 'count", said["content"])
        self.assertIn('"required"', said["content"])

    def test_an_agent_that_nerve_yaml_lacks(self):
        said = self.said("ask-nobody", result="exec-failed")
        self.assertIn("nerve.yaml has no agent nobody", said["meta"]["stderr"])

    def test_a_prompt_that_is_too_long_for_an_argument(self):
        said = self.said("ask-at-length", result="exec-failed")
        self.assertIn("shorten it", said["meta"]["stderr"])


class Rehearsals(RoleCase):
    definitions = {
        "rehearse-all": {
            "roles": {
                "plan": {"exec": ["/bin/sh", "-c", "touch /nowhere; exit 1"], "prompt": "plan {{ start.content }}",
                         "dry_run": {"content": "a plan", "meta": {"steps": 2}}},
                "ask": {"llm": "nowhere", "prompt": "system", "user": "of {{ plan.content }}", "meta": SCHEMA},
                "code": {"agent": "nobody", "prompt": "code {{ plan.meta.steps }}", "dry_run": {"meta": {"status": "again"}},
                         "meta": SCHEMA},
                "final": {"exec": ["/bin/sh", "-c", "echo dry $NERVE_DRY_RUN"], "dry_run": "execute"},
            },
            "graph": {"$START": "plan", "plan": {"ok": "ask"}, "ask": {"done": "code", "again": "$END"},
                      "code": {"again": "final", "done": "$END"}, "final": {"ok": "$END"}}},
        "rehearse-template": one(exec=["/bin/true"], prompt="{{ main.content }}"),
        "rehearse-waiting": {
            "roles": {"first": {"exec": ["/bin/false"]},
                      "wait": {"exec": ["/bin/sh", "-c", f"touch {nervebox.SCRATCH}/$NERVE_RUN_ID.$NERVE_ATTEMPT;"
                                        f"until [ -e {nervebox.SCRATCH}/go ]; do sleep 0.05; done"], "dry_run": "execute"},
                      "after": {"exec": ["/bin/false"]}},
            "graph": {"$START": "first", "first": {"ok": "wait"}, "wait": {"ok": "after"}, "after": {"ok": "$END"}},
            "worker": nervebox.WRITES},
    }

    def test_nothing_is_executed_and_every_prompt_is_rendered(self):
        run = ended(start("rehearse-all", "it", "--dry-run"))
        self.assertEqual((run["result"], run["rounds"], run["dryRun"]), ("success", 4, True))
        plan, ask, code, last = thread(run["run"])[1:]
        self.assertEqual((plan["content"], plan["meta"]), ("a plan", {"status": "ok", "steps": 2, "dryRun": True, "prompt": "plan it"}))
        self.assertEqual((ask["meta"]["status"], ask["meta"]["dryRun"]), ("done", True))
        self.assertTrue(ask["meta"]["prompt"].startswith("system\n\n") and ask["meta"]["prompt"].endswith("of a plan"))
        self.assertIn('"required"', ask["meta"]["prompt"])
        self.assertEqual(code["meta"]["status"], "again")
        self.assertTrue(code["meta"]["prompt"].startswith("code 2"))
        self.assertEqual((last["content"], last["meta"]["exitCode"]), ("dry 1", 0))

    def test_a_prompt_that_cannot_be_rendered_fails_as_it_always_does(self):
        self.said("rehearse-template", "--dry-run", result="template-error")

    def test_a_run_is_still_a_dry_one_after_a_resume(self):
        run = start("rehearse-waiting", None, "--dry-run")
        begun = lambda attempt: nervebox.wait_for((nervebox.SCRATCH / f"{run}.{attempt}").exists, f"attempt {attempt}",
                                                  watch=[nervebox.SCRATCH])
        begun(1)
        nervebox.kill_process(nervebox.worker_pid("rehearse-waiting"))
        begun(2)
        (nervebox.SCRATCH / "go").touch()
        self.assertEqual((ended(run)["result"], nervebox.row(run)["dryRun"]), ("success", True))
        self.assertTrue(nervebox.run_json(run)["dryRun"])
        self.assertEqual([said["meta"].get("dryRun") for said in thread(run)[1:]], [True, None, True])


class Llms(RoleCase):
    definitions = {
        "ask-model": one(llm="local", prompt="be brief"),
        "ask-user": one(llm={"provider": "local", "model": "other", "temperature": 0.5, "max_tokens": 9, "stream": False},
                        user="about {{ start.content }}"),
        "ask-meta": one(llm="local", prompt="count", meta=SCHEMA),
        "extract-meta": one(exec=["/bin/sh", "-c", "echo I counted two"], meta=SCHEMA, extract="local"),
        "ask-again": one(llm="local", retry={"attempts": 2, "backoff": "10ms", "on": ["llm-error:rate-limited"]}),
        "ask-impatient": one(llm="local", stall="1s"),
        "ask-hastily": one(llm="local", timeout="1s"),
        "ask-nobody": one(llm="nobody"),
    }

    def serve(self, *script):
        server = openai.Server(*script)
        server.__enter__()
        self.addCleanup(server.__exit__, None, None, None)
        replace(SETTINGS, json.dumps({"providers": {"local": {"base_url": server.url, "model": "m", "api_key": {"credential": "key"}}}}))
        nervebox.reload()
        return server

    @classmethod
    def setUpClass(cls):
        CREDSTORE.mkdir(mode=0o700, exist_ok=True)
        replace(CREDSTORE / "key", SECRET, mode=0o600)
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        (CREDSTORE / "key").unlink()
        super().tearDownClass()

    def test_it_is_asked_once_and_its_usage_is_kept(self):
        server = self.serve(openai.reply("a short answer"))
        said = self.said("ask-model", prompt="the question")
        self.assertEqual((said["content"], said["meta"]["status"]), ("a short answer", "ok"))
        self.assertEqual((said["meta"]["usage"], said["meta"]["model"]), (openai.USAGE, "scripted"))
        asked = server.requests[0]
        self.assertEqual(asked.body["messages"], [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the question"}])
        self.assertEqual((asked.key, asked.body["model"], len(server.requests)), (SECRET, "m", 1))

    def test_a_role_says_what_it_wants_otherwise(self):
        server = self.serve(openai.reply("ok"))
        self.said("ask-user", prompt="it")
        body = server.requests[0].body
        self.assertEqual(body["messages"], [{"role": "user", "content": "about it"}])
        self.assertEqual((body["model"], body["temperature"], body["max_tokens"], body.get("stream", False)), ("other", 0.5, 9, False))

    def test_a_wrong_meta_is_corrected_in_the_conversation(self):
        server = self.serve(openai.reply("two"), openai.reply("---\nstatus: done\ncount: 2\n---\ntwo"))
        said = self.said("ask-meta", prompt="birds")
        self.assertEqual((said["content"], said["meta"]["count"], said["meta"]["attempts"]), ("two", 2, 2))
        first, second = (request.body["messages"] for request in server.requests)
        self.assertEqual([turn["role"] for turn in second], ["system", "user", "assistant", "user"])
        self.assertEqual((second[:2], second[2]["content"]), (first, "two"))
        attempt = [event for event in nervebox.run_json(self.run_id)["events"] if event["type"] == "attempt-failed"]
        self.assertEqual(len(attempt), 1)

    def test_a_provider_extracts_what_is_missing(self):
        server = self.serve(openai.reply('{"status": "done", "count": 2}'))
        said = self.said("extract-meta")
        self.assertEqual((said["content"], said["meta"]["count"], said["meta"]["extraction"]["usage"]), ("I counted two", 2, openai.USAGE))
        self.assertEqual((len(server.requests), self.failed_attempts()), (1, 0))

    def test_it_waits_as_long_as_the_server_asks(self):
        self.serve(openai.status(429, retry_after=2), openai.reply("now"))
        said = self.said("ask-again", prompt="x")
        self.assertEqual((said["content"], said["meta"]["attempts"]), ("now", 2))
        events = nervebox.run_json(self.run_id)["events"]
        times = {event["type"]: event["timestamp"] for event in events}
        self.assertGreaterEqual(times["thread-workflow-message"] - times["attempt-failed"], 2_000_000)

    def test_one_that_falls_silent_is_given_up(self):
        server = self.serve(openai.stalled)
        self.said("ask-impatient", prompt="x", result="role-stalled")
        self.assertTrue(server.requests[0].gone.wait(20))
        server = self.serve(openai.silent)
        self.said("ask-hastily", prompt="x", result="role-timeout")

    def test_a_kill_in_the_middle_leaves_neither_process_nor_connection(self):
        server = self.serve(openai.stalled)
        run = start("ask-model", "x")
        server.asked()
        pids = nervebox.processes(run)
        ctl("workflow", "kill", run)
        self.assertTrue(server.requests[0].gone.wait(20))
        self.assertEqual(ended(run)["exitCode"], 137)
        nervebox.assert_gone(run, pids)

    def test_a_failure_is_told_and_has_a_class(self):
        self.serve(openai.echo(401))
        said = self.said("ask-model", prompt="x", result="llm-error:unauthorized")
        self.assertIn("[redacted]", said["meta"]["stderr"])
        self.assertNotIn(SECRET, json.dumps(said))

    def test_a_provider_that_nerve_yaml_lacks(self):
        self.assertIn("nerve.yaml has no provider nobody", self.said("ask-nobody", prompt="x", result="exec-failed")["meta"]["stderr"])
