"""The table of docs/migration.md: each row that says "equal" is equal in the gradient here."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from tolerances import NLL, TRAINED, assert_close

from gluon_stable_ce import StableSoftmaxCELoss

pytestmark = pytest.mark.usefixtures('kernel')

nd = mx.nd
C = 5


@pytest.fixture
def batch(rng):
    """(N, C, T) logits with classes on axis 1, labels with padding of -1, and the count of what is none."""
    pred = nd.array(rng.normal(0, 2, (4, C, 6)))
    label = nd.array(rng.randint(-1, C, (4, 6)))
    return pred, label, int((label != -1).sum().asscalar())


def gradient(function, pred, scale=1.0):
    pred = pred.copy()
    pred.attach_grad()
    with autograd.record():
        value = function(pred)
    value.backward()
    return pred.grad.asnumpy() * scale


def gradient_of_loss(pred, *labels, scale=1.0, **options):
    return gradient(lambda x: StableSoftmaxCELoss(**options)(x, *labels), pred, scale)


def flat(pred):
    return pred.transpose((0, 2, 1)).reshape((-1, C))


def test_softmax_output(batch):
    pred, label, _ = batch
    x, y = flat(pred), nd.maximum(label, 0).reshape((-1,))
    theirs = gradient(lambda x: nd.SoftmaxOutput(x, y), x)
    assert_close(gradient_of_loss(x, y, reduction='sum'), theirs, NLL)


def test_softmax_output_use_ignore(batch):
    pred, label, _ = batch
    x, y = flat(pred), label.reshape((-1,))
    theirs = gradient(lambda x: nd.SoftmaxOutput(x, y, use_ignore=True, ignore_label=-1), x)
    assert_close(gradient_of_loss(x, y, ignore_label=-1, reduction='sum'), theirs, NLL)


@pytest.mark.parametrize('normalization', ['null', 'batch', 'valid'])
def test_softmax_output_multi_output_and_normalization(normalization, batch):
    """What SoftmaxOutput divides by is what trainer.step divides by; but for 'valid', multi_output divides by a sample's positions too."""
    pred, label, _ = batch
    theirs = gradient(
        lambda x: nd.SoftmaxOutput(
            x, label, multi_output=True, use_ignore=True, ignore_label=-1, normalization=normalization
        ),
        pred,
    )
    loss_fn = StableSoftmaxCELoss(axis=1, ignore_label=-1, reduction='sum')
    positions = label.size // len(label)
    step = {'null': positions, 'batch': len(pred) * positions, 'valid': loss_fn.valid_count(label)}[
        normalization
    ]
    assert_close(gradient(lambda x: loss_fn(x, label), pred, 1 / step), theirs, NLL)


def test_softmax_output_smooth_alpha(batch):
    """It spreads alpha over the C - 1 other classes; label_smoothing spreads over all C."""
    pred, label, _ = batch
    x, y, alpha = flat(pred), nd.maximum(label, 0).reshape((-1,)), 0.1
    theirs = gradient(lambda x: nd.SoftmaxOutput(x, y, smooth_alpha=alpha), x)
    ours, other = (
        gradient_of_loss(x, y, label_smoothing=smoothing, reduction='sum')
        for smoothing in (alpha * C / (C - 1), alpha)
    )
    assert_close(ours, theirs, NLL)
    assert np.abs(other - theirs).max() > 1e-3


@pytest.mark.parametrize('normalization', ['null', 'batch', 'valid'])
def test_softmax_output_preserve_shape(normalization, batch):
    pred, label, count = batch
    x = pred.transpose((0, 2, 1))
    options = {'preserve_shape': True, 'use_ignore': True, 'ignore_label': -1, 'normalization': normalization}
    theirs = gradient(lambda x: nd.SoftmaxOutput(x, label, **options), x)
    step = {'null': 1, 'batch': label.size, 'valid': count}[normalization]
    assert_close(gradient_of_loss(x, label, scale=1 / step, ignore_label=-1, reduction='sum'), theirs, NLL)


def test_softmax_output_grad_scale(batch):
    pred, label, _ = batch
    x, y = flat(pred), nd.maximum(label, 0).reshape((-1,))
    theirs = gradient(lambda x: nd.SoftmaxOutput(x, y, grad_scale=3), x)
    assert_close(gradient_of_loss(x, y, weight=3, reduction='sum'), theirs, NLL)


BATCH, STEPS, FEATURES = 4, 6, 3


@pytest.fixture
def data(rng):
    label = rng.randint(-1, C, (3 * BATCH, STEPS)).astype('float32')
    return mx.io.NDArrayIter(rng.normal(0, 1, (3 * BATCH, STEPS, FEATURES)), label, BATCH)


WEIGHT = np.linspace(-1, 1, C * FEATURES).reshape(C, FEATURES)


def train_module(data, output):
    """Train a Module with an output of logits (batch, C) and labels (batch,); return its weights."""
    logits = mx.sym.FullyConnected(
        mx.sym.var('data'), num_hidden=C, flatten=False, no_bias=True, name='dense'
    )
    module = mx.mod.Module(output(logits, mx.sym.var('softmax_label')))
    module.bind(data.provide_data, data.provide_label)
    module.init_params(arg_params={'dense_weight': nd.array(WEIGHT)})
    module.init_optimizer(optimizer_params={'learning_rate': 0.5})
    data.reset()
    for batch in data:
        module.forward_backward(batch)
        module.update()
    return module.get_params()[0]['dense_weight'].asnumpy()


def train_gluon(data, step):
    net = gluon.nn.Dense(C, flatten=False, use_bias=False, in_units=FEATURES)
    net.initialize()
    net.weight.set_data(nd.array(WEIGHT))
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.5}, kvstore=None)
    loss_fn = StableSoftmaxCELoss(ignore_label=-1, reduction='sum')
    data.reset()
    for batch in data:
        (x,), (y,) = batch.data, batch.label
        with autograd.record():
            loss = loss_fn(net(x), y)
        loss.backward()
        trainer.step(step(max(1, loss_fn.valid_count(y))))
    return net.weight.data().asnumpy()


def softmax_output(normalization):
    options = {'use_ignore': True, 'ignore_label': -1, 'preserve_shape': True}
    return lambda x, y: mx.sym.SoftmaxOutput(x, y, normalization=normalization, name='softmax', **options)


@pytest.mark.parametrize(
    ('normalization', 'step'),
    [
        ('null', lambda n: BATCH),
        ('batch', lambda n: BATCH * BATCH * STEPS),
        ('valid', lambda n: n * BATCH),
    ],
    ids=['null', 'batch', 'valid'],
)
def test_softmax_output_in_a_module(normalization, step, data):
    """Module's optimizer divides by the batch size, too."""
    theirs = train_module(data, softmax_output(normalization))
    assert_close(train_gluon(data, step), theirs, TRAINED)
    assert np.abs(train_gluon(data, lambda n: step(n) / BATCH) - theirs).max() > 1e-3


@pytest.mark.parametrize(
    ('normalization', 'reduction', 'grad_scale'),
    [('null', 'sum', 1), ('valid', 'valid', 1 / BATCH)],
    ids=['null', 'valid'],
)
def test_make_loss_in_a_module(normalization, reduction, grad_scale, data):
    loss_fn = StableSoftmaxCELoss(ignore_label=-1, reduction=reduction)
    ours = train_module(data, lambda x, y: mx.sym.MakeLoss(loss_fn(x, y), grad_scale=grad_scale))
    assert_close(ours, train_module(data, softmax_output(normalization)), TRAINED)


def test_sample_weight_of_one_axis(batch, rng):
    """Gluon multiplies (N, 1) by (N,), and takes the mean of (N, N)."""
    pred, label, _ = batch
    x, y, weight = flat(pred), nd.maximum(label, 0).reshape((-1,)), nd.array(rng.uniform(1, 2, 24))
    ours, theirs = StableSoftmaxCELoss(), gluon.loss.SoftmaxCELoss()
    assert_close(ours(x, y, weight).asnumpy(), theirs(x, y, weight.expand_dims(1)).asnumpy(), NLL)
    assert_close(theirs(x, y, weight).asnumpy(), (ours(x, y) * weight.mean()).asnumpy(), NLL)


@pytest.mark.parametrize('weighted', [False, True])
def test_gluons_own(weighted, batch, rng):
    pred, label, _ = batch
    args = [nd.maximum(label, 0)] + [nd.array(rng.uniform(0, 2, (4, 1, 6)))] * weighted
    theirs = gradient(lambda x: gluon.loss.SoftmaxCrossEntropyLoss(axis=1)(x, *args), pred)
    assert_close(gradient_of_loss(pred, *args, axis=1), theirs, NLL)


def test_gluon_cv(batch):
    """Its loss divides by all positions, ours by those that count; with the sum, the step decides."""
    pred, label, _ = batch

    def gluon_cv(x):
        nll = -nd.pick(nd.log_softmax(x, axis=1), label, axis=1)
        return nd.where(label == -1, nd.zeros_like(nll), nll).mean(axis=0, exclude=True)

    theirs = gradient(gluon_cv, pred)
    options = {'axis': 1, 'ignore_label': -1}
    ours = gradient_of_loss(pred, label, scale=1 / label.shape[1], reduction='sum', **options)
    assert_close(ours, theirs, NLL)
    assert np.abs(gradient_of_loss(pred, label, **options) - theirs).max() > 1e-3


def test_gluon_nlp_masked(batch):
    """Its loss masks by length with a sample_weight, and divides by the padded length."""
    pred, label, _ = batch
    pred, label, length = pred.transpose((0, 2, 1)), nd.maximum(label, 0), nd.array([6, 3, 1, 0])
    weight = nd.SequenceMask(nd.ones((4, 6, 1)), length, use_sequence_length=True, axis=1)
    theirs = gradient(lambda x: gluon.loss.SoftmaxCELoss()(x, label, weight), pred)
    assert_close(gradient_of_loss(pred, label, weight), theirs, NLL)
    padded = nd.where(weight.squeeze(), label, nd.full(label.shape, -1))
    ours = gradient_of_loss(pred, padded, scale=1 / 6, ignore_label=-1, reduction='sum')
    assert_close(ours, theirs, NLL)


def test_gluon_nlp_label_smoothing(batch):
    pred, label, _ = batch
    x, y, epsilon = flat(pred), nd.maximum(label, 0).reshape((-1,)), 0.1
    smoothed = (1 - epsilon) * nd.one_hot(y, C) + epsilon / C
    theirs = gradient(lambda x: gluon.loss.SoftmaxCELoss(sparse_label=False)(x, smoothed), x)
    assert_close(gradient_of_loss(x, y, label_smoothing=epsilon), theirs, NLL)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_pytorch(reduction, weighted, smoothing, batch):
    """Its rules as its documentation of CrossEntropyLoss gives them, in closed form.

    l_n = -(1 - a) w_y log p_y - a/C sum_c w_c log p_c for labels other than ignore_index; 'mean' divides the sum by sum_n w_(y_n).
    """
    pred, label, _ = batch
    weights = np.array([1, 2, 0.5, 3, 1]) if weighted else np.ones(C)
    logits = np.moveaxis(pred.asnumpy().astype('float64'), 1, -1)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    index = label.asnumpy().astype(int)
    target = weights * ((1 - smoothing) * np.eye(C)[index] + smoothing / C)
    expected = np.where((index != -1)[..., None], target.sum(-1, keepdims=True) * p - target, 0)
    divisor = weights[index[index != -1]].sum() if reduction == 'mean' else 1
    options = {'class_weight': weights, 'label_smoothing': smoothing, 'reduction': 'sum'}
    ours = gradient_of_loss(pred, label, scale=1 / divisor, axis=1, ignore_label=-1, **options)
    assert_close(np.moveaxis(ours, 1, -1), expected / divisor, NLL)


@pytest.mark.parametrize('weighted', [False, True])
def test_pytorch_soft_targets(weighted, batch, rng):
    """l_n = -sum_c w_c log p_c y_c, and 'mean' divides by the number of positions: as ours, sample by sample."""
    pred, _, _ = batch
    x = flat(pred)
    target = rng.dirichlet(np.ones(C), x.shape[0]).astype('float32')
    weights = np.array([1, 2, 0.5, 3, 1]) if weighted else np.ones(C)
    p = nd.softmax(x).asnumpy().astype('float64')
    expected = ((weights * target).sum(-1, keepdims=True) * p - weights * target) / len(target)
    options = {'sparse_label': False, 'class_weight': weights}
    ours = gradient_of_loss(x, nd.array(target), scale=1 / len(target), **options)
    assert_close(ours, expected, NLL)
