"""Roles that are an LLM: fix-failing-test with a coder that is one, against a server that speaks the protocol and
misbehaves as it is told. Whatever can come right does; what cannot has the result that says why; a kill takes the call
along; the key is found nowhere.

Parity 126 (one completion: system = prompt, user = start content; errors are formatted)."""

import json
import pathlib
import threading

import nervebox
import openai
from nervebox import Case, cgroup_of, ctl, pids_of, row, run_json, sh, start, stored_end, thread

EXAMPLE = "/usr/lib/nerve/examples/fix-failing-test"
CANARY = "sk-canary-8c1f0e5b7a9d4e62"
CREDENTIAL = pathlib.Path("/etc/credstore/llm-key")
TRUSTED = pathlib.Path("/run/trusted.pem")
PROXY = "HTTPS_PROXY=http://127.0.0.1:1"  # where there is none; it is not for http://
TESTER = ["python3", "-B", "-m", "unittest", "discover", "--start-directory", "program"]


def right():
    """The reply that repairs the program."""
    source = pathlib.Path(EXAMPLE, "program/spans.py").read_text()
    for wrong, better in (("84600", "86400"), ("count > 1", "count >= 1"), ("min(texts", "max(texts")):
        source = source.replace(wrong, better)
    return f"---\nstatus: done\nchanges: 3\n---\n{source}"


def fix(stream, worker=None, **coder):
    """fix-failing-test, with a coder that is an LLM and a role that writes down what it said."""
    meta = {"type": "object", "required": ["status", "changes"],
            "properties": {"status": {"enum": ["done"]}, "changes": {"type": "integer"}}}
    prompt = "The tests fail. Answer with the whole program, repaired.\n{{ tester.meta.stderr }}"
    return {
        "concurrency": 4,
        "worker": worker or {},
        "roles": {
            "prepare": {"exec": ["sh", f"{EXAMPLE}/prepare"]},
            "tester": {"exec": TESTER},
            "coder": {"llm": {"provider": "scripted", "stream": stream}, "prompt": prompt, "meta": meta, **coder},
            "writer": {"exec": ["sh", "-c", "cat >program/spans.py"], "prompt": "{{ coder.content }}\n"}},
        "graph": {"$START": "prepare", "prepare": {"ok": "tester"}, "tester": {"ok": "$END", "error": "coder"},
                  "coder": {"done": "writer"}, "writer": {"ok": "tester"}}}


RETRY = {"attempts": 2, "backoff": "10ms", "max_backoff": "20ms"}


class Llm(Case):
    definitions = {
        "fix-whole": fix(False, worker={"Environment": PROXY}),
        "fix-piecewise": fix(True),
        "fix-again-whole": fix(False, retry=RETRY),
        "fix-again-piecewise": fix(True, retry=RETRY),
        "fix-in-time": fix(True, timeout="300ms", retry=RETRY),
        "fix-without-stalling": fix(True, stall="300ms", retry=RETRY),
        "fix-trusting": fix(True, llm="trusted", worker={"Environment": f"SSL_CERT_FILE={TRUSTED} {PROXY} NO_PROXY=127.0.0.1"}),
        "fix-by-proxy": fix(True, llm="trusted", worker={"Environment": f"SSL_CERT_FILE={TRUSTED} {PROXY}"}),
        "fix-distrusting": fix(True, llm="trusted"),
        "fix-nowhere": fix(True) | {"roles": fix(True)["roles"] | {
            "coder": {"llm": "nowhere", "meta": fix(True)["roles"]["coder"]["meta"]}}},
    }

    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(openai.Server())
        provider = {"base_url": cls.server.url, "model": "scripted", "api_key": {"credential": CREDENTIAL.name}}
        cls.trusted = cls.enterClassContext(openai.Server(openai.reply(right()), tls=True))
        trusted = {"base_url": cls.trusted.url, "model": "scripted"}
        nowhere = {"base_url": "http://127.0.0.1:1/v1", "model": "none"}
        nervebox.replace(CREDENTIAL, CANARY + "\n", mode=0o600)
        nervebox.replace(TRUSTED, openai.CERTIFICATE.read_text())
        for path in (CREDENTIAL, TRUSTED):
            cls.addClassCleanup(path.unlink)
        super().setUpClass()
        nervebox.replace(nervebox.SETTINGS, json.dumps({"providers": {
            "scripted": provider, "trusted": trusted, "nowhere": nowhere}}))
        nervebox.restart_nerve()

    def fixed(self, workflow, *script):
        """The run of this workflow against this script, which has ended well."""
        self.server.play(*script)
        run, code = start(workflow, "Be brief.", wait=True)
        self.assertEqual(code, 0, run_json(run)["events"])
        return run

    def coder(self, run):
        return next(message for message in thread(run) if message["role"] == "coder")

    def test_it_is_asked_as_the_definition_says_and_its_usage_is_kept(self):
        for workflow, stream in (("fix-whole", None), ("fix-piecewise", True)):
            with self.subTest(workflow):
                run = self.fixed(workflow, openai.reply(right()))
                [request] = self.server.requests
                system, user = request.body["messages"]
                self.assertIn("AssertionError", system["content"])
                self.assertEqual((system["role"], user), ("system", {"role": "user", "content": "Be brief."}))
                self.assertEqual((request.body["model"], request.body.get("stream")), ("scripted", stream))
                self.assertEqual(request.key, CANARY)
                said = self.coder(run)
                self.assertEqual((said["meta"]["status"], said["meta"]["changes"]), ("done", 3))
                self.assertEqual(said["meta"]["usage"], openai.USAGE)
                self.assertTrue(said["content"].startswith('"""Time spans'))

    def test_what_passes_is_tried_again(self):
        failures = {
            "unauthorized": openai.status(401), "rate-limited": openai.status(429, retry_after=1),
            "server-error": openai.status(500), "cut-off": openai.cut(right(), 400), "malformed": openai.malformed("?"),
            "too-large": openai.oversized, "not-found": openai.status(404), "bad-request": openai.status(400)}
        for workflow in ("fix-again-whole", "fix-again-piecewise"):
            for word, failure in [*failures.items(), ("cut-off", openai.reset)]:
                with self.subTest(f"{workflow}: {word}"):
                    run = self.fixed(workflow, failure, openai.reply(right()))
                    self.assertEqual(len(self.server.requests), 2)
                    [failed] = [event["payload"] for event in run_json(run)["events"] if event["type"] == "attempt-failed"]
                    self.assertEqual(failed["message"]["meta"]["result"], f"llm-error:{word}")
                    # What Retry-After asks for is given, whatever the role's own backoff is.
                    self.assertEqual(failed["delayUs"] >= 1_000_000, word == "rate-limited", failed)

    def test_what_does_not_pass_says_what_it_was(self):
        failures = {
            "unauthorized": openai.status(403), "rate-limited": openai.status(429), "server-error": openai.status(503),
            "cut-off": openai.cut(right(), 400), "malformed": openai.malformed({"choices": []}),
            "too-large": openai.oversized, "not-found": openai.status(404), "bad-request": openai.status(422)}
        for workflow in ("fix-whole", "fix-piecewise"):
            for word, failure in failures.items():
                with self.subTest(f"{workflow}: {word}"):
                    self.server.play(failure)
                    run, code = start(workflow, wait=True)
                    self.assertEqual((code, row(run)["result"]), (1, f"llm-error:{word}"))
                    self.assertIn("/v1/chat/completions", self.coder(run)["meta"]["stderr"])
        run, code = start("fix-nowhere", wait=True)
        self.assertEqual((code, row(run)["result"]), (1, "llm-error:unreachable"))

    def test_a_server_is_trusted_when_its_certificate_is(self):
        self.assertEqual(start("fix-trusting", wait=True)[1], 0)
        [request] = self.trusted.requests
        self.assertEqual(request.key, "")
        for workflow in ("fix-distrusting", "fix-by-proxy"):
            run, code = start(workflow, wait=True)
            self.assertEqual((code, row(run)["result"], len(self.trusted.requests)), (1, "llm-error:unreachable", 1))

    def test_a_server_that_is_slow_is_waited_for_and_one_that_is_silent_is_not(self):
        gates = [threading.Event() for _ in range(3)]
        self.server.play(openai.slow(right(), *gates))
        run = start("fix-piecewise")
        request = self.server.asked()
        for gate in gates:
            self.assertFalse(request.answered.is_set())
            gate.set()
        self.assertEqual(stored_end(run)["exit_code"], 0)
        self.fixed("fix-in-time", openai.silent, openai.reply(right()))
        self.assertTrue(self.server.requests[0].gone.wait(nervebox.TIMEOUT))
        self.fixed("fix-without-stalling", openai.stalled, openai.reply(right()))
        self.assertTrue(self.server.requests[0].gone.wait(nervebox.TIMEOUT))

    def test_a_reply_without_its_meta_is_corrected_and_one_that_never_has_it_is_kept(self):
        wrong = right().replace("changes: 3", "changes: three")
        for workflow in ("fix-whole", "fix-piecewise"):
            with self.subTest(workflow):
                self.fixed(workflow, openai.reply(wrong), openai.reply("no meta at all"), openai.reply(right()))
                told = self.server.requests[1].body["messages"]
                self.assertEqual([turn["role"] for turn in told], ["system", "user", "assistant", "user"])
                self.assertEqual(told[2]["content"], wrong)
                self.assertIn('/changes: "three" is not of type "integer"', told[3]["content"])
                self.server.play(openai.reply(wrong))
                run, code = start(workflow, wait=True)
                self.assertEqual((code, row(run)["result"], len(self.server.requests)), (1, "bad-reply", 3))
                self.assertIn("changes: three", self.coder(run)["content"])

    def test_a_kill_in_the_middle_of_a_call_leaves_no_process_and_no_connection(self):
        for behaviour in (openai.silent, openai.stalled):
            with self.subTest(behaviour.__name__):
                self.server.play(behaviour)
                run = start("fix-piecewise")
                request = self.server.asked()
                cgroup = cgroup_of(run)
                self.assertEqual(len(pids_of(cgroup)), 1)
                ctl("workflow", "kill", run)
                self.assertEqual(stored_end(run)["exit_code"], 137)
                self.assertEqual(pids_of(cgroup), {})
                self.assertTrue(request.gone.wait(nervebox.TIMEOUT), "the connection is still open")

    def test_the_key_is_found_nowhere(self):
        def quoting(request):
            openai.answer(request, f"{right()}# {request.key}\n")
        # A worker that answers while the key is in use…
        self.server.play(openai.silent)
        run = start("fix-piecewise")
        self.assertEqual(self.server.asked().key, CANARY)
        for kind in ("cmdline", "environ"):
            for path in pathlib.Path("/proc").glob(f"[0-9]*/{kind}"):
                self.assertTrue(self.is_clean(path), path)
        ctl("workflow", "kill", run)
        # …and one that is told it back, in errors and in a reply.
        for code in (401, 500):
            self.fixed("fix-again-whole", openai.echo(code), openai.reply(right()))
        self.fixed("fix-again-piecewise", openai.echo(401), quoting)
        self.assertIn("[redacted]", json.dumps(thread(start("fix-piecewise", wait=True)[0])))
        # As bytes: what other roles have said need not be text.
        journal = sh("journalctl", "--no-pager", "-o", "export", input=b"").stdout
        self.assertTrue(b"fix-piecewise" in journal)
        self.assertFalse(CANARY.encode() in journal, "the journal has the key")
        for folder in ("/var/lib/nerve", "/var/lib/nerve-wf", "/var/lib/private", "/run/nerve", "/run/systemd/transient",
                       "/run/log/journal", "/var/log/journal", "/etc/systemd"):
            for path in pathlib.Path(folder).rglob("*"):
                if path.is_file():
                    self.assertTrue(self.is_clean(path), path)
        shown = ctl("workflow", "list", "-n", "100", "-o", "json").stdout + ctl("status").stdout
        self.assertNotIn(CANARY, shown)

    def is_clean(self, path):
        try:
            return CANARY.encode() not in path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # it went in the meantime
            return True
