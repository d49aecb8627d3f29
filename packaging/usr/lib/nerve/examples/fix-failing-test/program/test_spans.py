import unittest

import spans


class Parse(unittest.TestCase):
    def test_seconds(self):
        self.assertEqual(spans.parse("90s"), 90)

    def test_several_words(self):
        self.assertEqual(spans.parse("2h 30min"), 9000)

    def test_a_day(self):
        self.assertEqual(spans.parse("1d"), 24 * 60 * 60)

    def test_nothing(self):
        self.assertEqual(spans.parse(""), 0)


class Show(unittest.TestCase):
    def test_several_words(self):
        self.assertEqual(spans.show(9002), "2h 30min 2s")

    def test_one_of_a_unit(self):
        self.assertEqual(spans.show(3661), "1h 1min 1s")

    def test_nothing(self):
        self.assertEqual(spans.show(0), "0s")


class Longest(unittest.TestCase):
    def test_longest(self):
        self.assertEqual(spans.longest(["90s", "2min", "1min 10s"]), "2min")

    def test_alone(self):
        self.assertEqual(spans.longest(["5s"]), "5s")
