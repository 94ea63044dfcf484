"""The example of the digits, as users run it, and its exact NLL."""

import os
import subprocess
import sys

import digits
import numpy as np
import pytest
from modes import VERSION

import gluon_stable_ce

pytestmark = pytest.mark.slow  # it trains

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(gluon_stable_ce.__file__)))


@pytest.fixture(scope='module')
def example(tmp_path_factory):
    """Run the example as a script; (the finished process, its output folder)."""
    out = tmp_path_factory.mktemp('digits')
    done = subprocess.run(
        [sys.executable, digits.__file__, '--out', str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=str(out),
        env={**os.environ, 'PYTHONPATH': ROOT},
    )
    assert done.returncode == 0, done.stderr
    return done, out


def test_table_agrees_with_float64(example):
    done, _ = example
    for name in ('as they are', 'rotated by 30 degrees', 'with noise', 'inverted'):
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        stock, ours, exact = map(float, line[22:].split()[:3])
        assert abs(ours - exact) <= 1e-5 * exact + 1e-5  # five decimals are printed
        assert 0 < stock <= exact + 1e-5


def test_sentence_names_the_row_that_differs(example):
    done, _ = example
    assert 'Look at the row "inverted": ours agrees with float64' in done.stdout


def test_writes_picture_and_reloadable_graph(example):
    done, out = example
    assert 'differ by at most 0.0e+00' in done.stdout
    assert (out / 'nll.png').read_bytes().startswith(b'\x89PNG')
    assert (out / 'net-symbol.json').exists()


@pytest.mark.skipif(VERSION < (1, 9), reason='older versions warn about the dtype of imported inputs')
def test_prints_no_warnings(example):
    done, _ = example
    assert done.stderr == ''


def test_untrained_net_has_no_small_probabilities(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['digits.py', '--epochs', '0', '--out', str(tmp_path)])
    digits.main()
    assert 'no label has a probability below 1e-12' in capsys.readouterr().out


def test_exact_nll():
    logits = np.array([[0, 100.0], [20, 0]], 'float32')
    expected = [100, np.log1p(np.exp(-20))]
    nll = digits.exact_nll(logits, np.array([0, 0]))
    np.testing.assert_allclose(nll, expected, rtol=1e-6)  # 20 + 2e-9 has that many digits
