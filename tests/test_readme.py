"""The README: its tables are measured here, its blocks are run, its files are the files. UPDATE_README=1 writes what is generated."""

import inspect
import os
import re
import subprocess
import sys
import warnings

import mxnet as mx
import numpy as np
import pytest
import reference
from digits import WithLoss
from modes import VERSION

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = os.path.join(ROOT, 'README.md')


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        return file.read()


def blocks_of(language):
    """The texts of the README's fenced blocks in a language."""
    return [
        text
        for found, text in re.findall('^```(.*?)\n(.*?)^```$', read(README), re.S | re.M)
        if found == language
    ]


def check_section(name, text):
    """The README's text between the markers of `name` is `text`."""
    readme = read(README)
    begin, end = (
        re.search(f'<!-- {re.escape(name)}.*?-->\n', readme).end(),
        readme.index(f'<!-- end of {name} -->'),
    )
    if os.environ.get('UPDATE_README'):
        with open(README, 'w', encoding='utf-8') as file:
            file.write(readme[:begin] + text + readme[end:])
    else:
        assert readme[begin:end] == text


@pytest.mark.skipif(VERSION != (1, 9), reason='the table is of MXNet 1.9')
def test_the_table_of_truth():
    nd, stock_loss, loss_fn = mx.nd, mx.gluon.loss.SoftmaxCrossEntropyLoss(), StableSoftmaxCELoss()
    stock_metric, metric = mx.metric.CrossEntropy(), StableCrossEntropy()
    probs = np.array([[1e-43, 1]], 'float32')
    for m in (stock_metric, metric):
        m.update([nd.array([0])], [nd.array(probs)])
    sure, padded = np.array([[20, 0]], 'float32'), np.array([[1, 2, 3]], 'float32')

    def value(loss, pred, label):
        return float(loss(nd.array(pred), nd.array([label])).asscalar())

    half, label = np.random.RandomState(0).normal(0, 3, (16, 50257)).astype('float16'), np.arange(16)
    truth = reference.loss_and_gradient(half, label)[0]
    off = [
        np.abs(loss(nd.array(half, dtype='float16'), nd.array(label)).asnumpy() - truth).max()
        for loss in (stock_loss, loss_fn)
    ]
    check_section(
        'truth',
        '\n'.join(
            [
                f'| what you do | MXNet {mx.__version__} says | this package says | the truth |',
                '|---|---|---|---|',
                f'| `mx.metric.CrossEntropy` on a probability of 1e-43 | {stock_metric.get()[1]:.2f} | {metric.get()[1]:.2f} | '
                f'{-np.log(probs.astype("float64")[0, 0]):.2f} |',
                f'| the loss of logits [20, 0], label 0 | {value(stock_loss, sure, 0):.2e} | {value(loss_fn, sure, 0):.1e} | '
                f'{float(reference.nll(sure[0], 0)):.1e} |',
                f'| the loss of logits [1, 2, 3] with a padding label, -1 | {value(stock_loss, padded, -1):.2f}: trains class 0 | '
                f'{value(loss_fn, padded, -1)}, gradient 0 | no class |',
                f'| the loss of 50,257 float16 logits | off by {off[0]:.1f} | off by {off[1]:.0e} | |',
            ]
        )
        + '\n',
    )


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    if VERSION < (1, 9):
        pytest.skip('the ONNX block needs MXNet 1.9')
    pytest.importorskip('onnx')
    monkeypatch.chdir(tmp_path)
    blocks = [
        text for text in blocks_of('python') if text != read('tests/dist_train.py')
    ]  # that one has a test of its own
    assert len(blocks) >= 5
    namespace = {'__name__': 'readme'}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for block in blocks:
            exec(compile(block, 'README.md', 'exec'), namespace)
    assert np.isfinite(namespace['nats'])


@pytest.mark.slow
def test_shell_blocks_are_commands_that_exist(tmp_path):
    """They are make's targets, of which CI runs demo and test as they stand here, and the audit, which runs here."""
    commands = [line for block in blocks_of('') for line in block.splitlines()]
    targets = re.findall(r'^([a-z-]+):', read('Makefile'), re.M)
    np.savez(tmp_path / 'predictions.npz', pred=np.full((4, 2), 0.5), label=np.zeros(4, int))
    assert commands.count('make demo') == 2
    for command in commands:
        if command.startswith('make'):
            assert command.split()[1] in targets
        else:
            assert command.startswith('python -m gluon_stable_ce audit ')
            args = [sys.executable, *command.split()[1:]]
            done = subprocess.run(
                args, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ROOT}, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith('samples counted')


def test_the_distributed_example_is_the_one_that_is_tested():
    check_section('tests/dist_train.py', f'```python\n{read("tests/dist_train.py")}```\n')


def test_with_loss_is_the_block_of_the_example():
    check_section('WithLoss', f'```python\n{inspect.getsource(WithLoss)}```\n')


def test_the_benchmark_is_the_one_that_was_measured():
    check_section('benchmarks/results.md', read('benchmarks/results.md'))


def test_the_bounds_hold_in_the_benchmark():
    """They are in its last table; nothing is timed here."""
    table = read('benchmarks/results.md').split('\n\n')[-1]
    bounds = [
        (float(bound), float(measured))
        for bound, measured in re.findall(r'\| ([\d.]+) \| ([\d.]+)[^|]*\|$', table, re.M)
    ]
    assert bounds
    assert 'not met' not in table
    assert all(measured <= bound for bound, measured in bounds)


def test_links_lead_somewhere():
    readme = read(README)
    headings = {
        re.sub('[^a-z0-9 -]', '', line.lstrip('# ').lower()).replace(' ', '-')
        for line in readme.splitlines()
        if line.startswith('#')
    }
    for target in re.findall(r'\]\(([^)]+)\)', readme):
        assert (
            target[1:] in headings if target.startswith('#') else os.path.exists(os.path.join(ROOT, target))
        )
