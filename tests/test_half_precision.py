"""A loss inside a float16 net is computed in float32, also where the graph does not know its dtypes."""

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
import reference
import tolerances
from checks import assert_loss_is_reference
from digits import WithLoss
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn
from tolerances import assert_close

from gluon_stable_ce import StableSoftmaxCELoss, array_api

C = 6
MANY = 50257
# Those that start from variables, whose dtypes no graph knows.
every_graph = modes.parametrize(modes.SYMBOLIC)


class Resized(nn.HybridBlock):
    def hybrid_forward(self, F, x):
        return F.contrib.BilinearResize2D(x, height=5, width=5)


class Tied(nn.HybridBlock):
    """An embedding whose weight is that of the output layer."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.weight = self.params.get('weight', shape=(C, 3))

    def hybrid_forward(self, F, x, weight):
        x = F.Embedding(x, weight, input_dim=C, output_dim=3)
        return F.FullyConnected(x, weight, no_bias=True, num_hidden=C, flatten=False)


class Recurrent(nn.HybridBlock):
    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.lstm, self.output = gluon.rnn.LSTM(4, layout='NTC'), nn.Dense(C, flatten=False)

    def hybrid_forward(self, F, x):
        return self.output(self.lstm(x))


def convolutions():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 1, activation='relu'), nn.Conv2D(C, 1), nn.GlobalAvgPool2D(), nn.Flatten())
    return net


NETS = {  # and their class axes
    'Embedding': (lambda: nn.Embedding(C, C), -1),
    'BilinearResize': (Resized, 1),
    'Conv2D': (lambda: nn.Conv2D(C, 3), 1),
    'Conv2DTranspose': (lambda: nn.Conv2DTranspose(C, 3), 1),
    'LSTM and Dense': (Recurrent, -1),
    'tied weights': (Tied, -1),
    'as SqueezeNet': (convolutions, -1),
}


@pytest.mark.parametrize('dtype', ['float16', 'float64'])
@pytest.mark.parametrize(('build', 'axis'), cases.rows(NETS))
def test_a_graph_reduces_the_classes_in_float32_at_least(build, axis, dtype):
    """By what MXNet infers of the graph, since it runs few of these layers in float16 on a CPU."""
    net = build()
    both = WithLoss(net, StableSoftmaxCELoss(axis=axis, label_smoothing=0.1, lse_square_scale=0.1))
    both.cast(dtype)
    data, label = mx.sym.var('data'), mx.sym.var('label', dtype='float32')
    assert array_api.dtype_name(net(data)) is None
    nodes = both(data, label).get_internals()
    dtypes = dict(zip(nodes.list_outputs(), nodes.infer_type(data=dtype)[1]))
    reduced = {name: dtype for name, dtype in dtypes.items() if 'log_softmax' in name}
    assert reduced
    assert {*reduced.values(), list(dtypes.values())[-1]} == {
        np.dtype(dtype if dtype == 'float64' else 'float32').type
    }


@every_graph
@pytest.mark.parametrize('layout', cases.FEW_LAYOUTS)
@pytest.mark.parametrize('options', cases.params({**cases.SPARSE, **cases.DENSE}))
def test_every_option_in_float16(options, layout, mode, rng):
    shape, axis, batch_axis = cases.LAYOUTS[layout]
    pred, label = cases.make(rng, shape, axis, **options)
    weight = np.expand_dims(rng.uniform(0, 2, np.delete(shape, axis)), axis)
    settings = {**options, 'axis': axis, 'batch_axis': batch_axis}
    for dtype in ('float16', 'float32'):
        arrays = pred.astype('float16'), label.astype(dtype), weight.astype(dtype)
        assert_loss_is_reference(settings, *arrays, mode=mode)


@every_graph
def test_many_classes(mode, rng):
    """In float16 arange stops at 2048, and the sum of the exponentials is off by half a nat."""
    pred = rng.normal(0, 3, (8, MANY)).astype('float16')
    label = rng.randint(0, MANY, 8).astype('float32')
    assert_loss_is_reference({'label_smoothing': 0.1}, pred, label, mode=mode)
    assert_loss_is_reference({}, pred, label, mode=mode)


def test_a_net_of_many_classes(rng):
    net = nn.Embedding(8, MANY)
    both = WithLoss(net, StableSoftmaxCELoss())
    both.initialize(mx.init.Normal(3))
    both.cast('float16')
    both.hybridize()
    data, label = nd.arange(8, dtype='float16'), rng.randint(0, MANY, 8)
    with autograd.record():
        loss = both(data, nd.array(label))
    loss.backward()
    expected, gradient = reference.loss_and_gradient(net.weight.data().asnumpy(), label)
    assert loss.dtype == np.float32
    assert_close(loss.asnumpy(), expected, tolerances.stated('stock', 'float32'))
    assert net.weight.grad().dtype == np.float16
    assert_close(net.weight.grad().asnumpy(), gradient, tolerances.FLOAT16_GRADIENT)


@pytest.mark.parametrize(
    ('first', 'second'),
    [('float32', 'float64'), ('float64', 'float32'), ('float16', 'float64'), ('float32', 'float16')],
)
@pytest.mark.parametrize('options', [{}, {'class_weight': np.arange(5), 'label_smoothing': 0.1}], ids=str)
def test_a_net_that_is_cast_after_its_first_use(first, second, options, rng):
    """Its symbols go on telling the first dtype."""
    pred, label, weight = rng.normal(0, 1, (4, 5)), np.arange(4), np.array([[1], [2], [0], [3]], 'float32')
    net = nn.LayerNorm(center=False, scale=True, in_channels=5)
    both = WithLoss(net, StableSoftmaxCELoss(**options))
    both.initialize()
    both.hybridize()
    for dtype in (first, second):
        both.cast(dtype)
        loss = both(nd.array(pred, dtype=dtype), nd.array(label), nd.array(weight))
    logits = net(nd.array(pred, dtype=second)).asnumpy()
    assert loss.dtype == (np.float64 if second == 'float64' else np.float32)
    expected = reference.loss_and_gradient(logits, label, weight, **options)[0]
    assert_close(loss.asnumpy(), expected, tolerances.FLOAT64 if second == 'float64' else tolerances.LOSS)


@pytest.mark.skipif(modes.VERSION < (1, 7), reason='MXNet has bfloat16 since 1.7')
@pytest.mark.parametrize('is_compiled', [True, False], ids=['compiled', 'eager'])
def test_bfloat16_arrays_are_computed_in_float32(kernel, is_compiled, rng):
    rounded = rng.randint(-32, 32, (8, C)).astype('float32') / 8  # bfloat16 holds them
    pred, label = nd.cast(nd.array(rounded), dtype=array_api.BFLOAT16), nd.array(rng.randint(0, C, 8))
    loss_fn = StableSoftmaxCELoss(kernel=kernel)
    loss_fn.hybridize(is_compiled)
    loss = loss_fn(pred, label)
    assert loss.dtype == np.float32
    np.testing.assert_array_equal(loss.asnumpy(), loss_fn(nd.array(rounded), label).asnumpy())
