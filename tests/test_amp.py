"""Mixed precision, in processes of its own, since amp.init cannot be undone."""

import subprocess
import sys

import mxnet as mx
import pytest
from modes import VERSION

# A net learns, with and without a graph, from labels of several dtypes.
BFLOAT16 = """
import mxnet as mx, numpy as np
from mxnet import autograd, gluon
from mxnet.contrib import amp
amp.init(target_dtype='bfloat16')
from gluon_stable_ce import StableSoftmaxCELoss
mx.random.seed(0)
rng = np.random.RandomState(0)
label = rng.randint(0, 4, 256)
data = mx.nd.array(rng.normal(0, 1, (256, 8)) + 3 * np.eye(4, 8)[label])
for dtype in ('float32', 'int32', 'int64'):
    for hybridize in (False, True):
        net = gluon.nn.HybridSequential()
        net.add(gluon.nn.Dense(16, activation='relu'), gluon.nn.Dense(4))
        net.initialize(mx.init.Xavier())
        net.hybridize(hybridize)
        trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
        loss_fn = StableSoftmaxCELoss(ignore_label=-1, class_weight=[1, 1, 1, 2], label_smoothing=0.01)
        losses = []
        for _ in range(30):
            with autograd.record():
                loss = loss_fn(net(data), mx.nd.array(label, dtype=dtype))
            loss.backward()
            trainer.step(256)
            assert loss.dtype == np.float32, loss.dtype
            losses.append(float(loss.mean().asscalar()))
        assert losses[-1] < losses[0] / 3, (dtype, hybridize, losses)
"""
# A layer learns with a loss scaler.
FLOAT16 = """
import mxnet as mx, numpy as np
from mxnet import autograd, gluon
from mxnet.contrib import amp
amp.init()
from gluon_stable_ce import StableSoftmaxCELoss
rng = np.random.RandomState(0)
label = rng.randint(0, 4, 256)
with mx.gpu():
    data = mx.nd.array(rng.normal(0, 1, (256, 8)) + 3 * np.eye(4, 8)[label])
    net = gluon.nn.Dense(4)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1}, update_on_kvstore=False)
    amp.init_trainer(trainer)
    loss_fn, losses = StableSoftmaxCELoss(), []
    for _ in range(30):
        with autograd.record():
            loss = loss_fn(net(data), mx.nd.array(label))
            with amp.scale_loss(loss, trainer) as scaled:
                autograd.backward(scaled)
        trainer.step(256)
        losses.append(float(loss.mean().asscalar()))
assert loss.dtype == np.float32 and losses[-1] < losses[0] / 3, losses
"""
NO_BFLOAT16 = pytest.mark.skipif(VERSION < (1, 7), reason='MXNet has bfloat16 since 1.7')
NO_GPU = pytest.mark.skipif(not mx.context.num_gpus(), reason="MXNet's float16 layers need a GPU")


@pytest.mark.slow
@pytest.mark.parametrize(
    'code',
    [pytest.param(BFLOAT16, marks=NO_BFLOAT16), pytest.param(FLOAT16, marks=NO_GPU)],
    ids=['bfloat16', 'float16'],
)
def test_a_net_learns(code):
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
