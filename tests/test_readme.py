"""The README: its Python blocks run, and its generated parts are up to date. UPDATE_README=1 writes what is generated."""

import inspect
import os
import re
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
def test_first_table_is_what_is_measured():
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


def test_distributed_example_is_dist_train():
    check_section('tests/dist_train.py', f'```python\n{read("tests/dist_train.py")}```\n')


def test_with_loss_is_the_block_of_the_digits_example():
    check_section('WithLoss', f'```python\n{inspect.getsource(WithLoss)}```\n')


def test_benchmark_is_results_md():
    check_section('benchmarks/results.md', read('benchmarks/results.md'))
