"""Which labels name a class, and what the loss and the metric make of those that do not, in every dtype."""

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
import tolerances
from checks import assert_loss_is_reference, every_mode
from tolerances import assert_close

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

nd, nan = mx.nd, float('nan')
C = 3
MANY = 2**24 + 2  # more classes than float32 can count


@pytest.fixture(params=cases.LABEL_DTYPES)
def labels(request):
    """Every class, and invalid labels of a dtype."""
    labels = np.array([0, 1, 2], request.param)
    return np.append(labels, np.array(cases.invalid_labels(request.param, C), request.param))


@pytest.fixture
def pred(labels, rng):
    return rng.normal(0, 1, (len(labels), C)).astype('float32')


@every_mode
@pytest.mark.parametrize('options', [{}, {'invalid_label': 'clip'}, {'ignore_label': 1}], ids=str)
def test_loss(kernel, mode, options, labels, pred):
    """NaN with a gradient of 0, or as the nearest class, or 0 with a gradient of 0."""
    assert_loss_is_reference(options, pred, labels, mode=mode, kernel=kernel)


def test_loss_metric_and_check_agree(kernel, labels, pred):
    bad = len(labels) - C
    label, pred = nd.array(labels, dtype=labels.dtype), nd.array(pred)
    metric = StableCrossEntropy(pred_type='logits')
    metric.update(label, pred)
    assert bad > 0
    assert np.isnan(StableSoftmaxCELoss()(pred, label).asnumpy()).sum() == bad
    with pytest.raises(ValueError, match=f'got {bad} invalid .* {C} valid'):
        metric.get()
    with pytest.raises(ValueError, match=f'got {bad} invalid .* {len(labels)}'):
        StableSoftmaxCELoss(invalid_label='raise')(pred, label)


def test_ignore_label_does_not_ignore_its_neighbour(kernel):
    label = nd.array([2**24, 2**24 + 1, 0], dtype='int64')
    loss = StableSoftmaxCELoss(ignore_label=2**24)(nd.zeros((3, 2)), label).asnumpy()
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])


@pytest.mark.slow
@pytest.mark.xdist_group('gigabytes')
@pytest.mark.parametrize(
    ('mode', 'dtype'),
    [(modes.default, 'int32'), (modes.default, 'float64'), (modes.nested, 'int64')],
    ids=['int32', 'float64', 'int64-nested'],
)
def test_more_classes_than_float32_can_count(kernel, mode, dtype):
    pred = np.zeros((3, MANY), 'float32')
    pred[:, -1], pred[:, -2] = 30, -30
    loss, gradient = mode(StableSoftmaxCELoss(), pred, np.array([MANY - 1, MANY - 2, MANY], dtype))
    assert_close(loss, [np.log1p(np.exp(-30.0) * (MANY - 2)), 60, nan], tolerances.NLL)
    assert gradient[0, -1] > -1e-4
    assert gradient[1, -2] < -0.999


@pytest.mark.slow
@pytest.mark.xdist_group('gigabytes')
@pytest.mark.parametrize('dtype', ['int32', 'int64'])
def test_a_metric_of_more_classes_than_float32_can_count(kernel, dtype):
    pred = nd.zeros((1, MANY))
    pred[0, MANY - 1] = 30
    metric = StableCrossEntropy(pred_type='logits')
    metric.update(nd.array([MANY - 1], dtype=dtype), pred)
    assert metric.get()[1] < 1e-4


@pytest.mark.parametrize(
    ('options', 'count'), [({}, 3), ({'ignore_label': -1}, 2), ({'ignore_label': 0}, 3)], ids=str
)
@pytest.mark.parametrize('is_compiled', [True, False], ids=['compiled', 'eager'])
def test_raise_counts_the_labels_that_are_not_ignored(kernel, options, count, is_compiled, ctx):
    pred, label = nd.array([[1, 2, 3]] * 4), nd.array([0, -1, 7, -2])
    loss_fn = StableSoftmaxCELoss(invalid_label='raise', **options)
    loss_fn.hybridize(is_compiled)
    with pytest.raises(ValueError, match=rf'^label: expected integers in \[0, 3\), got {count} invalid '):
        loss_fn(pred, label)
    assert loss_fn(pred, nd.array([0, 1, 2, 2])).shape == (4,)


def test_clip_is_gluons(kernel, ctx):
    pred, label = nd.array([[1, 2, 3]] * 6), nd.array([0, -1, 7, -2, 1.5, 2.9])
    expected = mx.gluon.loss.SoftmaxCrossEntropyLoss()(pred, label).asnumpy()
    assert_close(StableSoftmaxCELoss(invalid_label='clip')(pred, label).asnumpy(), expected)


IGNORED = {'ignore_label': -1}
COUNTS = {
    'all': ({}, nd.array([[3, 1, -1], [2, -1, -1]]), 6),
    'ignored': (IGNORED, nd.array([[3, 1, -1], [2, -1, -1]]), 3),
    'none': (IGNORED, nd.array([-1, -1]), 0),
    'invalid': (IGNORED, nd.array([nan, 99, -1]), 2),
    'numpy': (IGNORED, np.array([1, -1, 2]), 2),
    'list': (IGNORED, [1, -1, 2], 2),
    'nested-list': (IGNORED, [[1, -1], [-1, -1]], 1),
    'arrays': (IGNORED, [nd.array([1, -1]), nd.array([2], ctx=mx.cpu(1))], 2),
    'empty': (IGNORED, [], 0),
    'dense': ({'sparse_label': False}, nd.zeros((3, 2)), 3),
    'dense-axis': ({'sparse_label': False, 'axis': 1}, nd.zeros((2, 5, 4)), 8),
}


@pytest.mark.parametrize(('options', 'label', 'count'), cases.rows(COUNTS))
def test_valid_count(options, label, count):
    loss_fn = StableSoftmaxCELoss(**options)
    assert loss_fn.valid_count(label) == count
    if isinstance(label, nd.NDArray):
        with modes.numpy_semantics():
            assert loss_fn.valid_count(mx.np.array(label.asnumpy())) == count


@pytest.mark.parametrize('label', [None, 'abc', mx.sym.var('label'), 3], ids=['None', 'str', 'Symbol', 'int'])
def test_valid_count_refuses_what_is_no_label(label):
    with pytest.raises(TypeError, match='^label: expected an MXNet array, got '):
        StableSoftmaxCELoss(ignore_label=-1).valid_count(label)
