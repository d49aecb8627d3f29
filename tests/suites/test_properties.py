"""What `worker:` may say, at its limits: what validate takes, systemd takes, and the worker starts with."""

import nervebox
from nervebox import ctl

TAKEN = {
    "memory-all": {"MemoryMax": "100%"},
    "memory-infinite": {"MemoryMax": "infinity"},
    "memory-fraction": {"MemoryMax": "99.99%"},
    "tasks-all": {"TasksMax": "100%"},
    "tasks-infinite": {"TasksMax": "infinity"},
    "tasks-many": {"TasksMax": 18446744073709551614},
    "quota-large": {"CPUQuota": "42949672.95%"},
    "nice-least": {"Nice": -20},
    "nice-most": {"Nice": 19},
    "user-by-number": {"User": 0, "Group": 0},
    "groups-by-number": {"SupplementaryGroups": "0 4"},
    "variables-odd": {"Environment": ["A=", "B=x=y", '"C=a b\tc"', '"D=x\\ny"', 'F=100%%', '_=é']},
    "variable-long": {"Environment": "A=" + "x" * 131_000},
    "paths-odd": {"ReadWritePaths": ["/", "-/nonexistent"], "ReadOnlyPaths": "//usr//share/ -/a:b"},
    "network-private": {"PrivateNetwork": "T"},
    "limit-most": {"StartLimitIntervalSec": "500000y", "StartLimitBurst": 100},
    "limit-least": {"StartLimitIntervalSec": "1us", "StartLimitBurst": 1},
}
REFUSED = {
    "variable-too-long": ({"Environment": "A=" + "x" * 131_072}, "131071"),
    "tasks-too-many": ({"TasksMax": "100.01%"}, "more than there is"),
    "quota-too-large": ({"CPUQuota": "42949672.96%"}, "no percentage"),
}


class Properties(nervebox.Case):
    definitions = {name: nervebox.command("echo done", worker=worker) for name, worker in TAKEN.items()}

    def test_what_validate_takes_systemd_takes(self):
        for name in TAKEN:
            with self.subTest(name):
                self.assertEqual(ctl("validate", nervebox.WORKFLOWS / f"{name}.yaml").stdout, f"{name}: ok\n")
                run, code = nervebox.start(name, wait=True)
                self.assertEqual(code, 0, nervebox.row(run))

    def test_what_it_would_refuse_validate_refuses(self):
        for name, (worker, words) in REFUSED.items():
            with self.subTest(name):
                path = nervebox.define(name, nervebox.command("echo done", worker=worker), "/tmp")
                self.assertIn(words, ctl("validate", path, check=65).stderr)
