"""The metrics: their values against float64 and mpmath, signatures, errors, and what must not change a result."""

import copy
import inspect
import json
import math
from collections import OrderedDict

import cases
import label_cases
import modes
import mpmath
import mxnet as mx
import numpy as np
import pytest
import tolerances
from checks import expected_within
from tolerances import assert_close

from gluon_stable_ce import (
    StableBitsPerToken,
    StableCrossEntropy,
    StableLoss,
    StablePerplexity,
    StableSoftmaxCELoss,
    patch,
)

pytestmark = pytest.mark.usefixtures('kernel')

nd = mx.nd


def batches(rng, count=5, classes=7):
    """Uneven batches of (label, logits), with ignored labels of -1."""
    sizes = rng.randint(1, 9, count)
    return [(nd.array(rng.randint(-1, classes, n)), nd.array(rng.normal(0, 20, (n, classes)))) for n in sizes]


def filled(metric, data):
    for label, pred in data:
        metric.update([label], [pred])
    return metric


def test_probability_of_1e_43(ctx):
    prob = np.float32(1e-43)
    pred, label = nd.array([[prob, 1 - prob]]), nd.array([0])
    ours, stock = StableCrossEntropy(), mx.metric.CrossEntropy()
    for metric in (ours, stock):
        metric.update([label], [pred])
    assert_close(stock.get()[1], -math.log(1e-12), tolerances.ROUNDED_FLOAT32)
    assert_close(ours.get()[1], float(-mpmath.log(mpmath.mpf(float(prob)))), tolerances.ROUNDED)
    assert round(ours.get()[1], 1) == 99.0  # 1e-43 itself is not a float32


@pytest.mark.parametrize(('prob', 'nll'), [
    (0, math.inf),
    (1, 0),
    (1e-45, 103.2789),
    (5e-324, 744.4401),
    (1 + 2**-23, 0),
    (math.nan, math.nan),
    (1.0009, 0),
])  # fmt: skip
def test_probabilities_of_0_and_1_and_beyond(prob, nll, ctx):
    metric = StableCrossEntropy()
    metric.update(nd.array([1]), nd.array([[0.5, prob]], dtype='float64' if prob == 5e-324 else 'float32'))
    assert_close(metric.get()[1], nll, tolerances.ROUNDED_FLOAT32)
    assert str(metric.get()[1]) != '-0.0'
    assert metric.num_infinite == (prob == 0)


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_dtypes_of_predictions(dtype, rng, ctx):
    """float16 predictions give inf in stock: the epsilon vanishes and the sum overflows."""
    probs = rng.dirichlet(np.ones(4000), 300).astype(dtype)
    label = rng.randint(0, 4000, 300)
    metric = StableCrossEntropy()
    metric.update(nd.array(label, dtype='int32'), nd.array(probs, dtype=dtype))
    picked = probs[np.arange(300), label].astype('float64')
    with np.errstate(divide='ignore'):
        assert_close(metric.get()[1], -np.log(picked).mean(), tolerances.FLOAT64)


def test_perplexity_is_stocks_above_its_floor(rng, ctx):
    """Labels of any shape with as many entries as rows, as unrolled recurrent nets have them."""
    probs, label = nd.array(rng.dirichlet(np.ones(5), 12) * 0.9 + 0.02), nd.array(rng.randint(0, 5, (3, 4)))
    ours, stock = StablePerplexity(ignore_label=0), mx.metric.Perplexity(ignore_label=0)
    for metric in (ours, stock):
        metric.update([label], [probs])
    assert_close(ours.get()[1], stock.get()[1], tolerances.NLL)


def test_stable_loss_is_stocks_mean(rng, ctx):
    ours, stock = StableLoss(), mx.metric.Loss()
    assert isinstance(ours, mx.metric.Loss)
    for n in (3, 1, 8):
        values = nd.array(rng.normal(0, 1, n))
        for metric in (ours, stock):
            metric.update(None, [values, values])
    assert_close(ours.get()[1], stock.get()[1], tolerances.NLL)
    assert ours.num_inst == stock.num_inst == 24


def test_invalid_labels_are_counted_apart_until_reset(ctx):
    metric = StableCrossEntropy(ignore_label=-1)
    pred = nd.array([[0.5, 0.5]] * 5)
    metric.update(nd.array([0, -1, 2, 1.5, math.nan]), pred)
    message = r'^3 of 4 labels are invalid. If they are padding, set ignore_label. reset\(\) clears them$'
    for result in (metric.get, metric.get_global, metric.get_name_value):
        with pytest.raises(ValueError, match=message):
            result()
    metric.reset_local()
    metric.update(nd.array([0, 0, 0, 0, 0]), pred)
    assert metric.get()[1] == tolerances.FLOAT64.approx(math.log(2))
    with pytest.raises(ValueError, match='^3 of 9 labels are invalid'):
        metric.get_global()
    metric.reset()
    assert math.isnan(metric.get()[1])


@pytest.mark.parametrize('dtype', ['float32', 'int32'])
@pytest.mark.parametrize('pred_type', ['probs', 'logits', 'log_probs'])
def test_clipped_labels_count_as_in_stock_perplexity(pred_type, dtype, rng, ctx):
    logits = rng.normal(0, 1, (8, 4))
    label = nd.array([-1, -7, 4, 9, 1.5, -0.5, 2, 3], dtype=dtype)
    pred = {'logits': nd.identity, 'probs': nd.softmax, 'log_probs': nd.log_softmax}[pred_type](
        nd.array(logits)
    )
    stock = mx.metric.Perplexity(ignore_label=3)
    stock.update([label], [nd.softmax(nd.array(logits))])
    metric = StablePerplexity(ignore_label=3, pred_type=pred_type, invalid_label='clip')
    metric.update([label], [pred])
    assert_close(metric.get()[1], stock.get()[1], tolerances.NLL)
    assert metric.num_inst == 7


def test_metric_of_a_loss_that_clips_labels_clips_them(rng, ctx):
    loss_fn = StableSoftmaxCELoss(invalid_label='clip')
    pred, label = nd.array(rng.normal(0, 1, (3, 4))), nd.array([-1, 7, 1])
    metric = loss_fn.create_metric()
    metric.update(label, pred)
    assert_close(metric.get()[1], loss_fn(pred, label).asnumpy().mean(), tolerances.NLL)


LOGITS = [[3.0, 1.0, -2.0], [0.5, 4.0, 1.0], [2.0, 0.0, 6.0]]  # of a trained net, for the labels 0, 1 and 2
IMPOSSIBLE = {
    'probs': {'pred_type': 'probs'},
    'log-probs': {'pred_type': 'log_probs'},
    'dense-probs': {'pred_type': 'probs', 'sparse_label': False},
    'dense-log-probs': {'pred_type': 'log_probs', 'sparse_label': False},
    'classes-first': {'pred_type': 'probs', 'axis': 0},
}


def labels_0_1_2(options):
    return nd.array(np.eye(3) if not options.get('sparse_label', True) else [0, 1, 2])


@pytest.mark.parametrize('cls', [StableCrossEntropy, StablePerplexity, StableBitsPerToken])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('options', cases.params(IMPOSSIBLE))
def test_logits_that_are_given_as_something_else_are_refused(cls, dtype, options, ctx):
    metric = cls(**options)
    metric.update(labels_0_1_2(options), nd.array(LOGITS, dtype=dtype))
    for get in (metric.get, metric.get_global):
        with pytest.raises(
            ValueError, match=r"^3 of 3 predictions are not .* pred_type='logits' .* reset\(\)"
        ):
            get()
    assert (metric.num_inst, metric.num_infinite) == (0, 0)
    metric.reset()
    metric.update(
        labels_0_1_2(options), nd.full((3, 3), 1 / 3 if metric._options.pred_type == 'probs' else -1.0)
    )
    assert metric.num_inst == 3
    assert metric.get()[1] > 0


def test_log_probs_of_a_loss_that_are_logits_are_refused(ctx):
    metric = StableSoftmaxCELoss(from_logits=True).create_metric()
    metric.update(nd.array([0, 1, 2]), nd.array(LOGITS))
    with pytest.raises(
        ValueError, match='^3 of 3 predictions are not log-probabilities: .* from_logits=False'
    ):
        metric.get()


@pytest.mark.parametrize('sparse_label', [True, False], ids=['sparse', 'dense'])
@pytest.mark.parametrize(('pred_type', 'pred', 'nll'), [
    ('probs', 1.0009, 0),
    ('probs', 1.0011, None),
    ('probs', -1e-30, None),
    ('probs', -1.0, None),  # as the mark of ignored positions
    ('probs', -2.0, None),
    ('probs', math.inf, None),
    ('probs', -math.inf, None),
    ('probs', -0.0, math.inf),
    ('probs', math.nan, math.nan),
    ('log_probs', 9e-4, 0),
    ('log_probs', 1.1e-3, None),
    ('log_probs', 1.0, None),
    ('log_probs', 2.0, None),
    ('log_probs', math.inf, None),
    ('log_probs', -math.inf, math.inf),
    ('log_probs', math.nan, math.nan),
])  # fmt: skip
def test_only_rounding_errors_are_raised_to_0(pred_type, pred, nll, sparse_label, ctx):
    """None: the prediction is impossible."""
    metric = StableCrossEntropy(pred_type=pred_type, sparse_label=sparse_label)
    metric.update(nd.array([1] if sparse_label else [[0, 1]]), nd.array([[0.5, pred]]))
    if nll is None:
        with pytest.raises(ValueError, match='^1 of 1 predictions are not '):
            metric.get()
    else:
        np.testing.assert_array_equal(metric.get()[1], nll)
        assert metric.num_inst == 1


def test_impossible_predictions_count_only_where_they_are_read(ctx):
    """Neither of other classes, nor at positions that are ignored or invalid."""
    pred = nd.array([[0.5, 9], [0.25, -9], [9, 0.5], [9, 9]])
    metric = StableCrossEntropy(ignore_label=-1)
    metric.update(nd.array([0, 0, 1, -1]), pred)
    assert metric.get()[1] == tolerances.FLOAT64.approx(math.log(16) / 3)
    dense = StableCrossEntropy(sparse_label=False)
    dense.update(nd.array([[1, 0], [1, 0], [0, 1], [0, 0]]), pred)
    assert dense.get()[1] == tolerances.NLL.approx(math.log(16) / 4)
    metric.update(nd.array([2]), nd.array([[9, 9]]))
    with pytest.raises(ValueError, match='^1 of 4 labels are invalid'):
        metric.get()


def test_impossible_predictions_of_dense_labels_with_the_classes_first(ctx):
    metric = StableCrossEntropy(sparse_label=False, axis=0)
    metric.update(nd.array([[1, 1, 0], [0, 0, 1]]), nd.array([[9, 0.5, 9], [9, 9, -0.5]]))
    with pytest.raises(ValueError, match='^2 of 3 predictions are not probabilities'):
        metric.get()


def test_losses_of_0_count(kernel, ctx):
    metric = StableCrossEntropy(pred_type='logits', kernel=kernel)
    metric.update(nd.array([0, 0]), nd.array([[1000, 0], [0, 0]]))
    assert metric.num_inst == 2
    assert metric.get()[1] == tolerances.SEVEN_DIGITS['stock'].approx(math.log(2) / 2)


def test_impossible_predictions_go_into_checkpoints_merges_and_windows():
    metric, others = StableCrossEntropy(), [StableCrossEntropy() for _ in range(2)]
    metric.update(nd.array([0, 1, 2]), nd.array(LOGITS))
    others[0].load_state_dict(json.loads(json.dumps(metric.state_dict())))
    others[1].merge(metric)
    for other in (*others, metric.all_reduce(mx.kv.create('local')), copy.deepcopy(metric)):
        with pytest.raises(ValueError, match='^3 of 3 predictions are not probabilities'):
            other.get()
    metric.reset_local()
    metric.update(nd.array([0]), nd.array([[0.5, 0.5]]))
    assert metric.get()[1] == tolerances.FLOAT64.approx(math.log(2))
    with pytest.raises(ValueError, match='^3 of 4 predictions are not probabilities'):
        metric.get_global()


@pytest.mark.parametrize('invalid_label', ['raise', 'clip'])
@pytest.mark.parametrize('dtype', label_cases.DTYPES)
@pytest.mark.parametrize('ignore_label', label_cases.IGNORE_LABELS, ids=str)
@pytest.mark.parametrize('pred_type', ['probs', 'log_probs'])
def test_picked_labels_mean_what_the_table_says(pred_type, ignore_label, dtype, invalid_label, rng, ctx):
    """Every dtype and every bad value."""
    label = label_cases.labels_of(dtype)
    p = rng.dirichlet(np.ones(label_cases.CLASSES), len(label))
    named = [label_cases.class_of(number, ignore_label, invalid_label == 'clip') for number in label]
    metric = StableCrossEntropy(pred_type=pred_type, ignore_label=ignore_label, invalid_label=invalid_label)
    metric.update(nd.array(label, dtype=dtype), nd.array(p if pred_type == 'probs' else np.log(p)))
    invalid = len(named) - named.count(label_cases.IGNORED) - sum(isinstance(name, int) for name in named)
    assert metric.num_inst + invalid == len(named) - named.count(label_cases.IGNORED)
    nll = [-math.log(row[name]) for row, name in zip(p, named) if isinstance(name, int)]
    assert metric.sum_metric == tolerances.ROUNDED_FLOAT32.approx(sum(nll))
    assert str(metric).count(f'{invalid} of {invalid + metric.num_inst} labels are invalid') == bool(invalid)


@pytest.mark.parametrize('invalid_label', ['raise', 'clip'])
@pytest.mark.parametrize('pred_type', ['probs', 'logits', 'log_probs'])
def test_labels_may_have_the_class_axis(pred_type, invalid_label, rng, ctx):
    p = rng.dirichlet(np.ones(4), (2, 3))
    label = rng.randint(0, 4, (2, 3, 1))
    metric = StableCrossEntropy(pred_type=pred_type, invalid_label=invalid_label)
    metric.update(nd.array(label), nd.array(p if pred_type == 'probs' else np.log(p)))
    assert_close(metric.get()[1], -np.log(np.take_along_axis(p, label, -1)).mean(), tolerances.NLL)


@pytest.mark.parametrize('options', [
    {'pred_type': 'probs'},
    {'pred_type': 'probs', 'invalid_label': 'clip'},
    {'pred_type': 'logits'},
    {'pred_type': 'log_probs'},
    {'pred_type': 'logits', 'sparse_label': False},
], ids=str)  # fmt: skip
def test_updates_without_positions_change_nothing(options):
    metric = StableCrossEntropy(**options)
    loss = StableLoss()
    with modes.numpy_semantics():
        for shape in ((0, 3), (2, 0, 3), (2, 2, 2, 2, 2, 0, 3)):
            pred = mx.np.zeros(shape)
            metric.update(pred if 'sparse_label' in options else mx.np.zeros(shape[:-1]), pred)
            loss.update(None, pred)
    assert math.isnan(metric.get()[1])
    assert math.isnan(loss.get()[1])
    assert metric.num_inst == loss.num_inst == 0


def test_results_do_not_depend_on_batches_devices_or_when_get_is_called(rng):
    """Equal to the last bit, since the sums are exact."""
    options = {'pred_type': 'logits', 'ignore_label': -1}
    data = batches(rng, count=100)
    expected = filled(StableCrossEntropy(**options), data).get()
    asked = StableCrossEntropy(**options)
    for label, pred in data:
        asked.update(label, pred)
        asked.get()
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
    assert asked.get() == at_once.get() == on_two.get() == one_array.get() == expected


@pytest.mark.parametrize(('pred_type', 'axis', 'split_axis'), [
    ('logits', -1, 0),
    ('logits', -1, 1),
    ('probs', 1, 0),
    ('probs', 1, 2),
    ('probs', 0, 2),
    ('log_probs', 0, 1),
])  # fmt: skip
@pytest.mark.parametrize('classes', [10, 257])
def test_results_do_not_depend_on_splits_along_any_axis(pred_type, axis, split_axis, classes, rng):
    pred = np.moveaxis(rng.dirichlet(np.ones(classes), (8, 6)), -1, axis).astype('float32')
    pred = pred if pred_type == 'probs' else np.log(pred)
    label = rng.randint(0, classes, (8, 6))
    label_axis = split_axis - (axis % 3 < split_axis)

    def result(parts):
        metric = StableCrossEntropy(pred_type=pred_type, axis=axis)
        for arrays in zip(np.array_split(label, parts, label_axis), np.array_split(pred, parts, split_axis)):
            metric.update(*map(nd.array, arrays))
        return metric.get()

    assert result(1) == result(2) == result(label.shape[label_axis])


def test_a_metric_from_a_checkpoint_reports_what_it_would_have(rng):
    """Local and global window, to the last bit, wherever the run was interrupted."""
    data = batches(rng, count=12)
    options = {'pred_type': 'logits', 'ignore_label': -1}

    def values_of_run(interrupted_at):
        metric, values = StableCrossEntropy(**options), []
        for step, (label, pred) in enumerate(data):
            if step in interrupted_at:
                checkpoint = json.dumps(metric.state_dict(), allow_nan=False)
                metric = StableCrossEntropy(**options)
                metric.load_state_dict(json.loads(checkpoint))
            metric.update(label, pred)
            if step % 5 == 4:
                values += [metric.get(), metric.get_global()]
                metric.reset_local()
        return [*values, metric.get(), metric.get_global(), metric.global_num_inst]

    assert values_of_run(interrupted_at=(3, 5, 9)) == values_of_run(interrupted_at=())


LABEL, PRED = nd.zeros(2), nd.zeros((2, 3))
BAD_UPDATES = {
    'count': ([LABEL], [PRED] * 2, ValueError, '^labels: expected as many arrays as preds, 2, got 1$'),
    'shape': ([LABEL, nd.zeros(3)], [PRED] * 2, ValueError, r'^label: expected shape \(2,\) for pred of shape '),
    'dense': ([PRED], [PRED], ValueError, 'need sparse_label=False$'),
    'numpy': ([np.zeros(2)], [PRED], TypeError, '^labels: expected an MXNet array, got numpy.ndarray$'),
    'list': ([LABEL], [[0.5, 0.5]], TypeError, '^preds: expected an MXNet array, got list$'),
    'float16': (
        [nd.zeros(2, dtype='float16')], [nd.zeros((2, 5000))],
        TypeError, '^label: expected a dtype that can name 5000 classes',
    ),
    'int32': ([LABEL], [PRED.astype('int32')], TypeError, '^pred: expected one of the dtypes float16, '),
}  # fmt: skip


@pytest.mark.parametrize(('labels', 'preds', 'error', 'message'), cases.rows(BAD_UPDATES))
def test_bad_updates_raise_and_change_nothing(labels, preds, error, message, rng):
    metric = filled(StableCrossEntropy(ignore_label=-1, pred_type='logits'), batches(rng))
    before = metric.state_dict()
    with pytest.raises(error, match=message):
        metric.update(labels, preds)
    assert metric.state_dict() == before


@pytest.mark.parametrize('stype', ['csr', 'row_sparse'])
def test_sparse_storage(stype):
    label, pred = nd.array([[1], [0]]), nd.array([[0.5, 0.5], [1, 0]])
    metric = StableCrossEntropy()
    metric.update([label.tostype(stype)], [pred.tostype(stype)])
    assert_close(metric.get()[1], math.log(2) / 2, tolerances.ROUNDED)


@pytest.mark.parametrize('cls', [StableCrossEntropy, StablePerplexity, StableBitsPerToken, StableLoss])
def test_mx_metric_create_by_name_and_config(cls, rng):
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


@pytest.mark.parametrize('grad_req', ['write', 'add'])
def test_update_inside_record_does_not_change_the_gradient(kernel, grad_req, rng):
    label, pred = batches(rng)[0]
    pred.attach_grad(grad_req)
    metric = StableCrossEntropy(pred_type='logits', ignore_label=-1)
    with mx.autograd.record():
        metric.update(label, pred)
        loss = StableSoftmaxCELoss(ignore_label=-1)(pred, label)
        metric.update(label, pred)
    loss.backward()
    arrays = pred.asnumpy(), label.asnumpy()
    _, (expected, bound) = expected_within(kernel, arrays, {'ignore_label': -1})
    cases.assert_within(pred.grad.asnumpy(), expected, bound)
    assert np.abs(expected).max() > 0.1
    assert metric.num_inst == 2 * (arrays[1] != -1).sum()


@pytest.mark.parametrize(
    'options',
    [{}, {'ignore_label': -1}, {'axis': 1}, {'from_logits': True}, {'sparse_label': False}],
    ids=str,
)
@pytest.mark.parametrize(
    'beside',
    [{}, {'class_weight': [1, 2, 3, 4, 5], 'label_smoothing': 0.1, 'weight': 2.0}],
    ids=['plain', 'weights-and-smoothing'],
)
def test_create_metric_is_the_mean_of_the_loss(options, beside, rng, ctx):
    """Over all positions that count of any batches; weights and smoothing are not in it."""
    loss_fn = StableSoftmaxCELoss(**options, **beside)
    plain = StableSoftmaxCELoss(reduction='none', **options)
    metric, total, count = loss_fn.create_metric(name='nll'), 0.0, 0
    for rows in (4, 1, 7):
        shape = (rows, 5, 3) if 'axis' in options else (rows, 3, 5)
        pred, label = map(nd.array, cases.make(rng, shape, **{'axis': -1, **options}, invalid=False))
        total += plain(pred, label).asnumpy().astype('float64').sum()
        count += loss_fn.valid_count(label)
        metric.update([label], [pred])
    assert metric.get() == ('nll', tolerances.ROUNDED_FLOAT32.approx(total / count))
    assert metric.num_inst == count


def test_perplexity_is_exp_and_bits_are_divided_by_log_2(rng, ctx):
    options = {'pred_type': 'logits', 'ignore_label': -1}
    metrics = [cls(**options) for cls in (StableCrossEntropy, StablePerplexity, StableBitsPerToken)]
    names, (nll, perplexity, bits) = filled(mx.metric.CompositeEvalMetric(metrics), batches(rng)).get()
    assert names == ['cross-entropy', 'perplexity', 'bits-per-token']
    assert perplexity == tolerances.ROUNDED.approx(math.exp(nll))
    assert bits == tolerances.ROUNDED.approx(nll / math.log(2))


def test_perplexity_above_the_largest_float_is_infinite():
    metric = StablePerplexity(pred_type='log_probs')
    metric.update(nd.array([0]), nd.array([[-1e4, 0]]))
    assert metric.get()[1] == math.inf


@pytest.mark.parametrize('cls', [StableCrossEntropy, StableBitsPerToken])
def test_options_are_keyword_only(cls):
    with pytest.raises(TypeError, match='keyword arguments only|positional'):
        cls(-1)
    with pytest.raises(TypeError, match='eps'):
        cls(eps=1e-12)


def test_perplexity_has_the_positional_arguments_of_stock():
    stock = list(inspect.signature(mx.metric.Perplexity).parameters)
    assert list(inspect.signature(StablePerplexity).parameters)[: len(stock)] == stock
    metric = StablePerplexity(3, 1, 'ppl', ['out'], ['label'])
    config = metric.get_config()
    assert (config['ignore_label'], config['axis'], config['name']) == (3, 1, 'ppl')
    assert (config['output_names'], config['label_names']) == (['out'], ['label'])


def test_stable_loss_has_the_positional_arguments_of_stock():
    arguments = ('l2', ['out'], ['label'])
    ours, stock = StableLoss(*arguments), mx.metric.Loss(*arguments)
    for name in ('name', 'output_names', 'label_names'):
        assert ours.get_config()[name] == stock.get_config()[name]


@pytest.mark.parametrize('kind', ['cpu_shared', 'cpu_pinned', 'cpu'])
def test_labels_elsewhere_are_moved(kind):
    metric, place = StableCrossEntropy(), mx.Context(kind, 1 if kind == 'cpu' else 0)
    metric.update(nd.array([1]).as_in_context(place), nd.array([[0.5, 0.5]]))
    assert metric.get()[1] == tolerances.FLOAT64.approx(math.log(2))


def test_a_metric_can_be_printed_after_an_invalid_label():
    metric = StableCrossEntropy(name='mine')
    metric.update(nd.array([7]), nd.array([[0.5, 0.5]]))
    assert str(metric) == (
        'EvalMetric: mine: 1 of 1 labels are invalid. If they are padding, set ignore_label. reset() clears them'
    )


@pytest.mark.parametrize(('metric', 'expected'), [
    (StableLoss(), 'StableLoss()'),
    (StableCrossEntropy(), 'StableCrossEntropy()'),
    (
        StableCrossEntropy(pred_type='logits', ignore_label=-1, name='val'),
        "StableCrossEntropy(pred_type='logits', ignore_label=-1, name='val')",
    ),
    (StablePerplexity(0, 1, invalid_label='clip'), "StablePerplexity(ignore_label=0, axis=1, invalid_label='clip')"),
    (StableBitsPerToken(sparse_label=False), 'StableBitsPerToken(sparse_label=False)'),
], ids=lambda value: value if isinstance(value, str) else '')  # fmt: skip
def test_repr_shows_the_options_that_differ_from_their_defaults(metric, expected):
    assert repr(metric) == expected


def test_options_of_stock_perplexity_are_attributes_that_may_be_set():
    """A subclass of `mx.metric.Perplexity` with an `update` of its own reads them."""
    metric = StablePerplexity(1, 1)
    assert (metric.ignore_label, metric.axis) == (1, 1)
    metric.update(nd.array([0, 1, 1]), nd.array([[0.5, 0.5]] * 3))
    metric.ignore_label = 0
    metric.update(nd.array([0, 1, 1]), nd.array([[0.25, 0.25]] * 3))
    assert metric.num_inst == 3
    assert metric.get()[1] == tolerances.ROUNDED.approx(2 ** (5 / 3))
    assert metric.get_config()['ignore_label'] == 0
    metric.axis = 'first'
    with pytest.raises(TypeError, match="^axis: expected an integer, got 'first'$"):
        metric.update(nd.array([0, 1]), nd.array([[0.5, 0.5]] * 2))
    assert metric.num_inst == 3


@pytest.mark.parametrize('name', ['CrossEntropy', 'Perplexity', 'Loss'])
def test_states_and_merges_do_not_depend_on_the_class_that_was_patched(name):
    ours = {'CrossEntropy': StableCrossEntropy, 'Perplexity': StablePerplexity, 'Loss': StableLoss}[name]
    data = nd.array([0, 1]), nd.array([[0.5, 0.5]] * 2)
    with patch():
        arguments = [None] if name == 'Perplexity' else []
        patched = getattr(mx.metric, name)(*arguments)
        patched.update(*data)
        state = json.loads(json.dumps(patched.state_dict()))
    metric = ours()
    metric.load_state_dict(state)
    metric.merge(patched)
    patched.merge(metric)
    for _ in range(3):
        metric.update(*data)
    assert metric.num_inst == 5 * patched.num_inst / 3
    patched.load_state_dict(metric.state_dict())
    assert patched.state_dict() == metric.state_dict()


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


@pytest.mark.skipif(modes.VERSION < (1, 7), reason='MXNet has bfloat16 since 1.7')
def test_loss_values_in_bfloat16_are_numbers():
    metric = StableLoss()
    metric.update(None, nd.amp_cast(nd.array([1.5, 2.5]), dtype=np.dtype([('bfloat16', np.uint16)])))
    assert metric.get() == ('loss', 2.0)
