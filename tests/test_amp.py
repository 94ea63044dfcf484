"""AMP, MXNet's automatic mixed precision, in processes of its own: amp.init cannot be undone."""

import functools
import os
import subprocess
import sys

import pytest
from modes import VERSION
from tolerances import PRINTED

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
NO_BFLOAT16 = pytest.mark.skipif(VERSION < (1, 7), reason='MXNet has bfloat16 since 1.7')
UNDER_AMP = """
import os, sys
import pytest
from mxnet.contrib import amp
amp.init(os.environ['AMP'])
sys.exit(pytest.main(sys.argv[1:]))
"""
# A script that knows nothing of this package.
SCRIPT = """
import sys
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.contrib import amp
amp.init(sys.argv[1])
mx.random.seed(0)
net = gluon.nn.HybridSequential()
net.add(gluon.nn.Embedding(8, 4), gluon.nn.LayerNorm())
if sys.argv[1] == 'bfloat16':
    net.add(gluon.nn.Dense(4))
net.initialize(mx.init.Normal(1))
net.hybridize()
trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1})
loss_fn, metric = gluon.loss.SoftmaxCrossEntropyLoss(), mx.metric.CrossEntropy()
data, label = mx.nd.arange(8), mx.nd.array(np.arange(8) % 4, dtype='int64')
print(type(loss_fn).__module__)
for _ in range(20):
    with autograd.record():
        pred = net(data)
        loss = loss_fn(pred, label)
    loss.backward()
    trainer.step(8)
    metric.reset()
    metric.update(label, mx.nd.softmax(pred))
    print(loss.mean().asscalar(), metric.get()[1])
"""


def python(*arguments, **variables):
    """Run Python with the package and the tests' modules. Return what it prints."""
    paths = [ROOT, HERE, os.environ.get('PYTHONPATH', '')]
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BFLOAT16_DENSE = """
import mxnet as mx
from mxnet.contrib import amp

amp.init('bfloat16')
ones = mx.nd.ones((4, 4))
mx.nd.FullyConnected(ones, ones, num_hidden=4, no_bias=True).wait_to_read()
"""


@functools.lru_cache(maxsize=None)
def has_bfloat16_dense():
    """Whether MXNet computes layers of bfloat16 on this processor, which needs AVX-512 for that."""
    done = subprocess.run([sys.executable, '-c', BFLOAT16_DENSE], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ('dtype', 'tests'),
    [
        pytest.param('bfloat16', 'under_amp.py', marks=NO_BFLOAT16),
        # a sample of two modules: the numbers are those without AMP
        pytest.param('bfloat16', 'test_labels.py -k stock', marks=NO_BFLOAT16),
        pytest.param('bfloat16', 'test_values.py -k stock', marks=NO_BFLOAT16),
        ('float16', 'under_amp.py'),
    ],
)
def test_tests_pass_under_amp(dtype, tests):
    name, *chosen = tests.split()
    if name == 'under_amp.py' and dtype == 'bfloat16' and not has_bfloat16_dense():
        chosen = ['-k', 'Embedding']  # the nets without such a layer
    options = ['-q', '--tb=short', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-m', 'not slow']
    quick = '' if name == 'under_amp.py' else '1'
    printed = python('-c', UNDER_AMP, *options, os.path.join(HERE, name), *chosen, AMP=dtype, QUICK=quick)
    assert ' passed' in printed


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [pytest.param('bfloat16', marks=NO_BFLOAT16), 'float16'])
def test_a_script_under_run(dtype, tmp_path):
    if dtype == 'bfloat16' and not has_bfloat16_dense():
        pytest.skip('MXNet has no bfloat16 Dense on this processor')
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    module, *lines = python('-m', 'gluon_stable_ce', 'run', str(script), dtype).splitlines()
    losses = [list(map(float, line.split())) for line in lines]
    assert module == 'gluon_stable_ce.patching'
    assert losses[-1][0] < losses[0][0] / 2
    for loss, metric in losses:
        assert metric == PRINTED.approx(loss)
