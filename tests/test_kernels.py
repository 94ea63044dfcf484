"""Each kernel reduces the class axis to the same terms, whatever the layout and whether the rank is known."""

import cases
import mxnet as mx
import numpy as np
import pytest
import reference
from mxnet import autograd, gluon

from gluon_stable_ce.kernels import ClassTerms, class_terms

nd = mx.nd
every_kernel = pytest.mark.parametrize('kernel', ['stock'])
every_layout = pytest.mark.parametrize('layout', cases.params(cases.LAYOUTS))
RANK_KNOWN = pytest.mark.parametrize('is_rank_known', [True, False], ids=['rank-known', 'rank-unknown'])
PRED_TYPES = pytest.mark.parametrize('pred_type', ['logits', 'log_probs', 'probs'])


class Terms(gluon.HybridBlock):
    """The terms of `class_terms` in a graph of symbols."""

    def __init__(self, kernel, has_target=False, **options):
        super().__init__()
        self.kernel, self.has_target, self.options = kernel, has_target, options

    def hybrid_forward(self, F, pred, of_class, *class_weight):
        name = 'target' if self.has_target else 'index'
        weight = class_weight[0] if class_weight else None
        terms = class_terms(F, self.kernel, pred, **{name: of_class}, class_weight=weight, **self.options)
        return [term for term in terms if term is not None]


def compute(kernel, pred, of_class, class_weight=None, **options):
    """(terms in NumPy, gradient of their sum) of a compiled graph."""
    inputs = [nd.array(array, dtype=array.dtype) for array in (pred, of_class)]
    inputs += [] if class_weight is None else [nd.array(class_weight)]
    inputs[0].attach_grad()
    block = Terms(kernel, **options)
    block.hybridize()
    with autograd.record():
        terms = block(*inputs)
    autograd.backward(terms)
    return [term.asnumpy() for term in terms], inputs[0].grad.asnumpy()


def make(rng, layout, pred_type='logits', dense=False):
    """Predictions of what `pred_type` says, and an index or a target."""
    pred, of_class = cases.make(
        rng, layout.shape, layout.axis, not dense, from_logits=pred_type != 'logits', invalid=False
    )
    return np.exp(pred) if pred_type == 'probs' else pred, of_class


def expected_terms(layout, pred, of_class, pred_type='logits', dense=False, class_weight=None):
    as_logits = np.log(pred.astype('float64')) if pred_type == 'probs' else pred
    positions = reference.read_positions(
        as_logits,
        of_class,
        layout.axis % pred.ndim,
        sparse_label=not dense,
        from_logits=pred_type != 'logits',
        class_weight=class_weight,
    )
    target = positions.target if dense else (positions.target > 0).astype(float)
    nll = np.where(target == 0, 0, -target * positions.log_p).sum(-1)
    return nll, positions.logsumexp, -(positions.uniform * positions.log_p).sum(-1)


@every_kernel
@every_layout
@RANK_KNOWN
@pytest.mark.parametrize('dense', [False, True], ids=['index', 'target'])
@pytest.mark.parametrize('class_weight', [None, [1, 2, 0.5, 0.25, 3]], ids=['plain', 'class-weight'])
def test_terms_of_logits(kernel, layout, is_rank_known, dense, class_weight, rng, ctx):
    pred, of_class = make(rng, layout, dense=dense)
    known = {'ndim': pred.ndim} if is_rank_known else {}
    terms, _ = compute(
        kernel,
        pred,
        of_class,
        class_weight,
        has_target=dense,
        axis=layout.axis,
        logsumexp=True,
        uniform=True,
        **known,
    )
    expected = expected_terms(layout, pred, of_class, dense=dense, class_weight=class_weight)
    for term, truth in zip(terms, expected):
        assert term.shape == truth.shape
        np.testing.assert_allclose(term, truth, **cases.CLOSE)


@every_kernel
@every_layout
@RANK_KNOWN
@PRED_TYPES
def test_nll_of_pred_types(kernel, layout, is_rank_known, pred_type, rng, ctx):
    pred, index = make(rng, layout, pred_type)
    known = {'ndim': pred.ndim} if is_rank_known else {}
    (nll,), _ = compute(kernel, pred, index, axis=layout.axis, pred_type=pred_type, **known)
    expected, _, _ = expected_terms(layout, pred, index, pred_type)
    assert nll.dtype == ('float64' if pred_type == 'probs' else 'float32')
    np.testing.assert_allclose(nll, expected, **cases.CLOSE)


@every_kernel
def test_terms_not_asked_for_are_none(kernel):
    terms = class_terms(nd, kernel, nd.zeros((4, 3)), index=nd.zeros(4), ndim=2)
    assert isinstance(terms, ClassTerms)
    assert terms.nll.shape == (4,)
    assert terms.logsumexp is terms.uniform_nll is None


def test_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="^kernel: expected 'stock', got 'fast'$"):
        class_terms(nd, 'fast', nd.zeros((4, 3)), index=nd.zeros(4))


@every_kernel
def test_float16_is_cast(kernel, rng, ctx):
    pred = rng.normal(0, 3, (8, 3000)).astype('float16')
    index = rng.randint(0, 3000, 8).astype('float32')
    (nll, logsumexp), gradient = compute(
        kernel, pred, index, ndim=2, dtype='float16', logsumexp=True, axis=-1
    )
    assert (nll.dtype, logsumexp.dtype, gradient.dtype) == (np.float32, np.float32, np.float16)
    layout = cases.Layout(pred.shape, -1)
    for term, truth in zip((nll, logsumexp), expected_terms(layout, pred, index)):
        np.testing.assert_allclose(term, truth, rtol=2e-6, atol=1e-4)  # a float32 sum of as many terms


@every_kernel
@pytest.mark.parametrize('gap', [10, 20, 50])
def test_nll_is_never_negative_and_its_gradient_goes_on(kernel, gap, ctx):
    """The clamp at 0 lets the gradient through."""
    pred, index = np.array([[gap, 0]], 'float32'), np.array([0], 'float32')
    (nll,), gradient = compute(kernel, pred, index, ndim=2)
    assert nll[0] >= 0
    p = 1 / (1 + np.exp(np.float64(gap)))
    np.testing.assert_allclose(gradient[0, 1], p, rtol=1e-4)
    np.testing.assert_allclose(gradient[0, 0], -p, rtol=0, atol=2e-6)  # oneDNN's p is up to 1 + 1.4e-6


@every_kernel
def test_log_probs_above_zero_keep_their_gradient(kernel, ctx):
    (nll,), gradient = compute(
        kernel, np.array([[1e-6, -20]], 'float32'), np.array([0.0]), pred_type='log_probs', ndim=2
    )
    assert nll[0] == 0
    np.testing.assert_array_equal(gradient, [[-1, 0]])


@every_kernel
def test_targets_below_zero_are_not_clamped(kernel, ctx):
    pred, target = np.array([[0, 0]], 'float32'), np.array([[-1, 0.5]], 'float32')
    (nll,), _ = compute(kernel, pred, target, has_target=True, ndim=2)
    np.testing.assert_allclose(nll, [-0.5 * np.log(2)], **cases.CLOSE)


@every_kernel
@pytest.mark.parametrize('largest', [0, 88, 1e4, 1e30, -1e30])
def test_logsumexp_of_huge_logits(kernel, largest, ctx):
    pred = np.array([[largest, largest, -np.inf]], 'float32')
    (_, logsumexp), _ = compute(kernel, pred, np.array([0.0]), ndim=2, logsumexp=True)
    np.testing.assert_allclose(logsumexp, [pred[0, 0] + np.log(2)], rtol=2e-7, atol=1e-5)


@every_kernel
def test_uniform_nll_has_no_part_of_classes_of_weight_zero(kernel, ctx):
    pred, weight = np.array([[0, 0, -np.inf]], 'float32'), [1, 3, 0]
    (_, uniform), gradient = compute(kernel, pred, np.array([0.0]), weight, ndim=2, uniform=True)
    np.testing.assert_allclose(uniform, [4 / 3 * np.log(2)], **cases.CLOSE)
    assert np.isfinite(gradient).all()


@every_kernel
@RANK_KNOWN
@pytest.mark.parametrize('classes', [1, 2, 31, 252, 507])
def test_odd_numbers_of_classes(kernel, is_rank_known, classes, rng, ctx):
    layout = cases.Layout((3, classes, 5), 1)
    pred, index = make(rng, layout)
    known = {'ndim': 3} if is_rank_known else {}
    terms, _ = compute(kernel, pred, index, axis=1, logsumexp=True, uniform=True, **known)
    for term, truth in zip(terms, expected_terms(layout, pred, index)):
        np.testing.assert_allclose(term, truth, **cases.CLOSE)
