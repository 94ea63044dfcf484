"""The metrics: values against float64 and mpmath, windows, state, and everything that must not change the result."""

import copy
import json
import math
import pickle
from collections import OrderedDict
from fractions import Fraction

import modes
import mpmath
import mxnet as mx
import numpy as np
import pytest
import reference

import gluon_stable_ce
from gluon_stable_ce import (
    StableBitsPerToken,
    StableCrossEntropy,
    StableLoss,
    StablePerplexity,
    StableSoftmaxCELoss,
)
from gluon_stable_ce._running_mean import ExactSums, exact_sum

nd = mx.nd


def batches(rng, count=5, classes=7):
    """Uneven batches of (label, logits), with ignored labels of -1."""
    sizes = rng.randint(1, 9, count)
    return [(nd.array(rng.randint(-1, classes, n)), nd.array(rng.normal(0, 20, (n, classes)))) for n in sizes]


def filled(metric, data):
    for label, pred in data:
        metric.update(label, pred)
    return metric


def test_the_probability_that_stock_reports_as_27_63(ctx):
    prob = np.float32(1e-43)
    pred, label = nd.array([[prob, 1 - prob]]), nd.array([0])
    ours, stock = StableCrossEntropy(), mx.metric.CrossEntropy()
    for metric in (ours, stock):
        metric.update([label], [pred])
    assert stock.get()[1] == pytest.approx(27.631, abs=1e-3)
    np.testing.assert_allclose(ours.get()[1], float(-mpmath.log(mpmath.mpf(float(prob)))), rtol=1e-15)
    assert ours.get()[1] == pytest.approx(99.01, abs=0.01)  # 1e-43 itself is not a float32


@pytest.mark.parametrize(
    ('prob', 'nll'),
    [
        (0, math.inf),
        (1, 0),
        (1e-45, 103.2789),
        (5e-324, 744.4401),
        (1 + 2**-23, 0),
        (math.nan, math.nan),
        (-0.1, math.nan),
    ],
)
def test_probabilities_at_the_edge(prob, nll, ctx):
    metric = StableCrossEntropy()
    metric.update(nd.array([1]), nd.array([[0.5, prob]], dtype='float64' if prob == 5e-324 else 'float32'))
    np.testing.assert_allclose(metric.get()[1], nll, rtol=1e-6, equal_nan=True)
    assert str(metric.get()[1]) != '-0.0'
    assert metric.num_infinite == (prob == 0)


@pytest.mark.parametrize('pred_type', ['probs', 'logits', 'log_probs'])
@pytest.mark.parametrize(('shape', 'axis'), [((6, 5), -1), ((3, 5, 2, 4), 1), ((5, 6), 0)])
@pytest.mark.parametrize('sparse_label', [True, False])
def test_values_against_float64(pred_type, shape, axis, sparse_label, rng, ctx):
    logits = rng.normal(0, 5, shape)
    moved = np.moveaxis(logits, axis, -1)
    log_p = np.moveaxis(reference.log_softmax(moved), -1, axis)
    pred = {'logits': logits, 'log_probs': log_p, 'probs': np.exp(log_p)}[pred_type].astype('float32')
    positions = moved.shape[:-1]
    index = rng.randint(0, 5, positions)
    label = (
        index
        if sparse_label
        else np.moveaxis(rng.dirichlet(np.ones(5), positions), -1, axis).astype('float32')
    )
    ignore = index.flat[0] if sparse_label else None
    metric = StableCrossEntropy(
        axis=axis,
        pred_type=pred_type,
        ignore_label=int(ignore) if sparse_label else None,
        sparse_label=sparse_label,
    )
    for wrap in (mx.nd.array, None):
        metric.reset()
        if wrap:
            metric.update(wrap(label), wrap(pred))
        else:
            with modes.numpy_semantics():
                metric.update([mx.np.array(label)], [mx.np.array(pred)])
        as_logits = np.log(pred) if pred_type == 'probs' else pred
        expected, _ = reference.loss_and_gradient(
            as_logits,
            label,
            axis=axis,
            batch_axis=1 if axis == 0 else 0,
            sparse_label=sparse_label,
            from_logits=pred_type != 'logits',
            reduction='none',
        )
        expected = expected[index != ignore] if sparse_label else expected
        np.testing.assert_allclose(metric.get()[1], expected.mean(), rtol=3e-6)
        assert metric.num_inst == expected.size


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'ignore_label': -1},
        {'axis': 1},
        {'from_logits': True},
        {'sparse_label': False},
        {'class_weight': [1, 2, 3, 4, 5], 'label_smoothing': 0.1, 'lse_square_scale': 0.1},
    ],
    ids=str,
)
def test_the_companion_metric_accumulates_what_the_loss_computes(options, rng, ctx):
    """Over any split, the mean of the loss's own values over the positions that count; weights and smoothing are not the metric's."""
    loss_fn = StableSoftmaxCELoss(reduction='none', **options)
    plain = StableSoftmaxCELoss(
        reduction='none',
        **{
            k: v
            for k, v in options.items()
            if k not in ('class_weight', 'label_smoothing', 'lse_square_scale')
        },
    )
    metric = loss_fn.create_metric(name='nll')
    total, count = 0.0, 0
    for n in (4, 1, 7):
        shape = (n, 5, 3) if options.get('axis') == 1 else (n, 3, 5)
        pred = nd.log_softmax(nd.array(rng.normal(0, 5, shape)))
        label = (
            nd.array(rng.randint(0, 5, (n, 3)))
            if options.get('sparse_label', True)
            else nd.softmax(nd.array(rng.normal(0, 1, shape)))
        )
        if 'ignore_label' in options:
            label[0, 0] = -1
        values = plain(pred, label).asnumpy().astype('float64')
        total, count = total + values.sum(), count + loss_fn.valid_count(label)
        metric.update([label], [pred])
    assert metric.get()[0] == 'nll'
    np.testing.assert_allclose(metric.get()[1], total / count, rtol=1e-6)


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_dtypes_of_predictions(dtype, rng, ctx):
    """float16 predictions give inf in stock: the epsilon vanishes and the sum overflows."""
    probs = rng.dirichlet(np.ones(4000), 300).astype(dtype)
    label = rng.randint(0, 4000, 300)
    metric = StableCrossEntropy()
    metric.update(nd.array(label, dtype='int32'), nd.array(probs, dtype=dtype))
    picked = probs[np.arange(300), label].astype('float64')
    with np.errstate(divide='ignore'):
        np.testing.assert_allclose(metric.get()[1], -np.log(picked).mean(), rtol=1e-12)


def test_perplexity_and_bits(rng, ctx):
    data = batches(rng)
    for pred_type in ('logits',):
        options = {'pred_type': pred_type, 'ignore_label': -1}
        nll = filled(StableCrossEntropy(**options), data).get()[1]
        assert filled(StablePerplexity(**options), data).get() == (
            'perplexity',
            pytest.approx(math.exp(nll), rel=1e-15),
        )
        assert filled(StableBitsPerToken(**options), data).get() == (
            'bits-per-token',
            pytest.approx(nll / math.log(2), rel=1e-15),
        )
    metric = StablePerplexity(pred_type='log_probs')
    metric.update(nd.array([0]), nd.array([[-1e4, 0]]))
    assert metric.get()[1] == math.inf


def test_perplexity_agrees_with_stock_where_stock_has_no_floor(rng, ctx):
    """Labels of any shape with as many entries as rows, as unrolled recurrent nets have them."""
    probs, label = nd.array(rng.dirichlet(np.ones(5), 12) * 0.9 + 0.02), nd.array(rng.randint(0, 5, (3, 4)))
    ours, stock = StablePerplexity(ignore_label=0), mx.metric.Perplexity(ignore_label=0)
    for metric in (ours, stock):
        metric.update([label], [probs])
    np.testing.assert_allclose(ours.get()[1], stock.get()[1], rtol=1e-5)


def test_loss_values(rng, ctx):
    ours, stock = StableLoss(), mx.metric.Loss()
    assert isinstance(ours, mx.metric.Loss)
    for n in (3, 1, 8):
        values = nd.array(rng.normal(0, 1, n))
        for metric in (ours, stock):
            metric.update(None, [values, values])
    np.testing.assert_allclose(ours.get()[1], stock.get()[1], rtol=1e-5)
    assert ours.num_inst == stock.num_inst == 24


@pytest.mark.parametrize(
    ('values', 'mean'),
    [
        ([math.inf, 1], math.inf),
        ([-math.inf, 1], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, math.inf], math.nan),
        ([], math.nan),
        ([3e38, 3e38], float(np.float32(3e38))),
    ],
)
def test_values_that_are_not_finite(values, mean):
    metric = StableLoss()
    if values:
        metric.update(None, nd.array(values))
    np.testing.assert_array_equal(metric.get()[1], mean)
    assert metric.num_infinite == values.count(math.inf)


def test_an_infinite_nll_does_not_hide_how_many_there_are(ctx):
    metric = StableCrossEntropy()
    metric.update(nd.array([0, 0, 1]), nd.array([[0, 1], [0, 1], [0.5, 0.5]]))
    assert metric.get()[1] == math.inf
    assert (metric.num_infinite, metric.num_inst) == (2, 3)


def test_invalid_labels_are_counted_apart_until_reset(ctx):
    metric = StableCrossEntropy(ignore_label=-1)
    pred = nd.array([[0.5, 0.5]] * 5)
    metric.update(nd.array([0, -1, 2, 1.5, math.nan]), pred)
    for result in (metric.get, metric.get_global, metric.get_name_value):
        with pytest.raises(
            ValueError,
            match=r'^labels: expected integers in \[0, 2\), got 3 others beside 1 valid ones; reset\(\) forgets them$',
        ):
            result()
    metric.reset_local()
    metric.update(nd.array([0, 0, 0, 0, 0]), pred)
    assert metric.get()[1] == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match='got 3 others beside 6 valid ones'):
        metric.get_global()
    metric.reset()
    assert math.isnan(metric.get()[1])


def test_windows(rng):
    """As in MXNet: reset_local begins what get shows, get_global shows all since reset."""
    first, second = batches(rng), batches(rng)
    options = {'pred_type': 'logits', 'ignore_label': -1}
    metric = filled(StableCrossEntropy(**options), first)
    metric.reset_local()
    filled(metric, second)
    assert metric.get() == filled(StableCrossEntropy(**options), second).get()
    assert metric.get_global() == filled(StableCrossEntropy(**options), first + second).get()
    assert metric.get_global_name_value() == [metric.get_global()]
    assert metric.global_num_inst > metric.num_inst
    np.testing.assert_allclose(metric.sum_metric / metric.num_inst, metric.get()[1], rtol=1e-15)
    np.testing.assert_allclose(
        metric.global_sum_metric / metric.global_num_inst, metric.get_global()[1], rtol=1e-15
    )


def test_results_do_not_depend_on_batches_devices_or_when_somebody_looks(rng):
    """Equal to the last bit, since the sums are exact."""
    options = {'pred_type': 'logits', 'ignore_label': -1}
    data = batches(rng, count=100)
    expected = filled(StableCrossEntropy(**options), data).get()
    looked_at = StableCrossEntropy(**options)
    for label, pred in data:
        looked_at.update(label, pred)
        looked_at.get()
    at_once = StableCrossEntropy(**options)
    at_once.update([label for label, _ in data], [pred for _, pred in data])
    on_two = StableCrossEntropy(**options)
    for i, (label, pred) in enumerate(data):
        on_two.update([label], [pred.as_in_context(mx.cpu(i % 2))])
    one_array = StableCrossEntropy(**options)
    one_array.update(
        nd.concat(*[label for label, _ in data[::-1]], dim=0),
        nd.concat(*[pred for _, pred in data[::-1]], dim=0),
    )
    assert looked_at.get() == at_once.get() == on_two.get() == one_array.get() == expected


def test_merge_is_one_after_the_other(rng):
    options = {'pred_type': 'logits', 'ignore_label': -1}
    first, second = batches(rng), batches(rng)
    metric = filled(StableCrossEntropy(**options), first)
    metric.merge(filled(StableCrossEntropy(**options), second))
    assert metric.get() == filled(StableCrossEntropy(**options), first + second).get()
    with pytest.raises(TypeError, match='^other: expected a StableCrossEntropy, got StableLoss$'):
        metric.merge(StableLoss())


def test_state_survives_json_pickle_and_deepcopy_in_the_middle(rng):
    options = {'pred_type': 'logits', 'ignore_label': -1}
    first, second, third = batches(rng), batches(rng), batches(rng)
    whole = filled(StableCrossEntropy(**options), first)
    whole.reset_local()
    filled(whole, second)
    resumed = StableCrossEntropy(**options)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    copies = [resumed, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    filled(whole, third)
    for metric in copies:
        filled(metric, third)
        assert (metric.get(), metric.get_global()) == (whole.get(), whole.get_global())


@pytest.mark.parametrize(
    'state',
    [
        None,
        {},
        {'own': {}},
        {'own': {'local': 1, 'global': 2}, 'others': {}},
        {window: dict(ExactSums().as_dict(), count=0.5) for window in ('local', 'global')},
    ],
    ids=str,
)
def test_a_state_that_is_none_changes_nothing(state, rng):
    metric = filled(StableCrossEntropy(pred_type='logits', ignore_label=-1), batches(rng))
    before = metric.get()
    with pytest.raises(ValueError, match='^state: expected '):
        metric.load_state_dict(state)
    assert metric.get() == before


@pytest.mark.parametrize(
    ('labels', 'preds', 'error', 'message'),
    [
        (
            [nd.zeros(2)],
            [nd.zeros((2, 3))] * 2,
            ValueError,
            '^labels: expected as many arrays as preds, 2, got 1$',
        ),
        (
            [nd.zeros(2), nd.zeros(3)],
            [nd.zeros((2, 3))] * 2,
            ValueError,
            r'^label: expected shape \(2,\) for pred of shape \(2, 3\)',
        ),
        ([nd.zeros((2, 3))], [nd.zeros((2, 3))], ValueError, 'need sparse_label=False$'),
        ([np.zeros(2)], [nd.zeros((2, 3))], TypeError, '^labels: expected an MXNet array, got ndarray$'),
        ([nd.zeros(2)], [[0.5, 0.5]], TypeError, '^preds: expected an MXNet array, got list$'),
        (
            [nd.zeros(2, dtype='float16')],
            [nd.zeros((2, 5000))],
            TypeError,
            '^label: expected a dtype that can name 5000 classes',
        ),
    ],
)
def test_bad_updates_raise_and_lose_nothing(labels, preds, error, message, rng):
    metric = filled(StableCrossEntropy(ignore_label=-1, pred_type='logits'), batches(rng))
    before = metric.state_dict()
    with pytest.raises(error, match=message):
        metric.update(labels, preds)
    assert metric.state_dict() == before


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (
            {'pred_type': 'prob'},
            ValueError,
            "^pred_type: expected one of 'probs', 'logits', 'log_probs', got 'prob'$",
        ),
        ({'axis': None}, TypeError, '^axis: expected an integer, got None$'),
        ({'ignore_label': 0.5}, TypeError, r'^ignore_label: expected an integer, got 0\.5$'),
        (
            {'sparse_label': False, 'ignore_label': 1},
            ValueError,
            '^ignore_label: expected None with sparse_label=False',
        ),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        StableCrossEntropy(**options)


@pytest.mark.parametrize('cls', [StableCrossEntropy, StablePerplexity, StableBitsPerToken, StableLoss])
def test_mxnet_creates_it_by_name_and_from_its_own_config(cls, rng):
    snake = ''.join('_' + c.lower() if c.isupper() else c for c in cls.__name__).lstrip('_')
    options = {'name': 'mine', 'output_names': ['out'], 'label_names': ['label']}
    if cls is not StableLoss:
        options.update(axis=1, ignore_label=-1, pred_type='logits')
    metric = mx.metric.create(snake, **options)
    assert type(metric) is cls
    config = metric.get_config()
    assert {key: config[key] for key in options} == options
    again = mx.metric.create(config)
    assert type(again) is cls
    assert again.get_config() == config
    label, pred = batches(rng)[0]
    metric.update_dict(OrderedDict(label=label, other=nd.zeros(1)), OrderedDict(other=nd.zeros(1), out=pred))
    assert metric.num_inst > 0
    assert 'mine' in str(metric)


def test_composite(rng):
    data = batches(rng)
    options = {'pred_type': 'logits', 'ignore_label': -1}
    composite = mx.metric.CompositeEvalMetric([StableCrossEntropy(**options), StablePerplexity(**options)])
    for label, pred in data:
        composite.update([label], [pred])
    names, (nll, perplexity) = composite.get()
    assert names == ['cross-entropy', 'perplexity']
    assert perplexity == pytest.approx(math.exp(nll), rel=1e-15)


def test_update_inside_record_leaves_the_graph_alone(rng):
    label, pred = batches(rng)[0]
    pred.attach_grad()
    metric = StableCrossEntropy(pred_type='logits', ignore_label=-1)
    with mx.autograd.record():
        loss = StableSoftmaxCELoss(ignore_label=-1)(pred, label)
        metric.update(label, pred)
    loss.backward()
    assert metric.num_inst == StableSoftmaxCELoss(ignore_label=-1).valid_count(label)


def test_sums_are_exact(rng):
    """10 million terms of mixed size against math.fsum, which rounds once; and odd and any terms against fractions."""
    values = np.concatenate([rng.rand(5 * 10**6) * 1e-6, rng.rand(5 * 10**6) * 100])
    rng.shuffle(values)
    assert ExactSums.of(values).over(1) == math.fsum(values)
    odd = np.concatenate(
        [
            rng.normal(0, 1, 1000) * 10.0 ** rng.randint(-300, 300, 1000),
            [5e-324, -1.7e308, 0.0, -0.0, 2.0**53 + 2],
        ]
    )
    bits = rng.randint(0, 2**63, 1000, dtype='int64').view('float64')
    largest = np.full(1000, np.finfo('float64').max)
    for terms in (odd, bits[np.isfinite(bits)], -largest, np.concatenate([largest, odd]), odd[:0], odd[:1]):
        assert Fraction(exact_sum(terms), 2**1126) == sum(map(Fraction, terms.tolist()))


def test_the_public_names():
    assert sorted(gluon_stable_ce.__all__) == sorted(
        name for name in gluon_stable_ce.__all__ if hasattr(gluon_stable_ce, name)
    )
