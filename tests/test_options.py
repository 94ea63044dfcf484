"""Options that mean nothing are errors that name the option, what is expected and what came."""

import re
from fractions import Fraction

import mxnet as mx
import numpy as np
import pytest
from checks import assert_loss_is_reference

from gluon_stable_ce import (
    StableBitsPerToken,
    StableCrossEntropy,
    StableLoss,
    StablePerplexity,
    StableSoftmaxCELoss,
)

inf, nan = float('inf'), float('nan')
SHARED = '^batch_axis: expected an axis other than the class axis'
DENSE = 'with sparse_label=False'
NOT_NUMBERS = '^class_weight: expected an array or a list of numbers, got '
NOT_WEIGHTS = '^class_weight: expected one finite weight >= 0 per class'
BAD_LOSS_OPTIONS = [
    ({'axis': 1.0}, TypeError, r'^axis: expected an integer, got 1\.0$'),
    ({'axis': True}, TypeError, '^axis: expected an integer, got True$'),
    ({'axis': 0}, ValueError, f'{SHARED}, got 0 for both$'),
    ({'axis': 1, 'batch_axis': (0, 1)}, ValueError, f'{SHARED}, got 1 for both$'),
    ({'batch_axis': None}, TypeError, '^batch_axis: expected an integer, got None$'),
    ({'batch_axis': [0, 0]}, ValueError, '^batch_axis: expected one axis or several different ones'),
    ({'batch_axis': []}, ValueError, '^batch_axis: expected one axis or several different ones'),
    ({'sparse_label': 'False'}, TypeError, "^sparse_label: expected True or False, got 'False'$"),
    ({'sparse_label': None}, TypeError, '^sparse_label: expected True or False, got None$'),
    ({'from_logits': 'False'}, TypeError, "^from_logits: expected True or False, got 'False'$"),
    ({'from_logits': np.zeros(3)}, TypeError, '^from_logits: expected True or False, got array'),
    ({'weight': 'much'}, TypeError, "^weight: expected a number, got 'much'$"),
    ({'weight': 1e39}, ValueError, r'^weight: expected a number from -3.4028234663852886e\+38 to '),
    ({'weight': 10**39}, ValueError, '^weight: expected a number from '),
    ({'weight': inf}, ValueError, '^weight: expected a number from '),
    ({'class_weight': '123'}, TypeError, f"{NOT_NUMBERS}'123'$"),
    ({'class_weight': ['1', '2']}, TypeError, NOT_NUMBERS),
    ({'class_weight': {0: 1}}, TypeError, NOT_NUMBERS),
    ({'class_weight': iter([1])}, TypeError, NOT_NUMBERS),
    ({'class_weight': [1j]}, TypeError, NOT_NUMBERS),
    ({'class_weight': []}, ValueError, NOT_WEIGHTS),
    ({'class_weight': [[1, 2]]}, ValueError, rf'{NOT_WEIGHTS}, .*got .* of shape \(1, 2\)$'),
    ({'class_weight': [1, -2]}, ValueError, NOT_WEIGHTS),
    ({'class_weight': [1, nan]}, ValueError, NOT_WEIGHTS),
    ({'class_weight': [1, inf]}, ValueError, NOT_WEIGHTS),
    ({'class_weight': [1, 1e39]}, ValueError, NOT_WEIGHTS),
    ({'ignore_label': -1.5}, TypeError, r'^ignore_label: expected an integer, got -1\.5$'),
    ({'ignore_label': 2**53 + 1}, ValueError, '^ignore_label: expected a number .* got 9007199254740993$'),
    ({'ignore_label': 2**64}, ValueError, '^ignore_label: expected a number from -9007199254740991 to '),
    ({'label_smoothing': 1.5}, ValueError, r'^label_smoothing: expected a number from 0 to 1, got 1\.5$'),
    ({'label_smoothing': nan}, ValueError, '^label_smoothing: expected a number from 0 to 1, got nan$'),
    ({'lse_square_scale': -1}, ValueError, r'^lse_square_scale: expected a number from 0 to .*, got -1$'),
    ({'lse_square_scale': 10**39}, ValueError, '^lse_square_scale: expected a number from 0 to '),
    ({'reduction': ['mean']}, ValueError, '^reduction: expected one of '),
    ({'reduction': 'average'}, ValueError, "^reduction: expected one of 'mean', .*, got 'average'$"),
    ({'invalid_label': 'ignore'}, ValueError, "^invalid_label: expected one of 'nan', .*, got 'ignore'$"),
    ({'from_logits': True, 'lse_square_scale': 0.1}, ValueError, '^lse_square_scale: expected 0 with from'),
    ({'sparse_label': False, 'ignore_label': -1}, ValueError, f'^ignore_label: .* None {DENSE}, .* sample_weight'),
    ({'sparse_label': False, 'invalid_label': 'raise'}, ValueError, f"^invalid_label: .* 'nan' {DENSE}, as "),
]  # fmt: skip
BAD_METRIC_OPTIONS = [
    ({'pred_type': 'prob'}, ValueError, "^pred_type: expected one of 'probs', .*, got 'prob'$"),
    ({'axis': None}, TypeError, '^axis: expected an integer, got None$'),
    ({'ignore_label': 0.5}, TypeError, r'^ignore_label: expected an integer, got 0\.5$'),
    ({'sparse_label': False, 'ignore_label': 1}, ValueError, f'^ignore_label: expected None {DENSE}'),
    ({'invalid_label': 'nan'}, ValueError, "^invalid_label: expected one of 'raise', 'clip', got 'nan'$"),
    ({'sparse_label': False, 'invalid_label': 'clip'}, ValueError, f"^invalid_label: .* 'raise' {DENSE}, as "),
]  # fmt: skip


def named(bad_options):
    """The options as ids, without the addresses of objects, which differ in each process."""
    texts = [re.sub(' at 0x[0-9a-f]+', '', str(options)) for options, *_ in bad_options]
    return [
        pytest.param(*case, id=' '.join(re.findall(r"[^{}',:]+", text)))
        for case, text in zip(bad_options, texts)
    ]


@pytest.mark.parametrize(('options', 'error', 'message'), named(BAD_LOSS_OPTIONS))
def test_loss_rejects_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        StableSoftmaxCELoss(**options)


@pytest.mark.parametrize(('options', 'error', 'message'), named(BAD_METRIC_OPTIONS))
def test_metric_rejects_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        StableCrossEntropy(**options)


METRICS = [StableCrossEntropy, StablePerplexity, StableBitsPerToken]


@pytest.mark.parametrize('wrong', ['ignore_lable', 'ignore_index', 'ignore_class', 'ignorelabel'])
@pytest.mark.parametrize('cls', [StableSoftmaxCELoss, *METRICS])
def test_an_unknown_option_names_the_class_and_what_is_near(cls, wrong):
    class Subclass(cls):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    for called in (cls, Subclass):
        message = f"^{called.__name__}: unknown option '{wrong}'; did you mean 'ignore_label'\\?$"
        with pytest.raises(TypeError, match=message):
            called(**{wrong: -1})


@pytest.mark.parametrize('cls', [*METRICS, StableLoss])
def test_an_unknown_option_that_is_near_to_none_names_all(cls):
    message = f"^{cls.__name__}: unknown option 'eps'; expected one of .*output_names, label_names"
    with pytest.raises(TypeError, match=message):
        cls(eps=1e-12)


def test_a_loss_has_the_options_of_a_block():
    assert StableSoftmaxCELoss(prefix='mine_', params=None).prefix == 'mine_'
    with pytest.raises(TypeError, match="unknown option 'prefx'; did you mean 'prefix'"):
        StableSoftmaxCELoss(prefx='mine_')


def test_loss_options_beyond_gluons_are_keyword_only():
    with pytest.raises(TypeError, match='positional'):
        StableSoftmaxCELoss(-1, True, False, None, 0, -1)


@pytest.mark.parametrize('batch_axis', [2, -3])
def test_a_batch_axis_that_pred_has_not_is_refused(batch_axis):
    with pytest.raises(ValueError, match='^batch_axis: expected '):
        StableSoftmaxCELoss(batch_axis=batch_axis)(mx.nd.zeros((4, 5)), mx.nd.zeros(4))


def test_a_batch_axis_that_is_the_class_axis_counted_from_the_other_end_is_refused():
    message = r'^batch_axis: expected axes of pred, of shape \(4, 5\), other than'
    with pytest.raises(ValueError, match=message):
        StableSoftmaxCELoss(axis=-1, batch_axis=1)(mx.nd.zeros((4, 5)), mx.nd.zeros(4))


@pytest.mark.parametrize('options', [
    {'weight': Fraction(1, 2)},
    {'weight': 2**64},
    {'label_smoothing': Fraction(1, 10)},
    {'lse_square_scale': Fraction(1, 10)},
    {'ignore_label': np.int64(2)},
    {'sparse_label': np.bool_(True)},
], ids=str)  # fmt: skip
def test_numbers_of_every_kind_mean_what_they_say(kernel, options, rng):
    pred, label = rng.normal(0, 1, (4, 5)).astype('float32'), np.array([0, 2, 4, 1], 'float32')
    plain = {name: float(value) for name, value in options.items()}
    assert_loss_is_reference(plain, pred, label, kernel=kernel, loss_fn=StableSoftmaxCELoss(**options))
