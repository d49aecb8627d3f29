"""A short soak; `make soak` is the long one."""

import random
import unittest

import nervebox
import soak


class Short(unittest.TestCase):
    def test_faults_under_load(self):
        seed = random.SystemRandom().randrange(10**9)
        self.assertEqual(soak.soak(seconds=20, runs=40, faults=15, seed=seed), [], f"seed {seed}")

    @classmethod
    def tearDownClass(cls):
        nervebox.load({})
