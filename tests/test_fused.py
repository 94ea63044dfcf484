"""The fused operator against float64, and mpmath where float64 cannot reach; and how it is built, found and loaded."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import mpmath
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from gluon_stable_ce import StableSoftmaxCELoss, kernels
from gluon_stable_ce.kernels import fused

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOLERANCE = {'float16': 3e-7, 'float32': 3e-7, 'float64': 2e-13}  # of terms and of the label's gradient
ROUNDING = (
    2**-23
)  # of a float32 number up to 1, as a gradient of one loss is: of its value, and of adding it to a sum
NAN, INF = float('nan'), float('inf')


def _why_not():
    try:
        fused.build()
    except fused.BuildError as error:
        return str(error)
    return None if fused.load() else 'the library does not load'


SKIP = _why_not()
supported = pytest.mark.skipif(fused.why_unsupported() is not None, reason=str(fused.why_unsupported()))
needs_operator = pytest.mark.skipif(SKIP is not None, reason=f'no fused operator: {SKIP}')


def expected_terms(pred, index, axis, weights=None):
    """The three terms in long double, each in the form that is exact for p near 0 and near 1, and their gradients.

    Returns
    -------
    nll, logsumexp, uniform_nll : (positions...)
    gradient : function of the three incoming gradients
    """
    z = np.moveaxis(pred.astype(np.longdouble), axis, -1)  # (positions..., C)
    classes = z.shape[-1]
    at = index[..., None]
    w = np.ones(classes) if weights is None else weights.astype(np.longdouble)
    z_label = np.take_along_axis(z, at, -1)
    others = z.copy()
    np.put_along_axis(others, at, -INF, -1)
    most = others.max(-1, keepdims=True)
    log_odds = most + np.log(np.exp(others - most).sum(-1, keepdims=True)) - z_label
    nll = np.logaddexp(0, log_odds)
    lse = np.where(log_odds > 0, z_label + log_odds, z_label) + np.log1p(np.exp(-np.abs(log_odds)))
    uniform = (w * (lse - z)).sum(-1) / classes

    def gradient(g_nll, g_lse, g_uniform):
        p = np.exp(z - lse)
        p_less_onehot = p.copy()
        np.put_along_axis(p_less_onehot, at, np.expm1(-nll), -1)
        g_nll, g_lse, g_uniform = (g.astype(np.longdouble)[..., None] for g in (g_nll, g_lse, g_uniform))
        total = g_nll * p_less_onehot + g_lse * p + g_uniform * (w.sum() * p - w) / classes
        return np.moveaxis(total, -1, axis)

    return nll[..., 0], lse[..., 0], uniform, gradient


def exact_nll(logits, label):
    """-log softmax(logits)[label] with 60 digits."""
    with mpmath.workdps(60):
        z = [mpmath.mpf(float(logit)) for logit in logits]
        others = mpmath.fsum(mpmath.e ** (logit - z[label]) for j, logit in enumerate(z) if j != label)
        nll = mpmath.log1p(others)
        return float(nll), float(mpmath.expm1(-nll))


def class_terms(F, pred, index, axis=-1, is_leaf=False, **options):
    return kernels.class_terms(F, 'fused', pred, axis, index=index, is_leaf=is_leaf, **options)


def run(pred, index, axis=-1, grads=None, index_dtype='float64', **options):
    """Terms as a list of arrays, and the gradient of pred; `grads` are the incoming gradients, default ones."""
    pred = mx.nd.array(pred, dtype=pred.dtype)
    pred.attach_grad()
    with autograd.record():
        terms = class_terms(mx.nd, pred, mx.nd.array(index, dtype=index_dtype), axis, **options)
    terms = [term for term in terms if term is not None]
    grads = [
        mx.nd.ones_like(term) if grads is None else mx.nd.array(g, dtype=term.dtype)
        for term, g in zip(terms, grads or terms)
    ]
    autograd.backward(terms, grads)
    return [term.asnumpy() for term in terms], pred.grad.asnumpy()


def at_label(array, index, axis):
    return np.take_along_axis(np.moveaxis(array.astype('float64'), axis, -1), index[..., None], -1)[..., 0]


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


@needs_operator
@pytest.mark.parametrize('scale', [0.1, 3, 40])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize(('shape', 'axis'), SHAPES.values(), ids=SHAPES)
def test_terms_and_gradient_equal_long_double(shape, axis, dtype, scale, rng):
    pred = (rng.standard_normal(shape) * scale + scale).astype(dtype)
    positions = tuple(np.delete(shape, axis))
    index = rng.randint(0, shape[axis], positions)
    weights = rng.uniform(size=shape[axis]).astype('float32')
    grads = [rng.standard_normal(positions).astype('float32') for _ in range(3)]
    terms, grad = run(
        pred, index, axis, grads, logsumexp=True, uniform=True, class_weight=mx.nd.array(weights)
    )
    *expected, gradient = expected_terms(pred, index, axis, weights)
    expected_grad = gradient(*grads)
    for name, value, true in zip(('nll', 'logsumexp', 'uniform_nll'), terms, expected):
        # of a logsumexp near 0, the sum's rounding is left
        atol = TOLERANCE[dtype] if name == 'logsumexp' else 1e-37
        np.testing.assert_allclose(value, true, rtol=TOLERANCE[dtype], atol=atol, err_msg=name)
        assert value.dtype == ('float64' if dtype == 'float64' else 'float32')
    assert grad.dtype == dtype
    rtol, atol = (1e-3, 1e-7) if dtype == 'float16' else (3 * TOLERANCE[dtype], 0)
    np.testing.assert_allclose(
        grad, expected_grad, rtol=rtol, atol=atol + TOLERANCE[dtype] * np.abs(expected_grad).max()
    )


@needs_operator
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
        index = mx.nd.full((1, inner), label)
        terms = class_terms(mx.nd, pred, index, 1, uniform=True, class_weight=mx.nd.array(weights))
        with np.errstate(over='ignore'):
            lse = logits.astype('float64').max() + np.log(
                np.exp(logits.astype('float64') - logits.max()).sum()
            )
        expected = sum(float(w) * (lse - float(z)) for z, w in zip(logits, weights) if w) / classes
        np.testing.assert_allclose(
            terms.uniform_nll.asnumpy(), np.full((1, inner), expected), rtol=3e-7, atol=1e-8
        )
        assert (terms.uniform_nll.asnumpy() >= 0).all()


@needs_operator
@pytest.mark.parametrize('gap', [-3e38, -1e4, -200, -90, -20, -1, 0, 1, 15, 20, 40, 69, 300, 690])
@pytest.mark.parametrize('classes', [2, 3, 1000, 1_000_000])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_nll_and_label_gradient_are_exact_near_0_and_near_1(dtype, classes, gap):
    pred = np.zeros((1, classes), dtype)
    label = classes // 2
    pred[0, label] = gap
    (nll,), grad = run(pred, np.array([label]))
    with mpmath.workdps(60):
        true = mpmath.log1p((classes - 1) * mpmath.e ** -mpmath.mpf(float(pred[0, label])))
        true_grad = mpmath.expm1(-true)
    least = 2**-149 if dtype == 'float32' else 0
    np.testing.assert_allclose(nll, float(true), rtol=TOLERANCE[dtype], atol=least)
    np.testing.assert_allclose(grad[0, label], float(true_grad), rtol=TOLERANCE[dtype], atol=least)


@needs_operator
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('offset', [0, 15, 80, 1000, 4000, 5000, -5000, 60000])
def test_an_offset_of_all_logits_costs_no_digits(offset, dtype, rng):
    pred = (np.round(rng.standard_normal((50, 300)) * 1000) / 256 + offset).astype(dtype)
    index = rng.randint(0, 300, 50)
    (nll,), grad = run(pred, index)
    true, _, _, gradient = expected_terms(pred, index, -1)
    np.testing.assert_allclose(nll, true, rtol=TOLERANCE[dtype])
    zero = np.zeros(50)
    np.testing.assert_allclose(grad, gradient(np.ones(50), zero, zero), rtol=3 * TOLERANCE[dtype])


@needs_operator
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(('shape', 'axis'), [((200, 3), -1), ((50, 1000), -1), ((2, 20, 90), 1)], ids=str)
def test_a_logsumexp_near_0_is_exact_to_the_rounding_of_the_sum(shape, axis, dtype, rng):
    pred = rng.standard_normal(shape)
    pred = (pred - np.log(np.exp(pred).sum(axis, keepdims=True))).astype(dtype)
    index = np.zeros(np.delete(shape, axis), int)
    (_, logsumexp), _ = run(pred, index, axis, logsumexp=True)
    _, true, _, _ = expected_terms(pred, index, axis)
    assert abs(true).max() < 1e-6
    np.testing.assert_allclose(logsumexp, true, rtol=0, atol=TOLERANCE[dtype])


@needs_operator
@pytest.mark.parametrize('logit', [0.1, -0.3, 0.7, 2.9])
@pytest.mark.parametrize(('shape', 'axis'), [((2, 50000), -1), ((1, 1000, 64), 1)], ids=['rows', 'lines'])
def test_sums_of_equal_terms_do_not_drift(shape, axis, logit):
    pred = np.full(shape, logit, 'float32')
    positions = tuple(np.delete(shape, axis))
    (nll,), _ = run(pred, np.zeros(positions), axis)
    np.testing.assert_allclose(nll, np.log(shape[axis]), rtol=3e-7)


@needs_operator
def test_small_probabilities_have_gradients_down_to_the_least_number():
    pred = np.array([[100, 0, -3]], 'float32')
    _, grad = run(pred, np.array([0]))
    np.testing.assert_allclose(grad[0, 1], np.exp(-100.0), atol=1.5e-45)
    assert grad[0, 1] > 0


@needs_operator
@pytest.mark.parametrize('dtype', ['uint8', 'int8', 'int32', 'int64', 'float16', 'float32', 'float64'])
def test_index_may_have_any_dtype(dtype, rng):
    pred = rng.standard_normal((9, 50)).astype('float32')
    index = rng.randint(0, 50, 9)
    np.testing.assert_array_equal(run(pred, index, index_dtype=dtype)[0], run(pred, index)[0])


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


@needs_operator
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
    np.testing.assert_allclose(value, nll, rtol=1e-6)


@needs_operator
@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradient_of_masked_classes_is_0_and_of_a_masked_label_minus_1(layout):
    _, grad = run_layout([-INF, 1, 1], 1, layout)
    np.testing.assert_allclose(grad, [0, -0.5, 0.5], rtol=3e-7)
    _, grad = run_layout([-INF, 1, 1], 0, layout)
    np.testing.assert_allclose(grad, [-1, 0.5, 0.5], rtol=3e-7)


@needs_operator
@pytest.mark.parametrize('layout', LAYOUTS)
def test_logits_all_at_the_least_number_have_a_gradient(layout):
    nll, grad = run_layout([-3e38, -3e38, -3e38], 0, layout)
    np.testing.assert_allclose(nll, np.log(3), rtol=3e-7)
    np.testing.assert_allclose(grad, [-2 / 3, 1 / 3, 1 / 3], rtol=3e-7)


@needs_operator
@pytest.mark.parametrize('junk', [NAN, INF, 3e38])
@pytest.mark.parametrize(('shape', 'axis'), [((6, 5), -1), ((6, 99), -1), ((1, 5, 6), 1), ((1, 3, 80), 1)])
def test_positions_that_are_not_needed_are_0_whatever_they_hold(shape, axis, junk, rng):
    pred = rng.standard_normal(shape).astype('float32')
    positions = tuple(np.delete(shape, axis))
    index = rng.randint(0, shape[axis], positions)
    flat = np.arange(index.size).reshape(positions) % 2 == 0
    options = {'logsumexp': True, 'uniform': True}
    expected, expected_grad = run(pred, index, axis, **options)
    np.moveaxis(pred, axis, -1)[flat] = junk
    terms, grad = run(pred, np.where(flat, -1, index), axis, **options)
    for value, true in zip(terms, expected):
        np.testing.assert_array_equal(value, np.where(flat, 0, true))
    np.testing.assert_array_equal(grad, np.where(np.expand_dims(flat, axis), 0, expected_grad))


@needs_operator
@pytest.mark.parametrize(('shape', 'axis'), [((4, 5), -1), ((4, 99), -1), ((1, 5, 80), 1)])
def test_gradient_is_0_where_the_incoming_one_is(shape, axis):
    pred = np.full(shape, NAN, 'float32')
    positions = tuple(np.delete(shape, axis))
    _, grad = run(pred, np.zeros(positions), axis, [np.zeros(positions)])
    np.testing.assert_array_equal(grad, 0)


class Terms(gluon.HybridBlock):
    """The nll inside a graph."""

    def __init__(self, **options):
        super().__init__()
        self._options = options

    def hybrid_forward(self, F, pred, index):
        return class_terms(F, pred, index, **self._options).nll


@needs_operator
@pytest.mark.parametrize('static', [False, True])
def test_a_leaf_with_grad_req_add_adds(static, rng):
    pred, index = mx.nd.array(rng.standard_normal((8, 100))), mx.nd.array(rng.randint(0, 100, 8))
    block = Terms(is_leaf=True)
    block.hybridize(static_alloc=static, static_shape=static)
    grads = {}
    for grad_req, times in (('write', 1), ('add', 3)):
        pred.attach_grad(grad_req)
        for _ in range(times):
            with autograd.record():
                nll = block(pred, index)
            nll.backward()
        grads[grad_req] = pred.grad.asnumpy()
    np.testing.assert_allclose(grads['add'], 3 * grads['write'], rtol=1e-6)


@needs_operator
@pytest.mark.parametrize('hybridize', [False, True])
@pytest.mark.parametrize('losses', [1, 2, 5])
def test_several_losses_on_one_prediction_add_up(losses, hybridize, rng):
    leaf = mx.nd.array(rng.standard_normal((8, 100)))
    leaf.attach_grad()
    indices = [mx.nd.array(rng.randint(0, 100, 8)) for _ in range(losses)]
    block = Terms()
    if hybridize:
        block.hybridize()
    total = np.zeros(leaf.shape)
    with autograd.record():
        pred = leaf * 2
        values = [block(pred, index) for index in indices]
    autograd.backward(values)
    for index in indices:
        total += 2 * run(leaf.asnumpy() * 2, index.asnumpy())[1]
    np.testing.assert_allclose(leaf.grad.asnumpy(), total, rtol=0, atol=2 * losses * ROUNDING)


@needs_operator
@pytest.mark.parametrize('losses', [2, 8, 20])
@pytest.mark.parametrize('grad_req', ['write', 'add'])
def test_losses_in_one_graph_add_up(losses, grad_req, rng):
    """MXNet must neither merge what is in front of each, nor add into a gradient without telling the operator."""

    class Net(gluon.HybridBlock):
        def hybrid_forward(self, F, pred, *indices):
            return F.add_n(*[class_terms(F, pred, index, is_leaf=True).nll for index in indices])

    net = Net()
    net.hybridize(static_alloc=True)
    pred = mx.nd.array(rng.standard_normal((8, 100)))
    pred.attach_grad(grad_req)
    indices = [mx.nd.array(rng.randint(0, 100, 8)) for _ in range(losses)]
    for _ in range(2):
        with autograd.record():
            value = net(pred, *indices)
        value.backward()
    total = sum(run(pred.asnumpy(), index.asnumpy())[1] for index in indices)
    times = 2 if grad_req == 'add' else 1
    np.testing.assert_allclose(pred.grad.asnumpy(), times * total, rtol=0, atol=times * losses**2 * ROUNDING)


@needs_operator
@pytest.mark.parametrize('req', ['null', 'write'])
def test_symbols_run_with_and_without_gradients(req, rng):
    terms = class_terms(mx.sym, mx.sym.var('pred'), mx.sym.var('index'), uniform=True, is_leaf=True)
    symbol = mx.sym.load_json((terms.nll + terms.uniform_nll).tojson())
    pred, index = rng.standard_normal((3, 7)).astype('float32'), np.array([0, 3, 6])
    executor = symbol.simple_bind(mx.cpu(), pred=(3, 7), grad_req={'pred': req, 'index': 'null'})
    (value,) = executor.forward(is_train=req != 'null', pred=mx.nd.array(pred), index=mx.nd.array(index))
    expected, grad = run(pred, index, uniform=True)
    np.testing.assert_allclose(value.asnumpy(), sum(expected), rtol=1e-6)
    if req == 'write':
        executor.backward(mx.nd.ones(3))
        np.testing.assert_allclose(executor.grad_dict['pred'].asnumpy(), grad, rtol=1e-6)


@needs_operator
def test_index_gets_a_gradient_of_0(rng):
    pred, index = mx.nd.array(rng.standard_normal((3, 7))), mx.nd.array([0, 3, 6])
    for array in (pred, index):
        array.attach_grad()
    with autograd.record():
        nll = class_terms(mx.nd, pred, index).nll
    nll.backward()
    np.testing.assert_array_equal(index.grad.asnumpy(), 0)


@needs_operator
@pytest.mark.parametrize(
    ('pred', 'index', 'options', 'message'),
    [
        ((2, 3), (3,), {}, 'index: expected the shape of pred without its class axis'),
        ((2, 3), (2, 1), {}, 'index: expected the shape of pred without its class axis'),
        ((2, 3), (2,), {'axis': 2}, 'pred: has no such axis'),
        ((2, 3), (2,), {'uniform': True, 'class_weight': (2,)}, 'class_weight: expected one per class'),
    ],
    ids=str,
)
def test_wrong_shapes_are_errors(pred, index, options, message):
    options = {'axis': -1, **options}
    if 'class_weight' in options:
        options['class_weight'] = mx.nd.ones(options['class_weight'])
    with pytest.raises(mx.MXNetError, match=message):
        class_terms(mx.nd, mx.nd.ones(pred), mx.nd.ones(index), **options).nll.asnumpy()


@needs_operator
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


BITS = """
import hashlib, mxnet as mx, numpy as np
from gluon_stable_ce import kernels
from gluon_stable_ce.kernels import fused
assert fused.load()
rng = np.random.RandomState(0)
digest = hashlib.sha256()
for shape, axis in [((64, 2000), -1), ((1, 1000000), -1), ((1000, 100), -1), ((3, 2000, 300), 1), ((70000, 3), -1)]:
    pred = mx.nd.array(rng.standard_normal(shape))
    pred.attach_grad()
    index = mx.nd.array(rng.randint(0, shape[axis], np.delete(shape, axis)))
    with mx.autograd.record():
        terms = kernels.class_terms(mx.nd, 'fused', pred, axis, index=index, logsumexp=True, uniform=True)
    mx.autograd.backward(list(terms))
    for array in (*terms, pred.grad):
        digest.update(array.asnumpy().tobytes())
print(digest.hexdigest())
"""


def python(code, **environment):
    """What `code` prints in a process of its own; a variable that is None is not set."""
    environment = {**os.environ, 'PYTHONPATH': ROOT, **environment}
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={key: value for key, value in environment.items() if value is not None},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_operator
@pytest.mark.slow
def test_the_same_bits_for_any_number_of_threads_and_any_engine():
    digests = {python(BITS, OMP_NUM_THREADS=str(threads)) for threads in (1, 2, 3)}
    digests.add(python(BITS, OMP_NUM_THREADS='2', MXNET_ENGINE_TYPE='NaiveEngine'))
    assert len(digests) == 1


@needs_operator
@pytest.mark.parametrize(
    ('variable', 'threads'), [('OMP_NUM_THREADS', 1), ('OMP_NUM_THREADS', 3), ('MXNET_OMP_MAX_THREADS', 1)]
)
@pytest.mark.slow
def test_settings_of_threads_are_respected(variable, threads):
    code = """
import os, mxnet as mx
from gluon_stable_ce import kernels
from gluon_stable_ce.kernels import fused
fused.load()
pred, index = mx.nd.array([[0] * 1000000]), mx.nd.zeros(1)
mx.nd.waitall()
before = len(os.listdir('/proc/self/task'))
fused.class_terms(mx.nd, pred, -1, index, is_leaf=False)[0].wait_to_read()
print(1 + len(os.listdir('/proc/self/task')) - before)
"""
    assert python(code, **{variable: str(threads)}) == str(threads)


@needs_operator
@pytest.mark.parametrize(
    ('shape', 'uses_all'), [((1, 1000000), True), ((512, 1000), True), ((64, 1000), False)]
)
@pytest.mark.slow
def test_all_processors_are_used_for_large_work_only(shape, uses_all):
    code = f"""
import os, mxnet as mx
from gluon_stable_ce.kernels import fused
fused.load()
pred, index = mx.nd.zeros({shape}), mx.nd.zeros({shape[0]})
mx.nd.waitall()
before = len(os.listdir('/proc/self/task'))
fused.class_terms(mx.nd, pred, -1, index, is_leaf=False)[0].wait_to_read()
print(1 + len(os.listdir('/proc/self/task')) - before)
"""
    unset = dict.fromkeys(('OMP_NUM_THREADS', 'MXNET_OMP_MAX_THREADS'))
    processors = len(os.sched_getaffinity(0))
    if processors > 8:
        pytest.skip('more processors than parts of the work')
    assert python(code, **unset) == str(processors if uses_all else 1)


@needs_operator
@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='no affinity')
@pytest.mark.slow
def test_affinity_is_respected():
    code = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import mxnet as mx
from gluon_stable_ce.kernels import fused
fused.load()
pred, index = mx.nd.zeros((1, 1000000)), mx.nd.zeros(1)
mx.nd.waitall()
before = len(os.listdir('/proc/self/task'))
fused.class_terms(mx.nd, pred, -1, index, is_leaf=False)[0].wait_to_read()
print(1 + len(os.listdir('/proc/self/task')) - before)
"""
    assert python(code, OMP_NUM_THREADS=None, MXNET_OMP_MAX_THREADS=None) == '1'


@needs_operator
@pytest.mark.slow
def test_forked_workers_compute():
    code = """
import os, mxnet as mx, numpy as np
from gluon_stable_ce import kernels
from gluon_stable_ce.kernels import fused
fused.load()
def nll():
    pred = mx.nd.array(np.arange(400000).reshape(4, 100000) % 7)
    return fused.class_terms(mx.nd, pred, -1, mx.nd.zeros(4))[0].asnumpy()
class Data:
    def __len__(self): return 4
    def __getitem__(self, i): return nll()
before = nll()  # the parent's threads exist
for batch in mx.gluon.data.DataLoader(Data(), batch_size=2, num_workers=2):
    assert (batch.asnumpy() == before).all()
print('done')
"""
    assert python(code, OMP_NUM_THREADS='2') == 'done'


@needs_operator
@pytest.mark.slow
def test_profiler_names_the_operator(tmp_path):
    code = f"""
import mxnet as mx
from gluon_stable_ce import kernels
from gluon_stable_ce.kernels import fused
fused.load()
mx.profiler.set_config(profile_all=True, aggregate_stats=True, filename={str(tmp_path / 'profile.json')!r})
mx.profiler.set_state('run')
fused.class_terms(mx.nd, mx.nd.ones((2, 3)), -1, mx.nd.zeros(2))[0].asnumpy()
mx.profiler.set_state('stop')
print('stable_ce_class_terms' in mx.profiler.dumps())
"""
    assert python(code).splitlines()[-1] == 'True'


# ------------------------------------------------------------------------- building, finding, loading


@needs_operator
@pytest.mark.slow
def test_load_is_silent_and_leaves_the_functions_of_mxnet():
    code = """
import mxnet as mx
before = mx.nd.log_softmax, mx.sym.pick
from gluon_stable_ce import kernels
from gluon_stable_ce.kernels import fused
assert fused.load() and fused.load()
assert (mx.nd.log_softmax, mx.sym.pick) == before
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': ROOT},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, in the place of the package's own folder and of the user's."""
    folder = tmp_path / 'cache'
    monkeypatch.setattr(fused, 'cache_folder', lambda: str(folder))
    monkeypatch.setattr(fused, 'HERE', str(tmp_path / 'read-only'))
    return folder


def test_find_refuses_what_others_may_write(cache):
    cache.mkdir(mode=0o700)
    assert fused.find() is None
    library = cache / fused.file_name()
    library.write_bytes(fused.END)
    library.chmod(0o755)
    assert fused.find() == str(library)
    for path, mode in ((library, 0o775), (library, 0o757), (cache, 0o777)):
        library.chmod(0o755)
        path.chmod(mode)
        with pytest.warns(RuntimeWarning, match='other users may write it'):
            assert fused.find() is None


def test_a_library_beside_the_source_may_be_written_by_those_who_may_write_the_source(tmp_path, monkeypatch):
    """As after an installation with umask 002."""
    source = tmp_path / 'fused.cc'
    shutil.copy(fused.SOURCE, source)
    source.chmod(0o664)
    monkeypatch.setattr(fused, 'SOURCE', str(source))
    monkeypatch.setattr(fused, 'HERE', str(tmp_path))
    library = tmp_path / fused.file_name()
    library.write_bytes(fused.END)
    library.chmod(0o775)
    assert fused.find() == str(library)
    library.chmod(0o777)
    with pytest.warns(RuntimeWarning, match='other users may write it'):
        assert fused.find() is None


def test_a_library_that_was_cut_off_is_not_loaded(cache):
    cache.mkdir(mode=0o700)
    library = cache / fused.file_name()
    library.write_bytes(b'ELF' + fused.END[:-1])
    library.chmod(0o755)
    with pytest.warns(RuntimeWarning, match='not whole. To rebuild it: python -m gluon_stable_ce build$'):
        assert fused.find() is None


def test_a_library_that_cannot_be_read_is_not_loaded(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    library = cache / fused.file_name()
    library.mkdir()
    assert fused.find() is None
    monkeypatch.setattr(fused.os.path, 'isfile', os.path.exists)  # a root may read all files, but no folder
    with pytest.warns(
        RuntimeWarning, match='cannot be read .*To rebuild it: python -m gluon_stable_ce build$'
    ):
        assert fused.find() is None


def test_without_the_source_no_library_is_found(cache, monkeypatch):
    monkeypatch.setattr(fused, 'SOURCE', str(cache / 'fused.cc'))
    assert fused.find() is None


def test_writable_folder_is_private(cache):
    assert fused.writable_folder() == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(fused.BuildError, match='only this user may write'):
            fused.writable_folder()


def test_name_tells_versions_and_source(tmp_path, monkeypatch):
    before = fused.file_name()
    assert mx.__version__ in before
    other = tmp_path / 'fused.cc'
    other.write_text('// something else')
    monkeypatch.setattr(fused, 'SOURCE', str(other))
    assert fused.file_name() != before


@pytest.mark.parametrize('version', ['1.6.0', '1.8.0', '2.0.0'])
def test_other_versions_of_mxnet_are_refused_by_name(version, monkeypatch):
    monkeypatch.setattr(mx, '__version__', version)
    with pytest.raises(fused.BuildError, match=f'needs MXNet 1.9, got {version}'):
        fused.build()


@supported
@pytest.mark.parametrize('compiler', ['no-such-compiler', 'false', 'g++ "'])
def test_without_a_compiler_build_is_an_error_in_one_line(compiler, cache, monkeypatch, capsys):
    monkeypatch.setenv('CXX', compiler)
    assert fused.run(type('Args', (), {'force': True})) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.count('\n') == 1
    assert compiler in printed.err
    assert not printed.err.endswith(': \n')
    assert list(cache.iterdir()) == []


@supported
def test_messages_of_a_compiler_may_have_any_encoding(cache, monkeypatch, tmp_path, capsys):
    compiler = tmp_path / 'compiler'
    compiler.write_bytes(b'#!/bin/sh\necho "error: \xe9\xff" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    assert fused.run(type('Args', (), {'force': True})) == 2
    assert 'failed: error: ' in capsys.readouterr().err


@supported
def test_a_library_that_does_not_load_is_a_warning(cache, monkeypatch):
    monkeypatch.setattr(fused, '_is_loaded', None)
    cache.mkdir(mode=0o700)
    library = cache / fused.file_name()
    library.write_bytes(b'no library' + fused.END)
    library.chmod(0o755)
    with pytest.warns(RuntimeWarning, match='python -m gluon_stable_ce build --force'):
        assert fused.load() is False
    assert fused.load() is False


@needs_operator
@pytest.mark.slow
def test_a_killed_build_leaves_no_library_and_two_at_once_leave_one(tmp_path):
    folder = tmp_path / 'cache'
    code = f"""
from gluon_stable_ce import kernels
from gluon_stable_ce.kernels import fused
fused.writable_folder = lambda: {str(folder)!r}
print(fused.build(force=True))
"""
    folder.mkdir(mode=0o700)
    environment = {**os.environ, 'PYTHONPATH': ROOT}
    command = [sys.executable, '-c', code]
    killed = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.time() + 60
    while not list(folder.iterdir()) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / fused.file_name()).exists()
    builds = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [build.wait(300) for build in builds] == [0, 0]
    assert (folder / fused.file_name()).exists()


def test_what_killed_builds_left_is_removed(tmp_path):
    for name, age in (('building-a.so', 7200), ('building-b.so', 0), ('fused-c.so', 7200)):
        path = tmp_path / name
        path.write_bytes(b'')
        os.utime(path, (time.time() - age,) * 2)
    fused._remove_stale(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['building-b.so', 'fused-c.so']


@needs_operator
@pytest.mark.slow
@pytest.mark.parametrize(
    ('right', 'wrong'),
    [
        ('if (i < n) {', 'if (false) {'),
        ('g_nll * expm1_of<T>(-nll)', 'g_nll * (float(exp_of<T>(-nll)) - 1)'),
        ('if (y > j) others.add(x, int(y - j));', ''),
        ('x = x < lowest ? lowest : x;', 'x = x > lowest ? x : lowest;'),
    ],
    ids=['no tail', 'p - 1', 'no classes before the label', 'NaN hidden'],
)
def test_a_broken_kernel_is_not_installed(right, wrong, tmp_path, monkeypatch):
    with open(fused.SOURCE) as file:
        source = file.read()
    assert right in source
    broken = tmp_path / 'fused.cc'
    broken.write_text(source.replace(right, wrong))
    monkeypatch.setattr(fused, 'SOURCE', str(broken))
    monkeypatch.setattr(fused, 'writable_folder', lambda: str(tmp_path))
    with pytest.raises(fused.BuildError, match='is wrong'):
        fused.build(force=True)
    assert [path.name for path in tmp_path.iterdir()] == ['fused.cc']
