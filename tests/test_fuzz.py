"""The loss and the metric against the reference, over the whole space of options, modes, dtypes, layouts and special values.

`make fuzz EXAMPLES=20000` sets FUZZ_EXAMPLES.
"""

import os

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
import reference
import tolerances
from checks import expected_within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

pytestmark = pytest.mark.slow
SYMBOLIC = [*modes.SYMBOLIC, modes.exported_alone]
HEADS = st.none() | st.lists(st.sampled_from([1, 0, -1, 0.5, 3]), min_size=1, max_size=5)
FUZZ = settings(
    max_examples=int(os.environ.get('FUZZ_EXAMPLES', 300)),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def calls(draw):
    """A mode, a problem for it, and a head gradient."""
    mode = draw(st.sampled_from(modes.ALL))
    # a graph does not know dtypes: float16 is not cast, and weights have to have the dtype of pred
    symbolic = mode in SYMBOLIC
    dtypes = ('float32', 'float64') if symbolic else ('float32', 'float16', 'float64')
    problem = draw(
        cases.problems(dtypes, classes=20, dense=True, special=True, weighted=True, symbolic=symbolic)
    )
    return mode, problem, draw(HEADS)


@FUZZ
@given(calls())
def test_loss_is_the_reference(kernel, call):
    mode, problem, head = call
    if mode is modes.exported_alone:
        kernel = 'stock'
    loss_fn = StableSoftmaxCELoss(**problem.settings)
    positions = _read(problem)
    is_invalid = positions.is_counted & ~positions.is_valid
    if problem.settings.get('invalid_label') == 'raise' and mode not in modes.SYMBOLIC and is_invalid.any():
        with pytest.raises(ValueError, match=f'invalid labels: {is_invalid.sum()} of '):
            mode(loss_fn, *problem.arrays, head=head)
        return
    loss, gradient = mode(loss_fn, *problem.arrays, head=head)
    _check_loss(kernel, problem, positions, loss)
    _check_gradient(kernel, problem, positions, head, gradient)


@FUZZ
@given(
    cases.problems(('float32', 'float16', 'float64'), dense=True, special=True, options=False),
    st.sampled_from(['logits', 'log_probs', 'probs']),
    st.none() | st.integers(-1, 3),
    st.booleans(),
    st.booleans(),
)
def test_metric_is_the_reference(kernel, problem, pred_type, ignore_label, in_np_mode, is_possible):
    pred, label = problem.pred, problem.label
    if pred_type != 'logits' and is_possible:
        pred = -np.abs(pred) if pred_type == 'log_probs' else np.exp(-np.abs(pred))
    options = {'axis': problem.settings['axis'], 'sparse_label': problem.settings.get('sparse_label', True)}
    if options['sparse_label']:
        options['ignore_label'] = ignore_label
    values, invalid, impossible = reference.metric_terms(pred, label, pred_type=pred_type, **options)

    metric = StableCrossEntropy(pred_type=pred_type, **options)
    if in_np_mode:
        with modes.numpy_semantics():
            metric.update([mx.np.array(label, dtype=label.dtype)], [mx.np.array(pred, dtype=pred.dtype)])
    else:
        metric.update([mx.nd.array(label, dtype=label.dtype)], [mx.nd.array(pred, dtype=pred.dtype)])
    total = values.size + invalid + impossible
    if invalid or impossible:
        bad = f'{invalid} of {total} labels' if invalid else f'{impossible} of {total} predictions'
        with pytest.raises(ValueError, match=f'^{bad} are '):
            metric.get()
        return
    assert metric.num_inst == values.size
    settings = {**options, 'batch_axis': problem.settings['batch_axis'], 'from_logits': pred_type != 'logits'}
    if _is_unclear(kernel, cases.Problem(pred, label, None, settings)).any():
        return
    tolerance = tolerances.of(kernel, pred.dtype, settings)
    with np.errstate(divide='ignore'):
        log_p = np.log(pred.astype('float64')) if pred_type == 'probs' else pred
    bound, _ = reference.error_bounds(log_p, label, reduction='none', **tolerance._asdict(), **settings)
    with np.errstate(invalid='ignore'):
        expected = values.mean() if values.size else np.nan
    cases.assert_within(metric.get()[1], expected, bound.sum() / max(values.size, 1))
    assert metric.num_infinite == (values == np.inf).sum()


@FUZZ
@given(
    cases.problems(('float16', 'float32', 'float64'), classes=120, special=True, options=False),
    st.sampled_from(['write', 'add']),
    st.integers(1, 3),
    st.booleans(),
)
def test_losses_on_one_prediction_add_up(kernel, problem, grad_req, losses, is_leaf):
    """Twice, so that 'add' has something to add to; pred is a leaf, or made by an operator."""
    loss_fn = StableSoftmaxCELoss(**{**problem.settings, 'invalid_label': 'nan'})
    leaf, label = (mx.nd.array(array, dtype=array.dtype) for array in problem.arrays)
    leaf.attach_grad(grad_req)
    for _ in range(2):
        with mx.autograd.record():
            pred = leaf if is_leaf else leaf * 1
            total = [loss_fn(pred, label) for _ in range(losses)]
        mx.autograd.backward(total)
    times = losses * (2 if grad_req == 'add' else 1)
    _, (expected, bound) = expected_within(kernel, problem.arrays, problem.settings)
    if problem.pred.dtype == np.float16:  # each sum is rounded
        bound = bound + (times - 1) * tolerances.FLOAT16_GRADIENT.bound(expected)
    cases.assert_within(leaf.grad.asnumpy(), times * expected, times * bound, skipped=np.isnan(expected))


def _read(problem):
    given = {name: problem.settings[name] for name in reference.READING if name in problem.settings}
    return reference.read_positions(problem.pred, problem.label, problem.axis, **given)


def _check_loss(kernel, problem, positions, loss):
    assert loss.dtype == (np.float64 if problem.pred.dtype == np.float64 else np.float32)
    (expected, bound), _ = expected_within(kernel, problem.arrays, problem.settings)
    assert loss.shape == expected.shape
    is_unclear = _add_up(problem, _is_unclear(kernel, problem)).reshape(loss.shape) > 0
    cases.assert_within(loss, expected, bound, skipped=is_unclear)
    weight, may_be_above_0 = problem.sample_weight, problem.settings.get('from_logits')
    if (positions.target >= 0).all() and (weight is None or (weight >= 0).all()) and not may_be_above_0:
        assert not (loss < 0).any()


def _check_gradient(kernel, problem, positions, head, gradient):
    """The reference is NaN where there is no gradient, also at ignored positions: 0 times NaN is NaN to MXNet."""
    pred, settings = problem.pred, problem.settings
    assert gradient.dtype == pred.dtype
    loss, _ = reference.loss_and_gradient(*problem[:3], **settings)
    head = None if head is None else np.resize(head, loss.shape)
    _, (expected, bound) = expected_within(kernel, problem.arrays, settings, head)
    cases.assert_within(gradient, expected, bound, skipped=np.isnan(expected))
    is_removed = ~(positions.is_valid & positions.is_counted) | (_weight_of(problem) == 0)
    is_removed = np.expand_dims(is_removed, problem.axis)
    if not tolerances.is_fused(kernel, settings):
        is_removed = is_removed & ~np.isnan(expected)
    assert not np.where(is_removed, gradient, 0).any()
    if not settings.get('from_logits') and (head is None or head.all()):
        is_finite = np.isfinite(gradient).all(problem.axis)  # (positions...)
        assert not is_finite[_has_nan_that_counts(problem, positions)].any()


def _is_unclear(kernel, problem):
    """The positions, (positions...), about whose loss nothing is claimed.

    A row of only -inf logits has no probabilities: where the label asks for one, its loss is NaN. oneDNN hides a NaN
    that is not at the label: then only the gradient has to be not finite.
    """
    logits = np.moveaxis(problem.pred, problem.axis, -1)  # (positions..., C)
    positions = _read(problem)
    asked_for = positions.target != 0
    if problem.settings.get('from_logits'):
        return np.zeros(positions.is_valid.shape, bool)
    hides_nan = not tolerances.is_fused(kernel, problem.settings)
    is_broken = (np.isnan(logits).any(-1) & hides_nan) | (logits == -np.inf).all(-1)
    is_clear = (np.isnan(logits) & asked_for).any(-1) | ((logits == -np.inf).all(-1) & asked_for.any(-1))
    is_clear |= ~positions.is_counted | ~positions.is_valid | (_weight_of(problem) == 0)
    return is_broken & ~is_clear


def _has_nan_that_counts(problem, positions):
    """The positions with a NaN logit that ask for a probability, (positions...): the NaN is not hidden from the gradient."""
    counts = (
        positions.is_counted
        & positions.is_valid
        & (positions.target != 0).any(-1)
        & (_weight_of(problem) != 0)
    )
    return np.isnan(problem.pred).any(problem.axis) & counts


def _weight_of(problem):
    if problem.sample_weight is None:
        return np.ones(np.delete(problem.pred.shape, problem.axis))
    axes = reference.normalised(problem.axis, problem.settings['batch_axis'], problem.pred.ndim)
    return reference.fit_sample_weight(problem.sample_weight, problem.pred.shape, *axes)


def _add_up(problem, values):
    axes = reference.normalised(problem.axis, problem.settings['batch_axis'], problem.pred.ndim)
    return reference.add_up(values, *axes, problem.settings.get('reduction', 'mean'))
