"""Comparisons that several test modules make."""

import cases
import modes
import numpy as np
import reference

from gluon_stable_ce import StableSoftmaxCELoss

every_mode = modes.parametrize(modes.ALL)


def assert_loss_is_reference(settings, *arrays, mode=modes.default, **tolerance):
    """The value, its shape and the gradient of a loss with these options, called in a mode."""
    loss, gradient = mode(StableSoftmaxCELoss(**settings), *arrays)
    expected, expected_gradient = reference.loss_and_gradient(*arrays, **settings)
    assert loss.shape == expected.shape
    np.testing.assert_allclose(loss, expected, **(tolerance or cases.CLOSE))
    np.testing.assert_allclose(gradient, expected_gradient, **(tolerance or cases.CLOSE))
