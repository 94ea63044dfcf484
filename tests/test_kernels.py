"""Each kernel reduces the class axis to the same terms, whatever the layout and whether the rank is known."""

import json

import cases
import label_cases
import mxnet as mx
import numpy as np
import pytest
import reference
import tolerances
from mxnet import autograd, gluon
from tolerances import assert_close

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss
from gluon_stable_ce.call import Call, Fill
from gluon_stable_ce.class_terms import ClassTerms
from gluon_stable_ce.kernels import class_terms, library, stock
from gluon_stable_ce.kernels.choice import resolve
from gluon_stable_ce.options import Options
from gluon_stable_ce.plan import plan

nd = mx.nd
IS_FUSED = pytest.mark.skipif(not library.load(), reason='the fused kernel is not compiled')
every_layout = pytest.mark.parametrize('layout', cases.params(cases.LAYOUTS))
RANK_KNOWN = pytest.mark.parametrize('is_rank_known', [True, False], ids=['rank-known', 'rank-unknown'])


class Terms(gluon.HybridBlock):
    """The terms of `class_terms` in a graph of symbols."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def hybrid_forward(self, F, *inputs):
        return [term for term in class_terms(F, self.call, *inputs) if term is not None]


def call_of(kernel, terms='nll', **given):
    """A call whose terms are the NLL, or all three."""
    facts = {name: given.pop(name) for name in ('ndim', 'dtype', 'label_ndim') if name in given}
    scale = 1.0 if terms != 'nll' else 0.0
    options = Options(lse_square_scale=scale, label_smoothing=scale, **given)
    return Call(options, kernel=kernel, **facts)


def compute(call, *inputs):
    """(terms in NumPy, gradient of their sum) of a compiled graph; of unknown rank, they have a class axis of length 1."""
    inputs = [nd.array(array, dtype=np.asarray(array).dtype) for array in inputs]
    inputs[0].attach_grad()
    block = Terms(call)
    block.hybridize()
    with autograd.record():
        terms = block(*inputs)
    autograd.backward(terms)
    return [term.asnumpy() for term in terms], inputs[0].grad.asnumpy()


def make(rng, layout, pred_type='logits', dense=False):
    """Predictions of what `pred_type` says, and sparse or dense labels."""
    from_logits = pred_type == 'log_probs'
    return cases.make(rng, layout.shape, layout.axis, not dense, from_logits=from_logits, invalid=False)


def expected_terms(axis, pred, label, pred_type='logits', dense=False, class_weight=None):
    positions = reference.read_positions(
        pred,
        label,
        axis % pred.ndim,
        sparse_label=not dense,
        from_logits=pred_type == 'log_probs',
        class_weight=class_weight,
    )
    target = positions.target
    nll = np.where(target == 0, 0, -target * positions.log_p).sum(-1)
    return nll, positions.logsumexp, -(positions.uniform * positions.log_p).sum(-1)


@every_layout
@RANK_KNOWN
@pytest.mark.parametrize(
    ('kernel', 'dense'),
    [
        pytest.param('stock', False, id='stock-sparse'),
        pytest.param('stock', True, id='stock-dense'),
        pytest.param('fused', False, id='fused-sparse', marks=IS_FUSED),
    ],
)
@pytest.mark.parametrize('class_weight', [None, [1, 2, 0.5, 0, 3]], ids=['plain', 'class-weight'])
def test_terms_of_logits(kernel, layout, is_rank_known, dense, class_weight, rng, ctx):
    pred, label = make(rng, layout, dense=dense)
    ndim = pred.ndim if is_rank_known else None
    call = call_of(kernel, 'all', axis=layout.axis, sparse_label=not dense, ndim=ndim)
    weights = [] if class_weight is None else [np.array(class_weight, 'float32')]
    terms, _ = compute(call, pred, label, *weights)
    expected = expected_terms(layout.axis, pred, label, dense=dense, class_weight=class_weight)
    for term, truth in zip(terms, expected):
        if not is_rank_known:
            truth = np.expand_dims(truth, layout.axis)
        assert term.shape == truth.shape
        assert_close(term, truth)


@every_layout
@RANK_KNOWN
@pytest.mark.parametrize(
    ('kernel', 'pred_type'),
    [
        pytest.param('stock', 'logits', id='stock-logits'),
        pytest.param('stock', 'log_probs', id='stock-log_probs'),
        pytest.param('fused', 'logits', id='fused-logits', marks=IS_FUSED),
    ],
)
def test_nll_of_pred_types(kernel, layout, is_rank_known, pred_type, rng, ctx):
    pred, label = make(rng, layout, pred_type)
    ndim = pred.ndim if is_rank_known else None
    (nll,), _ = compute(call_of(kernel, axis=layout.axis, pred_type=pred_type, ndim=ndim), pred, label)
    expected, _, _ = expected_terms(layout.axis, pred, label, pred_type)
    assert nll.dtype == 'float32'
    assert_close(nll if is_rank_known else nll.squeeze(layout.axis), expected)


@RANK_KNOWN
@pytest.mark.parametrize('dtype', label_cases.DTYPES)
@pytest.mark.parametrize('invalid_label', ['nan', 'clip'])
@pytest.mark.parametrize('ignore_label', label_cases.IGNORE_LABELS, ids=str)
@pytest.mark.parametrize('fill', [Fill.LOSS, Fill.METRIC], ids=['loss', 'metric'])
def test_labels_mean_what_the_table_says(
    kernel, is_rank_known, dtype, invalid_label, ignore_label, fill, rng, ctx
):
    """Every dtype and every bad value: a term is filled in, with gradient 0, or is that of the class it names."""
    label = label_cases.labels_of(dtype)
    pred = rng.normal(0, 1, (len(label), label_cases.CLASSES)).astype('float32')
    named = [label_cases.class_of(number, ignore_label, invalid_label == 'clip') for number in label]
    has_class = np.array([isinstance(name, int) for name in named])
    fills = [fill.ignored if name == label_cases.IGNORED else fill.invalid for name in named]

    options = Options(
        kernel=kernel,
        ignore_label=ignore_label,
        invalid_label=invalid_label,
        label_smoothing=0.5,
        lse_square_scale=0.5,
    )
    arrays = nd.array(pred), nd.array(label, dtype=dtype)
    call = plan(options, *arrays, fill=fill)[0] if is_rank_known else Call(options, fill, kernel=kernel)
    terms, gradient = compute(call, pred, label)
    all_count = call._replace(options=options._replace(ignore_label=None))
    expected, expected_gradient = compute(all_count, pred, np.where(has_class, named, 0).astype(dtype))
    for term, truth in zip(terms, expected):
        filled = np.where(has_class, truth.ravel(), np.float32(fills))
        np.testing.assert_array_equal(term.ravel(), filled, err_msg=str(label))
    np.testing.assert_array_equal(gradient, np.where(has_class[:, None], expected_gradient, 0))


def test_terms_not_asked_for_are_none(kernel):
    terms = class_terms(nd, call_of(kernel, ndim=2, label_ndim=1), nd.zeros((4, 3)), nd.zeros(4))
    assert isinstance(terms, ClassTerms)
    assert terms.nll.shape == (4,)
    assert terms.logsumexp is terms.uniform_nll is None


@pytest.mark.parametrize('facts', [{'ndim': 2, 'dtype': 'float16'}, {}], ids=['known', 'unknown'])
def test_float16_is_cast(kernel, facts, rng, ctx):
    pred = rng.normal(0, 3, (8, 3000)).astype('float16')
    label = rng.randint(0, 3000, 8).astype('float32')
    (nll, logsumexp, _), gradient = compute(call_of(kernel, 'all', **facts), pred, label)
    assert (nll.dtype, logsumexp.dtype, gradient.dtype) == (np.float32, np.float32, np.float16)
    for term, truth in zip((nll, logsumexp), expected_terms(-1, pred, label)):
        assert_close(term.ravel(), truth, tolerances.SUM_OF_CLASSES)


@pytest.mark.slow
def test_terms_of_a_million_classes(rng):
    """All three are mended: `log_softmax` alone is off by 3e-4."""
    pred, label = rng.randint(-3, 3, (2, 1_000_000)).astype('float32'), np.array([0, 999_999])
    call = call_of('stock', 'all', dtype='float32', ndim=2)._replace(classes=1_000_000, has_many_classes=True)
    logsumexp = np.log(np.exp(pred.astype('float64')).sum(-1))
    expected = logsumexp - pred[[0, 1], label], logsumexp, logsumexp - pred.mean(-1, dtype='float64')
    for term, truth in zip(compute(call, pred, label)[0], expected):
        assert_close(term.ravel(), truth, tolerances.PLAIN)


@pytest.mark.parametrize('gap', [10.0, 20.0, 50.0])
def test_nll_is_never_negative_and_its_gradient_goes_on(kernel, gap, ctx):
    """Where a kernel clamps at 0, the clamp lets the gradient through."""
    pred, label = np.array([[gap, 0]], 'float32'), np.array([0], 'float32')
    (nll,), gradient = compute(call_of(kernel, ndim=2), pred, label)
    assert nll[0] >= 0
    p = 1 / (1 + np.exp(np.float64(gap)))
    tolerance = tolerances.FUSED_VALUE if kernel == 'fused' else tolerances.stated(kernel, 'float32')
    assert_close([nll[0], *gradient[0]], [np.log1p(np.exp(-gap)), -p, p], tolerance)


def test_log_probs_above_zero_keep_their_gradient(ctx):
    pred, label = np.array([[1e-6, -20]], 'float32'), np.array([0.0])
    (nll,), gradient = compute(call_of('stock', pred_type='log_probs', ndim=2), pred, label)
    assert nll[0] == 0
    np.testing.assert_array_equal(gradient, [[-1, 0]])


def test_targets_below_zero_are_not_clamped(ctx):
    pred, target = np.array([[0, 0]], 'float32'), np.array([[-1, 0.5]], 'float32')
    (nll,), _ = compute(call_of('stock', sparse_label=False, ndim=2), pred, target)
    assert_close(nll, [-0.5 * np.log(2)])


@pytest.mark.parametrize('dtype', ['float16', 'float64', 'int32'])
def test_targets_may_have_another_dtype(dtype, ctx):
    call = call_of('stock', sparse_label=False, ndim=2, dtype='float32')
    pred, target = np.array([[0, np.log(3)]], 'float32'), np.array([[2, 1]], dtype)
    (nll,), gradient = compute(call, pred, target)
    assert (nll.dtype, gradient.dtype) == (np.float32, np.float32)
    assert_close(nll, [2 * np.log(4) + np.log(4 / 3)])


@pytest.mark.parametrize('largest', [0, 88, 1e4, 1e30, -1e30])
def test_logsumexp_of_huge_logits(kernel, largest, ctx):
    pred = np.array([[largest, largest, -np.inf]], 'float32')
    (_, logsumexp, _), _ = compute(call_of(kernel, 'all', ndim=2), pred, np.array([0.0]))
    assert_close(logsumexp, [pred[0, 0] + np.log(2)], tolerances.LOGSUMEXP)


def test_uniform_nll_has_no_part_of_classes_of_weight_zero(kernel, ctx):
    pred, weight = np.array([[0, 0, -np.inf]], 'float32'), np.array([1, 3, 0], 'float32')
    (_, _, uniform), gradient = compute(call_of(kernel, 'all', ndim=2), pred, np.array([0.0]), weight)
    assert_close(uniform, [4 / 3 * np.log(2)])
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize('logit', [-np.inf, np.nan])
def test_a_class_weight_of_zero_removes_the_label_term(kernel, logit, ctx):
    pred, weight = np.array([[logit, 0, 1]], 'float32'), np.array([0, 1, 1], 'float32')
    (nll,), gradient = compute(call_of(kernel, ndim=2), pred, np.array([0.0]), weight)
    assert nll == 0
    if np.isinf(logit):
        np.testing.assert_array_equal(gradient, 0)


@RANK_KNOWN
@pytest.mark.parametrize('classes', [1, 2, 31, 252, 507])
def test_odd_numbers_of_classes(kernel, is_rank_known, classes, rng, ctx):
    pred, label = make(rng, cases.Layout((3, classes, 5), 1))
    call = call_of(kernel, 'all', axis=1, ndim=3 if is_rank_known else None)
    terms, _ = compute(call, pred, label)
    for term, truth in zip(terms, expected_terms(1, pred, label)):
        assert_close(term.reshape(truth.shape), truth)


@RANK_KNOWN
@pytest.mark.parametrize('axis', range(-4, 4))
def test_class_axis_last(axis, is_rank_known, rng):
    pred = rng.normal(0, 1, (2, 3, 4, 5)).astype('float32')
    expected = np.moveaxis(pred, axis, -1)
    if is_rank_known:
        moved = stock.class_axis_last(nd, nd.array(pred), axis, 4).asnumpy()
    else:  # some axes are merged
        symbol = stock.class_axis_last(mx.sym, mx.sym.var('pred'), axis)
        moved = symbol.eval(pred=nd.array(pred))[0].asnumpy()
        assert moved.shape[-1] == pred.shape[axis]
        moved = moved.reshape(expected.shape)
    np.testing.assert_array_equal(moved, expected)


def test_a_known_number_of_classes_changes_nothing(rng, ctx):
    pred, label = make(rng, cases.Layout((4, 300), -1))
    call = call_of('stock', 'all', ndim=2)
    terms, gradient = compute(call, pred, label)
    terms_of_known, gradient_of_known = compute(call._replace(classes=300), pred, label)
    np.testing.assert_array_equal(terms_of_known, terms)
    np.testing.assert_array_equal(gradient_of_known, gradient)


def test_class_weights_have_gradient_zero(kernel, ctx):
    pred, label, weight = nd.ones((2, 3)), nd.array([0, 2]), nd.ones(3)
    for array in (pred, weight):
        array.attach_grad()
    with autograd.record():
        terms = class_terms(nd, call_of(kernel, 'all', ndim=2, label_ndim=1), pred, label, weight)
    autograd.backward(list(terms))
    np.testing.assert_array_equal(weight.grad.asnumpy(), 0)


OPERATOR = 'stable_ce_class_terms'


def operators_of(symbol):
    return {node['op'] for node in json.loads(symbol.tojson())['nodes']}


def in_graph(**options):
    """The operators of a loss in a caller's graph."""
    return operators_of(StableSoftmaxCELoss(**options)(mx.sym.var('pred'), mx.sym.var('label')))


@IS_FUSED
@pytest.mark.parametrize(
    ('kernel', 'facts', 'chosen'),
    [
        ('stock', {}, 'stock'),
        ('auto', {}, 'fused'),
        ('auto', {'device_type': 'cpu_pinned'}, 'fused'),
        ('auto', {'device_type': 'cpu_shared'}, 'fused'),
        ('auto', {'is_empty': True}, 'stock'),
        ('fused', {'is_empty': True}, 'stock'),
        ('auto', {'device_type': 'gpu'}, 'stock'),
        ('auto', {'is_main_thread': False}, 'stock'),
        ('auto', {'is_symbol': True}, 'stock'),
        ('fused', {}, 'fused'),
        ('fused', {'is_symbol': True}, 'fused'),
    ],
    ids=str,
)
def test_resolve(kernel, facts, chosen):
    assert resolve(Options(kernel=kernel), **facts) == chosen


@pytest.mark.parametrize(
    ('options', 'facts', 'reason'),
    [
        ({}, {'device_type': 'gpu'}, 'it runs on the CPU, and pred is on a gpu'),
        ({}, {'is_main_thread': False}, 'it is for the main thread only'),
        ({'sparse_label': False}, {}, 'it computes sparse labels and logits only'),
    ],
)
def test_fused_where_it_cannot_be_is_an_error(options, facts, reason):
    message = f"^kernel: expected 'auto' or 'stock', got 'fused'; the fused kernel cannot be used: {reason}"
    with pytest.raises(ValueError, match=message):
        resolve(Options(kernel='fused', **options), **facts)


def test_without_the_operator_auto_is_stock_and_fused_an_error(monkeypatch):
    monkeypatch.setattr(library, 'load', lambda: False)
    assert resolve(Options()) == 'stock'
    for make_it in (StableSoftmaxCELoss, StableCrossEntropy):
        with pytest.raises(ValueError, match='^kernel: .*fused kernel'):
            make_it(kernel='fused', **{'pred_type': 'logits'} if make_it is StableCrossEntropy else {})


@pytest.mark.parametrize('options', [{'sparse_label': False}, {'from_logits': True}], ids=str)
def test_fused_is_for_sparse_labels_and_logits(options, monkeypatch):
    with pytest.raises(ValueError, match='^kernel: expected .* sparse labels and logits'):
        StableSoftmaxCELoss(kernel='fused', **options)
    monkeypatch.setenv('GLUON_STABLE_CE_KERNEL', 'fused')  # a default is for what it can be for
    assert "kernel='stock'" in repr(StableSoftmaxCELoss(**options))


def test_kernel_has_to_be_one(monkeypatch):
    with pytest.raises(ValueError, match="^kernel: expected one of 'auto', 'stock', 'fused', got 'fast'"):
        StableSoftmaxCELoss(kernel='fast')
    monkeypatch.setenv('GLUON_STABLE_CE_KERNEL', 'fast')
    with pytest.raises(ValueError, match="^GLUON_STABLE_CE_KERNEL: expected one of .*, got 'fast'"):
        StableCrossEntropy()


@IS_FUSED
def test_graphs_of_symbols_are_stock_unless_asked_for(monkeypatch):
    monkeypatch.delenv('GLUON_STABLE_CE_KERNEL', raising=False)
    assert OPERATOR not in in_graph()
    assert {'log_softmax', 'pick'} <= in_graph()
    assert OPERATOR in in_graph(kernel='fused')
    monkeypatch.setenv('GLUON_STABLE_CE_KERNEL', 'fused')
    assert OPERATOR in in_graph()
    assert OPERATOR not in in_graph(kernel='stock')


@IS_FUSED
def test_export_is_stock_whatever_the_kernel_is(tmp_path, rng):
    loss_fn = StableSoftmaxCELoss(kernel='fused')
    pred, label = nd.array(rng.normal(0, 3, (4, 5))), nd.array([0, 1, 2, 3])
    loss = loss_fn(pred, label)
    path, _ = loss_fn.export(str(tmp_path / 'loss'))
    assert OPERATOR not in operators_of(mx.sym.load(path))
    loaded = gluon.SymbolBlock.imports(path, ['data0', 'data1'])
    assert_close(loaded(pred, label).asnumpy(), loss.asnumpy())


@IS_FUSED
def test_metrics_of_both_kernels_may_be_merged(rng):
    pred, label = nd.array(rng.normal(0, 3, (4, 5))), nd.array([0, 1, 2, 3])
    stock, own = (StableCrossEntropy(pred_type='logits', kernel=kernel) for kernel in ('stock', 'fused'))
    for metric in (stock, own):
        metric.update(label, pred)
    expected = (stock.get()[1] + own.get()[1]) / 2
    stock.merge(own)
    assert stock.get()[1] == tolerances.FLOAT64.approx(expected)
