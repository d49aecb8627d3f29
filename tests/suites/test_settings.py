"""nerve.yaml(5): what reaches runs and workers of it. What files may say, and what is wrong with them, is tested with
`config::settings`; `max_active` in test_overflow."""

import hashlib
import pathlib
import subprocess

import nervebox
from nervebox import SETTINGS, ctl, ended, replace, sh, start

CREDSTORE = pathlib.Path("/etc/credstore")
ENCRYPTED = pathlib.Path("/etc/credstore.encrypted")
DROP_INS = pathlib.Path(f"{SETTINGS}.d")


def has_credential():
    """Says the sha256 of the credential that its worker has: the credential itself it could not say."""
    file = f"/run/credentials/{nervebox.unit_of('have-credential')}/token"
    role = {"exec": ["sha256sum", file], "env": {"TOKEN": {"credential": "token"}}}
    return {"roles": {"main": role}, "graph": {"$START": "main", "main": {"ok": "$END"}}}


class Settings(nervebox.Case):
    definitions = {
        "count-rounds": {"roles": {"main": {"exec": ["/bin/true"]}}, "graph": {"$START": "main", "main": {"ok": "main"}}},
        "have-credential": has_credential(),
        "ask-model": {"roles": {"main": {"llm": "local", "prompt": "x"}}, "graph": {"$START": "main", "main": {"ok": "$END"}}},
    }

    def tearDown(self):
        for path in [SETTINGS, *DROP_INS.glob("*.yaml"), CREDSTORE / "token", ENCRYPTED / "token"]:
            path.unlink(missing_ok=True)
        super().tearDown()

    def credential(self):
        """What a new worker of have-credential has."""
        nervebox.drain("have-credential", "--wait")
        run, _ = start("have-credential", wait=True)
        return nervebox.thread(run)[-1]["content"].split()[0]

    def test_max_rounds_is_for_those_who_do_not_say(self):
        replace(SETTINGS, "max_rounds: 3\n")
        ctl("reload")
        self.assertEqual((lambda run: (run["exitCode"], run["rounds"]))(ended(start("count-rounds"))), (2, 3))
        own = ended(start("count-rounds", None, "--max-rounds", "2"))
        self.assertEqual(own["rounds"], 2)

    def test_a_credential_of_the_store_reaches_the_role_that_names_it(self):
        CREDSTORE.mkdir(mode=0o700, exist_ok=True)
        replace(CREDSTORE / "token", "from-the-store", mode=0o600)
        self.assertEqual(self.credential(), hashlib.sha256(b"from-the-store").hexdigest())

    def test_an_encrypted_credential_is_decrypted(self):
        if subprocess.run(["which", "systemd-creds"], capture_output=True).returncode:
            self.skipTest("there is no systemd-creds")
        ENCRYPTED.mkdir(mode=0o700, exist_ok=True)
        sh("systemd-creds", "encrypt", "--name=token", "--with-key=host", "-", ENCRYPTED / "token", input="from-the-vault")
        self.assertEqual(self.credential(), hashlib.sha256(b"from-the-vault").hexdigest())

    def test_a_worker_is_replaced_when_a_provider_needs_another_credential(self):
        unit = lambda: nervebox.systemctl("cat", nervebox.unit_of("ask-model")).stdout
        provider = "providers: {{local: {{base_url: 'http://127.0.0.1:9', api_key: {{credential: {}}}}}}}\n"
        replace(SETTINGS, provider.format("first"))
        ctl("reload")
        ended(start("ask-model"))
        before = nervebox.worker_pid("ask-model")
        self.assertIn("LoadCredential=first:first", unit())
        replace(SETTINGS, provider.format("second"))
        ctl("reload")
        ended(start("ask-model"))
        self.assertNotEqual(nervebox.worker_pid("ask-model"), before)
        self.assertIn("LoadCredential=second:second", unit())

    def test_the_presets_that_come_with_nerve_are_right_and_can_be_hidden(self):
        self.assertTrue(pathlib.Path("/usr/lib/nerve/nerve.yaml.d/agents.yaml").exists())
        self.assertNotIn("error", ctl("validate").stderr)
        replace(DROP_INS / "agents.yaml", "agents: {x: {}}\n")
        self.assertIn("has no exec", ctl("validate", check=65).stderr)
