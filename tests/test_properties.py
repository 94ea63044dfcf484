"""What must hold for every input, searched for by hypothesis over shapes, axes, dtypes, labels and options."""

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
import reference
import tolerances
from cases import problems
from checks import expected_within
from hypothesis import assume, given
from hypothesis import strategies as st
from tolerances import assert_close

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

pytestmark = pytest.mark.usefixtures('kernel')


def run(pred, label, **settings):
    return modes.default(StableSoftmaxCELoss(**settings), pred, label)


def sums_of(pred):
    return tolerances.SUMS[str(pred.dtype)]


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


@given(problems(special=True, dense=True, weighted=True))
def test_reference_gradient_is_the_central_difference_of_the_reference(problem):
    """For logits at which the loss is smooth and the difference is exact enough."""
    pred, label, sample_weight, settings = problem
    assume(not settings.get('from_logits'))
    pred = np.clip(np.nan_to_num(pred.astype('float64'), nan=0), -5, 5)
    loss, gradient = reference.loss_and_gradient(pred, label, sample_weight, **settings)
    head = np.arange(1.0, loss.size + 1).reshape(loss.shape)
    gradient = reference.loss_and_gradient(pred, label, sample_weight, head, **settings)[1]
    step = 1e-5
    for index in list(np.ndindex(pred.shape))[:12]:
        around = []
        for sign in (1, -1):
            moved = pred.copy()
            moved[index] += sign * step
            around.append(reference.loss_and_gradient(moved, label, sample_weight, **settings)[0])
        with np.errstate(invalid='ignore'):
            difference = np.nansum((around[0] - around[1]) * head) / (2 * step)
        if np.isfinite(loss).all():
            assert_close(gradient[index], difference, tolerances.DIFFERENCE)


@given(problems())
def test_loss_is_the_reference(kernel, problem):
    results = run(*problem.arrays, **problem.settings)
    for got, (expected, bound) in zip(results, expected_within(kernel, problem.arrays, problem.settings)):
        cases.assert_within(got, expected, bound)


@given(problems())
def test_loss_is_finite_and_never_negative(problem):
    pred, label, _, settings = problem
    loss, gradient = run(pred, label, **settings)
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()
    assert (loss >= 0).all()
    assert not np.signbit(loss[loss == 0]).any()


@given(problems(), st.integers(-64, 64))
def test_adding_a_constant_to_all_logits_changes_nothing(problem, shift):
    """The logits are multiples of 1/16, so that the shift rounds nothing."""
    pred, label, _, settings = problem
    settings = without(settings, 'lse_square_scale')  # which is there to see such a constant
    before, after = run(pred, label, **settings), run(pred + pred.dtype.type(shift), label, **settings)
    for a, b in zip(before, after):
        assert_close(a, b, sums_of(pred))


@given(problems(ignored=False), st.randoms(use_true_random=False))
def test_order_of_classes_does_not_matter(problem, random):
    pred, label, _, settings = problem
    classes = random.sample(range(pred.shape[problem.axis]), pred.shape[problem.axis])
    renamed = np.argsort(classes)[label.astype(int)].astype(label.dtype)
    moved = dict(settings)
    if 'class_weight' in settings:
        moved['class_weight'] = np.take(settings['class_weight'], classes)
    loss, gradient = run(pred, label, **settings)
    loss_moved, gradient_moved = run(np.take(pred, classes, problem.axis), renamed, **moved)
    assert_close(loss_moved, loss, sums_of(pred))
    assert_close(gradient_moved, np.take(gradient, classes, problem.axis), sums_of(pred))


@given(problems(), st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(problem, random):
    pred, label, _, settings = problem
    axis, batch_axis = problem.axis, settings['batch_axis'] % pred.ndim
    label_axis = batch_axis - (batch_axis > axis)
    samples = random.sample(range(pred.shape[batch_axis]), pred.shape[batch_axis])
    loss, gradient = run(pred, label, **settings)
    loss_moved, gradient_moved = run(
        np.take(pred, samples, batch_axis), np.take(label, samples, label_axis), **settings
    )
    loss_axis = label_axis if settings.get('reduction') == 'none' else 0
    assert_close(loss_moved, np.take(loss, samples, loss_axis), sums_of(pred))
    assert_close(gradient_moved, np.take(gradient, samples, batch_axis), sums_of(pred))


@given(problems(dtypes=('float16', 'float32', 'float64')))
def test_gradients_over_classes_sum_to_zero(kernel, problem):
    """Relative to the gradient's own size, beside the absolute error that the kernel's logarithms may have."""
    pred, label, _, settings = problem
    settings = without(settings, 'lse_square_scale')
    _, gradient = run(pred, label, **settings)
    gradient = gradient.astype('float64')
    tolerance = tolerances.of(kernel, pred.dtype, settings)
    _, bound = reference.error_bounds(pred, label, **settings, absolute=tolerance.absolute, relative=0)
    bound = bound.sum(problem.axis) + tolerance.relative * np.abs(gradient).sum(problem.axis)
    if pred.dtype == np.float16:
        bound = bound + tolerances.FLOAT16_GRADIENT.bound(gradient).sum(problem.axis)
    assert (np.abs(gradient.sum(problem.axis)) <= bound).all()


@given(problems(ignored=False))
def test_sparse_labels_are_their_one_hot_distributions(problem):
    pred, label, _, settings = problem
    onehot = np.eye(pred.shape[problem.axis], dtype=pred.dtype)[label.astype(int)]
    dense = run(pred, np.moveaxis(onehot, -1, problem.axis), sparse_label=False, **settings)
    for of_label, of_onehot in zip(run(pred, label, **settings), dense):
        assert_close(of_onehot, of_label, sums_of(pred))


@given(problems())
def test_mean_of_reduction_valid_is_the_mean_over_all_positions_that_count(problem):
    pred, label, _, settings = problem
    per_position, _ = run(pred, label, **{**settings, 'reduction': 'none'})
    per_sample, _ = run(pred, label, **{**settings, 'reduction': 'valid'})
    count = (label != settings.get('ignore_label')).sum()
    assert_close(per_sample.mean(), per_position.sum() / max(count, 1), sums_of(pred))


@given(problems(dtypes=('float32',), options=False))
def test_error_is_bounded_by_that_of_the_plain_implementation(problem):
    """Each loss is off by no more than gluon's largest error on the same logits, and a kernel's own error.

    gluon takes another kernel where the classes are not last.
    """
    pred, label, _, settings = problem
    truth, _ = reference.loss_and_gradient(pred, label, **settings)
    stock = mx.gluon.loss.SoftmaxCrossEntropyLoss(**settings)(mx.nd.array(pred), mx.nd.array(label)).asnumpy()
    ours, _ = run(pred, label, **settings)
    bound = np.abs(stock - truth).max() + tolerances.BESIDE_STOCK.bound(truth)
    assert (np.abs(ours - truth) <= bound).all()


@given(problems(dtypes=('float32',), options=False), st.integers(0, 12))
def test_merging_metrics_is_one_after_the_other(problem, ignore_label):
    axis = problem.settings['axis']
    pred, label = mx.nd.array(problem.pred), mx.nd.array(problem.label, dtype=problem.label.dtype)
    first, second, both = (
        StableCrossEntropy(axis=axis, pred_type='logits', ignore_label=ignore_label) for _ in range(3)
    )
    first.update(label, pred)
    second.update(label, -pred)
    both.update([label, label], [pred, -pred])
    first.merge(second)
    np.testing.assert_array_equal(first.get()[1], both.get()[1])
