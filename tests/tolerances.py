"""By how much results may be off, each with its reason: the one place of the tests for it.

A test names what it compares. ``assert_close(got, expected, tolerances.NLL)`` is for results of a known size.
`checks.expected_within` adds up the errors of all terms of a loss, each of which `of(kernel, dtype, options)` bounds.
A kernel that becomes more exact changes a number here, and nothing else.
"""

from typing import NamedTuple

import numpy as np
import pytest


class Tolerance(NamedTuple):
    """An error of at most `absolute` + `relative` times the expected value."""

    absolute: float = 0.0
    relative: float = 0.0

    def approx(self, expected):
        """What is equal to every number within the larger of the two."""
        return pytest.approx(expected, abs=self.absolute, rel=self.relative)

    def bound(self, expected):
        """The largest error, of the shape of `expected`."""
        return self.absolute + self.relative * np.abs(expected)


# One logarithm, computed by a kernel

# What the stock kernel states for sparse labels and logits: log_softmax of logits that are lowered by 64 rounds to
# 4e-6, and oneDNN's sums are off by up to 5e-6. That is the error of the log-odds, so it is relative to the loss and to
# each entry of the gradient. The absolute part is the smallest exact loss.
STOCK = Tolerance(absolute=1e-27, relative=1e-5)
STOCK_FLOAT64 = STOCK._replace(relative=1e-13)
# Dense labels, log-probabilities, label smoothing and z-loss have log_softmax's error of 5e-6 as it is. The rest is
# float32's rounding of logits, differences and sums of up to a hundred terms, each 6e-8 of what is rounded.
PLAIN = Tolerance(absolute=1e-5, relative=1.2e-5)
# 2**-53 times the number of roundings, which is below nine thousand.
FLOAT64 = Tolerance(absolute=1e-12, relative=1e-12)
# The fused kernel is off by 3e-7 of the value. The rest is the rounding of weights, smoothing and sums.
FUSED = Tolerance(absolute=1e-37, relative=1e-6)
# The NLL of the class with the largest logit, which is part of a smoothed target, is off by up to 1e-8.
FUSED_SMOOTHING = Tolerance(absolute=1e-8, relative=1e-6)


def of(kernel, dtype, options):
    """The tolerance of each logarithm of a loss or a metric, where `kernel` computes whatever it can."""
    if str(dtype) == 'float64':
        return FLOAT64
    if is_fused(kernel, options):
        return FUSED_SMOOTHING if options.get('label_smoothing') else FUSED
    is_exact = options.get('sparse_label', True) and not any(map(options.get, NOT_EXACT))
    return STOCK if is_exact else PLAIN  # of float16 too, which is computed in float32


NOT_EXACT = ('from_logits', 'label_smoothing', 'lse_square_scale')


def is_fused(kernel, options):
    """Whether the fused kernel computes."""
    return kernel == 'fused' and options.get('sparse_label', True) and not options.get('from_logits')


# The same with many classes, and at the smallest values

# The fused kernel's bound; the absolute part is the smallest float32, and the smallest normal float64.
FUSED_VALUE = Tolerance(absolute=2**-149, relative=3e-7)
FUSED_FLOAT64 = Tolerance(absolute=2.3e-308, relative=2e-13)
# The rounding of the sum is left where the logsumexp is near 0.
FUSED_LOGSUMEXP = {
    'float16': Tolerance(absolute=3e-7, relative=3e-7),
    'float32': Tolerance(absolute=3e-7, relative=3e-7),
    'float64': Tolerance(absolute=2e-13, relative=2e-13),
}
# The part of the largest logit is exact to 1e-8, those of the others relatively.
FUSED_UNIFORM = Tolerance(absolute=1e-8, relative=3e-7)


def fused_terms(dtype):
    """The tolerances of an NLL, a logsumexp and a uniform NLL of the fused kernel."""
    value = FUSED_FLOAT64 if dtype == 'float64' else FUSED_VALUE
    return value, FUSED_LOGSUMEXP[dtype], value


def fused_gradient_bound(dtype, expected):
    """The errors of three terms' gradients, which may cancel: so one is relative to the largest entry."""
    relative = FUSED_LOGSUMEXP[dtype].relative
    bound = relative * (np.abs(expected).max() + 3 * np.abs(expected))
    return bound + FLOAT16_GRADIENT.bound(expected) if dtype == 'float16' else bound


def stated(kernel, dtype):
    """The tolerance of a plain loss, and of each entry of its gradient, that the documentation states."""
    float32, float64 = (FUSED_VALUE, FUSED_FLOAT64) if kernel == 'fused' else (STOCK, STOCK_FLOAT64)
    return float64 if str(dtype) == 'float64' else float32


# What the documentation states of the stock kernel's label smoothing and z-loss in float32.
STATED_PLAIN = Tolerance(absolute=1e-5, relative=2e-5)
# A smoothed loss adds up two terms, each off by FUSED_UNIFORM, with roundings of 6e-8 of factors, products and the sum.
STATED_SMOOTHING = Tolerance(absolute=1e-8, relative=6e-7)
# A gradient's entry is p - target; the error is relative to the sum of both.
STATED_SMOOTHING_ENTRY = Tolerance(absolute=1e-30, relative=1e-6)


def equal_logits(kernel, dtype):
    """The same where hundreds of logits are equal: all additions of the fused kernel round to one side."""
    return FUSED if kernel == 'fused' and str(dtype) != 'float64' else stated(kernel, dtype)


def rounded_off(kernel, dtype, classes):
    """The same where some logits are so far above many others that their sums round these off.

    Of those that are added up with a large one, up to 192 come one after the other, each less than 3e-8 of it: 6e-6 in
    all, beside the 6e-6 of other logits. With a million classes, that happens to later sums, too. In float64, a thousand
    come one after the other, each less than 1.1e-16 of it.
    """
    if kernel == 'fused':
        return equal_logits(kernel, dtype)
    if str(dtype) == 'float64':
        return STOCK_FLOAT64._replace(relative=1.3e-13)
    return STOCK._replace(relative=1.3e-5 if classes <= 100_000 else 3.5e-5)


# A gradient with respect to float16 logits is rounded to 11 bits, and to multiples of the smallest float16: half of this.
# The rest is the kernel's own error, which may round to the next one.
FLOAT16_GRADIENT = Tolerance(absolute=2**-24, relative=2**-10)

# Whole tests in float32, by any kernel

# oneDNN's error in an NLL or its gradient, with weights of at most 1. Where two losses are compared, both have it.
NLL = Tolerance(absolute=1e-5, relative=1e-5)
# A few such terms, weighted with up to 3.
LOSS = Tolerance(absolute=2e-5, relative=5e-6)
# Both sides are off by oneDNN's error, in sums of up to 64 positions with weights.
SUMS = {'float32': Tolerance(absolute=1e-4, relative=1e-5), 'float64': FLOAT64}
# Up to 81 gradients that are added up, each off by up to 2e-6 in the stock kernel.
ADDED_GRADIENTS = Tolerance(absolute=2e-5, relative=1e-5)
# The sum of 3,000 classes, which MXNet without oneDNN adds up one by one, and the rounding of its logarithm.
SUM_OF_CLASSES = Tolerance(absolute=1e-4, relative=2e-6)
# oneDNN's error of the logarithm, and the rounding of the largest logit.
LOGSUMEXP = Tolerance(absolute=1e-5, relative=2e-7)
# oneDNN's logarithm is off by up to 3.6e-6, in both losses. The rest is the rounding of the lowered logits.
BESIDE_STOCK = Tolerance(absolute=5e-6, relative=1.2e-5)
# The same operators on the same numbers. What may differ is the layout that oneDNN picks for the net in front.
SAME_OPERATORS = Tolerance(absolute=2e-6, relative=2e-6)
# Parameters below 1 after a few steps of several workers, beside those of one process: the sums of float32 gradients
# are in another order, and gluon's loss has an error of 4e-6 of a gradient, at a learning rate of 0.1.
ONE_PROCESS = Tolerance(absolute=1e-6)
# Parameters after a few steps: gradients within 1e-6 of each other, at learning rates of about 1.
TRAINED = Tolerance(absolute=5e-6, relative=1e-5)
# Some operations with the 8 bits of bfloat16.
HALF_SUM = Tolerance(absolute=2**-8, relative=2**-6)
# Numbers that scripts print after training with either loss.
PRINTED = Tolerance(relative=1e-4)
# Gluon's loss adds up thousands of classes in float16.
STOCK_LOSS = {'float16': Tolerance(absolute=1e-2), 'float32': Tolerance(absolute=1e-4)}
STOCK_GRADIENT = Tolerance(absolute=5e-3)

# The audit

# float64, each NLL rounded a few times, and their exact sum
AUDIT = Tolerance(relative=1e-14)
# MXNet's metrics add up thousands of logarithms in the dtype of the predictions.
STOCK_METRIC = {'float16': Tolerance(relative=2e-3), 'float32': Tolerance(relative=2e-6), 'float64': FLOAT64}
# What an epsilon of 1e-12 adds to probabilities of at least 0.1.
EPSILON = Tolerance(absolute=2e-12, relative=1e-9)

# Single numbers

ROUNDED = Tolerance(relative=1e-15)  # a float64, rounded a few times
ROUNDED_FLOAT32 = Tolerance(relative=1e-6)  # a float32, rounded a few times
SUM_OF_PROBABILITIES = Tolerance(absolute=2**-23)  # each time that a float32 up to 1 is added
SIX_DECIMALS = Tolerance(absolute=1e-6)  # that are logged or printed
SEVEN_DIGITS = {'fused': Tolerance(relative=1e-6), 'stock': Tolerance(relative=1e-5)}  # of a printed mean
FOCAL = Tolerance(relative=3e-5)  # (1 - p)^2 NLL, three times the error of the NLL
ONNX = Tolerance(absolute=1e-8, relative=1e-6)  # onnxruntime's log_softmax, which gives 0 for 4e-9
# Central differences with steps of 1e-5: the square of the step, and float64's rounding divided by it.
DIFFERENCE = Tolerance(absolute=1e-6, relative=1e-5)


def assert_relatively_close(got, expected, tolerance):
    """Arrays are equal within the relative part of a tolerance; what is too small for it, within the absolute part."""
    got, expected = np.asarray(got), np.asarray(expected)
    least = max(tolerance.absolute, np.finfo(got.dtype).tiny)
    is_small = abs(expected) < least
    assert_close(got[is_small], expected[is_small], Tolerance(absolute=least))
    assert_close(got[~is_small], expected[~is_small], tolerance._replace(absolute=0))


def assert_close(got, expected, tolerance=LOSS, message=''):
    """Arrays are equal within a tolerance; NaN is equal to NaN, and infinity to itself."""
    np.testing.assert_allclose(
        got, expected, rtol=tolerance.relative, atol=tolerance.absolute, err_msg=message
    )
