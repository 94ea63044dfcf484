"""The audit: against mpmath, against the real mx.metric classes, and on files, good and bad, as its users run it."""
import argparse
import io
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile

import mpmath
import mxnet as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gluon_stable_ce
from gluon_stable_ce.audit import arrays, files as _files
from gluon_stable_ce.audit import Audit, add_arguments, audit, run

ROOT = os.path.dirname(os.path.dirname(gluon_stable_ce.__file__))


def distributions(*shape, seed=0, dtype='float32', sharpness=12):
    """Softmax over the last axis of random logits, some of them hopeless; rounded to `dtype`."""
    z = np.random.RandomState(seed).randn(*shape) * sharpness
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True)).astype(dtype)


def labels_for(shape, classes, seed=1):
    return np.random.RandomState(seed).randint(0, classes, shape)


def true_nll(row, label, pred_type):
    """NLL of one label at 400 digits, which tell exp(-700) from 0 next to 1; from the rounded input, as an mpf."""
    with mpmath.workdps(400):
        row = [mpmath.mpf(float(x)) for x in row]
        if pred_type == 'logits':
            return mpmath.log(mpmath.fsum(mpmath.exp(x) for x in row)) - row[label]
        return -mpmath.log(row[label]) if pred_type == 'probs' else -row[label]


def as_pred_type(p, pred_type):
    return p if pred_type == 'probs' else np.log(p.astype('float64')).astype(p.dtype)


def same(a, b):
    """Whether all fields are the same, NaN included."""
    return json.dumps(a.as_dict()) == json.dumps(b.as_dict())


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')
    return json.loads(text, parse_constant=refuse)


# --- values ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('pred_type', ['probs', 'logits', 'log_probs'])
def test_the_mean_is_that_of_mpmath(pred_type, dtype):
    p = distributions(61, 7, dtype=dtype, sharpness=2)
    pred, label = as_pred_type(p, pred_type), labels_for(61, 7)
    with mpmath.workdps(50):
        truth = mpmath.fsum(true_nll(row, y, pred_type) for row, y in zip(pred, label)) / 61
        perplexity = mpmath.exp(truth)
    found = audit(pred, label, pred_type=pred_type)
    np.testing.assert_allclose(found.nll, float(truth), rtol=1e-14)
    np.testing.assert_allclose(found.perplexity, float(perplexity), rtol=1e-13)
    assert found.samples == 61


@pytest.mark.parametrize(('pred', 'label', 'pred_type'), [
    ([20.0, 0.0], 0, 'logits'), ([40.0, 0.0], 0, 'logits'), ([700.0, 0.0], 0, 'logits'), ([0.0, 1e5], 0, 'logits'),
    ([1.0, 2.0, 3.0], 2, 'logits'), ([-5e4, -5e4], 1, 'logits'), ([float('-inf'), 0.0, 3.0], 1, 'logits'), ([2.0, 2.0, 2.0], 0, 'logits'),
    ([1e-43, 1.0], 0, 'probs'), ([5e-324, 1.0], 0, 'probs'), ([0.0, 1 - 2.0 ** -53], 1, 'probs'), ([-1e-300, -800.0], 0, 'log_probs')])
def test_both_tails_are_exact(pred, label, pred_type):
    truth = float(true_nll(pred, label, pred_type))
    assert truth > 0
    np.testing.assert_allclose(audit(np.array([pred]), np.array([label]), pred_type=pred_type).nll, truth, rtol=1e-14)


@pytest.mark.parametrize(('pred', 'label', 'pred_type', 'nll'), [
    ([1.0, 0.0], 1, 'probs', float('inf')), ([1.0, 0.0], 0, 'probs', 0.0), ([float('nan'), 0.5], 0, 'probs', float('nan')),
    ([-0.5, 1.5], 0, 'probs', float('nan')), ([0.0, 1.0000001], 1, 'probs', 0.0), ([float('-inf'), 0.0], 0, 'log_probs', float('inf')),
    ([float('-inf'), 0.0], 0, 'logits', float('inf')), ([float('nan'), 0.0], 1, 'logits', float('nan')),
    ([float('inf'), 0.0], 0, 'logits', float('nan')), ([float('-inf'), float('-inf')], 0, 'logits', float('nan'))])
def test_what_is_not_finite(pred, label, pred_type, nll):
    found = audit(np.array([pred, pred]), np.array([label] * 2), pred_type=pred_type)
    np.testing.assert_equal(found.nll, nll)
    assert not math.copysign(1, found.nll) < 0
    assert (found.zero, found.nan) == (2 * (nll == float('inf')), 2 * math.isnan(nll))
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
def test_the_stock_values_are_those_of_the_stock_metrics(dtype, eps, ignore_label):
    pred, label = distributions(20000, 11, dtype=dtype, sharpness=9), labels_for(20000, 11)
    found = audit(pred, label, eps=eps, ignore_label=ignore_label)
    cross_entropy, perplexity = real_metrics(pred, label, eps, ignore_label)
    rtol = 1e-6 if dtype == 'float32' else 1e-12
    np.testing.assert_allclose(found.stock_cross_entropy, cross_entropy, rtol=rtol)
    np.testing.assert_allclose(found.stock_perplexity, perplexity, rtol=20 * rtol)  # the exponential of 13 or so
    if eps:
        assert found.under_eps > 20
        assert found.nll - found.stock_cross_entropy > 1e-3  # so the two would not pass for each other
    assert abs(math.log(found.stock_perplexity) - found.nll) > 1e-3


@pytest.mark.parametrize(('dtype', 'count'), [('float16', 3000), ('float16', 30000), ('float32', 30000)])
def test_the_stock_values_in_half_precision(dtype, count):
    """There the eps and the floor vanish, and a sum over 65504 is inf; in float32 neither happens."""
    pred, label = distributions(count, 5, dtype=dtype, sharpness=3), labels_for(count, 5)
    pred = np.maximum(pred, np.float16(2.0 ** -14)).astype(dtype)  # without a p = 0, which would be inf at once
    found = audit(pred, label)
    cross_entropy, perplexity = real_metrics(pred, label)
    np.testing.assert_allclose([found.stock_cross_entropy, np.log(found.stock_perplexity)], [cross_entropy, np.log(perplexity)], rtol=2e-3)
    assert math.isinf(found.stock_cross_entropy) == (dtype == 'float16' and count == 30000)
    assert math.isfinite(found.nll)


@pytest.mark.parametrize('pred_type', ['logits', 'log_probs'])
def test_the_stock_values_from_logits_and_log_probs(pred_type):
    z = (np.random.RandomState(3).randn(5000, 6) * 15).astype('float32')
    p = mx.nd.softmax(mx.nd.array(z))
    pred = z if pred_type == 'logits' else mx.nd.log_softmax(mx.nd.array(z)).asnumpy()
    found = audit(pred, labels_for(5000, 6), pred_type=pred_type)
    np.testing.assert_allclose(found.stock_cross_entropy, real_metrics(p.asnumpy(), labels_for(5000, 6))[0], rtol=1e-5)
    assert found.under_eps > 100
    assert found.nll > found.stock_cross_entropy * 1.01


def test_what_sat_under_the_eps():
    p = np.array([1e-13, 1e-20, 0.5, 1e-12, 2e-12])
    found = audit(np.stack([p, 1 - p], axis=1), np.zeros(5, int))
    assert (found.samples, found.under_eps, found.zero, found.bad_rows) == (5, 2, 0, 0)
    np.testing.assert_allclose(found.under_eps_share, (math.log(1e-13) + math.log(1e-20)) / np.log(p).sum(), rtol=1e-14)
    np.testing.assert_allclose(found.error, (np.log(p + 1e-12).sum() - np.log(p).sum()) / -np.log(p).sum(), rtol=1e-12)
    p[0] = 0
    found = audit(np.stack([p, 1 - p], axis=1), np.zeros(5, int))
    assert (found.under_eps, found.zero, found.under_eps_share, found.nll, found.error) == (2, 1, 1.0, float('inf'), float('inf'))


@pytest.mark.parametrize(('stock', 'exact', 'error'), [
    (1.0, 2.0, 0.5), (2.5, 2.0, 0.25), (-1e-9, 1e-3, 1.000001), (0.0, 0.0, 0.0), (float('inf'), float('inf'), 0.0),
    (float('inf'), 1.0, float('inf')), (27.6, float('inf'), float('inf')), (-1e-12, 0.0, float('inf')),
    (float('nan'), 1.0, float('nan')), (1.0, float('nan'), float('nan')), (float('nan'), float('inf'), float('nan'))])
def test_relative_error(stock, exact, error):
    found = audit(np.array([[0.5, 0.5]]), np.array([0]))
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    np.testing.assert_allclose(Audit(**{**fields, 'nll': exact, 'stock_cross_entropy': stock}).error, error, rtol=1e-12)


def test_rows_that_do_not_sum_to_1():
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


def test_labels_are_read_as_the_loss_reads_them():
    pred, label = distributions(9, 4), np.array([0, 1, -1, 4, 2.5, np.nan, np.inf, -2.0, 3])
    found = audit(pred, label, ignore_label=-1)
    assert (found.samples, found.ignored, found.invalid) == (3, 1, 5)
    assert same(audit(pred[[0, 1, 8]], label[[0, 1, 8]]), Audit(**{**vars(found), 'ignored': 0, 'invalid': 0, 'worst': tuple(
        worst._replace(index=([0, 1, 8].index(worst.index[0]),)) for worst in found.worst)}))
    assert audit(pred, label).invalid == 6
    assert audit(pred, np.full(9, 2 ** 53 + 2)).invalid == 9


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'int64', 'uint64', 'float16', 'float32',
                                   'float64', '>i4'])
def test_label_dtypes(dtype):
    pred, label = distributions(50, 9), labels_for(50, 9)
    assert same(audit(pred, label.astype(dtype)), audit(pred, label))


def test_byte_order_of_predictions():
    pred, label = distributions(50, 9), labels_for(50, 9)
    assert same(audit(pred.astype('>f4'), label), audit(pred, label))


def test_nothing_counts():
    for found in (audit(distributions(3, 4), np.full(3, -1), ignore_label=-1), audit(np.zeros((0, 4)), np.zeros(0))):
        assert (found.samples, found.worst, found.under_eps, found.zero) == (0, (), 0, 0)
        np.testing.assert_equal([found.nll, found.perplexity, found.stock_cross_entropy, found.stock_perplexity, found.error], [np.nan] * 5)
        assert 'nan' in found.table()
        found.plot()


def test_the_worst_samples():
    pred = np.full((30, 2, 3), 0.25)
    pred[7, 1] = [0.9, 0.1, 0.0]
    pred[20, 0] = [1e-5, 0.5, 0.5]
    label = np.zeros((30, 2), int)
    label[7, 1] = 2
    worst = audit(pred, label, worst=4).worst
    assert [tuple(sample) for sample in worst[:2]] == [((7, 1), 2, 0.0, float('inf')), ((20, 0), 0, 1e-5, -math.log(1e-5))]
    assert [sample.index for sample in worst[2:]] == [(0, 0), (0, 1)]  # of equal ones the first
    assert audit(pred, label, worst=0).worst == ()
    pred[9, 0] = np.nan
    assert [sample.index for sample in audit(pred, label, worst=3).worst] == [(7, 1), (9, 0), (20, 0)]  # NaN as if infinite
    many = audit(distributions(2000, 3), labels_for(2000, 3), worst=1500)
    nll = -np.log(distributions(2000, 3).astype('float64')[np.arange(2000), labels_for(2000, 3)])
    np.testing.assert_allclose([sample.nll for sample in many.worst], -np.sort(-nll)[:1500], rtol=1e-14)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10 ** 6), st.integers(1, 40), st.integers(1, 6), st.sampled_from([1e-12, 1e-3, 0.0]))
def test_an_epsilon_only_ever_hides(seed, count, classes, eps):
    found = audit(distributions(count, classes, seed=seed, dtype='float64'), labels_for(count, classes, seed), eps=eps)
    assert found.stock_cross_entropy <= found.nll * (1 + 1e-14)
    assert 0 <= found.under_eps_share <= 1 + 1e-15
    order = np.random.RandomState(seed).permutation(count)
    shuffled = audit(distributions(count, classes, seed=seed, dtype='float64')[order], labels_for(count, classes, seed)[order], eps=eps)
    assert (shuffled.nll, shuffled.stock_perplexity, shuffled.under_eps_share) == (found.nll, found.stock_perplexity, found.under_eps_share)


# --- layouts and chunks ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('chunk', [1, 37, 2 ** 20])
@pytest.mark.parametrize('pred_type', ['probs', 'logits', 'log_probs'])
def test_layouts_and_chunks_change_nothing(monkeypatch, tmp_path, pred_type, chunk):
    pred, label = as_pred_type(distributions(23, 4, 3, 5, sharpness=5), pred_type), labels_for((23, 4, 3), 5)
    label[0, 0, 0], label[1, 1, 1] = -1, 9
    options = {'pred_type': pred_type, 'ignore_label': -1}
    whole = audit(pred, label, **options)
    assert (whole.samples, whole.ignored, whole.invalid) == (23 * 12 - 2, 1, 1)
    monkeypatch.setattr(_files, '_CHUNK', chunk)
    np.save(tmp_path / 'pred.npy', pred)
    np.savez(tmp_path / 'both.npz', pred=pred, label=label)
    np.savez_compressed(tmp_path / 'small.npz', pred=pred, label=label[..., None])
    first, middle = np.moveaxis(pred, -1, 0), np.moveaxis(pred, -1, 1)
    np.savez(tmp_path / 'first.npz', pred=np.ascontiguousarray(first), label=label)
    np.savez(tmp_path / 'middle.npz', pred=np.ascontiguousarray(middle), label=label)
    np.savez(tmp_path / 'fortran.npz', pred=np.asfortranarray(pred), label=np.asfortranarray(label))
    np.save(tmp_path / 'fortran.npy', np.asfortranarray(pred))
    for p, y, axis in [(pred, label, -1), (pred, label[..., None], 3), (first, label, 0), (first, label[None], -4), (middle, label, 1),
                       (middle, label[:, None], -3), (np.asfortranarray(pred), np.asfortranarray(label), -1),
                       (np.repeat(pred, 2, axis=0)[::2], label, -1),
                       (np.load(tmp_path / 'pred.npy', mmap_mode='r'), label, -1),
                       (np.load(tmp_path / 'pred.npy', mmap_mode='c'), label, -1),
                       (np.load(tmp_path / 'fortran.npy', mmap_mode='r'), label, -1),
                       (mx.nd.array(pred), mx.nd.array(label, dtype='int64'), -1), (mx.nd.array(first), mx.nd.array(label), 0),
                       (mx.np.array(pred), mx.np.array(label), -1)]:
        assert same(audit(p, y, axis=axis, **options), whole)
    for name, axis in [('both', -1), ('small', -1), ('first', 0), ('first', -4), ('middle', 1), ('fortran', 3)]:
        assert same(audit(*_files.read_files([str(tmp_path / (name + '.npz'))], axis), axis=axis, **options), whole), name
    assert not same(audit(np.roll(pred, 1, axis=0), label, **options), whole)


def test_members_are_read_in_order_and_once(tmp_path):
    np.savez(tmp_path / 'a.npz', pred=np.eye(5), label=np.arange(5))
    pred, label = _files.read_files([str(tmp_path / 'a.npz')])
    assert isinstance(pred, _files.Member)
    np.testing.assert_equal(pred[0:2], np.eye(5)[:2])
    np.testing.assert_equal(label[0:9], np.arange(5))
    with pytest.raises(IndexError, match='expected row 2, got 0'):
        pred[0:2]


# --- errors of the function -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('change', 'error', 'message'), [
    ({'pred': [[0.5, 0.5]]}, TypeError, 'pred: expected a NumPy array or an MXNet array, got list'),
    ({'pred': np.eye(4, dtype=int)}, TypeError, 'pred: expected float16, float32 or float64, got int64'),
    ({'pred': np.eye(4, dtype=complex)}, TypeError, 'pred: .* got complex128'),
    ({'pred': np.ones(4)}, ValueError, r'pred: expected at least 2 axes, with the classes on axis -1, got shape \(4,\)'),
    ({'pred': np.ones((4, 0))}, ValueError, r'got shape \(4, 0\)'),
    ({'pred': mx.nd.ones((4, 2)).tostype('row_sparse')}, TypeError, 'pred: expected a dense array, got row_sparse'),
    ({'label': np.zeros((4, 2))}, ValueError, r'label: expected shape \(4,\) for pred of shape \(4, 2\) .* axis 1, got \(4, 2\)'),
    ({'label': np.zeros(3)}, ValueError, r'label: expected shape \(4,\)'),
    ({'label': np.array(list('abcd'))}, TypeError, 'label: expected integers or floats, got <U1'),
    ({'label': np.array([None] * 4)}, TypeError, 'label: expected integers or floats, got object'),
    ({'label': np.zeros(4, bool)}, TypeError, 'label: expected integers or floats, got bool'),
    ({'pred': np.ones((4, 2049)), 'label': np.zeros(4, 'float16')}, TypeError, 'label: expected a dtype that can name 2049 classes, got float16'),
    ({'axis': 2}, ValueError, 'classes on axis 2'),
    ({'axis': 1.0}, TypeError, 'axis: expected an integer'),
    ({'pred_type': 'odds'}, ValueError, "pred_type: expected one of 'probs', 'logits', 'log_probs', got 'odds'"),
    ({'ignore_label': 0.5}, TypeError, 'ignore_label: expected an integer'),
    ({'eps': -1.0}, ValueError, 'eps: expected a number from 0 to 1'),
    ({'eps': float('nan')}, ValueError, 'eps: expected a number'),
    ({'worst': -1}, ValueError, 'worst: expected a number from 0')])
def test_errors(change, error, message):
    arguments = {'pred': np.full((4, 2), 0.5), 'label': np.zeros(4, int), **change}
    with pytest.raises(error, match=message):
        audit(arguments.pop('pred'), arguments.pop('label'), **arguments)


# --- report ---------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def hopeless():
    """2000 samples, every hundredth of them under the eps, one with p = 0."""
    p = np.random.RandomState(5).uniform(0.1, 1, 2000)
    p[::100] = 10.0 ** -np.arange(13, 33)
    p[42] = 0
    return np.stack([p, 1 - p], axis=1), np.zeros(2000, int)


def test_table(hopeless):
    table = audit(*hopeless).table()
    lines = table.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith('samples counted')] == ['2000']
    assert 'outside [0, 2)' in table
    assert 'hold 100.000% of the total loss' in table
    assert 'mx.metric.CrossEntropy(eps=1e-12)' in table
    assert len(lines) == 11 + 2 + 10
    assert len({len(line) for line in lines[12:]}) == 1
    assert all(line[48] != ' ' and line[49:51] in ('', '  ') for line in lines[:11])  # the values end in one column
    assert 'sum to 1' not in audit(*hopeless, pred_type='logits').table()


def test_as_dict_is_strict_json(hopeless):
    found = audit(*hopeless)
    again = strict_json(json.dumps(found.as_dict(), allow_nan=False))
    assert (again['nll'], again['error'], again['samples'], again['worst'][0]) == (
        'inf', 'inf', 2000, {'index': [42], 'label': 0, 'p': 0.0, 'nll': 'inf'})
    assert {*again} == {name for name in found.__dataclass_fields__ if name != '_curve'} | {'error'}
    assert float(again['nll']) == found.nll  # the strings are what float() reads


def test_plot(hopeless, tmp_path):
    from matplotlib.image import imread
    figure = audit(*hopeless).plot(tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    image = imread(tmp_path / 'a.png')
    assert image.shape[0] >= 300
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 100
    axes, = figure.axes
    assert 'nats' in axes.get_ylabel()
    assert axes.get_xlabel()
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    floor = -math.log(1e-12)
    assert max(lines['mx.metric.CrossEntropy']) <= floor + 1e-9
    assert sorted(lines['exact'])[-2] > 70
    assert list(lines['exact']) == sorted(lines['exact'], reverse=True)
    np.testing.assert_allclose(next(y for label, y in lines.items() if '1e-12' in label), floor)
    assert any('infinite: 1 ' in label for label in lines)


def test_the_plot_is_of_a_bounded_sample_with_the_right_ranks():
    count = 300000
    p = 1 - np.arange(count) / count * 0.9
    found = audit(np.stack([p, 1 - p], axis=1), np.zeros(count, int))
    rank, exact, stock = found._curve
    assert 9000 < len(rank) < 13000
    assert list(rank[:3]) == [1, 2, 3]
    assert rank[-1] == count
    np.testing.assert_allclose(np.exp(-exact), 1 - (count - rank) / count * 0.9, atol=2e-3)
    np.testing.assert_allclose(stock, exact, rtol=1e-9, atol=2e-12)
    assert np.any(rank[1:] - rank[:-1] > 2)
    assert (np.diff(rank) > 0).all()
    assert (np.diff(audit(distributions(30000, 3), labels_for(30000, 3))._curve[1]) <= 0).all()  # no step where the two parts meet


def test_progress_bar_only_on_a_terminal_and_only_with_tqdm(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    pred, label = distributions(50, 4), labels_for(50, 4)
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, 'stderr', stream)
        audit(pred, label)
        assert not stream.getvalue()
        audit(pred, label, progress=True)
        assert ('chunk' in stream.getvalue()) == shown
    monkeypatch.setitem(sys.modules, 'tqdm', None)
    assert same(audit(pred, label, progress=True), audit(pred, label))


# --- the command ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path):
    """A directory with the same predictions and labels in every format."""
    pred, label = distributions(300, 6), labels_for(300, 6)
    np.save(tmp_path / 'pred.npy', pred)
    np.save(tmp_path / 'label.npy', label)
    np.savez(tmp_path / 'both.npz', pred=pred, label=label, other=label)
    mx.nd.save(str(tmp_path / 'both.params'), {'pred': mx.nd.array(pred), 'label': mx.nd.array(label)})
    mx.nd.save(str(tmp_path / 'both.nd'), [mx.nd.array(pred), mx.nd.array(label)])
    return tmp_path


@pytest.mark.parametrize('names', [['pred.npy', 'label.npy'], ['both.npz'], ['both.params'], ['both.nd']])
def test_every_format_gives_the_same(files, names, capsys):
    assert command(*(files / name for name in names), '--json') == 0
    out, err = capsys.readouterr()
    assert strict_json(out) == audit(distributions(300, 6), labels_for(300, 6)).as_dict()
    assert not err


def test_the_flags_reach_the_function(tmp_path, capsys):
    pred, label = np.random.RandomState(0).randn(5, 40).astype('float32'), labels_for(40, 5)
    np.savez(tmp_path / 'a.npz', pred=pred, label=label)
    assert command(tmp_path / 'a.npz', '--json', '--pred-type', 'logits', '--axis', '0', '--ignore-label', '-1', '--eps', '0.25') == 0
    assert strict_json(capsys.readouterr().out) == audit(pred, label, pred_type='logits', axis=0, ignore_label=-1, eps=0.25).as_dict()
    assert command(tmp_path / 'a.npz', '--json', '--pred-type', 'logits', '--axis', '0', '--ignore-label', '2') == 0
    assert strict_json(capsys.readouterr().out)['ignored'] == (label == 2).sum()


@pytest.mark.parametrize(('p', 'code'), [(0.5, 0), (1e-20, 1), (0.0, 1), (float('nan'), 1)])
def test_max_error(tmp_path, capsys, p, code):
    np.savez(tmp_path / 'a.npz', pred=np.array([[p, 1 - p]] * 3), label=np.zeros(3, int))
    assert command(tmp_path / 'a.npz', '--max-error', '0.01') == code
    assert command(tmp_path / 'a.npz') == 0
    if p == 1e-20:  # 27.63 for 46.05, off by 0.4
        assert [command(tmp_path / 'a.npz', '--max-error', bound) for bound in ('0.39', '0.41')] == [1, 0]
    assert not capsys.readouterr().err


class Bomb:
    """Unpickled, it leaves a trace."""

    def __reduce__(self):
        return open, ('exploded', 'w')


def save(path, content):
    """Write bytes, or an array, or the arrays of an archive; the suffix may lie."""
    with open(path, 'wb') as file:
        if isinstance(content, bytes):
            file.write(content)
        elif isinstance(content, dict):
            np.savez(file, **content)
        else:
            np.save(file, content, allow_pickle=True)


def npz(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        for name, content in members.items():
            archive.writestr(name + '.npy', content)
    return stream.getvalue()


def npy(array, **replaced):
    stream = io.BytesIO()
    np.save(stream, array)
    data = stream.getvalue()
    for old, new in replaced.items():
        data = data.replace(old.encode(), new)
    return data


GOOD, LABEL = np.full((4, 2), 0.5), np.zeros(4, int)
BOMBS = np.array([Bomb()] * 4)
BROKEN = {
    'not there': (['a.npz'], {}, 'No such file'),
    'not there, npy': (['a.npy', 'b.npy'], {'a.npy': GOOD}, 'No such file'),
    'not there, params': (['a.params'], {}, 'No such file'),
    'one npy': (['a.npy'], {'a.npy': GOOD}, 'two .npy'),
    'two npz': (['a.npz', 'b.npz'], {}, 'expected one .npz'),
    'other suffix': (['a.txt'], {'a.txt': b'1 2 3'}, 'expected one .npz'),
    'three files': (['a.npy', 'a.npy', 'a.npy'], {'a.npy': GOOD}, 'two .npy'),
    'no zip': (['a.npz'], {'a.npz': b'PK' * 40}, 'not a zip'),
    'empty npz': (['a.npz'], {'a.npz': b''}, 'not a zip'),
    'empty npy': (['a.npy', 'a.npy'], {'a.npy': b''}, '.npy format'),
    'a pickle': (['a.npy', 'a.npy'], {'a.npy': pickle.dumps(Bomb())}, '.npy format'),
    'pickled npy': (['a.npy', 'b.npy'], {'a.npy': GOOD, 'b.npy': BOMBS}, 'refused'),
    'pickled npz': (['a.npz'], {'a.npz': {'pred': GOOD, 'label': BOMBS}}, 'refused'),
    'pickled npz, axis 0': (['a.npz', '--axis', '0'], {'a.npz': {'pred': BOMBS, 'label': LABEL}}, 'refused'),
    'pickled member': (['a.npz'], {'a.npz': npz(pred=pickle.dumps(Bomb()), label=npy(LABEL))}, '.npy format'),
    'wrong keys': (['a.npz'], {'a.npz': {'x': GOOD, 'label': LABEL}}, "named 'pred' and 'label', got 'label', 'x'"),
    'cut npy': (['a.npy', 'b.npy'], {'a.npy': npy(GOOD)[:-8], 'b.npy': LABEL}, 'a.npy'),
    'cut member': (['a.npz'], {'a.npz': npz(pred=npy(GOOD)[:-8], label=npy(LABEL))}, 'ends within row 3'),
    'header': (['a.npz'], {'a.npz': npz(pred=npy(GOOD, descr=b'drops'), label=npy(LABEL))}, '.npy format'),
    'huge': (['a.npy', 'b.npy'], {'a.npy': npy(GOOD, **{'(4, 2), }': b'(4' + b'0' * 20 + b', 2), }'}), 'b.npy': LABEL}, 'a.npy'),
    'checksum': (['a.npz'], {'a.npz': npz(pred=npy(GOOD), label=npy(LABEL)).replace(b'\xe0?', b'\xf0?', 1)}, 'CRC'),
    'dtype': (['a.npz'], {'a.npz': {'pred': GOOD.astype(int), 'label': LABEL}}, 'pred: expected float16'),
    'label dtype': (['a.npz'], {'a.npz': {'pred': GOOD, 'label': np.array(list('abcd'))}}, 'label: expected integers'),
    'records': (['a.npy', 'b.npy'], {'a.npy': np.zeros(4, 'f4,i4'), 'b.npy': LABEL}, 'pred: expected float16'),
    'shape': (['a.npz'], {'a.npz': {'pred': GOOD, 'label': np.zeros(3)}}, 'label: expected shape (4,)'),
    'swapped': (['a.npy', 'b.npy'], {'a.npy': LABEL, 'b.npy': GOOD}, 'pred: expected float16'),
    'scalar': (['a.npz'], {'a.npz': {'pred': np.float32(1), 'label': LABEL}}, 'at least 2 axes'),
    'axis': (['a.npz', '--axis', '7'], {'a.npz': {'pred': GOOD, 'label': LABEL}}, 'axis 7'),
    'eps': (['a.npz', '--eps', '-1'], {'a.npz': {'pred': GOOD, 'label': LABEL}}, 'eps: expected a number'),
    'max-error': (['a.npz', '--max-error', 'nan'], {'a.npz': {'pred': GOOD, 'label': LABEL}}, '--max-error: expected a number'),
    'plot suffix': (['a.npz', '--plot', 'a.xyz'], {'a.npz': {'pred': GOOD, 'label': LABEL}}, 'xyz'),
    'plot place': (['a.npz', '--plot', 'nowhere/a.png'], {'a.npz': {'pred': GOOD, 'label': LABEL}}, 'No such file'),
    'a directory': (['.', ], {}, 'expected one .npz'),
    'no params': (['a.params'], {'a.params': b'something else'}, 'mx.nd.load'),
    'npz as params': (['a.params'], {'a.params': npz(pred=npy(GOOD), label=npy(LABEL))}, 'mx.nd.load'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_bad_files_give_one_line_and_exit_2(case, tmp_path, monkeypatch, capsys):
    arguments, contents, message = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    for name, content in contents.items():
        save(name, content)
    assert command(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith('audit: ')
    assert err.count('\n') == 1
    assert 'Traceback' not in err
    assert not os.path.exists('exploded')


def test_the_bombs_are_live(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save('b.npy', BOMBS)
    np.load('b.npy', allow_pickle=True)
    assert os.path.exists('exploded')


@pytest.mark.parametrize(('content', 'message'), [
    ({'pred': mx.nd.ones((2, 2)), 'y': mx.nd.ones(2)}, "got 'pred', 'y'"), ([mx.nd.ones((2, 2))], 'expected two arrays'),
    ([mx.nd.ones((2, 2)).tostype('csr'), mx.nd.ones(2)], 'dense')])
def test_bad_params(content, message, tmp_path, capsys):
    mx.nd.save(str(tmp_path / 'a.params'), content)
    assert command(tmp_path / 'a.params') == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count('\n') == 1


def test_every_cut_of_a_params_file_is_refused(files, capsys):
    data = (files / 'both.params').read_bytes()
    for end in range(0, len(data), len(data) // 40):
        (files / 'cut.params').write_bytes(data[:end])
        assert command(files / 'cut.params') == 2
        assert capsys.readouterr().err.count('\n') == 1


def test_no_matplotlib(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert command(files / 'both.npz', '--plot', files / 'a.png') == 2
    assert 'pip install "gluon-stable-ce[demo]"' in capsys.readouterr().err


def python(*arguments, cwd):
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([ROOT, os.environ.get('PYTHONPATH', '')])}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_line(files):
    done = python('-m', 'gluon_stable_ce', 'audit', 'pred.npy', 'label.npy', '--plot', 'a.png', '--max-error', '1e-6', cwd=files)
    assert (done.returncode, done.stderr) == (1, '')
    assert done.stdout.rstrip('\n') == audit(distributions(300, 6), labels_for(300, 6)).table()
    assert (files / 'a.png').stat().st_size > 10000
    done = python('-m', 'gluon_stable_ce', 'audit', 'label.npy', 'pred.npy', cwd=files)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == 'audit: pred: expected float16, float32 or float64, got int64\n'


# --- memory ---------------------------------------------------------------------------------------------------------------------------

PEAK = '''
import argparse, sys
from gluon_stable_ce.audit import add_arguments, run
parser = argparse.ArgumentParser()
add_arguments(parser)
if sys.argv[1:]:
    assert run(parser.parse_args(sys.argv[1:])) == 0
print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) // 1024)
'''  # not getrusage: its maximum outlives exec, and would be that of the test's own process


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads the peak memory from /proc')
def test_memory_stays_small(tmp_path):
    """400 MB of predictions, in a memory map and in an archive, cost less than 100 MB on top of what the import costs."""
    pred = np.lib.format.open_memmap(tmp_path / 'pred.npy', 'w+', 'float32', (200000, 500))
    pred.reshape(100, 2000, 500)[:] = distributions(2000, 500)
    del pred
    np.save(tmp_path / 'label.npy', labels_for(200000, 500))
    with zipfile.ZipFile(tmp_path / 'both.npz', 'w') as archive:
        archive.write(tmp_path / 'pred.npy', 'pred.npy')
        archive.write(tmp_path / 'label.npy', 'label.npy')
    try:
        baseline = int(python('-c', PEAK, cwd=tmp_path).stdout)
        for arguments in (['pred.npy', 'label.npy'], ['both.npz', '--pred-type', 'logits']):
            done = python('-c', PEAK, *arguments, '--json', cwd=tmp_path)
            found, peak = done.stdout.splitlines()
            assert strict_json(found)['samples'] == 200000
            assert int(peak) - baseline < 100, arguments
        loaded = python('-c', PEAK.replace('if sys', 'import numpy; x = numpy.load("pred.npy") + 1\nif sys'), cwd=tmp_path)
        assert int(loaded.stdout) - baseline > 380  # so the measure would see it
    finally:
        for path in tmp_path.glob('*.np?'):
            path.unlink()
