"""The fused operator against long double, and mpmath where that cannot reach."""

import os
import platform
import threading
from pathlib import Path

import cases
import mxnet as mx
import numpy as np
import pytest
import tolerances
from fused_operator import needs_operator, python
from label_cases import DTYPES
from mxnet import autograd, gluon
from tolerances import FUSED_VALUE, assert_close

from gluon_stable_ce import StableSoftmaxCELoss
from gluon_stable_ce.call import Call, Fill
from gluon_stable_ce.kernels import fused
from gluon_stable_ce.options import Options

pytestmark = needs_operator

NAN, INF = float('nan'), float('inf')


def expected_terms(pred, label, axis, weights=None):
    """The three terms in long double, each in the form that is exact for p near 0 and near 1, and their gradient.

    Returns
    -------
    nll, logsumexp, uniform_nll : (positions...)
    gradient : function of the three incoming gradients
    """
    z = np.moveaxis(pred.astype(np.longdouble), axis, -1)  # (positions..., C)
    classes = z.shape[-1]
    at = label[..., None]
    w = np.ones(classes) if weights is None else weights.astype(np.longdouble)
    z_label = np.take_along_axis(z, at, -1)
    others = z.copy()
    np.put_along_axis(others, at, -INF, -1)
    most = others.max(-1, keepdims=True)
    log_odds = most + np.log(np.exp(others - most).sum(-1, keepdims=True)) - z_label
    nll = np.logaddexp(0, log_odds)
    lse = np.where(log_odds > 0, z_label + log_odds, z_label) + np.log1p(np.exp(-np.abs(log_odds)))
    uniform = (w * (lse - z)).sum(-1) / classes
    w_label = w[at]

    def gradient(g_nll, g_lse, g_uniform):
        p = np.exp(z - lse)
        p_less_onehot = p.copy()
        np.put_along_axis(p_less_onehot, at, np.expm1(-nll), -1)
        g_nll, g_lse, g_uniform = (g.astype(np.longdouble)[..., None] for g in (g_nll, g_lse, g_uniform))
        total = g_nll * w_label * p_less_onehot + g_lse * p + g_uniform * (w.sum() * p - w) / classes
        return np.moveaxis(total, -1, axis)

    return (w_label * nll)[..., 0], lse[..., 0], uniform, gradient


def class_terms(F, pred, label, axis=-1, class_weight=None, logsumexp=False, uniform=False, **call):
    """The terms with the fields of `Call` and `Options` by name."""
    options = {name: call.pop(name) for name in ('ignore_label', 'invalid_label') if name in call}
    options.update(axis=axis, lse_square_scale=float(logsumexp), label_smoothing=float(uniform))
    ndim = None if F is mx.sym else pred.ndim
    call = Call(Options(**options), **{'ndim': ndim, 'needs_guard': False, **call})
    return fused.class_terms(F, call, pred, label, class_weight)


def run(pred, label, axis=-1, grads=None, label_dtype='float64', **options):
    """Terms as a list of arrays, and the gradient of pred; `grads` are the incoming gradients, default ones."""
    pred = mx.nd.array(pred, dtype=pred.dtype)
    pred.attach_grad()
    pred.grad[:] = NAN  # what is not written stays
    with autograd.record():
        terms = class_terms(mx.nd, pred, mx.nd.array(label, dtype=label_dtype), axis, **options)
    terms = [term for term in terms if term is not None]
    grads = [
        mx.nd.ones_like(term) if grads is None else mx.nd.array(g, dtype=term.dtype)
        for term, g in zip(terms, grads or terms)
    ]
    autograd.backward(terms, grads)
    return [term.asnumpy() for term in terms], pred.grad.asnumpy()


SHAPES = {
    'two classes': ((7, 2), -1),
    'one position': ((1, 10), -1),
    'few classes': ((600, 10), -1),
    'the last in lines': ((33, 64), -1),
    'the first in rows': ((33, 65), -1),
    'an odd row': ((5, 1337), -1),
    'a block and one': ((3, 1025), -1),
    'many classes': ((3, 50257), -1),
    'one more than a part of a row': ((2, 65537), -1),
    'sequences': ((3, 5, 129), -1),
    'images': ((2, 21, 33, 17), 1),
    'image lines of an odd length': ((2, 21, 13, 47), 1),
    'image lines in parts': ((1, 5, 40, 30), 1),
    'images, many classes': ((1, 150, 8, 9), 1),
    'axis 0': ((40, 70), 0),
    'axis 0 of a vector of positions': ((3, 1), 0),
    'axis in the middle, short lines': ((3, 300, 5), 1),
    'more than a part of a line': ((1, 1100, 70), 1),
    'axis -2': ((4, 77, 3), -2),
}


@pytest.mark.parametrize('scale', [0.1, 3, 40])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize(('shape', 'axis'), SHAPES.values(), ids=SHAPES)
def test_terms_and_gradient_equal_long_double(shape, axis, dtype, scale, rng):
    pred = (rng.standard_normal(shape) * scale + scale).astype(dtype)
    positions = tuple(np.delete(shape, axis))
    label = rng.randint(0, shape[axis], positions)
    weights = rng.uniform(size=shape[axis]).astype('float32')
    grads = [rng.standard_normal(positions).astype('float32') for _ in range(3)]
    terms, grad = run(
        pred, label, axis, grads, logsumexp=True, uniform=True, class_weight=mx.nd.array(weights)
    )
    *expected, gradient = expected_terms(pred, label, axis, weights)
    expected_grad = gradient(*grads)
    for value, true, tolerance in zip(terms, expected, tolerances.fused_terms(dtype)):
        assert_close(value, true, tolerance)
        assert value.dtype == ('float64' if dtype == 'float64' else 'float32')
    assert grad.dtype == dtype
    cases.assert_within(grad, expected_grad, tolerances.fused_gradient_bound(dtype, expected_grad))


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize(
    ('shape', 'axis', 'positions'),
    [
        pytest.param((70, 300), -1, 0, id='rows'),
        pytest.param((5, 70000), -1, 0, id='rows in parts'),
        pytest.param((1100, 10), -1, 0, id='few classes'),
        pytest.param((3, 21, 700), 1, 2, id='lines'),
        pytest.param((70, 1100, 3), 1, 0, id='short lines in parts'),
    ],
)
def test_the_same_bits_in_any_batch_and_at_any_position(shape, axis, positions, dtype, rng):
    """`positions` is an axis of which some positions are computed alone, in another order."""
    pred, label = (
        rng.standard_normal(shape).astype(dtype) * 9,
        rng.randint(0, shape[axis], np.delete(shape, axis)),
    )
    grads = [rng.standard_normal(label.shape).astype('float32') for _ in range(3)]
    some = rng.permutation(shape[positions])[: 2 * shape[positions] // 3]
    of_label = min(positions, label.ndim - 1)
    terms, gradient = run(pred, label, axis, grads, logsumexp=True, uniform=True)
    label, *grads = (array.take(some, of_label) for array in (label, *grads))
    alone, gradient_alone = run(pred.take(some, positions), label, axis, grads, logsumexp=True, uniform=True)
    for array, expected in zip(alone, terms):
        np.testing.assert_array_equal(array, expected.take(some, of_label))
    np.testing.assert_array_equal(gradient_alone, gradient.take(some, positions))


INSTRUCTION_SETS = ['x86-64', 'x86-64-v3', 'x86-64-v4']  # for each of which the loops are compiled


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='there is one instruction set')
@pytest.mark.parametrize('arch', INSTRUCTION_SETS)
def test_each_instruction_set_is_as_exact(arch, tmp_path):
    """The tests of numbers, with an operator whose loops are compiled for one instruction set."""
    if arch == 'x86-64-v4' and 'avx512vl' not in Path('/proc/cpuinfo').read_text():
        pytest.skip('this processor has no AVX-512')
    code = f"""
import pytest, sys
from gluon_stable_ce.kernels import library
library.FLAGS += ('-DKERNEL=__attribute__((noinline, target("arch={arch}"))) static',)
library.HERE = {str(tmp_path)!r}
names = 'same_bits_in_any or infinite_and_nan or long_double and not float16 and not 40'
sys.exit(pytest.main(['-q', '-n', '0', '-p', 'no:cacheprovider', '-k', names, {__file__!r}]))
"""
    assert ' passed' in python(code)


@pytest.mark.parametrize('alpha', [1e-3, 0.3, 1])
@pytest.mark.parametrize('weighted', [False, True], ids=['', 'class-weight'])
@pytest.mark.parametrize('logits', ['near', 'far', 'confident', 'equal', 'masses'])
@pytest.mark.parametrize('classes', [2, 7, 64, 257, 5000])
def test_smoothing_is_within_its_stated_bound(classes, logits, weighted, alpha, rng):
    """Of the page on accuracy, whether the largest logit is the label's or not."""
    rows = max(8, 20_000 // classes)
    scale = {'near': 0.01, 'far': 15, 'equal': 0}.get(logits, 3)
    pred = rng.normal(0, scale, (rows, classes)) + rng.normal(0, 5, (rows, 1))
    if logits in ('confident', 'masses'):
        pred[np.arange(rows), rng.randint(0, classes, rows)] += (
            40 if logits == 'confident' else np.log(classes)
        )
    pred, label = pred.astype('float32'), rng.randint(0, classes, rows)
    weights = rng.uniform(0.1, 3, classes).astype('float32') if weighted else np.ones(classes, 'float32')
    x = mx.nd.array(pred)
    x.attach_grad()
    options = {'class_weight': weights} if weighted else {}
    with autograd.record():
        loss = StableSoftmaxCELoss(kernel='fused', label_smoothing=alpha, **options)(x, mx.nd.array(label))
    loss.backward()
    nll, _, uniform, gradient = expected_terms(pred, label, 1, weights)
    assert_close(loss.asnumpy(), (1 - alpha) * nll + alpha * uniform, tolerances.STATED_SMOOTHING)
    head = np.ones(rows, np.longdouble)
    target = alpha / classes * np.tile(weights.astype(np.longdouble), (rows, 1))
    target[np.arange(rows), label] += (1 - alpha) * weights[label]
    expected = gradient((1 - alpha) * head, 0 * head, alpha * head)
    bound = tolerances.STATED_SMOOTHING_ENTRY.bound(expected + 2 * target)  # p sum(target) + target
    cases.assert_within(x.grad.asnumpy(), expected, bound)


@pytest.mark.parametrize('inner', [1, 70], ids=['rows', 'lines'])
@pytest.mark.parametrize('classes', [2, 31, 33, 100, 1100])
@pytest.mark.parametrize('weighted', [True, False], ids=['weight', 'weight-0'])
@pytest.mark.parametrize('other', [-1e30, 1e30, -INF])
def test_uniform_nll_beside_huge_and_masked_logits(classes, inner, weighted, other, rng):
    """Each term w_j (logsumexp - z_j) is at least 0. The largest logit's is exact to 1e-8, the others' relatively."""
    logits, weights = rng.standard_normal(classes).astype('float32'), np.ones(classes, 'float32')
    logits[: classes // 2] = other
    weights[: classes // 2] = weighted
    pred = mx.nd.array(np.repeat(logits[None, :, None], inner, axis=2))
    for label in (0, classes - 1):
        labels = mx.nd.full((1, inner), label)
        terms = class_terms(mx.nd, pred, labels, 1, uniform=True, class_weight=mx.nd.array(weights))
        with np.errstate(over='ignore'):
            lse = logits.astype('float64').max() + np.log(
                np.exp(logits.astype('float64') - logits.max()).sum()
            )
        expected = sum(float(w) * (lse - float(z)) for z, w in zip(logits, weights) if w) / classes
        assert_close(terms.uniform_nll.asnumpy(), np.full((1, inner), expected), tolerances.FUSED_UNIFORM)
        assert (terms.uniform_nll.asnumpy() >= 0).all()


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(('shape', 'axis'), [((200, 3), -1), ((50, 1000), -1), ((2, 20, 90), 1)], ids=str)
def test_a_logsumexp_near_0_is_exact_to_the_rounding_of_the_sum(shape, axis, dtype, rng):
    pred = rng.standard_normal(shape)
    pred = (pred - np.log(np.exp(pred).sum(axis, keepdims=True))).astype(dtype)
    label = np.zeros(np.delete(shape, axis), int)
    (_, logsumexp), _ = run(pred, label, axis, logsumexp=True)
    _, true, _, _ = expected_terms(pred, label, axis)
    assert abs(true).max() < 1e-6
    assert_close(logsumexp, true, tolerances.FUSED_LOGSUMEXP[dtype])


@pytest.mark.parametrize('logit', [0.1, -0.3, 0.7, 2.9])
@pytest.mark.parametrize(('shape', 'axis'), [((2, 50000), -1), ((1, 1000, 64), 1)], ids=['rows', 'lines'])
def test_sums_of_equal_terms_do_not_drift(shape, axis, logit):
    pred = np.full(shape, logit, 'float32')
    positions = tuple(np.delete(shape, axis))
    (nll,), _ = run(pred, np.zeros(positions), axis)
    assert_close(nll, np.log(shape[axis]), FUSED_VALUE)


def test_small_probabilities_have_gradients_down_to_the_least_number():
    pred = np.array([[100, 0, -3]], 'float32')
    _, grad = run(pred, np.array([0]))
    assert_close(grad[0, 1], np.exp(-100.0), FUSED_VALUE)
    assert grad[0, 1] > 0


LAYOUTS = {
    'lines': (0, 1),
    'rows': (100, 1),
    'image lines': (0, 70),
}  # masked classes to add, positions along inner


def run_layout(row, label, layout, dtype='float32'):
    """The nll and the gradient of one position, as one of many classes (masked ones) or of many positions."""
    masked, inner = LAYOUTS[layout]
    pred = np.repeat(np.array(row + [-INF] * masked, dtype)[None, :, None], inner, 2)
    (nll,), grad = run(pred, np.full((1, inner), label), 1)
    return nll[0, 0], grad[0, : len(row), 0]


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    ('row', 'label', 'nll'),
    [
        ([-INF, 1, 2], 0, INF),
        ([-INF, 1, 1], 1, np.log(2)),
        ([-INF, -INF, 1], 2, 0),
        ([-INF, -INF], 0, NAN),
        ([NAN, -1, 1, 2], 3, NAN),
        ([0, 1, NAN], 2, NAN),
        ([INF, 0, 1], 0, NAN),
        ([INF, 0, 1], 1, INF),
        ([INF, NAN, 1], 2, NAN),
        ([INF, -INF, 1], 1, INF),
    ],
    ids=str,
)
def test_infinite_and_nan_logits(row, label, nll, layout, dtype):
    value, _ = run_layout(row, label, layout, dtype)
    assert_close(value, nll, FUSED_VALUE)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradient_of_masked_classes_is_0_and_of_a_masked_label_minus_1(layout):
    _, grad = run_layout([-INF, 1, 1], 1, layout)
    assert_close(grad, [0, -0.5, 0.5], FUSED_VALUE)
    _, grad = run_layout([-INF, 1, 1], 0, layout)
    assert_close(grad, [-1, 0.5, 0.5], FUSED_VALUE)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_logits_all_at_the_least_number_have_a_gradient(layout):
    nll, grad = run_layout([-3e38, -3e38, -3e38], 0, layout)
    assert_close(nll, np.log(3), FUSED_VALUE)
    assert_close(grad, [-2 / 3, 1 / 3, 1 / 3], FUSED_VALUE)


@pytest.mark.parametrize('bad', [-1, 7000], ids=['ignored', 'invalid'])
@pytest.mark.parametrize('junk', [NAN, INF, 3e38])
@pytest.mark.parametrize(('shape', 'axis'), [((6, 5), -1), ((6, 99), -1), ((1, 5, 6), 1), ((1, 3, 80), 1)])
def test_positions_without_a_class_are_filled_in_whatever_they_hold(shape, axis, junk, bad, rng):
    pred = rng.standard_normal(shape).astype('float32')
    positions = tuple(np.delete(shape, axis))
    label = rng.randint(0, shape[axis], positions)
    flat = np.arange(label.size).reshape(positions) % 2 == 0
    options = {'logsumexp': True, 'uniform': True, 'ignore_label': -1, 'fill': Fill.METRIC}
    expected, expected_grad = run(pred, label, axis, **options)
    np.moveaxis(pred, axis, -1)[flat] = junk
    grads = [np.where(flat, NAN, 1)] * 3
    terms, grad = run(pred, np.where(flat, bad, label), axis, grads, **options)
    for value, true in zip(terms, expected):
        fill = Fill.METRIC.ignored if bad == -1 else Fill.METRIC.invalid
        np.testing.assert_array_equal(value, np.where(flat, fill, true))
    np.testing.assert_array_equal(grad, np.where(np.expand_dims(flat, axis), 0, expected_grad))


@pytest.mark.parametrize('weight_dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('layout', ['rows', 'lines'])
def test_a_class_of_weight_0_has_no_nll_and_no_gradient(layout, dtype, weight_dtype):
    classes = 100 if layout == 'rows' else 3
    pred = np.zeros((4, classes), dtype)
    pred[0, 1], pred[1, 0] = -INF, NAN
    weights = mx.nd.array([2, 0] + [1] * (classes - 2), dtype=weight_dtype)
    (nll,), grad = run(pred, np.array([1, 1, 1, 0]), grads=[[NAN, 1, 1, 1]], class_weight=weights)
    assert_close(nll, [0, 0, 0, 2 * np.log(classes)], FUSED_VALUE)
    np.testing.assert_array_equal(grad[:3], 0)
    assert_close(grad[3, :2], [2 / classes - 2, 2 / classes], tolerances.FLOAT16_GRADIENT)


@pytest.mark.parametrize(('shape', 'axis'), [((4, 5), -1), ((4, 99), -1), ((1, 5, 80), 1)])
def test_gradient_is_0_where_the_incoming_one_is(shape, axis):
    pred = np.full(shape, NAN, 'float32')
    positions = tuple(np.delete(shape, axis))
    _, grad = run(pred, np.zeros(positions), axis, [np.zeros(positions)])
    np.testing.assert_array_equal(grad, 0)


class NLL(gluon.HybridBlock):
    """The nll inside a graph."""

    def hybrid_forward(self, F, pred, label):
        ndim = None if F is mx.sym else 2
        return class_terms(F, pred, label, ndim=ndim, needs_guard=True).nll


@pytest.mark.parametrize('losses', [2, 8, 20])
@pytest.mark.parametrize('grad_req', ['write', 'add'])
def test_losses_in_one_graph_add_up(losses, grad_req, rng):
    """MXNet must neither merge what is in front of each, nor add into a gradient without telling the operator."""

    class Net(gluon.HybridBlock):
        def hybrid_forward(self, F, pred, *labels):
            return F.add_n(*[class_terms(F, pred, label, needs_guard=True).nll for label in labels])

    net = Net()
    net.hybridize(static_alloc=True)
    pred = mx.nd.array(rng.standard_normal((8, 100)))
    pred.attach_grad(grad_req)
    labels = [mx.nd.array(rng.randint(0, 100, 8)) for _ in range(losses)]
    for _ in range(2):
        with autograd.record():
            value = net(pred, *labels)
        value.backward()
    total = sum(run(pred.asnumpy(), label.asnumpy())[1] for label in labels)
    times = 2 if grad_req == 'add' else 1
    bound = times * losses**2 * tolerances.SUM_OF_PROBABILITIES.absolute
    cases.assert_within(pred.grad.asnumpy(), times * total, bound)


@pytest.mark.parametrize('req', ['null', 'write'])
def test_symbols_run_with_and_without_gradients(req, rng):
    terms = class_terms(mx.sym, mx.sym.var('pred'), mx.sym.var('label'), uniform=True, needs_guard=True)
    symbol = mx.sym.load_json((terms.nll + terms.uniform_nll).tojson())
    pred, label = rng.standard_normal((3, 7)).astype('float32'), np.array([0, 3, 6])
    executor = symbol.simple_bind(mx.cpu(), pred=(3, 7), grad_req={'pred': req, 'label': 'null'})
    (value,) = executor.forward(is_train=req != 'null', pred=mx.nd.array(pred), label=mx.nd.array(label))
    expected, grad = run(pred, label, uniform=True)
    assert_close(value.asnumpy().ravel(), sum(expected), tolerances.ROUNDED_FLOAT32)
    if req == 'write':
        executor.backward(mx.nd.ones((3, 1)))
        assert_close(executor.grad_dict['pred'].asnumpy(), grad, tolerances.ROUNDED_FLOAT32)


MEMORY = {
    'eager': None,
    'no static memory': {},
    'static_alloc': {'static_alloc': True},
    'static_shape': {'static_alloc': True, 'static_shape': True},
}


@pytest.mark.parametrize('memory', MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize('dtype', DTYPES)
def test_the_operator_may_be_all_of_a_graph(dtype, memory, rng):
    pred, label = mx.sym.var('pred'), mx.sym.var('label')
    block = gluon.SymbolBlock(mx.sym.stable_ce_class_terms(pred, label)[0], [pred, label])
    if memory is not None:
        block.hybridize(**memory)
    leaf, labels = mx.nd.array(rng.standard_normal((6, 5))), mx.nd.array([0, 1, 2, 3, 4, 0], dtype=dtype)
    leaf.attach_grad()
    for _ in range(2):
        with autograd.record():
            nll = block(leaf * 1, labels)
        nll.backward()
    (expected,), grad = run(leaf.asnumpy(), labels.asnumpy())
    np.testing.assert_array_equal(nll.asnumpy(), expected)
    np.testing.assert_array_equal(leaf.grad.asnumpy(), grad)


@pytest.mark.parametrize('memory', MEMORY.values(), ids=MEMORY)
def test_recorded_calls_keep_apart_what_their_gradients_need(memory, rng):
    """Two calls are recorded, and others follow, before the backwards; one is used twice."""
    block = NLL()
    if memory is not None:
        block.hybridize(**memory)
    leaves = [mx.nd.array(rng.standard_normal((rows, 9)) * 5) for rows in (6, 6, 4)]
    label = mx.nd.array(rng.randint(0, 9, 6))
    values = []
    for leaf in leaves:
        leaf.attach_grad()
        with autograd.record():
            values.append(block(leaf * 1, label[: len(leaf)]))
        block(leaf * -1, label[: len(leaf)])
    for _ in range(2):
        for leaf, value in zip(leaves, values):
            value.backward(retain_graph=True)
            grad = run(leaf.asnumpy(), label[: len(leaf)].asnumpy())[1]
            np.testing.assert_array_equal(leaf.grad.asnumpy(), grad)


def test_label_and_class_weight_get_gradients_of_0(rng):
    pred, label, weight = mx.nd.array(rng.standard_normal((3, 7))), mx.nd.array([0, 3, 6]), mx.nd.ones(7)
    for array in (pred, label, weight):
        array.attach_grad()
    with autograd.record():
        nll = class_terms(mx.nd, pred, label, class_weight=weight).nll
    nll.backward()
    for array in (label, weight):
        np.testing.assert_array_equal(array.grad.asnumpy(), 0)


def test_in_a_graph_of_symbols_label_and_class_weight_keep_their_gradients(rng):
    names = ('pred', 'label', 'class_weight')
    pred, label, weight = map(mx.sym.var, names)
    nll = class_terms(mx.sym, pred, label, class_weight=weight, needs_guard=True).nll
    arrays = {'pred': mx.nd.ones((3, 7)), 'label': mx.nd.array([0, 3, 6]), 'class_weight': mx.nd.ones(7)}
    grads = {name: mx.nd.ones_like(array) * 5 for name, array in arrays.items()}
    executor = nll.bind(mx.cpu(), arrays, grads, grad_req='add')
    executor.forward(is_train=True)
    executor.backward(mx.nd.ones((3, 1)))
    for name in ('label', 'class_weight'):
        np.testing.assert_array_equal(grads[name].asnumpy(), 5)


@pytest.mark.parametrize(
    ('pred', 'label', 'options', 'message'),
    [
        ((2, 3), (3,), {}, r'label: expected shape \(2,\) or \(2, 1\) for pred of \(2, 3\), got \(3,\)'),
        ((2, 3), (1, 2), {}, r'label: expected shape \(2,\) or \(2, 1\) for pred of \(2, 3\), got \(1, 2\)'),
        (
            (2, 3, 4),
            (2, 4, 1),
            {'axis': 1},
            r'label: expected shape \(2, 4\) or \(2, 1, 4\) .*got \(2, 4, 1\)',
        ),
        ((2, 3), (2,), {'axis': 2}, r'pred: expected an axis 2, got shape \(2, 3\)'),
        ((2, 3), (2,), {'class_weight': (2,)}, r'class_weight: expected shape \(3,\).*got \(2,\)'),
        ((2, 3), (2,), {'class_weight': (3, 1)}, r'class_weight: expected shape \(3,\).*got \(3, 1\)'),
    ],
    ids=str,
)
def test_wrong_shapes_are_errors(pred, label, options, message):
    options = {'axis': -1, **options}
    if 'class_weight' in options:
        options['class_weight'] = mx.nd.ones(options['class_weight'])
    with pytest.raises(mx.MXNetError, match=message):
        class_terms(mx.nd, mx.nd.ones(pred), mx.nd.ones(label), **options).nll.asnumpy()


@pytest.mark.parametrize(
    ('dtypes', 'message'),
    [
        (('int32', 'float32', 'float32'), 'pred: expected float16, float32 or float64'),
        (('float32', 'bool', 'float32'), 'label: expected integers or floats'),
        (('float32', 'float32', 'int32'), 'class_weight: expected floats'),
    ],
)
def test_wrong_dtypes_are_errors(dtypes, message):
    pred, label, weight = (mx.nd.ones(shape).astype(d) for shape, d in zip(((2, 3), 2, 3), dtypes))
    with pytest.raises(mx.MXNetError, match=message):
        class_terms(mx.nd, pred, label, class_weight=weight).nll.asnumpy()


def test_other_threads_compute_with_the_stock_kernel(rng):
    """Calls of an operator of a library from two threads can wait for each other for ever."""
    pred, label = mx.nd.array(rng.standard_normal((4, 5))), mx.nd.array([0, 1, 2, 3])
    raised, losses = [], []

    def work():
        losses.append(StableSoftmaxCELoss()(pred, label).asnumpy())
        loss_fn = StableSoftmaxCELoss(kernel='fused')
        with pytest.raises(ValueError, match='main thread only') as error:
            loss_fn(pred, label)
        raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raised
    np.testing.assert_array_equal(losses[0], StableSoftmaxCELoss(kernel='stock')(pred, label).asnumpy())


OPERATOR = """
import os, mxnet as mx, numpy as np
from gluon_stable_ce.call import Call
from gluon_stable_ce.kernels import fused, library
from gluon_stable_ce.options import Options
assert library.load()

def nll(pred, label):
    return fused.class_terms(mx.nd, Call(ndim=2, needs_guard=False), pred, label, None).nll
"""
BITS = f"""{OPERATOR}
import hashlib
rng = np.random.RandomState(0)
digest = hashlib.sha256()
for shape, axis in [((64, 2000), -1), ((1, 1000000), -1), ((1000, 100), -1), ((3, 2000, 300), 1), ((70000, 3), -1)]:
    pred = mx.nd.array(rng.standard_normal(shape))
    pred.attach_grad()
    label = mx.nd.array(rng.randint(0, shape[axis], np.delete(shape, axis)))
    call = Call(Options(axis=axis, label_smoothing=0.1, lse_square_scale=0.1), ndim=pred.ndim)
    with mx.autograd.record():
        terms = fused.class_terms(mx.nd, call, pred, label, None)
    mx.autograd.backward(list(terms))
    for array in (*terms, pred.grad):
        digest.update(array.asnumpy().tobytes())
print(digest.hexdigest())
"""


# how many threads one forward takes
THREADS = f"""{OPERATOR}
pred, label = mx.nd.zeros(SHAPE), mx.nd.zeros(SHAPE[0])
mx.nd.waitall()
before = len(os.listdir('/proc/self/task'))
nll(pred, label).wait_to_read()
print(1 + len(os.listdir('/proc/self/task')) - before)
"""


@pytest.mark.slow
def test_the_same_bits_for_any_number_of_threads_and_any_engine():
    digests = {python(BITS, OMP_NUM_THREADS=str(threads)) for threads in (1, 2, 3)}
    digests.add(python(BITS, OMP_NUM_THREADS='2', MXNET_ENGINE_TYPE='NaiveEngine'))
    assert len(digests) == 1


@pytest.mark.parametrize(
    ('variable', 'threads'), [('OMP_NUM_THREADS', 1), ('OMP_NUM_THREADS', 3), ('MXNET_OMP_MAX_THREADS', 1)]
)
@pytest.mark.slow
def test_settings_of_threads_are_respected(variable, threads):
    assert python(f'SHAPE = (1, 1000000){THREADS}', **{variable: str(threads)}) == str(threads)


UNSET = {'OMP_NUM_THREADS': None, 'MXNET_OMP_MAX_THREADS': None}


@pytest.mark.parametrize(
    ('shape', 'uses_all'), [((1, 1000000), True), ((512, 1000), True), ((64, 1000), False)]
)
@pytest.mark.slow
def test_all_processors_are_used_for_large_work_only(shape, uses_all):
    processors = len(os.sched_getaffinity(0))
    if processors > 8:
        pytest.skip('more processors than parts of the work')
    assert python(f'SHAPE = {shape}{THREADS}', **UNSET) == str(processors if uses_all else 1)


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='no affinity')
@pytest.mark.slow
def test_affinity_is_respected():
    one = 'import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])'
    assert python(f'{one}\nSHAPE = (1, 1000000){THREADS}', **UNSET) == '1'


@pytest.mark.slow
def test_forked_workers_compute():
    code = f"""{OPERATOR}
def compute():
    return nll(mx.nd.array(np.arange(400000).reshape(4, 100000) % 7), mx.nd.zeros(4)).asnumpy()
class Data:
    def __len__(self): return 4
    def __getitem__(self, i): return compute()
before = compute()  # the parent's threads exist
for batch in mx.gluon.data.DataLoader(Data(), batch_size=2, num_workers=2):
    assert (batch.asnumpy() == before).all()
print('done')
"""
    assert python(code, OMP_NUM_THREADS='2') == 'done'


@pytest.mark.slow
def test_profiler_names_the_operator(tmp_path):
    code = f"""{OPERATOR}
mx.profiler.set_config(profile_all=True, aggregate_stats=True, filename={str(tmp_path / 'profile.json')!r})
mx.profiler.set_state('run')
nll(mx.nd.ones((2, 3)), mx.nd.zeros(2)).asnumpy()
mx.profiler.set_state('stop')
print('stable_ce_class_terms' in mx.profiler.dumps())
"""
    assert python(code).splitlines()[-1] == 'True'


@pytest.mark.slow
def test_a_process_ends_with_a_recorded_call():
    code = f"""{OPERATOR}
pred = mx.nd.ones((2, 3))
pred.attach_grad()
symbol = mx.sym.stable_ce_class_terms(mx.sym.var('pred'), mx.sym.var('label'))
block = mx.gluon.SymbolBlock(symbol, [mx.sym.var('pred'), mx.sym.var('label')])
block.hybridize(static_alloc=True)
with mx.autograd.record():
    values = block(pred, mx.nd.zeros(2)), nll(pred, mx.nd.zeros(2))
print('done')
"""
    assert python(code) == 'done'
