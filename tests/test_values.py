"""Values and gradients that were computed by hand, for each option, without the code of the reference.

Logits are [0, log 3], so p = [1/4, 3/4], the logsumexp is log 4, and the NLLs are log 4 and log 4/3. The gradient
of an NLL with respect to logits is p minus the target.
"""

import cases
import modes
import numpy as np
import pytest
import tolerances
from checks import every_mode
from tolerances import assert_close

from gluon_stable_ce import StableSoftmaxCELoss

inf, nan = float('inf'), float('nan')
NLL = (1.3862943611198906, 0.28768207245178093)  # log 4, log 4/3
LOGITS, LOG_P = [[0, 1.0986122886681098]], [[-NLL[0], -NLL[1]]]  # log 3
TWO = LOGITS * 2
E_17, E_40 = 4.1399377187851667e-8, 4.2483542552915890e-18  # exp(-17), exp(-40)

VALUES = {  # options, pred, label, loss, gradient
    'unlikely': ({}, LOGITS, [0], [NLL[0]], [[-0.75, 0.75]]),
    'likely': ({}, LOGITS, [1], [NLL[1]], [[0.25, -0.25]]),
    'weight': ({'weight': 0.5}, LOGITS, [0], [NLL[0] / 2], [[-0.375, 0.375]]),
    'ignored': ({'ignore_label': -1}, LOGITS, [-1], [0], [[0, 0]]),
    'ignored-class': ({'ignore_label': 1}, TWO, [1, 0], [0, NLL[0]], [[0, 0], [-0.75, 0.75]]),
    'invalid': ({}, TWO, [2, 0], [nan, NLL[0]], [[0, 0], [-0.75, 0.75]]),
    'clip': ({'invalid_label': 'clip'}, LOGITS, [7], [NLL[1]], [[0.25, -0.25]]),
    'class-weight': ({'class_weight': [2, 1]}, LOGITS, [0], [2 * NLL[0]], [[-1.5, 1.5]]),
    'class-weight-0': ({'class_weight': [0, 1]}, LOGITS, [0], [0], [[0, 0]]),
    # the target is [3/4, 1/4]
    'smoothing': (
        {'label_smoothing': 0.5}, LOGITS, [0], [0.75 * NLL[0] + 0.25 * NLL[1]], [[-0.5, 0.5]],
    ),
    'smoothing-1': ({'label_smoothing': 1}, LOGITS, [0], [(NLL[0] + NLL[1]) / 2], [[-0.25, 0.25]]),
    # the target is [1/2 2 + 1/4 2, 1/4 1] = [3/2, 1/4]; the gradient is 7/4 p minus it
    'smoothing-class-weight': (
        {'label_smoothing': 0.5, 'class_weight': [2, 1]}, LOGITS, [0],
        [1.5 * NLL[0] + 0.25 * NLL[1]], [[-1.0625, 1.0625]],
    ),
    # 1/4 log(4)^2 is added, and to the gradient 1/2 log(4) p
    'z-loss': (
        {'lse_square_scale': 0.25}, LOGITS, [0],
        [NLL[0] + NLL[0] ** 2 / 4], [[-0.75 + NLL[0] / 8, 0.75 + NLL[0] * 3 / 8]],
    ),
    'log-probs': ({'from_logits': True}, LOG_P, [0], [NLL[0]], [[-1, 0]]),
    'log-probs-smoothing': (
        {'from_logits': True, 'label_smoothing': 0.5}, LOG_P, [0],
        [0.75 * NLL[0] + 0.25 * NLL[1]], [[-0.75, -0.25]],
    ),
    'log-probs-above-0': ({'from_logits': True}, [[2**-10, -3]], [0], [0], [[-1, 0]]),
    'dense': ({'sparse_label': False}, LOGITS, [[0.5, 0.5]], [(NLL[0] + NLL[1]) / 2], [[-0.25, 0.25]]),
    'dense-negative': ({'sparse_label': False}, LOGITS, [[-2, 0]], [-2 * NLL[0]], [[1.5, -1.5]]),
    'dense-class-weight': (
        {'sparse_label': False, 'class_weight': [2, 1]}, LOGITS, [[0.5, 0.5]],
        [NLL[0] + NLL[1] / 2], [[-0.625, 0.625]],  # 3/2 p - [1, 1/2]
    ),
    'dense-log-probs': (
        {'sparse_label': False, 'from_logits': True}, LOG_P, [[0.5, 0.5]],
        [(NLL[0] + NLL[1]) / 2], [[-0.5, -0.5]],
    ),
    'mean': ({}, [TWO], [[0, 1]], [(NLL[0] + NLL[1]) / 2], [[[-0.375, 0.375], [0.125, -0.125]]]),
    'mean-ignored': ({'ignore_label': -1}, [TWO], [[0, -1]], [NLL[0]], [[[-0.75, 0.75], [0, 0]]]),
    'all-ignored': ({'ignore_label': -1}, [TWO], [[-1, -1]], [0], [[[0, 0], [0, 0]]]),
    'sum': ({'reduction': 'sum'}, [TWO], [[0, 1]], [NLL[0] + NLL[1]], [[[-0.75, 0.75], [0.25, -0.25]]]),
    'none': ({'reduction': 'none'}, [TWO], [[0, 1]], [NLL], [[[-0.75, 0.75], [0.25, -0.25]]]),
    # two and one positions count, 3/2 on average
    'valid': (
        {'reduction': 'valid', 'ignore_label': -1}, [TWO, TWO], [[0, 1], [0, -1]],
        [(NLL[0] + NLL[1]) / 1.5, NLL[0] / 1.5],
        [[[-0.5, 0.5], [0.5 / 3, -0.5 / 3]], [[-0.5, 0.5], [0, 0]]],
    ),
    'axis': ({'axis': 1}, [[[0, 0], [1.0986122886681098] * 2]], [[0, 1]], [(NLL[0] + NLL[1]) / 2],
             [[[-0.375, 0.125], [0.375, -0.125]]]),
    'p-0': ({}, [[0, -inf]], [1], [inf], [[1, -1]]),
    'p-0-masked': ({}, [[0, -inf]], [0], [0], [[0, 0]]),
    'p-0-smoothing-1': ({'label_smoothing': 1}, [[-inf, 0]], [0], [inf], [[-0.5, 0.5]]),
    'p-0-dense': ({'sparse_label': False}, [[*LOGITS[0], -inf]], [[1, 0, 0]], [NLL[0]], [[-0.75, 0.75, 0]]),
    # the z-loss of an infinite loss stays in its gradient, and in a loss of weight 0
    'p-0-z-loss': (
        {'lse_square_scale': 0.25}, [[*LOGITS[0], -inf]], [2],
        [inf], [[0.25 + NLL[0] / 8, 0.75 + NLL[0] * 3 / 8, -1]],
    ),
    'p-0-z-loss-weight-0': (
        {'lse_square_scale': 0.25, 'class_weight': [1, 1, 0]}, [[*LOGITS[0], -inf]], [2],
        [NLL[0] ** 2 / 4], [[NLL[0] / 8, NLL[0] * 3 / 8, 0]],
    ),
    'p-near-1': ({}, [[17, 0]], [0], [E_17], [[-E_17, E_17]]),
    'p-nearer-1': ({}, [[40, 0]], [0], [E_40], [[-E_40, E_40]]),
    'p-near-0': ({}, [[40, 0]], [1], [40], [[1, -1]]),
}  # fmt: skip


SAMPLE_WEIGHTS = {  # pred, label, sample_weight, loss, gradient
    'batch': (TWO, [0, 1], [2, 0], [2 * NLL[0], 0], [[-1.5, 1.5], [0, 0]]),
    'gluon': (TWO, [0, 1], [[2], [3]], [2 * NLL[0], 3 * NLL[1]], [[-1.5, 1.5], [0.75, -0.75]]),
    # means over the classes
    'pred': (TWO, [0, 1], [[1, 3], [0, 1]], [2 * NLL[0], NLL[1] / 2], [[-1.5, 1.5], [0.125, -0.125]]),
    # infinite and NaN losses are removed
    'zero': ([[-inf, 0], *LOGITS], [0, 7], [0, 0], [0, 0], [[0, 0], [0, 0]]),
}


def check(kernel, mode, dtype, options, arrays, loss, gradient):
    got, got_gradient = mode(StableSoftmaxCELoss(**options), *arrays)
    tolerance = tolerances.of('stock' if mode is modes.exported_alone else kernel, dtype, options)
    assert_close(got, loss, tolerance)
    assert_close(got_gradient, gradient, tolerance)
    assert not ((got < 0) & np.greater_equal(loss, 0)).any()


@every_mode
@pytest.mark.parametrize(('options', 'pred', 'label', 'loss', 'gradient'), cases.rows(VALUES))
def test_values_in_float32(kernel, mode, options, pred, label, loss, gradient):
    arrays = np.array(pred, 'float32'), np.array(label, 'float32')
    check(kernel, mode, 'float32', options, arrays, loss, gradient)


@pytest.mark.parametrize(('options', 'pred', 'label', 'loss', 'gradient'), cases.rows(VALUES))
def test_values_in_float64(kernel, options, pred, label, loss, gradient):
    arrays = np.array(pred, 'float64'), np.array(label, 'float64')
    check(kernel, modes.default, 'float64', options, arrays, loss, gradient)


@every_mode
@pytest.mark.parametrize(('pred', 'label', 'weight', 'loss', 'gradient'), cases.rows(SAMPLE_WEIGHTS))
def test_sample_weights(kernel, mode, pred, label, weight, loss, gradient):
    arrays = [np.array(array, 'float32') for array in (pred, label, weight)]
    check(kernel, mode, 'float32', {}, arrays, loss, gradient)
