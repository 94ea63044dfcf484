"""Gradients arrive where and how they are asked for: written, added, or not at all, whatever made the logits.

The fused operator can only write. Sums are the danger: MXNet passes their gradient on to the variable behind
them without an operator of its own.
"""

import mxnet as mx
import numpy as np
import pytest
import reference
from mxnet import autograd, gluon
from tolerances import ADDED_GRADIENTS, SUMS, assert_close

from gluon_stable_ce import StableSoftmaxCELoss

LOGITS = np.array([[0.5, -1, 2, 0], [1, 1, -2, 0.25], [3, 0, 0.5, -0.5]], 'float32')
LABEL = np.array([2, 0, 3], 'float32')


def gradient(logits, label=LABEL):
    """Of the sum of the losses: p - onehot."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p - np.eye(logits.shape[-1])[label.astype(int)]


def zeros(x):
    return mx.nd.zeros_like(x)


def nested_sum(x):
    return mx.nd.elemwise_add(mx.nd.elemwise_add(x, zeros(x)), mx.nd.elemwise_add(zeros(x), zeros(x)))


def as_np(x, operator, other):
    return operator(x.as_np_ndarray(), other.as_np_ndarray()).as_nd_ndarray()


# how the logits are made of a leaf, and how many times the leaf is in them
SOURCES = {
    'leaf': (lambda x: x, 1),
    'elemwise_add': (lambda x: mx.nd.elemwise_add(x, zeros(x)), 1),
    'sum of sums': (nested_sum, 1),
    'add_n': (lambda x: mx.nd.add_n(x, zeros(x), zeros(x)), 1),
    'plus': (lambda x: x + zeros(x), 1),
    'x + x': (lambda x: x + x, 2),
    'add_n of x': (lambda x: mx.nd.add_n(x, x, x), 3),
    'x + 2x': (lambda x: x + x * 2, 3),
    'identity': (mx.nd.identity, 1),
    'identity of a sum': (lambda x: mx.nd.identity(x + zeros(x)), 1),
    'reshape': (lambda x: x.reshape((3, 4)), 1),
    'reshape of a sum': (lambda x: (x + zeros(x)).reshape((3, 4)), 1),
    'slice': (lambda x: x[:], 1),
    'scalar': (lambda x: x * 1, 1),
    'broadcast_add': (lambda x: mx.nd.broadcast_add(x, mx.nd.zeros((1, 4))), 1),
    'dot': (lambda x: mx.nd.dot(x, mx.nd.one_hot(mx.nd.arange(4), 4)), 1),
    'np.add': (lambda x: as_np(x, mx.np.add, zeros(x)), 1),
    'np.add to itself': (lambda x: as_np(x, mx.np.add, x), 2),
    'np.dot': (lambda x: as_np(x, mx.np.dot, mx.nd.one_hot(mx.nd.arange(4), 4)), 1),
}
sources = pytest.mark.parametrize(('source', 'times'), SOURCES.values(), ids=SOURCES)
BACKWARDS = {'write': 1, 'add': 3}  # how many of three backwards arrive
grad_reqs = pytest.mark.parametrize('grad_req', BACKWARDS)


@grad_reqs
@sources
def test_leaf(source, times, grad_req, kernel):
    loss_fn, leaf = StableSoftmaxCELoss(kernel=kernel), mx.nd.array(LOGITS)
    leaf.attach_grad(grad_req)
    for _ in range(3):
        with autograd.record():
            loss = loss_fn(source(leaf), mx.nd.array(LABEL))
        loss.backward()
    expected = BACKWARDS[grad_req] * times * gradient(times * LOGITS)
    assert_close(leaf.grad.asnumpy(), expected, ADDED_GRADIENTS)


@sources
def test_leaf_without_a_gradient_beside_one_that_has_one(source, times, kernel):
    loss_fn, leaf, other = StableSoftmaxCELoss(kernel=kernel), mx.nd.array(LOGITS), mx.nd.ones(3)
    leaf.attach_grad('null')
    grad = leaf.grad  # which MXNet takes from the leaf
    grad[:] = 5
    other.attach_grad()
    with autograd.record():
        loss = loss_fn(source(leaf), mx.nd.array(LABEL)) * other
    loss.backward()
    np.testing.assert_array_equal(grad.asnumpy(), 5)
    assert (other.grad.asnumpy() > 0).all()


@grad_reqs
@sources
@pytest.mark.parametrize('losses', [2, 4, 9])  # MXNet 1.6 adds up 5 to 7 gradients wrongly
def test_several_losses_on_the_same_logits(losses, source, times, grad_req, kernel):
    loss_fn, leaf = StableSoftmaxCELoss(kernel=kernel), mx.nd.array(LOGITS)
    leaf.attach_grad(grad_req)
    for _ in range(3):
        with autograd.record():
            pred = source(leaf)
            values = [loss_fn(pred, mx.nd.array((LABEL + i) % 4)) for i in range(losses)]
        autograd.backward(values)
    total = sum(gradient(times * LOGITS, (LABEL + i) % 4) for i in range(losses))
    assert_close(leaf.grad.asnumpy(), BACKWARDS[grad_req] * times * total, ADDED_GRADIENTS)


@grad_reqs
@sources
def test_several_backwards_of_one_recording(source, times, grad_req, kernel):
    loss_fn, leaf = StableSoftmaxCELoss(kernel=kernel), mx.nd.array(LOGITS)
    leaf.attach_grad(grad_req)
    with autograd.record():
        loss = loss_fn(source(leaf), mx.nd.array(LABEL))
    for i in range(3):
        loss.backward(retain_graph=i < 2)
    expected = BACKWARDS[grad_req] * times * gradient(times * LOGITS)
    assert_close(leaf.grad.asnumpy(), expected, ADDED_GRADIENTS)


@sources
def test_logits_beside_another_use_of_the_leaf(source, times, kernel):
    """The leaf gets a gradient from elsewhere in the same backward."""
    loss_fn, leaf = StableSoftmaxCELoss(kernel=kernel), mx.nd.array(LOGITS)
    leaf.attach_grad()
    with autograd.record():
        loss = loss_fn(source(leaf), mx.nd.array(LABEL)).sum() + (leaf * 7).sum()
    loss.backward()
    assert_close(leaf.grad.asnumpy(), times * gradient(times * LOGITS) + 7, ADDED_GRADIENTS)


class Net(gluon.HybridBlock):
    """Logits: layers, and a bias of (1, C) that the operator `add` adds."""

    def __init__(self, add, layers):
        super().__init__()
        self._add = add
        with self.name_scope():
            self.layers = gluon.nn.HybridSequential()
            for _ in range(layers):
                self.layers.add(gluon.nn.Dense(4, use_bias=False, in_units=4))
            self.bias = self.params.get('bias', shape=(1, 4), init='zeros')

    def hybrid_forward(self, F, x, bias):
        return getattr(F, self._add)(self.layers(x), bias)


class NetWithLoss(gluon.HybridBlock):
    """A net whose output is the loss."""

    def __init__(self, net, loss_fn):
        super().__init__()
        self.net, self.loss_fn = net, loss_fn

    def hybrid_forward(self, F, x, label):
        return self.loss_fn(self.net(x), label)


MEMORY = {
    'eager': None,
    'hybrid': {},
    'static_alloc': {'static_alloc': True},
    'static_shape': {'static_alloc': True, 'static_shape': True},
}
memories = pytest.mark.parametrize('memory', MEMORY.values(), ids=MEMORY)


def is_right_with_other_losses(inside, add, layers, memory):
    """Whether MXNet computes the gradient of the bias. It loses that of some sums at the end of a graph."""
    if add == 'broadcast_add' or memory == 'eager':
        return True
    return inside or layers < 3 if memory == 'hybrid' else inside and layers > 0


# MXNet puts graphs of up to two operators inline
NETS = [
    pytest.param(inside, add, layers, MEMORY[memory], id=f'{add}-{layers}-{memory}-{inside}')
    for inside in ('loss outside', 'loss inside')
    for add in ('elemwise_add', 'broadcast_add')
    for layers in (0, 1, 3)
    for memory in MEMORY
    if is_right_with_other_losses(inside == 'loss inside', add, layers, memory)
]


def gradients_of_micro_batches(net, loss_fn, grad_req, inside=False, memory=None):
    """The gradients of the parameters after each row has been a batch of its own, the bias's first."""
    net.initialize()
    for i, parameter in enumerate(net.collect_params().values()):
        parameter.set_data(mx.nd.array(np.random.RandomState(i).standard_normal(parameter.shape)))
        parameter.grad_req = grad_req
    model = NetWithLoss(net, loss_fn) if inside else net
    if memory is not None:
        model.hybridize(**memory)
    for logits, label in zip(LOGITS, LABEL):
        x, y = mx.nd.array(logits[None]), mx.nd.array([label])
        with autograd.record():
            loss = model(x, y) if inside else loss_fn(model(x), y)
        loss.backward()
    return [parameter.grad().asnumpy() for parameter in net.collect_params().values()]


@grad_reqs
@pytest.mark.parametrize(('inside', 'add', 'layers', 'memory'), NETS)
def test_parameters_of_nets_that_add_gradients_of_micro_batches(
    inside, add, layers, memory, grad_req, kernel
):
    loss_fn, net = StableSoftmaxCELoss(kernel=kernel), Net(add, layers)
    actual = gradients_of_micro_batches(net, loss_fn, grad_req, inside == 'loss inside', memory)
    other_loss = gluon.loss.SoftmaxCrossEntropyLoss()
    expected = gradients_of_micro_batches(Net('broadcast_add', layers), other_loss, grad_req)
    # behind an elemwise_add with 'add', layers get what has been added up for the bias, with every loss
    count = 1 if add == 'elemwise_add' and grad_req == 'add' else len(expected)
    for grad, true in zip(actual[:count], expected):
        assert_close(grad, true, ADDED_GRADIENTS)


@grad_reqs
@memories
def test_leaf_of_a_net_that_is_the_loss(memory, grad_req, kernel):
    model, x = NetWithLoss(lambda x: x, StableSoftmaxCELoss(kernel=kernel)), mx.nd.array(LOGITS)
    if memory is not None:
        model.hybridize(**memory)
    x.attach_grad(grad_req)
    for _ in range(3):
        with autograd.record():
            loss = model(x, mx.nd.array(LABEL))
        loss.backward()
    assert_close(x.grad.asnumpy(), BACKWARDS[grad_req] * gradient(LOGITS), ADDED_GRADIENTS)


@grad_reqs
@memories
@pytest.mark.parametrize('label_dtype', ['float32', 'int32'])
def test_a_label_keeps_its_gradient(label_dtype, memory, grad_req, kernel):
    loss_fn, label = StableSoftmaxCELoss(kernel=kernel), mx.nd.array(LABEL, dtype=label_dtype)
    net = NetWithLoss(Net('broadcast_add', 1), loss_fn)
    net.initialize()
    if memory is not None:
        net.hybridize(**memory)
    label.attach_grad(grad_req)
    label.grad[:] = 5
    for model in (net, lambda x, y: loss_fn(net.net(x), y)):
        with autograd.record():
            loss = model(mx.nd.array(LOGITS), label)
        loss.backward()
        assert set(label.grad.asnumpy()) <= ({5} if grad_req == 'add' else {0, 5})


@grad_reqs
@sources
def test_sample_weight(source, times, grad_req, kernel):
    loss_fn, leaf, weight = StableSoftmaxCELoss(kernel=kernel), mx.nd.array(LOGITS), mx.nd.array([1, 2, 0.5])
    leaf.attach_grad(grad_req)
    weight.attach_grad(grad_req)
    for _ in range(3):
        with autograd.record():
            loss = loss_fn(source(leaf), mx.nd.array(LABEL), weight.reshape((3, 1)))
        loss.backward()
    nll = loss_fn(mx.nd.array(times * LOGITS), mx.nd.array(LABEL)).asnumpy()
    assert_close(weight.grad.asnumpy(), BACKWARDS[grad_req] * nll, ADDED_GRADIENTS)
    expected = BACKWARDS[grad_req] * times * gradient(times * LOGITS) * [[1], [2], [0.5]]
    assert_close(leaf.grad.asnumpy(), expected, ADDED_GRADIENTS)


class Twice(gluon.HybridBlock):
    """A net that reads its logits twice."""

    def __init__(self, combine):
        super().__init__()
        self.combine = combine
        self.loss_fn, self.smoothed = StableSoftmaxCELoss(), StableSoftmaxCELoss(label_smoothing=0.1)

    def hybrid_forward(self, F, data, label, other, weight):
        return self.combine(self, data * 2, label, other, weight)


TWICE = {
    'same': lambda net, pred, label, other, weight: net.loss_fn(pred, label) + net.loss_fn(pred, label),
    'labels': lambda net, pred, label, other, weight: net.loss_fn(pred, label) + net.loss_fn(pred, other),
    'options': lambda net, pred, label, other, weight: net.loss_fn(pred, label) + net.smoothed(pred, label),
    'weights': lambda net, pred, label, other, weight: net.loss_fn(pred, label, weight) + net.loss_fn(pred, label),
    'derived-labels': lambda net, pred, label, other, weight: net.loss_fn(pred, 3 - label) + net.loss_fn(pred, 3 - other),
}  # fmt: skip


@pytest.mark.parametrize('combine', TWICE.values(), ids=TWICE)
@pytest.mark.parametrize('flags', [{}, {'static_alloc': True}], ids=str)
def test_two_losses_of_the_same_logits(combine, flags, kernel, rng):
    """MXNet merges equal operators, but no two that only the fused operator behind them tells apart."""
    arrays = [mx.nd.array(array) for array in (LABEL, LABEL[::-1].copy(), [[1], [2], [3]])]
    gradients = []
    for is_hybrid in (False, True):
        net, data = Twice(combine), mx.nd.array(LOGITS)
        net.hybridize(is_hybrid, **flags)
        data.attach_grad('add')
        for _ in range(2):
            with autograd.record():
                loss = net(data, *arrays)
            loss.backward()
        gradients.append(data.grad.asnumpy())
    assert_close(gradients[1], gradients[0], ADDED_GRADIENTS)


class SumInFront(gluon.HybridBlock):
    """A net whose logits are a sum, with its loss in one graph."""

    def __init__(self, other, loss_fn):
        super().__init__()
        self.other, self.loss_fn = other, loss_fn
        self.dense = gluon.nn.Dense(4, in_units=4)
        if other == 'prior':
            self.prior = self.params.get('prior', shape=(4, 4), init=mx.init.Uniform(2))

    def hybrid_forward(self, F, data, label, mask, prior=None):
        other = {'mask': mask, 'prior': prior, 'residual': data}[self.other]
        return self.loss_fn(self.dense(data) + other, label)


IN_FRONT = {
    'plain': {},
    'classes-first': {'axis': 0, 'batch_axis': 1},
    'dense': {'sparse_label': False},
    'dense-first': {'sparse_label': False, 'axis': 0, 'batch_axis': 1},
    'dense-log-probs': {'sparse_label': False, 'from_logits': True},
    'log-probs': {'from_logits': True},
    'log-probs-smoothing': {'from_logits': True, 'label_smoothing': 0.1},
    'every-option': {'label_smoothing': 0.1, 'lse_square_scale': 0.1, 'class_weight': [1, 2, 3, 4]},
}


@pytest.mark.parametrize('other', ['mask', 'prior', 'residual'])
@pytest.mark.parametrize('static_shape', [None, False, True], ids=['', 'static_alloc', 'static_shape'])
@pytest.mark.parametrize('options', IN_FRONT.values(), ids=IN_FRONT)
def test_a_sum_in_front_of_the_loss_in_a_parent_with_static_memory(other, static_shape, options, kernel, rng):
    """Gluon's loss has a wrong gradient behind a mask: MXNet writes over what it still reads."""
    net = SumInFront(other, StableSoftmaxCELoss(**options))
    net.initialize(mx.init.Uniform(2))
    net.hybridize(**({} if static_shape is None else {'static_alloc': True, 'static_shape': static_shape}))
    data, mask = mx.nd.array(rng.normal(0, 2, (4, 4))), mx.nd.array([[0, -3, 0, -3]] * 4)
    label = rng.randint(0, 4, 4) if options.get('sparse_label', True) else rng.dirichlet(np.ones(4), 4)
    data.attach_grad()
    for _ in range(2):
        with autograd.record():
            loss = net(data, mx.nd.array(label), mask)
        loss.backward()
    weight = net.dense.weight.data().asnumpy()
    addend = {'mask': mask, 'residual': data}[other] if other != 'prior' else net.prior.data()
    logits = data.asnumpy() @ weight.T + addend.asnumpy()
    _, expected = reference.loss_and_gradient(logits, label, **options)
    assert_close(net.dense.weight.grad().asnumpy(), expected.T @ data.asnumpy(), SUMS['float32'])
    of_data = expected @ weight + (expected if other == 'residual' else 0)
    assert_close(data.grad.asnumpy(), of_data, SUMS['float32'])
