"""Mixed precision, in processes of its own, since amp.init cannot be undone."""

import subprocess
import sys
import textwrap

import pytest

mx = pytest.importorskip('mxnet')


def run(code):
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, mx.__version__.split('.')[:2])) < (1, 7), reason='MXNet has bfloat16 since 1.7'
)
def test_a_net_trains_in_bfloat16_on_the_cpu():
    code = """
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
                        logits = net(data)
                        loss = loss_fn(logits, mx.nd.array(label, dtype=dtype))
                    loss.backward()
                    trainer.step(256)
                    assert loss.dtype == np.float32, loss.dtype
                    losses.append(float(loss.mean().asscalar()))
                assert losses[-1] < losses[0] / 3, (dtype, hybridize, losses)
        print('trained', logits.dtype)
    """
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert 'trained' in done.stdout


@pytest.mark.skipif(
    mx.context.num_gpus() == 0,
    reason="MXNet's float16 layers need a GPU, and this machine has none that MXNet can use",
)
def test_a_net_trains_in_float16_with_a_loss_scaler():
    code = """
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
    done = run(code)
    assert done.returncode == 0, done.stderr
