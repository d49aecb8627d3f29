"""develop-workflow, end to end, with an agent whose answers are a script: a workflow that did not exist is planned, written
in passes, tried, mended, reviewed, mended again and committed, and nothing is installed."""

import pathlib
import shutil

import nervebox
from nervebox import Case, WORKFLOWS, ctl, ended, sh, start

HERE = pathlib.Path(__file__).resolve().parent
WORKSPACE = pathlib.Path("/srv/workflows")
EXAMPLE = "/usr/lib/nerve/examples/develop-workflow"
AGENT = pathlib.Path("/opt/scripted_agent.py")
SETTINGS = pathlib.Path("/etc/nerve/nerve.yaml.d/90-scripted.yaml")


class DevelopWorkflow(Case):
    definitions = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        sh("useradd", "--system", "--create-home", "--user-group", "build")
        shutil.copy(HERE / "scripted_agent.py", AGENT)
        AGENT.chmod(0o755)
        SETTINGS.parent.mkdir(mode=0o755, exist_ok=True)
        SETTINGS.write_text(f"agents:\n  claude:\n    exec: [python3, {AGENT}]\n")
        WORKSPACE.mkdir(parents=True)
        shutil.chown(WORKSPACE, "build", "build")
        ctl("install", EXAMPLE)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree("/etc/nerve/workspaces")
        AGENT.unlink()
        SETTINGS.unlink()
        shutil.rmtree(WORKSPACE)
        super().tearDownClass()
        sh("userdel", "--remove", "build", check=False)

    def setUp(self):
        super().setUp()
        # The directory stays, since the worker that another test has started can write to this one only.
        sh("find", WORKSPACE, "-mindepth", "1", "-delete")
        self.as_build("nervectl", "init", WORKSPACE)
        self.as_build("git", "-C", WORKSPACE, "init", "--quiet")

    def as_build(self, *argv):
        return sh("runuser", "-u", "build", "--", *argv)

    def test_a_workflow_that_did_not_exist_is_written_tried_and_committed(self):
        run = start("develop-workflow", "Add numbers for me.")
        self.assertEqual(ended(run, timeout=60)["exitCode"], 0, ctl("thread", run).stdout)
        thread = nervebox.thread(run)
        self.assertEqual([(one["role"], one["meta"]["status"]) for one in thread[1:]], [
            ("planner", "planned"), ("coder", "continue"), ("coder", "done"), ("tester", "error"), ("coder", "done"),
            ("tester", "ok"), ("reviewer", "rejected"), ("coder", "done"), ("tester", "ok"), ("reviewer", "approved"),
            ("committer", "ok")])
        self.assertIn("exit-code:3", thread[4]["content"])
        self.assertIn("42", thread[6]["content"])
        log = self.as_build("git", "-C", WORKSPACE, "log", "--format=%s%n%b").stdout
        self.assertEqual(log.splitlines()[:2], ["add-numbers: as wished", "Add numbers for me."])
        files = self.as_build("git", "-C", WORKSPACE, "show", "--format=", "--name-only").stdout.split()
        self.assertEqual(files, ["nerve.yaml", "workflows/add-numbers.yaml"])
        self.assertIn(f"nervectl install {WORKSPACE}", thread[-1]["content"])
        self.assertFalse((WORKFLOWS / "add-numbers.yaml").exists())
        # A person does what it said, and has the workflow.
        ctl("install", WORKSPACE)
        self.assertIn("\n42\n", ctl("workflow", "start", "add-numbers", "-p", "20 22", "-f").stdout)

    def test_a_rehearsal_walks_to_the_end_and_touches_nothing(self):
        run = start("develop-workflow", "Add numbers for me.", "--dry-run")
        self.assertEqual(ended(run, timeout=60)["exitCode"], 0, ctl("thread", run).stdout)
        roles = [one["role"] for one in nervebox.thread(run)[1:]]
        self.assertEqual(roles, ["planner", "coder", "tester", "reviewer", "committer"])
        self.assertEqual(sorted(path.name for path in (WORKSPACE / "workflows").iterdir()), ["report-disk-usage.yaml"])
