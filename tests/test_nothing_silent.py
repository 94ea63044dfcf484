"""Inputs that once gave a wrong number without a word: each is refused by name now, or gives the right number."""

import copy
from fractions import Fraction

import modes
import mxnet as mx
import numpy as np
import pytest
import reference
from mxnet import autograd, gluon

from gluon_stable_ce import (
    StableCrossEntropy,
    StableLoss,
    StablePerplexity,
    StableSoftmaxCELoss,
    functional,
)

pytestmark = pytest.mark.usefixtures('kernel')

nd, inf, nan = mx.nd, float('inf'), float('nan')
GRAPHS = [modes.nested, modes.exported]
CLASSES = 2**24 + 2  # more than float32 can count


def loss_and_gradient(loss_fn, pred, *others):
    """Of one call, NumPy."""
    pred = nd.array(pred, dtype=np.asarray(pred, dtype='float32').dtype)
    pred.attach_grad()
    with autograd.record():
        loss = loss_fn(pred, *map(nd.array, others))
    loss.backward()
    return loss.asnumpy(), pred.grad.asnumpy()


# Shapes in graphs of symbols


@pytest.mark.parametrize('mode', GRAPHS, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize('options', [{}, {'label_smoothing': 0.1}], ids=['plain', 'smoothed'])
@pytest.mark.parametrize('classes', [3, 7], ids=['too-few', 'too-many'])
def test_class_weights_of_another_number_are_a_shape_error_in_a_graph(classes, options, mode):
    loss_fn = StableSoftmaxCELoss(class_weight=[1.0] * 5, **options)
    pred, label = np.zeros((4, 5), 'float32'), np.zeros(4, 'float32')
    net = modes.WithLoss(gluon.nn.HybridLambda(lambda F, x: x), loss_fn)
    net.hybridize()
    mode(loss_fn, pred, label)
    with pytest.raises(mx.MXNetError):
        net(nd.zeros((4, classes)), nd.array(label))


@pytest.mark.parametrize('mode', GRAPHS, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(
    ('options', 'pred', 'label'),
    [
        ({}, (4, 5), (2, 2)),
        ({}, (4, 6, 5), (6, 4)),
        ({'axis': 1}, (2, 3, 4, 5), (2, 5, 4)),
        ({'axis': -3}, (2, 3, 4, 5), (2, 5, 4)),
        ({'axis': 1, 'sparse_label': False}, (2, 3, 4, 5), (2, 3, 5, 4)),
        ({'sparse_label': False}, (2, 3, 4), (3, 2, 4)),
    ],
    ids=str,
)
def test_a_label_of_another_shape_and_the_same_size_is_a_shape_error_in_a_graph(options, pred, label, mode):
    with pytest.raises((mx.MXNetError, ValueError)):
        mode(StableSoftmaxCELoss(**options), np.zeros(pred, 'float32'), np.zeros(label, 'float32'))


@pytest.mark.parametrize('mode', GRAPHS, ids=lambda mode: mode.__name__)
def test_a_label_with_the_class_axis_kept_is_accepted_in_a_graph(mode, rng):
    pred, label = rng.normal(0, 1, (4, 5)).astype('float32'), np.array([[0], [1], [4], [2]], 'float32')
    loss, _ = mode(StableSoftmaxCELoss(), pred, label)
    np.testing.assert_allclose(loss, reference.loss_and_gradient(pred, label)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('pred', 'weight', 'options'),
    [
        ((2, 5, 3, 3), (2, 3, 3), {'axis': 1}),
        ((2, 3, 3, 3), (2, 3, 3), {'axis': 1}),
        ((4, 5), (4, 7), {}),
        ((4, 6, 5), (4, 6, 2), {}),
        ((4, 4, 5), (4,), {'batch_axis': 1}),
    ],
    ids=str,
)
def test_a_sample_weight_of_another_layout_is_a_shape_error_in_a_graph(pred, weight, options):
    axis = options.get('axis', -1) % len(pred)
    label = np.zeros(pred[:axis] + pred[axis + 1 :], 'float32')
    arrays = np.zeros(pred, 'float32'), label, np.ones(weight, 'float32')
    with pytest.raises(mx.MXNetError):
        modes.nested(StableSoftmaxCELoss(**options), *arrays)


def test_a_batch_axis_that_is_the_class_axis_is_refused():
    pred, label = np.zeros((4, 5), 'float32'), np.zeros(4, 'float32')
    loss_fn = StableSoftmaxCELoss(axis=-1, batch_axis=1)
    with pytest.raises(
        ValueError, match=r'^batch_axis: expected axes of pred, of shape \(4, 5\), other than'
    ):
        loss_fn(nd.array(pred), nd.array(label))
    with pytest.raises(mx.MXNetError):
        modes.nested(loss_fn, pred, label)


@pytest.mark.parametrize('batch_axis', [2, -3, [0, 0], []], ids=str)
def test_a_batch_axis_out_of_range_is_refused(batch_axis):
    with pytest.raises(ValueError, match='^batch_axis: expected '):
        StableSoftmaxCELoss(batch_axis=batch_axis)(nd.zeros((4, 5)), nd.zeros(4))


# Options


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'ignore_label': 2**64}, ValueError, '^ignore_label: expected a number from -9007199254740991 to '),
        ({'weight': inf}, ValueError, '^weight: expected a number from '),
        ({'weight': 10**39}, ValueError, '^weight: expected a number from '),
        ({'lse_square_scale': 10**39}, ValueError, '^lse_square_scale: expected a number from 0 to '),
        ({'class_weight': [1e39]}, ValueError, '^class_weight: expected one finite weight >= 0 per class'),
        ({'class_weight': []}, ValueError, '^class_weight: expected one finite weight >= 0 per class'),
        (
            {'class_weight': 'abc'},
            TypeError,
            "^class_weight: expected an array or a list of numbers, got 'abc",
        ),
        ({'class_weight': {0: 1}}, TypeError, '^class_weight: expected an array or a list of numbers'),
        ({'class_weight': iter([1])}, TypeError, '^class_weight: expected an array or a list of numbers'),
        ({'class_weight': [1j]}, TypeError, '^class_weight: expected an array or a list of numbers'),
        ({'class_weight': ['1', '2']}, TypeError, '^class_weight: expected an array or a list of numbers'),
        ({'sparse_label': 'False'}, TypeError, "^sparse_label: expected True or False, got 'False'$"),
        ({'from_logits': 'False'}, TypeError, "^from_logits: expected True or False, got 'False'$"),
        ({'from_logits': np.zeros(3)}, TypeError, '^from_logits: expected True or False, got array'),
        ({'sparse_label': None}, TypeError, '^sparse_label: expected True or False, got None$'),
        ({'reduction': ['mean']}, ValueError, '^reduction: expected one of '),
    ],
    ids=str,
)
def test_options_that_mxnet_would_read_otherwise_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        StableSoftmaxCELoss(**options)


@pytest.mark.parametrize(
    'options',
    [
        {'weight': Fraction(1, 2)},
        {'weight': 2**64},
        {'label_smoothing': Fraction(1, 10)},
        {'lse_square_scale': Fraction(1, 10)},
        {'ignore_label': np.int64(2)},
        {'sparse_label': np.bool_(True)},
    ],
    ids=str,
)
def test_numbers_of_every_kind_mean_what_they_say(options, rng):
    pred, label = rng.normal(0, 1, (4, 5)).astype('float32'), np.array([0, 2, 4, 1], 'float32')
    plain = {name: float(value) for name, value in options.items()}
    loss, gradient = modes.default(StableSoftmaxCELoss(**options), pred, label)
    expected = reference.loss_and_gradient(pred, label, **plain)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-5 * np.abs(expected[1]).max())


def test_ignore_label_does_not_ignore_its_neighbour():
    label = nd.array([2**24, 2**24 + 1, 0], dtype='int64')
    loss = StableSoftmaxCELoss(ignore_label=2**24)(nd.zeros((3, 2)), label).asnumpy()
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])


# Values and gradients


@pytest.mark.parametrize('log_p', [0.0, 1e-3])
def test_the_gradient_goes_on_where_log_probabilities_reach_0(log_p):
    loss, gradient = loss_and_gradient(StableSoftmaxCELoss(from_logits=True), [[log_p, -3]], [0])
    np.testing.assert_array_equal(loss, [0])
    np.testing.assert_array_equal(gradient, [[-1, 0]])


def test_the_gradient_goes_on_where_the_loss_rounds_to_0():
    loss, gradient = loss_and_gradient(StableSoftmaxCELoss(), [[17, 0]], [0])
    assert 0 <= loss[0] < 1e-7
    np.testing.assert_allclose(gradient[0, 1], np.exp(-17.0), rtol=1e-5)


def test_negative_dense_targets_are_not_clamped():
    pred, target = [[1.0, 2, 3]], [[0, -2.0, 0]]
    loss, gradient = loss_and_gradient(StableSoftmaxCELoss(sparse_label=False), pred, target)
    stock = loss_and_gradient(gluon.loss.SoftmaxCELoss(sparse_label=False), pred, target)
    assert loss[0] < -2
    np.testing.assert_allclose(loss, stock[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, stock[1], rtol=1e-5)


@pytest.mark.parametrize('dtype', ['int32', 'int64', 'float64'])
@pytest.mark.parametrize('mode', [modes.default, modes.nested], ids=lambda mode: mode.__name__)
@pytest.mark.slow
def test_more_classes_than_float32_can_count(mode, dtype):
    pred = np.zeros((3, CLASSES), 'float32')
    pred[:, -1], pred[:, -2] = 30, -30
    loss, gradient = mode(StableSoftmaxCELoss(), pred, np.array([CLASSES - 1, CLASSES - 2, CLASSES], dtype))
    np.testing.assert_allclose(loss[0], np.log1p(np.exp(-30.0) * (CLASSES - 2)), atol=2e-6)
    np.testing.assert_allclose(loss[1], 60, rtol=1e-6)
    assert np.isnan(loss[2])
    assert gradient[0, -1] > -1e-4
    assert gradient[1, -2] < -0.999


@pytest.mark.parametrize('dtype', ['int32', 'int64'])
@pytest.mark.slow
def test_a_metric_counts_more_classes_than_float32(dtype):
    pred = nd.zeros((1, CLASSES))
    pred[0, CLASSES - 1] = 30
    metric = StableCrossEntropy(pred_type='logits')
    metric.update(nd.array([CLASSES - 1], dtype=dtype), pred)
    assert metric.get()[1] < 1e-4


@pytest.mark.parametrize('class_weight', [None, [0.0, 1, 1]], ids=['plain', 'weight-0'])
def test_z_loss_stays_where_the_label_is_impossible(class_weight):
    options = {'lse_square_scale': 0.1, 'class_weight': class_weight}
    pred = np.array([[-inf, 2, 3]], 'float32')
    loss, gradient = loss_and_gradient(StableSoftmaxCELoss(**options), pred, [0])
    expected, expected_gradient = reference.loss_and_gradient(pred, np.zeros(1), **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_full_label_smoothing_of_an_impossible_label_is_infinite():
    assert loss_and_gradient(StableSoftmaxCELoss(label_smoothing=1), [[-inf, 2, 3]], [0])[0] == [inf]


@pytest.mark.parametrize('mode', [modes.default, modes.nested], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(
    ('label', 'nearest'), [(3e9, 2), (inf, 2), (-inf, 0), (nan, 0), (1.7, 1), (-0.5, 0), (2.5, 2)], ids=str
)
def test_clip_trains_the_nearest_class(label, nearest, mode):
    pred = np.array([[1, 2, 4]], 'float32')
    loss, _ = mode(StableSoftmaxCELoss(invalid_label='clip'), pred, np.array([label], 'float32'))
    np.testing.assert_allclose(loss, reference.loss_and_gradient(pred, np.array([nearest]))[0], rtol=1e-5)


EMPTY = {
    'no samples': ((0, 5), -1, 0),
    'no samples of several positions': ((0, 3, 5), -1, 0),
    'samples without positions': ((2, 0, 5), -1, 0),
    'neither': ((0, 0, 5), -1, 0),
    'images without height': ((2, 5, 0, 3), 1, 0),
    'images without width': ((2, 5, 3, 0), 1, 0),
    'no images': ((0, 5, 3, 2), 1, 0),
    'several batch axes': ((2, 5, 0, 3), 1, (-1, 0)),
    'a batch axis of size 0 that is not the first': ((3, 0, 5), -1, 1),
}


@pytest.mark.parametrize('options', [{'ignore_label': -1}, {'sparse_label': False}], ids=str)
@pytest.mark.parametrize('reduction', ['mean', 'valid', 'sum', 'none'])
@pytest.mark.parametrize(('shape', 'axis', 'batch_axis'), EMPTY.values(), ids=EMPTY)
def test_samples_without_positions_have_a_loss_of_0(shape, axis, batch_axis, reduction, options):
    loss_fn = StableSoftmaxCELoss(axis=axis, batch_axis=batch_axis, reduction=reduction, **options)
    positions = tuple(np.delete(shape, axis))
    kept = tuple(np.array(shape)[sorted(np.arange(len(shape))[np.atleast_1d(batch_axis)])])
    with modes.numpy_semantics():
        pred, label = mx.np.zeros(shape), mx.np.zeros(shape if 'sparse_label' in options else positions)
        pred.attach_grad()
        for weights in ([], [mx.np.ones(kept)], [mx.np.ones(shape)], [mx.np.ones(positions)]):
            with autograd.record():
                loss = loss_fn(pred, label, *weights)
            loss.backward()
            expected = np.zeros(positions if reduction == 'none' else kept)
            np.testing.assert_array_equal(loss.asnumpy(), expected)
            mx.nd.waitall()


# Dtypes and storage


@pytest.mark.parametrize('dtype', ['int32', 'int64', 'uint8'])
def test_integer_predictions_are_refused(dtype):
    message = f'^pred: expected one of the dtypes float16, bfloat16, float32, float64, got {dtype}$'
    with pytest.raises(TypeError, match=message):
        StableSoftmaxCELoss()(nd.zeros((4, 3), dtype=dtype), nd.zeros(4))
    with pytest.raises(TypeError, match=message):
        StableCrossEntropy().update(nd.zeros(4), nd.zeros((4, 3), dtype=dtype))


@pytest.mark.parametrize('stype', ['csr', 'row_sparse'])
@pytest.mark.parametrize('argument', ['pred', 'label', 'sample_weight'])
def test_sparse_storage_is_refused(argument, stype):
    arrays = {'pred': nd.zeros((4, 3)), 'label': nd.zeros((4, 1)), 'sample_weight': nd.zeros((4, 1))}
    arrays[argument] = arrays[argument].tostype(stype)
    with pytest.raises(TypeError, match=f'^{argument}: expected a dense array, got '):
        StableSoftmaxCELoss()(*arrays.values())


@pytest.mark.parametrize('stype', ['csr', 'row_sparse'])
def test_a_metric_refuses_sparse_storage(stype):
    with pytest.raises(TypeError, match='^labels: expected a dense array, got '):
        StableCrossEntropy().update(nd.zeros((4, 1)).tostype(stype), nd.zeros((4, 3)))


@pytest.mark.skipif(modes.VERSION < (1, 7), reason='MXNet has bfloat16 since 1.7')
def test_loss_values_in_bfloat16_are_numbers():
    metric = StableLoss()
    metric.update(None, nd.amp_cast(nd.array([1.5, 2.5]), dtype=np.dtype([('bfloat16', np.uint16)])))
    assert metric.get() == ('loss', 2.0)


# valid_count


@pytest.mark.parametrize(
    ('label', 'count'),
    [
        (np.array([1, -1, 2]), 2),
        ([1, -1, 2], 2),
        ([[1, -1], [-1, -1]], 1),
        ([nd.array([1, -1]), nd.array([2])], 2),
        ([], 0),
        (nd.array([-1, -1]), 0),
    ],
    ids=str,
)
def test_valid_count_takes_arrays_and_lists(label, count):
    assert StableSoftmaxCELoss(ignore_label=-1).valid_count(label) == count


@pytest.mark.parametrize('label', [None, 'abc', mx.sym.var('label'), 3], ids=['None', 'str', 'Symbol', 'int'])
def test_valid_count_refuses_what_is_no_label(label):
    with pytest.raises(TypeError, match='^label: expected an MXNet array, got '):
        StableSoftmaxCELoss(ignore_label=-1).valid_count(label)


@pytest.mark.parametrize('axis', [-1, 1])
def test_valid_count_of_dense_labels_is_the_number_of_positions(axis):
    assert StableSoftmaxCELoss(axis=axis, sparse_label=False).valid_count(nd.zeros((2, 5, 5))) == 10


def test_four_inputs_are_refused_by_their_names():
    with pytest.raises(TypeError, match='^expected pred, label and sample_weight, got 4 inputs$'):
        StableSoftmaxCELoss()(nd.zeros((4, 3)), nd.zeros(4), nd.ones(4), nd.ones(4))


# Metrics


def test_a_copied_metric_has_a_queue_of_its_own():
    metric = StableLoss()
    metric.update(None, nd.array([1.0]))
    other = copy.copy(metric)
    metric.update(None, nd.array([3.0]))
    assert (metric.get()[1], other.get()[1]) == (2.0, 1.0)


@pytest.mark.parametrize('field', ['count', 'infinite', 'minus_infinite', 'nan', 'invalid'])
def test_load_state_dict_rejects_negative_counts(field):
    state = StableLoss().state_dict()
    state['local'][field] = -1
    with pytest.raises(ValueError, match='^state: expected '):
        StableLoss().load_state_dict(state)


@pytest.mark.parametrize(
    'change',
    [{'infinite': 2, 'count': 1}, {'total': ' 0x1f '}, {'total': '1_0'}, {'total': 'f', 'count': 0}],
    ids=str,
)
def test_load_state_dict_rejects_sums_that_no_metric_has(change):
    state = StableLoss().state_dict()
    state['global'].update(change)
    with pytest.raises(ValueError, match='^state: expected '):
        StableLoss().load_state_dict(state)


def test_load_state_dict_rejects_another_metrics_state():
    state = StableCrossEntropy(ignore_label=-1).state_dict()
    for metric in (StableLoss(), StablePerplexity(-1), StableCrossEntropy()):
        with pytest.raises(ValueError, match='^state: expected '):
            metric.load_state_dict(state)
    StableCrossEntropy(ignore_label=-1, name='mine').load_state_dict(state)


@pytest.mark.parametrize('options', [{'axis': 1}, {'pred_type': 'logits'}, {'ignore_label': 0}], ids=str)
def test_merge_rejects_a_metric_of_other_options(options):
    with pytest.raises(ValueError, match='^other: expected '):
        StableCrossEntropy().merge(StableCrossEntropy(**options))


@pytest.mark.parametrize('pred_type', ['probs', 'logits'])
def test_an_error_on_the_device_spoils_no_other_update(pred_type):
    """MXNet skips work that was queued behind the error, without a word."""
    label, pred = nd.zeros(4), nd.full((4, 4), 0.25)
    nd.waitall()
    metric, errors = StableCrossEntropy(pred_type=pred_type), 0
    for i in range(8):
        try:
            if i == 2:
                metric.update(label, nd.random.normal(0, -1, shape=(4, 4)))  # fails on the device
            metric.update(label, pred)
        except mx.MXNetError:  # noqa: PERF203
            errors += 1
    if not errors:
        with pytest.raises(mx.MXNetError):
            metric.get()
    assert metric.get()[1] == pytest.approx(np.log(4))
    assert metric.num_inst == 32


class Doubled(StableSoftmaxCELoss):
    """A subclass with a graph of its own."""

    def hybrid_forward(self, F, pred, label, sample_weight=None):
        return super().hybrid_forward(F, pred, label, sample_weight) * 2


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'class_weight': [1, 2]}, '^class_weight: expected one weight'),
        ({'invalid_label': 'raise'}, '^label: '),
    ],
    ids=str,
)
def test_a_subclass_checks_what_the_loss_checks(options, message):
    with pytest.raises(ValueError, match=message):
        Doubled(**options)(nd.zeros((4, 3)), nd.array([7, 0, 0, 0]))


@pytest.mark.parametrize(
    ('name', 'value'), [('_weight', 5.0), ('_axis', 1), ('_batch_axis', 1), ('_from_logits', True)]
)
def test_gluons_options_may_be_set_later(name, value, rng):
    """As in the __init__ of a subclass, after super().__init__()."""
    pred, label = nd.log_softmax(nd.array(rng.normal(0, 1, (4, 4, 4)))), nd.array(rng.randint(0, 4, (4, 4)))
    ours, stock = StableSoftmaxCELoss(), gluon.loss.SoftmaxCELoss()
    for loss_fn in (ours, stock):
        setattr(loss_fn, name, value)
    np.testing.assert_allclose(ours(pred, label).asnumpy(), stock(pred, label).asnumpy(), rtol=1e-5)


def test_a_metric_with_its_own_reset_and_counts():
    class Weighted(StableLoss):
        def reset(self):
            self.num_inst, self.sum_metric = 0, 0.0

        def update(self, _, values):
            for value in values:
                self.sum_metric += value
                self.num_inst += 0.5

    metric = Weighted()
    metric.update(None, [1.0, 2.0, 3.0])
    assert metric.get()[1] == 4.0
    metric.reset()
    assert np.isnan(metric.get()[1])


def test_eps_is_no_argument_of_the_metric():
    with pytest.raises(TypeError, match='^eps: expected no epsilon'):
        StableCrossEntropy(1e-12)
    with pytest.raises(TypeError, match='eps'):
        StableCrossEntropy(eps=1e-12)


def test_labels_are_read_in_one_place(rng):
    """The loss, 'raise', the metric and the functions agree on which labels are invalid."""
    label, pred = nd.array([0, -1, 3, 1.5, nan, 2]), nd.array(rng.normal(0, 1, (6, 3)))
    is_valid = functional.read_labels(nd, label, pred).is_valid.asnumpy()
    np.testing.assert_array_equal(is_valid, [1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(~np.isnan(StableSoftmaxCELoss()(pred, label).asnumpy()), is_valid)
    metric = StableCrossEntropy(pred_type='logits')
    metric.update(label, pred)
    with pytest.raises(ValueError, match='got 4 invalid ones beside 2 valid ones'):
        metric.get()
    with pytest.raises(ValueError, match='got 4 invalid ones among 6'):
        StableSoftmaxCELoss(invalid_label='raise')(pred, label)
