"""From `make install` to a running nerve: what is put where, the first start, the units, and what systemd does to them."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import unittest

import nervebox
from nervebox import ctl, sh, systemctl, wait_for

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = {  # what an installation has at least
    "bin/nervectl": 0o755, "libexec/nerve/nerved": 0o755, "libexec/nerve/nerve-worker": 0o755,
    "lib/systemd/system/nerve.service": 0o644, "lib/systemd/system/nerve.socket": 0o644,
    "lib/systemd/system/nerve.target": 0o644, "lib/systemd/system/nerve-wf.slice": 0o644,
    "lib/systemd/system/nerve-archive.timer": 0o644, "lib/systemd/system/nerve-archive.service": 0o644,
    "lib/systemd/system/nerve-wf@.service.d/10-nerve.conf": 0o644,
    "share/dbus-1/system.d/org.nerve1.conf": 0o644, "lib/sysusers.d/nerve.conf": 0o644,
    "share/man/man1/nervectl.1": 0o644, "share/man/man5/nerve-workflow.5": 0o644,
    "lib/nerve/workflows/check-host.yaml": 0o644, "lib/nerve/workflows/fix-failing-test.yaml": 0o644,
}


@contextlib.contextmanager
def dropin(unit, text):
    """An administrator's drop-in, as `systemctl edit` makes it, for a while."""
    folder = pathlib.Path(f"/etc/systemd/system/{unit}.d")
    folder.mkdir(parents=True, exist_ok=True)
    # A name of its own: the drop-in of an instance replaces one of the same name for all.
    file = folder / f"nervebox-{unit}.conf"
    file.write_text(text)
    systemctl("daemon-reload")
    try:
        yield
    finally:
        file.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
        systemctl("daemon-reload")


def revive():
    """Restarts a nerve that does not answer, so that what made it deaf fails one test and not all that follow."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        if ctl("status", check=False, timeout=3).returncode == 0:
            return
    nervebox.restart_nerve()


def tree(root):
    return {str(path.relative_to(root)): path.stat().st_mode & 0o7777 for path in sorted(root.rglob("*")) if path.is_file()}


@unittest.skipUnless((REPOSITORY / "Makefile").exists(), "no Makefile")
class Make(unittest.TestCase):
    """The recipe of `make install`, by the shell, since this machine need have no make: what it runs is a few lines."""

    @classmethod
    def setUpClass(cls):
        cls.make = shutil.which("make")

    def run_make(self, *arguments):
        if self.make is None:
            self.skipTest("no make in this machine: tests/box itself installs with it, outside")
        # Nothing that builds is there to be called.
        return sh(self.make, "-C", REPOSITORY, *arguments, env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"})

    def test_install_builds_and_starts_nothing_and_uninstall_leaves_nothing(self):
        is_machine = os.path.isdir("/run/systemd/system")
        pid = is_machine and nervebox.nerved_pid()
        for prefix in ("/usr", "/usr/local", "/opt/nerve"):
            with self.subTest(prefix=prefix), tempfile.TemporaryDirectory() as root:
                root = pathlib.Path(root)
                self.run_make("install", f"DESTDIR={root}", f"PREFIX={prefix}")
                found = tree(root / prefix[1:])
                self.assertEqual({name: found.get(name) for name in SHIPPED}, SHIPPED)
                self.assertEqual([path for path in root.iterdir()], [root / prefix.split("/")[1]])
                service = (root / prefix[1:] / "lib/systemd/system/nerve.service").read_text()
                self.assertIn(f"ExecStart={prefix}/libexec/nerve/nerved\n", service)
                self.assertIn(f"ExecReload=-{prefix}/bin/nervectl reload\n", service)
                self.run_make("uninstall", f"DESTDIR={root}", f"PREFIX={prefix}")
                self.assertEqual(tree(root), {})
        self.assertEqual(is_machine and nervebox.nerved_pid(), pid)

    def test_uninstall_takes_nothing_foreign(self):
        with tempfile.TemporaryDirectory() as root:
            root = pathlib.Path(root)
            self.run_make("install", f"DESTDIR={root}")
            mine = root / "usr/lib/nerve/workflows/my-own.yaml"
            mine.write_text("x")
            self.run_make("uninstall", f"DESTDIR={root}")
            self.assertEqual(list(tree(root)), [str(mine.relative_to(root))])


class Installed(nervebox.Case):
    definitions = {"say-good": nervebox.command("echo good")}

    def test_what_is_installed(self):
        found = {name: (path := pathlib.Path("/usr") / name).exists() and path.stat().st_mode & 0o7777 for name in SHIPPED}
        self.assertEqual(found, SHIPPED)
        for name in SHIPPED:
            self.assertEqual((pathlib.Path("/usr") / name).stat().st_uid, 0)

    def test_what_is_not_installed(self):
        # With a unit file of that name systemd refuses transient units; with an activation file nervectl would start a
        # nerve that somebody has stopped.
        for pattern in ("lib/systemd/system/nerve-wf@*.service", "share/dbus-1/system-services/org.nerve1*"):
            self.assertEqual(list(pathlib.Path("/usr").glob(pattern)), [])
        found = sh("find", "/usr/libexec/nerve", "/usr/bin/nervectl", "-perm", "/6000")
        self.assertEqual(found.stdout, "")

    def test_versions(self):
        for program in ("/usr/bin/nervectl", "/usr/libexec/nerve/nerved", "/usr/libexec/nerve/nerve-worker"):
            with self.subTest(program):
                self.assertRegex(sh(program, "--version").stdout, r"^\w[\w-]* \d+\.\d+\.\d+\n$")

    def test_the_shipped_examples_are_valid(self):
        done = ctl("validate", *sorted(pathlib.Path("/usr/lib/nerve/workflows").glob("*.yaml")))
        self.assertEqual(sorted(done.stdout.splitlines()), ["check-host: ok", "fix-failing-test: ok"])

    def test_the_static_user_can_do_nothing(self):
        passwd = sh("getent", "passwd", "nerve").stdout.strip().split(":")
        self.assertRegex(passwd[6], "nologin|false")

    def test_worker_and_daemon_by_hand_say_what_they_need(self):
        for argv in (["/usr/libexec/nerve/nerve-worker", "say-good"], ["/usr/libexec/nerve/nerve-worker"],
                     ["/usr/libexec/nerve/nerve-worker", "../x"], ["/usr/libexec/nerve/nerved", "--no-auth"]):
            with self.subTest(argv):
                done = sh(*argv, check=False, timeout=10, env={"PATH": "/usr/bin"})
                self.assertNotEqual(done.returncode, 0)
                self.assertTrue(done.stderr)
                self.assertNotIn("panicked", done.stderr)

    def test_the_service_is_confined(self):
        show = nervebox.properties("nerve.service", "CapabilityBoundingSet", "NoNewPrivileges", "ProtectSystem",
                                   "PrivateNetwork", "WatchdogUSec", "Restart", "UMask", "StateDirectoryMode",
                                   "StartLimitIntervalUSec")
        self.assertEqual(show["CapabilityBoundingSet"], "cap_dac_override")
        self.assertEqual((show["NoNewPrivileges"], show["ProtectSystem"], show["PrivateNetwork"]), ("yes", "strict", "yes"))
        self.assertEqual((show["UMask"], show["StateDirectoryMode"], show["Restart"]), ("0077", "0700", "always"))
        self.assertNotIn(show["WatchdogUSec"], ("0", "infinity"))
        self.assertEqual(show["StartLimitIntervalUSec"], "0")
        status = pathlib.Path(f"/proc/{nervebox.nerved_pid()}/status").read_text()
        self.assertRegex(status, r"CapEff:\s+0*2\n")
        self.assertRegex(status, r"NoNewPrivs:\s+1\n")

    def test_a_worker_is_watched_and_restarts_within_limits(self):
        nervebox.start("say-good", wait=True)
        show = nervebox.properties(nervebox.unit_of("say-good"), "WatchdogUSec", "Restart", "RestartUSec", "KillMode",
                                   "OOMPolicy", "Slice", "Delegate", "Type", "StartLimitBurst", "StartLimitIntervalUSec",
                                   "Transient", "DynamicUser", "User", "ExecStart")
        self.assertNotIn(show.pop("WatchdogUSec"), ("0", "infinity"))
        self.assertRegex(show.pop("ExecStart"), r"argv\[\]=/usr/libexec/nerve/nerve-worker say-good ;")
        self.assertGreater(int(show.pop("StartLimitBurst")), 0)
        self.assertNotEqual(show.pop("StartLimitIntervalUSec"), "0")
        self.assertEqual(show, {"Restart": "always", "RestartUSec": "100ms", "KillMode": "mixed", "OOMPolicy": "continue",
                                "Slice": "nerve-wf.slice", "Delegate": "yes", "Type": "notify", "Transient": "yes",
                                "DynamicUser": "yes", "User": "nw-say-good"})


class FirstStart(nervebox.Case):
    """A machine that never had nerve: no database, no configuration."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        systemctl("stop", "nerve.service", "nerve.socket")
        shutil.rmtree(nervebox.STATE)
        shutil.rmtree("/etc/nerve", ignore_errors=True)
        systemctl("start", "nerve.socket", "nerve.service")

    def test_modes(self):
        self.assertEqual(nervebox.STATE.stat().st_mode & 0o7777, 0o700)
        files = tree(nervebox.STATE)
        self.assertIn("nerve.db", files)
        self.assertEqual(set(files.values()), {0o600})
        self.assertEqual((pathlib.Path("/run/nerve").stat().st_mode & 0o7777,
                          pathlib.Path("/run/nerve/worker.sock").stat().st_mode & 0o777), (0o755, 0o666))

    def test_no_configuration_is_needed(self):
        self.assertFalse(pathlib.Path("/etc/nerve").exists())
        self.assertEqual(nervebox.listed(), [])
        self.assertIn("check-host", ctl("status").stdout)
        self.assertEqual(ctl("validate").returncode, 0)

    def test_the_database_is_sound(self):
        with nervebox.database() as connection:
            self.assertEqual(connection.execute("PRAGMA integrity_check").fetchone()[0], "ok")
            self.assertEqual(connection.execute("PRAGMA journal_mode").fetchone()[0], "wal")


class Units(nervebox.Case):
    definitions = {
        "say-good": nervebox.command("echo good"),
        "show-limits": nervebox.command("ulimit -n; echo $COLOUR", concurrency=2),
        "sleep-long": nervebox.command("exec sleep infinity", concurrency=2),
        "wait-for-file": nervebox.command("exec 9<>/run/nervebox-fifo; read line <&9; echo $line"),
        "tell-stories": nervebox.command("echo before >&2; while [ ! -e /run/nervebox-go ]; do sleep 0.05; done; "
                                         "echo after >&2; echo done"),
    }

    @classmethod
    def tearDownClass(cls):
        revive()
        super().tearDownClass()

    def setUp(self):
        revive()
        if left := [run["run"] for run in nervebox.listed("--active")]:
            ctl("workflow", "kill", "--grace", "0", *left, check=False)

    def status_text(self):
        return nervebox.properties("nerve.service", "StatusText")["StatusText"]

    def test_status_says_what_runs_and_waits(self):
        runs = [nervebox.start("sleep-long") for _ in range(5)]
        wait_for(lambda: re.search(r"\b2\b.*active.*\b3\b.*queued", self.status_text()), "2 active, 3 queued")
        self.assertRegex(systemctl("status", "nerve.service").stdout, r'Status: ".*2 .*active.*3 queued')
        ctl("workflow", "kill", "--grace", "0", *runs)
        wait_for(lambda: re.search(r"\b0\b.*active.*\b0\b.*queued", self.status_text()), "0 active, 0 queued")

    def test_the_log_level_is_set_by_a_drop_in(self):
        def is_chatty():
            since = nervebox.properties("nerve.service", "InvocationID")["InvocationID"]
            nervebox.start("say-good", wait=True)
            return any(entry["PRIORITY"] == "7" for entry in nervebox.journal(f"_SYSTEMD_INVOCATION_ID={since}",
                                                                                     "_COMM=nerved"))
        nervebox.restart_nerve()
        self.assertFalse(is_chatty())
        for value, has_debug in (("debug", True), ("error", False), ("nonsense", False)):
            with self.subTest(value), dropin("nerve.service", f"[Service]\nEnvironment=NERVE_LOG={value}\n"):
                nervebox.restart_nerve()
                self.assertEqual(is_chatty(), has_debug)
        nervebox.restart_nerve()

    def test_a_drop_in_for_all_workers_and_one_for_one(self):
        with dropin("nerve-wf@.service", "[Service]\nLimitNOFILE=777\nEnvironment=COLOUR=all\n"):
            revive()
            run, _ = nervebox.start("show-limits", wait=True)
            self.assertEqual(nervebox.thread(run)[1]["content"], "777\nall")
            nervebox.drain("show-limits", "--wait")
            with dropin("nerve-wf@show-limits.service", "[Service]\nLimitNOFILE=555\n"):
                revive()
                run, _ = nervebox.start("show-limits", wait=True)
                self.assertEqual(nervebox.thread(run)[1]["content"], "555\nall")

    def test_a_daemon_reload_leaves_a_worker_as_it_is(self):
        run = nervebox.start("sleep-long")
        pids, worker = nervebox.processes(run), nervebox.worker_pid("sleep-long")
        names = ("ExecStart", "Restart", "KillMode", "Delegate", "DynamicUser", "User", "OOMPolicy", "Environment",
                 "WatchdogUSec", "RestartPreventExitStatus", "LogExtraFields", "LogRateLimitBurst", "Slice", "CollectMode",
                 "StateDirectory", "StartLimitBurst", "NoNewPrivileges", "SystemCallFilter")
        unit = nervebox.unit_of("sleep-long")

        def settings():
            found = nervebox.properties(unit, *names)
            return found | {"ExecStart": found["ExecStart"].partition(" ;")[0]}
        before = settings()
        for _ in range(3):
            systemctl("daemon-reload")
        systemctl("daemon-reexec")
        self.assertEqual(settings(), before)
        self.assertEqual((nervebox.worker_pid("sleep-long"), nervebox.alive(pids)), (worker, pids))
        revive()
        ctl("workflow", "kill", run)

    def test_nerve_hears_after_many_signals_of_systemd(self):
        # Each daemon-reload is some hundred signals. Who waits for an answer while nobody takes those hears nothing more.
        for _ in range(4):
            for workflow in ("say-good", "show-limits"):
                run = nervebox.start(workflow)
            systemctl("daemon-reload")
            systemctl("restart", "nerve-wf@*.service")
            systemctl("daemon-reload")
            try:
                ctl("status", timeout=5)
            except subprocess.TimeoutExpired:
                self.fail("nerve hears nothing more")
            nervebox.ended(run)

    def test_a_stopped_nerved_is_restarted_by_its_watchdog_and_the_run_survives(self):
        with dropin("nerve.service", "[Service]\nWatchdogSec=6\nTimeoutAbortSec=1\n"):
            nervebox.restart_nerve()
            run = nervebox.start("sleep-long")
            pids, worker, nerved = nervebox.processes(run), nervebox.worker_pid("sleep-long"), nervebox.nerved_pid()
            os.kill(nerved, signal.SIGSTOP)
            wait_for(lambda: nervebox.nerved_pid() not in (0, nerved), "another nerved")
            wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to answer")
            self.assertEqual((nervebox.worker_pid("sleep-long"), nervebox.alive(pids)), (worker, pids))
            self.assertEqual(nervebox.row(run)["status"], "started")
            ctl("workflow", "kill", run)
            self.assertEqual(nervebox.row(run)["exitCode"], 137)
            nervebox.assert_gone(run, pids)
        nervebox.restart_nerve()

    def test_an_idle_nerved_keeps_its_watchdog_content(self):
        with dropin("nerve.service", "[Service]\nWatchdogSec=6\n"):
            nervebox.restart_nerve()
            pid = nervebox.nerved_pid()
            first = nervebox.properties("nerve.service", "WatchdogTimestampMonotonic")
            wait_for(lambda: nervebox.properties("nerve.service", "WatchdogTimestampMonotonic") != first,
                     "a ping", timeout=6)
            self.assertEqual(nervebox.nerved_pid(), pid)
        nervebox.restart_nerve()

    def test_a_worker_without_runs_stays_and_takes_the_next(self):
        nervebox.start("say-good", wait=True)
        pid = nervebox.worker_pid("say-good")
        self.assertNotEqual(pid, 0)
        nervebox.start("say-good", wait=True)
        self.assertEqual(nervebox.worker_pid("say-good"), pid)
        self.assertEqual(list(nervebox.worker_cgroup("say-good").glob("run-*")), [])
        self.assertEqual([path.name for path in nervebox.worker_cgroup("say-good").iterdir() if path.is_dir()], ["main"])

    def test_a_restart_of_journald_during_a_run(self):
        go = pathlib.Path("/run/nervebox-go")
        go.unlink(missing_ok=True)
        self.addCleanup(go.unlink, missing_ok=True)
        run = nervebox.start("tell-stories")
        pids = nervebox.processes(run)
        wait_for(lambda: "before" in ctl("logs", run).stdout, "the first line")
        systemctl("restart", "systemd-journald.service")
        go.touch()
        end = nervebox.ended(run)
        self.assertEqual((end["status"], end["exitCode"]), ("completed", 0))
        thread = nervebox.thread(run)
        self.assertEqual((thread[1]["content"], thread[1]["meta"]["stderr"]), ("done", "before\nafter\n"))
        wait_for(lambda: "after" in ctl("logs", run).stdout, "the last line")
        nervebox.assert_gone(run, pids)
        # And nerve itself still logs.
        nervebox.restart_nerve()
        self.assertEqual(nervebox.start("say-good", wait=True)[1], 0)

    def test_a_restart_of_the_bus_and_of_logind_during_a_run(self):
        run = nervebox.start("sleep-long")
        pids = nervebox.processes(run)
        nerved = nervebox.nerved_pid()
        systemctl("restart", "dbus.service")
        wait_for(lambda: ctl("status", check=False).returncode == 0, "nerve to be on the bus again")
        self.assertEqual((nervebox.alive(pids), nervebox.nerved_pid()), (pids, nerved))
        ctl("workflow", "kill", run)
        nervebox.assert_gone(run, pids)

    def test_stop_stays_stopped_and_start_goes_on(self):
        run = nervebox.start("sleep-long")
        pids = nervebox.processes(run)
        systemctl("stop", "nerve.service")
        try:
            # The socket's job is another one, for which systemctl does not wait.
            wait_for(lambda: systemctl("is-active", "nerve.socket", check=False).stdout.strip() == "inactive",
                     "the socket to be closed")
            self.assertFalse(pathlib.Path("/run/nerve/worker.sock").exists())
            self.assertEqual(ctl("status", check=69).stdout, "")
            self.assertEqual(systemctl("is-active", "nerve.service", check=False).stdout.strip(), "inactive")
            self.assertEqual(nervebox.alive(pids), pids)
        finally:
            systemctl("start", "nerve.service")
        self.assertEqual(nervebox.alive(pids), pids)
        ctl("workflow", "kill", run)
        self.assertEqual(nervebox.row(run)["exitCode"], 137)

    def test_stopping_the_target_stops_everything(self):
        systemctl("start", "nerve.target", "nerve.service")
        run = nervebox.start("sleep-long")
        pids = nervebox.processes(run)
        systemctl("stop", "nerve.target")
        try:
            self.assertEqual(nervebox.alive(pids), {})
            self.assertEqual(systemctl("list-units", "--no-legend", "--state=active", "--type=service,socket,target",
                                       "nerve*").stdout.strip(), "")
        finally:
            systemctl("start", "nerve.target", "nerve.service")  # the target itself does not wait for it
        self.assertEqual(nervebox.start("say-good", wait=True)[1], 0)
        ctl("workflow", "kill", "--grace", "0", run, check=False)


if __name__ == "__main__":
    unittest.main()
