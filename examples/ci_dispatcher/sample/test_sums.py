"""What the sample's pipeline tests."""

import unittest


class Sums(unittest.TestCase):
    """Tests of addition."""

    def test_addition(self):
        self.assertEqual(1 + 1, 2)
