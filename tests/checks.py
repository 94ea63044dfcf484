"""Comparisons that several test modules make."""

import cases
import modes
import numpy as np
import reference
import tolerances

from gluon_stable_ce import StableSoftmaxCELoss

every_mode = modes.parametrize(modes.ALL)


def expected_within(kernel, arrays, settings, head=None):
    """The loss and its gradient by the reference, each with the largest error that a kernel may have."""
    tolerance = tolerances.of(kernel, arrays[0].dtype, settings)
    loss, gradient = reference.loss_and_gradient(*arrays, head=head, **settings)
    bound, gradient_bound = reference.error_bounds(*arrays, head=head, **settings, **tolerance._asdict())
    gradient_bound = gradient_bound + tolerance.relative * np.abs(gradient)
    if arrays[0].dtype == np.float16:
        gradient_bound = gradient_bound + tolerances.FLOAT16_GRADIENT.bound(gradient)
    return (loss, bound), (gradient, gradient_bound)


def assert_loss_is_reference(settings, *arrays, mode=modes.default, kernel='stock', loss_fn=None):
    """The value, its shape and the gradient of a loss with these options, called in a mode."""
    kernel = 'stock' if mode is modes.exported_alone else kernel  # of whose operators its file is
    results = mode(loss_fn or StableSoftmaxCELoss(**settings), *arrays)
    for got, (expected, bound) in zip(results, expected_within(kernel, arrays, settings)):
        assert got.shape == expected.shape
        cases.assert_within(got, expected, bound)
