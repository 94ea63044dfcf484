"""Run the jobs of a client package twice, as they are and under ``gluon_stable_ce run``, and compare their numbers."""

import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TOLERANCE = 1e-4  # of the largest absolute value of an array

collect_ignore_glob = ['jobs_*.py', 'runner.py']


@functools.lru_cache(maxsize=None)
def execute(script, *how):
    """The results of all jobs in `script`, and how many losses and metrics were this package's."""
    env = dict(os.environ, PYTHONPATH=ROOT, MPLBACKEND='agg')
    command = [sys.executable, '-W', 'ignore', *how, os.path.join(HERE, script)]
    done = subprocess.run(
        command, env=env, cwd=HERE, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = re.search(r'(\d+) loss(?:es)? and (\d+) metrics? were replaced', done.stderr)
    return json.loads(done.stdout), counts and tuple(map(int, counts.groups()))


def both(script, job):
    """What the job returns with stock and with this package."""
    return execute(script)[0][job], execute(script, '-m', 'gluon_stable_ce', 'run')[0][job]


def compare(script, job):
    """Assert that the job gives the same numbers with stock and with this package."""
    stock, ours = both(script, job)
    assert 'error' not in stock, stock['error']
    assert 'error' not in ours, ours['error']
    assert stock.keys() == ours.keys()
    for name, expected in stock.items():
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(
            ours[name], expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=f'{job}: {name}'
        )


@pytest.fixture
def results():
    return both


@pytest.fixture
def same_numbers():
    return compare


@pytest.fixture
def counts():
    """How many losses and metrics were replaced in a script's jobs."""
    return lambda script: execute(script, '-m', 'gluon_stable_ce', 'run')[1]
