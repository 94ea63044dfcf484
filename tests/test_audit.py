"""The audit: against mpmath, against the real mx.metric classes, in every layout and chunk size."""

import math
import tracemalloc

import mpmath
import mxnet as mx
import numpy as np
import pytest
import tolerances
from audit_cases import as_pred_type, distributions, labels_for, same
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import AUDIT, FLOAT64, STOCK_METRIC, assert_close

from gluon_stable_ce import Audit, StableCrossEntropy, audit
from gluon_stable_ce.auditing import arrays

inf, nan = math.inf, math.nan


def true_nll(row, label, pred_type):
    """NLL of one label at 400 digits, so that exp(-700) is not lost next to 1; from the rounded input, as an mpf."""
    with mpmath.workdps(400):
        row = [mpmath.mpf(float(x)) for x in row]
        if pred_type == 'logits':
            return mpmath.log(mpmath.fsum(mpmath.exp(x) for x in row)) - row[label]
        return -mpmath.log(row[label]) if pred_type == 'probs' else -row[label]


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('pred_type', ['probs', 'logits', 'log_probs'])
def test_mean_nll_equals_mpmath(pred_type, dtype):
    p = distributions(61, 7, dtype=dtype, sharpness=2)
    pred, label = as_pred_type(p, pred_type), labels_for(61, 7)
    with mpmath.workdps(50):
        truth = mpmath.fsum(true_nll(row, y, pred_type) for row, y in zip(pred, label)) / 61
        perplexity = mpmath.exp(truth)
    found = audit(pred, label, pred_type=pred_type)
    assert_close(found.nll, float(truth), AUDIT)
    assert_close(found.perplexity, float(perplexity), FLOAT64)
    assert found.samples == 61


@pytest.mark.parametrize(('pred', 'label', 'pred_type'), [
    ([20.0, 0.0], 0, 'logits'),
    ([40.0, 0.0], 0, 'logits'),
    ([700.0, 0.0], 0, 'logits'),
    ([0.0, 1e5], 0, 'logits'),
    ([1.0, 2.0, 3.0], 2, 'logits'),
    ([-5e4, -5e4], 1, 'logits'),
    ([-inf, 0.0, 3.0], 1, 'logits'),
    ([2.0, 2.0, 2.0], 0, 'logits'),
    ([1e-43, 1.0], 0, 'probs'),
    ([5e-324, 1.0], 0, 'probs'),
    ([0.0, 1 - 2.0**-53], 1, 'probs'),
    ([-1e-300, -800.0], 0, 'log_probs'),
])  # fmt: skip
def test_nll_is_exact_for_probabilities_near_0_and_near_1(pred, label, pred_type):
    truth = float(true_nll(pred, label, pred_type))
    assert truth > 0
    assert_close(audit(np.array([pred]), np.array([label]), pred_type=pred_type).nll, truth, AUDIT)


@pytest.mark.parametrize(('pred', 'label', 'pred_type', 'nll'), [
    ([1.0, 0.0], 1, 'probs', inf),
    ([1.0, 0.0], 0, 'probs', 0.0),
    ([nan, 0.5], 0, 'probs', nan),
    ([-0.5, 1.5], 0, 'probs', nan),
    ([0.0, 1.0000001], 1, 'probs', 0.0),
    ([-inf, 0.0], 0, 'log_probs', inf),
    ([-inf, 0.0], 0, 'logits', inf),
    ([nan, 0.0], 1, 'logits', nan),
    ([inf, 0.0], 0, 'logits', nan),
    ([-inf, -inf], 0, 'logits', nan),
])  # fmt: skip
def test_infinite_and_nan_nll_are_counted_apart(pred, label, pred_type, nll):
    found = audit(np.array([pred, pred]), np.array([label] * 2), pred_type=pred_type)
    np.testing.assert_equal(found.nll, nll)
    assert not math.copysign(1, found.nll) < 0
    assert (found.zero, found.nan) == (2 * (nll == inf), 2 * math.isnan(nll))
    np.testing.assert_equal(found.worst[0].nll, nll)


def real_metrics(pred, label, eps=1e-12, ignore_label=None):
    """What mx.metric prints after one update with all of it. CrossEntropy knows no ignore_label, so it gets what is left."""
    kept = label != ignore_label
    cross_entropy, perplexity = mx.metric.CrossEntropy(eps), mx.metric.Perplexity(ignore_label)
    cross_entropy.update([mx.nd.array(label[kept])], [mx.nd.array(pred[kept], dtype=pred.dtype)])
    perplexity.update([mx.nd.array(label)], [mx.nd.array(pred, dtype=pred.dtype)])
    return cross_entropy.get()[1], perplexity.get()[1]


@pytest.mark.parametrize('ignore_label', [None, 3])
@pytest.mark.parametrize('eps', [1e-12, 1e-8, 0.0])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_stock_values_equal_the_stock_metrics(dtype, eps, ignore_label):
    pred, label = distributions(20000, 11, dtype=dtype, sharpness=9), labels_for(20000, 11)
    found = audit(pred, label, eps=eps, ignore_label=ignore_label)
    cross_entropy, perplexity = real_metrics(pred, label, eps, ignore_label)
    assert_close(found.stock_cross_entropy, cross_entropy, STOCK_METRIC[dtype])
    assert_close(np.log(found.stock_perplexity), np.log(perplexity), STOCK_METRIC[dtype])
    if eps:
        assert found.under_eps > 20
        assert found.nll - found.stock_cross_entropy > 1e-3  # so that the test can distinguish the two
    assert abs(math.log(found.stock_perplexity) - found.nll) > 1e-3


@pytest.mark.parametrize(('dtype', 'count'), [('float16', 3000), ('float16', 30000), ('float32', 30000)])
def test_stock_values_in_float16_equal_the_stock_metrics(dtype, count):
    """In float16 the eps and the floor round to 0, and a sum over 65504 is inf. Neither happens in float32."""
    pred, label = distributions(count, 5, dtype=dtype, sharpness=3), labels_for(count, 5)
    pred = np.maximum(pred, np.float16(2.0**-14)).astype(dtype)  # without a p = 0, which would be inf at once
    found = audit(pred, label)
    cross_entropy, perplexity = real_metrics(pred, label)
    stock = [found.stock_cross_entropy, np.log(found.stock_perplexity)]
    assert_close(stock, [cross_entropy, np.log(perplexity)], STOCK_METRIC['float16'])
    assert math.isinf(found.stock_cross_entropy) == (dtype == 'float16' and count == 30000)
    assert math.isfinite(found.nll)


@pytest.mark.parametrize('pred_type', ['logits', 'log_probs'])
def test_stock_values_of_logits_and_log_probs_equal_the_stock_metrics_of_probs(pred_type):
    z = (np.random.RandomState(3).randn(5000, 6) * 15).astype('float32')
    p = mx.nd.softmax(mx.nd.array(z))
    pred = z if pred_type == 'logits' else mx.nd.log_softmax(mx.nd.array(z)).asnumpy()
    found = audit(pred, labels_for(5000, 6), pred_type=pred_type)
    cross_entropy, _ = real_metrics(p.asnumpy(), labels_for(5000, 6))
    assert_close(found.stock_cross_entropy, cross_entropy, tolerances.NLL)
    assert found.under_eps > 100
    assert found.nll > found.stock_cross_entropy * 1.01


def test_under_eps_counts_samples_and_their_share_of_the_loss():
    p = np.array([1e-13, 1e-20, 0.5, 1e-12, 2e-12])
    found = audit(np.stack([p, 1 - p], axis=1), np.zeros(5, int))
    assert (found.samples, found.under_eps, found.zero, found.bad_rows) == (5, 2, 0, 0)
    nll = -np.log(p)
    assert_close(found.under_eps_share, nll[:2].sum() / nll.sum(), AUDIT)
    assert_close(found.error, (nll + np.log(p + 1e-12)).sum() / nll.sum(), FLOAT64)
    p[0] = 0
    found = audit(np.stack([p, 1 - p], axis=1), np.zeros(5, int))
    assert (found.under_eps, found.zero, found.under_eps_share) == (2, 1, 1.0)
    assert found.nll == found.error == inf


@pytest.mark.parametrize(('stock', 'exact', 'error'), [
    (1.0, 2.0, 0.5),
    (2.5, 2.0, 0.25),
    (-1e-9, 1e-3, 1.000001),
    (0.0, 0.0, 0.0),
    (inf, inf, 0.0),
    (inf, 1.0, inf),
    (27.6, inf, inf),
    (-1e-12, 0.0, inf),
    (nan, 1.0, nan),
    (1.0, nan, nan),
    (nan, inf, nan),
])  # fmt: skip
def test_relative_error(stock, exact, error):
    found = audit(np.array([[0.5, 0.5]]), np.array([0]))
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    found = Audit(**{**fields, 'nll': exact, 'stock_cross_entropy': stock})
    assert_close(found.error, error, FLOAT64)


def test_bad_rows_counts_rows_that_do_not_sum_to_1():
    pred = np.full((6, 2), 0.5, 'float32')
    pred[1] *= 1.0009
    pred[2] *= 1.0011
    pred[3, 1] = np.nan
    pred[4] = 0
    label = np.array([0, 0, 0, 0, -1, 7])  # an invalid label does not excuse its row, an ignored one does
    assert audit(pred, label).bad_rows == 3
    assert audit(pred, label, ignore_label=-1).bad_rows == 2
    assert audit(np.log(np.maximum(pred, 1e-9)), label, pred_type='log_probs', ignore_label=-1).bad_rows == 2
    assert audit(pred, label, pred_type='logits').bad_rows is None
    half = np.full((2, 2), 0.5, 'float16')
    half[0] *= np.float16(1.005)
    half[1] *= np.float16(1.02)
    assert (audit(half, label[:2]).bad_rows, audit(half, label[:2]).row_tolerance) == (1, 1e-2)


def test_labels_are_ignored_or_invalid_as_in_the_loss():
    pred, label = distributions(9, 4), np.array([0, 1, -1, 4, 2.5, np.nan, np.inf, -2.0, 3])
    found = audit(pred, label, ignore_label=-1)
    assert (found.samples, found.ignored, found.invalid) == (3, 1, 5)
    metric = StableCrossEntropy(ignore_label=-1)
    metric.update(mx.nd.array(label, dtype='float64'), mx.nd.array(pred))
    sums = metric.state_dict()['local']
    assert (sums['count'], sums['invalid']) == (found.samples, found.invalid)
    assert found.nll == audit(pred[[0, 1, 8]], label[[0, 1, 8]]).nll
    assert sorted(sample.index for sample in found.worst) == [(0,), (1,), (8,)]
    assert audit(pred, label).invalid == 6
    assert audit(pred, np.full(9, 2**53 + 2)).invalid == 9


@pytest.mark.parametrize('dtype', [
    'int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'int64', 'uint64', 'float16', 'float32', 'float64',
    '>i4',
])  # fmt: skip
def test_label_dtypes_change_nothing(dtype):
    pred, label = distributions(50, 9), labels_for(50, 9)
    assert same(audit(pred, label.astype(dtype)), audit(pred, label))


def test_byte_order_of_predictions_changes_nothing():
    pred, label = distributions(50, 9), labels_for(50, 9)
    assert same(audit(pred.astype('>f4'), label), audit(pred, label))


@pytest.mark.parametrize(('pred', 'label'), [
    pytest.param(distributions(3, 4), np.full(3, -1), id='all ignored'),
    pytest.param(distributions(3, 4), np.full(3, 4), id='all invalid'),
    pytest.param(np.zeros((0, 4)), np.zeros(0), id='no samples'),
    pytest.param(np.zeros((3, 0, 4)), np.zeros((3, 0)), id='no positions'),
])  # fmt: skip
def test_means_are_nan_where_no_sample_counts(pred, label):
    found = audit(pred, label, ignore_label=-1)
    assert (found.samples, found.worst, found.under_eps, found.zero) == (0, (), 0, 0)
    assert found.ignored + found.invalid == label.size
    means = [found.nll, found.perplexity, found.stock_cross_entropy, found.stock_perplexity, found.error]
    np.testing.assert_equal(means, [np.nan] * 5)
    assert 'nan' in found.table()
    found.plot()


def test_worst_lists_the_samples_of_the_largest_nll():
    pred = np.full((30, 2, 3), 0.25)
    pred[7, 1] = [0.9, 0.1, 0.0]
    pred[20, 0] = [1e-5, 0.5, 0.5]
    label = np.zeros((30, 2), int)
    label[7, 1] = 2
    worst = audit(pred, label, worst=4).worst
    assert [tuple(sample) for sample in worst[:2]] == [
        ((7, 1), 2, 0.0, inf),
        ((20, 0), 0, 1e-5, -math.log(1e-5)),
    ]
    assert [sample.index for sample in worst[2:]] == [(0, 0), (0, 1)]  # of equal ones the first
    assert audit(pred, label, worst=0).worst == ()
    pred[9, 0] = np.nan
    assert [sample.index for sample in audit(pred, label, worst=3).worst] == [
        (7, 1),
        (9, 0),
        (20, 0),
    ]  # NaN as if infinite


@pytest.mark.parametrize('chunk', [90, 2**20])
@pytest.mark.parametrize('worst', [500, 1500])
def test_worst_does_not_depend_on_chunks(monkeypatch, worst, chunk):
    monkeypatch.setattr(arrays, '_CHUNK', chunk)
    pred, label = distributions(5000, 3), labels_for(5000, 3)
    nll = -np.log(pred.astype('float64')[np.arange(5000), label])
    found = audit(pred, label, worst=worst).worst
    values = [sample.nll for sample in found]
    assert_close(values, -np.sort(-nll)[:worst], AUDIT)
    assert_close([nll[sample.index] for sample in found], values, AUDIT)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 6), st.sampled_from([1e-12, 1e-3, 0.0]))
def test_stock_never_exceeds_exact_and_order_changes_nothing(seed, count, classes, eps):
    pred = distributions(count, classes, seed=seed, dtype='float64')
    label, order = labels_for(count, classes, seed), np.random.RandomState(seed).permutation(count)
    found, shuffled = audit(pred, label, eps=eps), audit(pred[order], label[order], eps=eps)
    assert found.stock_cross_entropy <= found.nll * (1 + 1e-14)
    assert 0 <= found.under_eps_share <= 1 + 1e-15
    for name in ('nll', 'stock_perplexity', 'under_eps_share'):
        assert getattr(shuffled, name) == getattr(found, name)


def classes_at(axis):
    """Return a function that moves the classes, which are last, to `axis` in new memory."""
    return lambda pred, label: (np.ascontiguousarray(np.moveaxis(pred, -1, axis)), label, axis)


def memory_map(order, mode):
    """Return a function that saves predictions in an order, and opens the file as a memory map."""

    def layout(pred, label, path='pred.npy'):
        np.save(path, np.asarray(pred, order=order))
        return np.load(path, mmap_mode=mode), label, -1

    return layout


LAYOUTS = {
    'kept axis': lambda pred, label: (pred, label[..., None], 3),
    'classes first': classes_at(0),
    'classes second': classes_at(1),
    'classes third, negative': classes_at(-2),
    'classes first, a view': lambda pred, label: (np.moveaxis(pred, -1, 0), label[None], -4),
    'classes second, kept axis': lambda pred, label: (np.moveaxis(pred, -1, 1), label[:, None], -3),
    'Fortran order': lambda pred, label: (np.asfortranarray(pred), np.asfortranarray(label), -1),
    'strided': lambda pred, label: (np.repeat(pred, 2, axis=0)[::2], label, -1),
    'memory map': memory_map('C', 'r'),
    'memory map, copy on write': memory_map('C', 'c'),
    'memory map, Fortran order': memory_map('F', 'r'),
    'mx.nd': lambda pred, label: (mx.nd.array(pred), mx.nd.array(label, dtype='int64'), -1),
    'mx.nd, classes first': lambda pred, label: (
        mx.nd.array(np.moveaxis(pred, -1, 0)),
        mx.nd.array(label),
        0,
    ),
    'mx.np': lambda pred, label: (mx.np.array(pred), mx.np.array(label), -1),
}


@pytest.mark.slow
@pytest.mark.parametrize('chunk', [1, 37, 2**20])
@pytest.mark.parametrize('pred_type', ['probs', 'logits', 'log_probs'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_and_chunks_change_nothing(monkeypatch, tmp_path, layout, pred_type, chunk):
    pred = as_pred_type(distributions(23, 4, 3, 5, sharpness=5), pred_type)
    label = labels_for((23, 4, 3), 5)
    label[0, 0, 0], label[1, 1, 1] = -1, 9
    whole = audit(pred, label, pred_type=pred_type, ignore_label=-1)
    assert (whole.samples, whole.ignored, whole.invalid) == (23 * 12 - 2, 1, 1)
    monkeypatch.setattr(arrays, '_CHUNK', chunk)
    monkeypatch.chdir(tmp_path)
    moved, moved_label, axis = LAYOUTS[layout](pred, label)
    assert same(audit(moved, moved_label, axis=axis, pred_type=pred_type, ignore_label=-1), whole)


@pytest.mark.parametrize('axis', [-1, 1])
@pytest.mark.parametrize('pred_type', ['probs', 'logits', 'log_probs'])
def test_a_memory_map_of_100_mb_needs_less_than_60_mb(tmp_path, pred_type, axis):
    """Tracemalloc counts what NumPy allocates, and not the pages of a file, which the system can take back."""
    shape = (1, 50000, 500) if axis == -1 else (500, 500, 100)
    pred = np.lib.format.open_memmap(tmp_path / 'pred.npy', 'w+', 'float32', shape)
    pred[:] = 0.002 if pred_type == 'probs' else np.log(0.002)
    pred.flush()
    pred, label = (np.load(tmp_path / 'pred.npy', mmap_mode='r'), np.zeros(np.delete(shape, axis), 'uint8'))
    tracemalloc.start()
    try:
        assert audit(pred, label, pred_type=pred_type, axis=axis).samples == 50000
        assert tracemalloc.get_traced_memory()[1] < 60e6
        tracemalloc.stop()
        tracemalloc.start()  # the peak of what follows
        assert np.array(pred).nbytes == 1e8
        assert tracemalloc.get_traced_memory()[1] > 1e8  # so the measurement would show it
    finally:
        tracemalloc.stop()
        (tmp_path / 'pred.npy').unlink()


@pytest.mark.parametrize(('change', 'error', 'message'), [
    ({'pred': [[0.5, 0.5]]}, TypeError, 'pred: expected a NumPy array or an MXNet array, got list'),
    ({'pred': np.eye(4, dtype=int)}, TypeError, 'pred: expected float16, float32 or float64, got int64'),
    ({'pred': np.eye(4, dtype=complex)}, TypeError, 'pred: .* got complex128'),
    (
        {'pred': np.ones(4)}, ValueError,
        r'pred: expected at least 2 axes, with the classes on axis -1, got shape \(4,\)',
    ),
    ({'pred': np.ones((4, 0))}, ValueError, r'got shape \(4, 0\)'),
    (
        {'pred': mx.nd.ones((4, 2)).tostype('row_sparse')}, TypeError,
        'pred: expected a dense array, got row_sparse',
    ),
    (
        {'label': np.zeros((4, 2))}, ValueError,
        r'label: expected class indices of shape \(4,\) .* got \(4, 2\); if the labels are one-hot',
    ),
    (
        {'pred': np.ones((2, 4)), 'label': np.zeros((2, 4)), 'axis': 0}, ValueError,
        r'shape \(4,\) .* their argmax over axis 0',
    ),
    ({'label': np.zeros(3)}, ValueError, r'label: expected shape \(4,\)'),
    ({'label': np.array(list('abcd'))}, TypeError, 'label: expected integers or floats, got <U1'),
    ({'label': np.array([None] * 4)}, TypeError, 'label: expected integers or floats, got object'),
    ({'label': np.zeros(4, bool)}, TypeError, 'label: expected integers or floats, got bool'),
    (
        {'pred': np.ones((4, 2049)), 'label': np.zeros(4, 'float16')}, TypeError,
        'label: expected a dtype that can name 2049 classes, got float16',
    ),
    ({'axis': 2}, ValueError, 'classes on axis 2'),
    ({'axis': 1.0}, TypeError, 'axis: expected an integer'),
    (
        {'pred_type': 'odds'}, ValueError,
        "pred_type: expected one of 'probs', 'logits', 'log_probs', got 'odds'",
    ),
    ({'ignore_label': 0.5}, TypeError, 'ignore_label: expected an integer'),
    ({'eps': -1.0}, ValueError, 'eps: expected a number from 0 to 1'),
    ({'eps': nan}, ValueError, 'eps: expected a number'),
    ({'worst': -1}, ValueError, 'worst: expected a number from 0'),
])  # fmt: skip
def test_bad_arguments_raise(change, error, message):
    arguments = {'pred': np.full((4, 2), 0.5), 'label': np.zeros(4, int), **change}
    with pytest.raises(error, match=message):
        audit(arguments.pop('pred'), arguments.pop('label'), **arguments)


def test_one_hot_error_names_no_option_of_the_loss():
    with pytest.raises(ValueError, match='one-hot') as caught:
        audit(np.full((4, 2), 0.5), np.eye(4, 2))
    assert 'sparse_label' not in str(caught.value)


def test_a_single_class_with_a_kept_axis_is_no_one_hot_label():
    assert audit(np.ones((4, 1)), np.zeros((4, 1))).samples == 4
