"""Values and each entry of gradients against 60 digits or long double, relatively: with each kernel, in each mode."""

import cases
import modes
import mpmath
import mxnet as mx
import numpy as np
import pytest
import tolerances
from checks import every_mode
from mxnet import autograd, gluon, nd
from tolerances import assert_close, assert_relatively_close

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

pytestmark = pytest.mark.usefixtures('kernel')

INF = float('inf')
GAPS = [-1e4, -200, -90, -20, -1, 0, 1, 15, 20, 40, 60, 69, 100, 300, 690, 1e4]
DTYPES = pytest.mark.parametrize('dtype', ['float32', 'float64'])


def exact(pred, label):
    """The NLL and its gradient in long double, in the form that is exact for p near 0 and near 1; (N, C) logits."""
    z, rows = pred.astype(np.longdouble), np.arange(len(pred))
    others = z - z[rows, label][:, None]
    others[rows, label] = -INF
    most = others.max(1, keepdims=True)
    log_odds = (most + np.log(np.exp(others - most).sum(1, keepdims=True)))[:, 0]
    nll = np.where(log_odds > 0, log_odds, 0) + np.log1p(np.exp(-np.abs(log_odds)))
    gradient = np.exp(others - nll[:, None])
    gradient[rows, label] = np.expm1(-nll)
    return nll.astype('float64'), gradient.astype('float64')


def assert_exact(kernel, mode, pred, label, tolerance=None):
    """The loss and each entry of its gradient, within the stated bounds."""
    kernel = 'stock' if mode is modes.exported_alone else kernel
    tolerance = tolerance or tolerances.stated(kernel, pred.dtype)
    loss, gradient = mode(StableSoftmaxCELoss(), pred, label.astype('float32'))
    expected, expected_gradient = exact(pred, label)
    assert (loss >= 0).all()
    assert_relatively_close(loss, expected, tolerance)
    assert_relatively_close(gradient, expected_gradient, tolerance)


@DTYPES
@every_mode
@pytest.mark.parametrize('classes', [2, 10, 300])
@pytest.mark.parametrize('scale', [0.1, 10])
@pytest.mark.parametrize('offset', [0, -30, 1e4])
def test_random_logits_and_gaps(kernel, mode, dtype, classes, scale, offset, rng):
    label = rng.randint(0, classes, 40)
    pred = rng.normal(offset, scale, (40, classes))
    pred[np.arange(40), label] += np.linspace(-100, 100, 40)
    assert_exact(kernel, mode, pred.astype(dtype), label)


@DTYPES
@pytest.mark.parametrize(
    ('classes', 'gap'),
    [(classes, gap) for classes in (2, 3, 1000) for gap in GAPS]
    + [pytest.param(1_000_000, gap, marks=pytest.mark.slow) for gap in (-20, 0, 20, 69)],
)
@modes.parametrize([modes.default, modes.nested])
def test_one_logit_above_or_below_equal_ones(kernel, mode, dtype, classes, gap):
    pred, label = np.zeros((1, classes), dtype), classes // 2
    pred[0, label] = gap
    with mpmath.workdps(60):
        expected = mpmath.log1p((classes - 1) * mpmath.e ** -mpmath.mpf(gap))
        other = -mpmath.expm1(-expected) / (classes - 1)
    loss, gradient = mode(StableSoftmaxCELoss(), pred, np.array([label], 'float32'))
    tolerance = tolerances.equal_logits(kernel, dtype)
    expected_gradient = np.full(pred.shape, float(other))
    expected_gradient[0, label] *= 1 - classes
    assert_relatively_close(loss, [float(expected)], tolerance)
    assert_relatively_close(gradient, expected_gradient, tolerance)


def behind_dense(loss_fn, pred, label):
    """A layer that computes `pred`, in one graph with the loss. Its weight has the gradient of the logits."""
    dense = gluon.nn.Dense(pred.shape[1], in_units=len(pred), use_bias=False, weight_initializer='zeros')
    dense.cast(pred.dtype)
    dense.initialize()
    dense.weight.set_data(nd.array(pred.T, dtype=pred.dtype))
    net = modes.WithLoss(dense, loss_fn)
    net.hybridize()
    with autograd.record():
        loss = net(nd.array(np.eye(len(pred)), dtype=pred.dtype), nd.array(label))
    loss.backward()
    return loss.asnumpy(), dense.weight.grad().asnumpy().T


@DTYPES
@pytest.mark.parametrize('classes', [70_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@modes.parametrize([modes.default, modes.nested, behind_dense])
def test_more_classes_than_log_softmax_adds_up_exactly(kernel, mode, dtype, classes, rng):
    pred, label = rng.normal(0, 3, (4, classes)).astype(dtype).round(), np.arange(4)
    pred[np.arange(4), label] += np.array([-30, 0, 20, 45], dtype)
    assert_exact(kernel, mode, pred, label)


@modes.parametrize([modes.default, modes.nested, behind_dense])
@pytest.mark.parametrize('classes', [21, 40, 1024, 50_257])
def test_few_large_and_many_small_logits(kernel, mode, classes, rng):
    """A sum of their exponentials in float32 would leave out those that are too small to change it alone."""
    positions = 60 if mode is behind_dense else 500_000 // classes
    pred = rng.normal(0, 5, (positions, classes)).astype('float32')
    assert_exact(kernel, mode, pred, rng.randint(0, classes, positions))


@modes.parametrize([modes.default, modes.nested])
@pytest.mark.parametrize('classes', [1000, 50_257, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('smoothing', [0.1, 1])
def test_the_gradient_of_smoothing_over_many_classes(kernel, mode, classes, smoothing):
    """A gradient for each class, added up one by one in float32, is off by 1e-3."""
    pred = np.zeros((2, classes), 'float32')
    pred[:, 1] = 40
    loss, gradient = mode(StableSoftmaxCELoss(label_smoothing=smoothing), pred, np.array([0, 1], 'float32'))
    target = np.full(pred.shape, smoothing / classes)
    target[[0, 1], [0, 1]] += 1 - smoothing
    p = np.exp(np.float64(pred) - 40)
    p /= p.sum(-1, keepdims=True)
    cases.assert_within(gradient, p - target, tolerances.PLAIN.absolute * (p + target))
    tolerance = tolerances.STATED_SMOOTHING if kernel == 'fused' else tolerances.STATED_PLAIN
    assert_close(loss, (target * (40 - pred)).sum(-1), tolerance)


@DTYPES
@pytest.mark.slow
@pytest.mark.parametrize(
    ('first', 'last', 'largest'), [(64, 70, 0), (-12, 12, 0), (0, 12, 13.5), (58, 62, 14.5)]
)
@pytest.mark.parametrize('classes', [100, 1000, 10_000, 50_257])
@modes.parametrize([modes.default, modes.nested, behind_dense])
def test_many_equal_logits(kernel, dtype, mode, classes, first, last, largest):
    """Beside a label that is above them, also after the stock kernel has lowered it, or beside one larger logit."""
    rows = np.arange(33)
    pred, label = np.zeros((33, classes), dtype), rows
    pred[:, 40] = largest
    pred[rows, label] = np.linspace(first, last, 33)
    assert_exact(kernel, mode, pred, label, tolerances.equal_logits(kernel, dtype))


@DTYPES
@pytest.mark.parametrize(
    ('classes', 'large', 'label'),
    [
        (600, 9.689416885375977, 38.59646987915039),
        (750, 9.773630142211914, 23.362857818603516),
        (950, 16.728891372680664, 29.29692268371582),
        (1000, 16.59235343680615, 37.0617102477978),
    ],
)
@modes.parametrize([modes.default, modes.nested, behind_dense])
def test_one_logit_that_rounds_off_hundreds(kernel, mode, dtype, classes, large, label):
    """The worst that a search found, unless the classes are added up once more."""
    pred = np.zeros((1, classes), dtype)
    pred[0, [7, 67]] = large, label
    is_added_up_again = kernel == 'stock' and mode is modes.nested
    tolerance = None if is_added_up_again else tolerances.rounded_off(kernel, dtype, classes)
    assert_exact(kernel, mode, pred, np.array([67]), tolerance)


@pytest.mark.parametrize('classes', [50_257, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(('large', 'spread'), [(1, 0), (3, 0.003)])
@modes.parametrize([modes.default, modes.nested])
def test_large_logits_that_round_off_nearly_equal_ones(kernel, mode, classes, large, spread, rng):
    """Their probabilities are less than half of a unit in its last place, in each sum that has both."""
    pred, label = rng.normal(0, 1, (4, classes)) * spread, np.full(4, classes // 2)
    pred[:, [0, 1, classes // 7 + 2][:large]] = [[16.8], [17.32], [17.36], [17.39]]
    assert_exact(
        kernel, mode, pred.astype('float32'), label, tolerances.rounded_off(kernel, 'float32', classes)
    )


@pytest.mark.parametrize('classes', [1000, 50_257])
def test_the_gradient_of_equal_dense_targets(classes):
    """MXNet adds up the targets one by one: up to 2e-8 per class, as in gluon's loss."""
    pred = np.zeros((1, classes), 'float32')
    pred[0, 1] = 40
    target = np.full(pred.shape, 1 / classes, 'float32')
    _, gradient = modes.default(StableSoftmaxCELoss(sparse_label=False), pred, target)
    p = np.exp(np.float64(pred) - 40)
    p *= np.float64(target).sum() / p.sum()
    cases.assert_within(
        gradient, p - target, 2e-8 * classes * p + tolerances.ROUNDED_FLOAT32.relative * target
    )


@DTYPES
@every_mode
@pytest.mark.parametrize(
    ('pred', 'nll', 'gradient'),
    [
        pytest.param([5], 0, [0], id='one class'),
        pytest.param([1e5, 0], 0, [0, 0], id='certain'),
        pytest.param([1e30, 0], 0, [0, 0], id='huge'),
        pytest.param([0, -1e30], 0, [0, 0], id='hugely negative'),
        pytest.param([0, 1e30], 1e30, [-1, 1], id='hugely unlikely'),
        pytest.param([1e30, 1e30], np.log(2), [-0.5, 0.5], id='huge and equal'),
        pytest.param(
            [1e8 + 8, 1e8], np.log1p(np.exp(-8)), [-1 / (1 + np.exp(8)), 1 / (1 + np.exp(8))], id='offset'
        ),
        pytest.param([1e-30, -1e-30], np.log(2), [-0.5, 0.5], id='tiny'),
        pytest.param([3, -INF, -INF], 0, [0, 0, 0], id='all others masked'),
        pytest.param([3] + [-1e4] * 10_000, 0, [0] * 10_001, id='all of many others unlikely'),
        pytest.param([1, 1, -INF], np.log(2), [-0.5, 0.5, 0], id='masked'),
        pytest.param([-INF, 1, 1], INF, [-1, 0.5, 0.5], id='label masked'),
    ],
)
def test_special_logits(kernel, mode, dtype, pred, nll, gradient):
    loss, got = mode(StableSoftmaxCELoss(), np.array([pred], dtype), np.zeros(1, 'float32'))
    kernel = 'stock' if mode is modes.exported_alone else kernel
    tolerance = tolerances.stated(kernel, dtype) if nll else tolerances.Tolerance()
    assert_close(loss, [nll], tolerance)
    assert_close(got, [gradient], tolerance)


@modes.parametrize([modes.default, modes.nested])
def test_logits_where_the_roundings_near_64_add_up(kernel, mode):
    pred = [[-28.769105911254883, -17.677043914794922, -31.650794982910156]]
    assert_exact(kernel, mode, np.array(pred, 'float32'), np.array([1]))


@modes.parametrize([modes.default, modes.nested])
def test_float16_logits_are_those_of_their_rounded_values(kernel, mode, rng):
    label = rng.randint(0, 3000, 8)
    pred = rng.normal(0, 3, (8, 3000)).astype('float16')
    loss, gradient = mode(StableSoftmaxCELoss(), pred, label.astype('float32'))
    expected, expected_gradient = exact(pred, label)
    assert_relatively_close(loss, expected, tolerances.stated(kernel, 'float32'))
    assert_close(gradient, expected_gradient, tolerances.FLOAT16_GRADIENT)


@DTYPES
@pytest.mark.parametrize('gap', [-60, 0, 20, 60])
def test_the_metric_of_logits_is_as_exact(kernel, dtype, gap):
    pred, label = np.array([[gap, 0, 0]], dtype), np.array([0])
    metric = StableCrossEntropy(pred_type='logits')
    metric.update(mx.nd.array(label), mx.nd.array(pred, dtype=dtype))
    assert_relatively_close(metric.get()[1], exact(pred, label)[0][0], tolerances.stated(kernel, dtype))
