"""The scripts are run by test_command_run.py. Pytest must not import them to look for doctests."""

import os

collect_ignore = [name for name in os.listdir(os.path.dirname(__file__)) if name.endswith('.py')]
