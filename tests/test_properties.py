"""What must hold for every input, searched for by hypothesis over shapes, axes, dtypes, labels and options."""

import mxnet as mx
import numpy as np
import reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mxnet import autograd

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

EXACT = {np.float32: 24, np.float64: 53}


@st.composite
def problems(draw, dtypes=(np.float32, np.float64), options=True, classes=12):
    """(pred, label, settings): grid logits, so that sums of them are exact, any layout, labels of any dtype that can name the classes."""
    ndim = draw(st.integers(2, 4))
    axis, batch_axis = draw(st.permutations(range(ndim)))[:2]
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[axis] = draw(st.integers(1, classes))
    logits = hnp.arrays(np.int32, tuple(shape), elements=st.integers(-800, 800))
    pred = (draw(logits) / 16).astype(draw(st.sampled_from(dtypes)))
    positions = tuple(shape[:axis] + shape[axis + 1 :])
    label_dtype = draw(st.sampled_from(['int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64']))
    label = draw(hnp.arrays(label_dtype, positions, elements=st.integers(0, shape[axis] - 1)))
    settings = {
        'axis': axis - draw(st.sampled_from([0, ndim])),
        'batch_axis': batch_axis - draw(st.sampled_from([0, ndim])),
    }
    if settings['axis'] == settings['batch_axis']:
        settings['axis'] %= ndim
    if options:
        settings.update(
            draw(
                st.fixed_dictionaries(
                    {},
                    optional={
                        'ignore_label': st.integers(0, shape[axis]),
                        'label_smoothing': st.sampled_from([0.1, 0.5]),
                        'class_weight': st.lists(
                            st.sampled_from([0, 0.5, 1, 3]), min_size=shape[axis], max_size=shape[axis]
                        ),
                        'lse_square_scale': st.just(1e-2),
                        'reduction': st.sampled_from(['mean', 'sum', 'none']),
                        'weight': st.just(0.5),
                    },
                )
            )
        )
    return pred, label, settings


def run(pred, label, **settings):
    pred, label = mx.nd.array(pred, dtype=pred.dtype), mx.nd.array(label, dtype=label.dtype)
    pred.attach_grad()
    with autograd.record():
        loss = StableSoftmaxCELoss(**settings)(pred, label)
    loss.backward()
    return loss.asnumpy(), pred.grad.asnumpy()


@given(problems())
def test_it_is_the_reference(problem):
    pred, label, settings = problem
    loss, gradient = run(pred, label, **settings)
    expected, expected_gradient = reference.loss_and_gradient(pred, label, **settings)
    terms = (
        label.size * 3
    )  # as many at most are added up, each with a weight of 3 at most, each off by 1e-5 (float32, oneDNN)
    tolerance = (
        {'rtol': 2e-6, 'atol': 1e-5 * terms}
        if pred.dtype == np.float32
        else {'rtol': 1e-12, 'atol': 1e-13 * terms}
    )
    np.testing.assert_allclose(loss, expected, **tolerance)
    np.testing.assert_allclose(gradient, expected_gradient, **tolerance)


@given(problems())
def test_it_is_finite_and_never_negative(problem):
    pred, label, settings = problem
    loss, gradient = run(pred, label, **settings)
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()
    assert (loss >= 0).all()
    assert not np.signbit(loss[loss == 0]).any()


@given(problems(), st.integers(-64, 64))
def test_a_constant_added_to_all_logits_changes_nothing(problem, shift):
    """The logits are multiples of 1/16, so the shift rounds nothing, and neither does the kernel that takes out the largest logit."""
    pred, label, settings = problem
    settings.pop('lse_square_scale', None)  # that is what it is there for
    before, after = run(pred, label, **settings), run(pred + pred.dtype.type(shift), label, **settings)
    for a, b in zip(before, after):
        np.testing.assert_allclose(
            a, b, rtol=2 ** (3 - EXACT[pred.dtype.type]), atol=1e-4 if pred.dtype == np.float32 else 1e-12
        )


@given(problems(), st.randoms(use_true_random=False))
def test_classes_and_samples_have_no_order(problem, random):
    pred, label, settings = problem
    settings.pop('ignore_label', None)
    axis, batch_axis = settings['axis'] % pred.ndim, settings['batch_axis'] % pred.ndim
    classes = random.sample(range(pred.shape[axis]), pred.shape[axis])
    renamed = np.argsort(classes)[label.astype(int)].astype(label.dtype)
    moved = (
        {**settings, 'class_weight': np.take(settings['class_weight'], classes)}
        if 'class_weight' in settings
        else settings
    )
    close = {'rtol': 1e-5, 'atol': 1e-4} if pred.dtype == np.float32 else {'rtol': 1e-12, 'atol': 1e-12}
    loss, gradient = run(pred, label, **settings)
    loss_renamed, gradient_renamed = run(np.take(pred, classes, axis), renamed, **moved)
    np.testing.assert_allclose(loss_renamed, loss, **close)
    np.testing.assert_allclose(gradient_renamed, np.take(gradient, classes, axis), **close)

    samples = random.sample(range(pred.shape[batch_axis]), pred.shape[batch_axis])
    label_axis = batch_axis - (batch_axis > axis)
    loss_moved, gradient_moved = run(
        np.take(pred, samples, batch_axis), np.take(label, samples, label_axis), **settings
    )
    np.testing.assert_allclose(
        loss_moved, np.take(loss, samples, label_axis if settings.get('reduction') == 'none' else 0), **close
    )
    np.testing.assert_allclose(gradient_moved, np.take(gradient, samples, batch_axis), **close)


@given(problems())
def test_gradients_over_classes_sum_to_zero(problem):
    pred, label, settings = problem
    settings.pop('lse_square_scale', None)
    _, gradient = run(pred, label, **settings)
    np.testing.assert_allclose(
        gradient.sum(settings['axis']), 0, atol=2e-4 if pred.dtype == np.float32 else 1e-12
    )


@given(problems())
def test_a_label_is_its_one_hot_distribution(problem):
    pred, label, settings = problem
    settings.pop('ignore_label', None)
    onehot = np.moveaxis(
        np.eye(pred.shape[settings['axis']], dtype=pred.dtype)[label.astype(int)], -1, settings['axis']
    )
    close = {'rtol': 1e-5, 'atol': 1e-4} if pred.dtype == np.float32 else {'rtol': 1e-12, 'atol': 1e-12}
    for sparse, dense in zip(run(pred, label, **settings), run(pred, onehot, sparse_label=False, **settings)):
        np.testing.assert_allclose(dense, sparse, **close)


@given(problems(dtypes=(np.float32,), options=False))
def test_the_error_is_bounded_by_that_of_the_plain_implementation(problem):
    """Ours is off by no more than gluon's own on the same logits, and 5e-6 (see the loss's Numerics)."""
    pred, label, settings = problem
    truth, _ = reference.loss_and_gradient(pred, label, **settings)
    stock = mx.gluon.loss.SoftmaxCrossEntropyLoss(**settings)(mx.nd.array(pred), mx.nd.array(label)).asnumpy()
    ours, _ = run(pred, label, **settings)
    assert np.abs(ours - truth).max() <= np.abs(stock - truth).max() + 5e-6


@given(problems(dtypes=(np.float32,), options=False), st.integers(0, 12))
def test_merging_metrics_is_one_after_the_other(problem, ignore_label):
    pred, label, settings = problem
    pred, label = mx.nd.array(pred), mx.nd.array(label, dtype=label.dtype)
    first, second, both = (
        StableCrossEntropy(axis=settings['axis'], pred_type='logits', ignore_label=ignore_label)
        for _ in range(3)
    )
    first.update(label, pred)
    second.update(label, -pred)
    both.update([label, label], [pred, -pred])
    first.merge(second)
    np.testing.assert_array_equal(first.get()[1], both.get()[1])
