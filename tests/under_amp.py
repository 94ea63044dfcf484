"""Tests of a process in which AMP is on, which test_amp.py starts. AMP in the environment is the dtype."""

import os

import modes
import mxnet as mx
import numpy as np
import pages
import pytest
import reference
import tolerances
from digits import WithLoss
from mxnet import autograd, gluon, nd
from mxnet.contrib import amp
from mxnet.gluon import nn
from tolerances import assert_close

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

AMP = os.environ['AMP']
BFLOAT16 = np.dtype([('bfloat16', np.uint16)])
ROUNDED = tolerances.Tolerance(absolute=2**-24, relative=2**-8)  # to the 8 bits of bfloat16
BATCH, FEATURES = 6, 8


class Divided(nn.HybridBlock):
    def hybrid_forward(self, F, x):
        return x / 2


class Reshaped(nn.HybridBlock):
    def hybrid_forward(self, F, x):
        return x.reshape((0, -1))


class Normalized(nn.HybridBlock):
    def hybrid_forward(self, F, x):
        return F.L2Normalization(x)


LAST_LAYERS = {
    'Dense': (),
    'division': (Divided,),
    'reshape': (Reshaped,),
    'LayerNorm': (nn.LayerNorm,),
    'L2Normalization': (Normalized,),
}


def make_net(last, classes):
    """MXNet has no Dense in float16 on a CPU: there an embedding takes its place."""
    net = nn.HybridSequential()
    net.add(nn.Dense(classes) if AMP == 'bfloat16' and last != 'Embedding' else nn.Embedding(BATCH, classes))
    net.add(*[layer() for layer in LAST_LAYERS.get(last, ())])
    net.initialize(mx.init.Normal(1))
    return net


def make_data(net, rng):
    is_dense = isinstance(net[0], nn.Dense)
    return nd.array(rng.normal(0, 1, (BATCH, FEATURES)) if is_dense else np.arange(BATCH))


class Both(gluon.HybridBlock):
    """A net and its loss, which returns the logits too."""

    def __init__(self, net, loss_fn):
        super().__init__()
        self.net, self.loss_fn = net, loss_fn

    def hybrid_forward(self, F, data, label):
        pred = self.net(data)
        return pred, self.loss_fn(pred, label)


def alone(both):
    both.net.hybridize()


def nested(both):
    both.hybridize()


def eager(both):
    both.loss_fn.hybridize(False)


@pytest.mark.parametrize('label_dtype', ['int32', 'int64', 'float32', 'float64'])
@pytest.mark.parametrize('classes', [4, 3000])
@pytest.mark.parametrize('mode', [alone, nested, eager], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize('last', [*LAST_LAYERS, 'Embedding'])
def test_a_net_trains(last, mode, classes, label_dtype, kernel, rng):
    """With the loss of the logits that the net rounded, as float64 has it."""
    net = make_net(last, classes)
    both = Both(net, StableSoftmaxCELoss(ignore_label=-1))
    mode(both)
    data, label = make_data(net, rng), rng.randint(0, classes, BATCH)
    label[2] = -1
    label = nd.array(label, dtype=label_dtype)
    both(data, label)  # not recorded
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1})
    losses = []
    for _ in range(3):
        with autograd.record():
            pred, loss = both(data, label)
        loss.backward()
        trainer.step(BATCH)
        nd.waitall()  # here an error of the device is raised
        expected, _ = reference.loss_and_gradient(
            pred.astype('float32').asnumpy(), label.asnumpy().astype('float64'), ignore_label=-1
        )
        assert loss.dtype == np.float32
        assert_close(loss.asnumpy(), expected, tolerances.stated(kernel, 'float32'))
        losses.append(expected.mean())
    assert losses[-1] < losses[0]


OPTIONS = {
    'ignore_label': -1,
    'label_smoothing': 0.1,
    'lse_square_scale': 0.01,
    'class_weight': [1, 2, 0.5, 3],
}


@pytest.mark.skipif(AMP != 'bfloat16', reason='MXNet casts to no float16 on a CPU')
@pytest.mark.parametrize('options', [{}, OPTIONS, {'sparse_label': False}], ids=['plain', 'all', 'dense'])
def test_gradient_through_bfloat16(options, kernel, rng):
    pred = nd.amp_cast(nd.array(rng.normal(0, 3, (5, 4))), dtype=BFLOAT16).astype('float32')
    label = np.eye(4)[[0, 3, 1, 2, 1]] if 'sparse_label' in options else np.array([0, 3, -1, 2, 1])
    pred.attach_grad()
    with autograd.record():
        logits = nd.amp_cast(pred, dtype=BFLOAT16)
        loss = StableSoftmaxCELoss(**options)(logits, nd.array(label))
    loss.backward()
    expected, gradient = reference.loss_and_gradient(pred.asnumpy(), label, **options)
    assert loss.dtype == np.float32
    assert_close(loss.asnumpy(), expected, tolerances.LOSS)
    assert_close(pred.grad.asnumpy(), gradient, ROUNDED)


@pytest.mark.parametrize('last', [*LAST_LAYERS, 'Embedding'])
@pytest.mark.parametrize('label_dtype', ['int32', 'int64', 'float32', 'float64'])
def test_metrics_of_logits_and_of_probabilities(label_dtype, last, kernel, rng):
    net = make_net(last, 3000)
    net.hybridize()
    label = rng.randint(0, 3000, BATCH)
    pred = net(make_data(net, rng))
    rounded = pred.astype('float32').asnumpy()
    expected = reference.loss_and_gradient(rounded, label)[0].mean()
    probs = nd.softmax(pred)
    inputs = {'logits': pred, 'log_probs': nd.log_softmax(pred), 'probs': probs}
    for pred_type, array in inputs.items():
        metric = StableCrossEntropy(pred_type=pred_type)
        metric.update(nd.array(label, dtype=label_dtype), array)
        assert metric.get()[1] == tolerances.NLL.approx(expected)


@pytest.mark.parametrize('mode', [alone, nested], ids=lambda mode: mode.__name__)
def test_a_scaled_loss_trains(mode, rng):
    """By as much as one that is not scaled."""
    weights = []
    for is_scaled in (False, True):
        mx.random.seed(1)
        net = make_net('LayerNorm', 4)
        both = Both(net, StableSoftmaxCELoss())
        mode(both)
        data, label = make_data(net, np.random.RandomState(0)), nd.array(rng.randint(0, 4, BATCH) * 0)
        options = {'learning_rate': 0.5}
        trainer = gluon.Trainer(net.collect_params(), 'sgd', options, update_on_kvstore=False)
        amp.init_trainer(trainer)
        for _ in range(3):
            with autograd.record():
                _, loss = both(data, label)
                if is_scaled:
                    with amp.scale_loss(loss, trainer) as scaled:
                        autograd.backward(scaled)
                else:
                    autograd.backward(loss)
            trainer.step(BATCH)
        weights.append([value.data().asnumpy() for value in net.collect_params().values()])
    for plain, scaled in zip(*weights):
        assert_close(scaled, plain, ROUNDED)


@pytest.mark.parametrize('last', [*LAST_LAYERS, 'Embedding'])
def test_an_exported_net_computes_in_float32(last, rng):
    net = make_net(last, 5)
    loss_fn = StableSoftmaxCELoss(label_smoothing=0.1, class_weight=[1, 2, 3, 4, 5])
    both = WithLoss(net, loss_fn)
    both.hybridize()
    data, label = make_data(net, rng), nd.array([0, 1, 2, 3, 4, 9])
    loss = both(data, label).asnumpy()
    loaded = modes.load_exported(both, 2)
    assert_close(loaded(data, label).asnumpy(), loss, tolerances.Tolerance(relative=0.02))


def test_float64_stays_float64(rng):
    pred, label = rng.normal(0, 3, (8, 5)), np.arange(8) % 5
    for mode in (modes.default, modes.eager):
        loss, _ = mode(StableSoftmaxCELoss(), pred, label)
        assert_close(loss, reference.loss_and_gradient(pred, label)[0], tolerances.FLOAT64)


@pytest.mark.skipif(AMP != 'bfloat16', reason='the page uses bfloat16, for a CPU')
def test_blocks_of_the_page_run():
    namespace = {}
    for block in pages.blocks_of('docs/mixed_precision.md', 'py'):
        exec(compile(block.text, 'docs/mixed_precision.md', 'exec'), namespace)
