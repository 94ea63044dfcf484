"""Options that mean nothing are errors that name the option, what is expected and what came."""

import re

import pytest

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

BAD_LOSS_OPTIONS = [
    ({'axis': 1.0}, TypeError, r'^axis: expected an integer, got 1\.0$'),
    ({'axis': True}, TypeError, '^axis: expected an integer, got True$'),
    ({'axis': 0}, ValueError, '^batch_axis: expected another axis than the class axis, got 0 for both$'),
    (
        {'axis': 1, 'batch_axis': (0, 1)},
        ValueError,
        '^batch_axis: expected another axis than the class axis, got 1 for both$',
    ),
    ({'batch_axis': None}, TypeError, '^batch_axis: expected an integer, got None$'),
    ({'weight': 'much'}, TypeError, "^weight: expected a number, got 'much'$"),
    ({'weight': 1e39}, ValueError, r'^weight: expected a number from -3.4028234663852886e\+38 to '),
    ({'ignore_label': -1.5}, TypeError, r'^ignore_label: expected an integer, got -1\.5$'),
    (
        {'ignore_label': 2**53 + 1},
        ValueError,
        '^ignore_label: expected a number from -9007199254740991 to 9007199254740991, got 9007199254740993$',
    ),
    ({'label_smoothing': 1.5}, ValueError, r'^label_smoothing: expected a number from 0 to 1, got 1\.5$'),
    (
        {'label_smoothing': float('nan')},
        ValueError,
        '^label_smoothing: expected a number from 0 to 1, got nan$',
    ),
    (
        {'lse_square_scale': -1},
        ValueError,
        r'^lse_square_scale: expected a number from 0 to 3.4028234663852886e\+38, got -1$',
    ),
    ({'reduction': 'average'}, ValueError, "^reduction: expected one of 'mean', .*, got 'average'$"),
    (
        {'invalid_label': 'ignore'},
        ValueError,
        "^invalid_label: expected one of 'nan', 'raise', 'clip', got 'ignore'$",
    ),
    (
        {'from_logits': True, 'lse_square_scale': 0.1},
        ValueError,
        '^lse_square_scale: expected 0 with from_logits=True, as ',
    ),
    (
        {'sparse_label': False, 'ignore_label': -1},
        ValueError,
        '^ignore_label: expected None with sparse_label=False, as .* sample_weight',
    ),
    (
        {'sparse_label': False, 'invalid_label': 'raise'},
        ValueError,
        "^invalid_label: expected 'nan' with sparse_label=False, as ",
    ),
]
BAD_METRIC_OPTIONS = [
    (
        {'pred_type': 'prob'},
        ValueError,
        "^pred_type: expected one of 'probs', 'logits', 'log_probs', got 'prob'$",
    ),
    ({'axis': None}, TypeError, '^axis: expected an integer, got None$'),
    ({'ignore_label': 0.5}, TypeError, r'^ignore_label: expected an integer, got 0\.5$'),
    (
        {'sparse_label': False, 'ignore_label': 1},
        ValueError,
        '^ignore_label: expected None with sparse_label=False',
    ),
]


def named(bad_options):
    """The options as ids."""
    return [pytest.param(*case, id=' '.join(re.findall(r"[^{}',:]+", str(case[0])))) for case in bad_options]


@pytest.mark.parametrize(('options', 'error', 'message'), named(BAD_LOSS_OPTIONS))
def test_loss_rejects_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        StableSoftmaxCELoss(**options)


@pytest.mark.parametrize(('options', 'error', 'message'), named(BAD_METRIC_OPTIONS))
def test_metric_rejects_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        StableCrossEntropy(**options)


def test_loss_rejects_unknown_options():
    with pytest.raises(TypeError, match='ignore_index'):
        StableSoftmaxCELoss(ignore_index=-1)


def test_loss_options_beyond_gluons_are_keyword_only():
    with pytest.raises(TypeError, match='positional'):
        StableSoftmaxCELoss(-1, True, False, None, 0, -1)
