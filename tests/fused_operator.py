"""The fused operator for tests: it is built if it can be, and called with few words."""

import os
import subprocess
import sys

import pytest

from gluon_stable_ce.kernels import library
from gluon_stable_ce.kernels.build import BuildError, build

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _why_not():
    try:
        build()
    except BuildError as error:
        return str(error)
    return None if library.load() else 'the library does not load'


SKIP = _why_not()
needs_operator = pytest.mark.skipif(SKIP is not None, reason=f'no fused operator: {SKIP}')
supported = pytest.mark.skipif(library.why_unsupported() is not None, reason=str(library.why_unsupported()))


def python(code, **environment):
    """What `code` prints in a process of its own; a variable that is None is not set."""
    environment = {**os.environ, 'PYTHONPATH': ROOT, **environment}
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={key: value for key, value in environment.items() if value is not None},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
