"""The example of the digits, as users run it, and its exact NLL."""

import os
import re
import subprocess
import sys

import digits
import numpy as np
import pytest
import tolerances
from modes import VERSION
from tolerances import assert_close

import gluon_stable_ce
from gluon_stable_ce.kernels import library

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('digits')]  # it trains

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


ROWS = ('as they are', 'rotated by 30 degrees', 'with noise', 'inverted')


def columns_of(printed, title):
    """The numbers of each column of a table, as they are printed, in the order of ROWS."""
    lines = printed.split(title)[1].splitlines()
    names = re.split(r' {2,}', lines[0].strip())
    rows = [next(line for line in lines if line.startswith(name))[22:].split() for name in ROWS]
    return dict(zip(names, zip(*rows)))


@pytest.mark.parametrize('title', ['mean NLL, nats', 'perplexity'])
def test_tables_agree_with_float64(example, title):
    done, _ = example
    columns = columns_of(done.stdout, title)
    exact = np.array(columns['float64'], float)
    for name in set(columns) - {'mx.metric', 'float64'}:
        kernel = 'fused' if name == 'ours, fused' else 'stock'
        assert_close(np.array(columns[name], float), exact, tolerances.SEVEN_DIGITS[kernel])
    assert (np.array(columns['mx.metric'], float) <= exact * (1 + 1e-5)).all()


def test_columns_are_those_of_the_kernels_that_are_there(example):
    done, _ = example
    ours = ('ours, stock', 'ours, fused') if library.load() else ('ours',)
    assert tuple(columns_of(done.stdout, 'mean NLL, nats')) == ('mx.metric', *ours, 'float64')


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
    picture = tmp_path / 'demo.png'
    options = ['--epochs', '0', '--out', str(tmp_path), '--picture', str(picture)]
    monkeypatch.setattr(sys, 'argv', ['digits.py', *options])
    digits.main()
    assert 'no label has a probability below 1e-12' in capsys.readouterr().out
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_exact_nll():
    logits = np.array([[0, 100.0], [20, 0]], 'float32')
    expected = [100, np.log1p(np.exp(-20))]
    nll = digits.exact_nll(logits, np.array([0, 0]))
    assert_close(nll, expected, tolerances.ROUNDED_FLOAT32)
