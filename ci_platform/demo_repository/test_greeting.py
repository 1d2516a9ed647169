import unittest

from src.greeting import greeting


class GreetingTest(unittest.TestCase):
    def test_it_names_who_is_greeted(self):
        self.assertEqual(greeting("dynflow"), "Hello, dynflow!")


if __name__ == "__main__":
    unittest.main()
