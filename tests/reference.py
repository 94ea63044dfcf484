"""The truth, in float64 NumPy and 50 digits of mpmath. Imports nothing of ours and nothing of MXNet's.

Each position n has a target t, how much of each class it asks for. Its loss is

    (1 - a) sum_j t_j (-log p_j) + a / C sum_j w_j (-log p_j) + s logsumexp^2

and its gradient follows in closed form. Where the loss is infinite, the gradient is its limit, which is finite.
Where it is NaN, as from a NaN logit, from logits that are all -inf or from inf - inf, there is no gradient: it is NaN here, also if the
position does not count. A test skips these entries.
"""

from typing import NamedTuple

import mpmath
import numpy as np


def log_softmax(pred):
    """Over the last axis. The largest logit is taken out first, so p near 1 is exact; logits may be -inf."""
    pred = pred.astype('float64')
    with np.errstate(invalid='ignore'):
        shifted = pred - pred.max(-1, keepdims=True)
    others = np.exp(shifted)
    np.put_along_axis(others, shifted.argmax(-1)[..., None], 0, -1)
    return shifted - np.log1p(others.sum(-1, keepdims=True))


def nll(pred, label):
    """-log softmax(pred)[label] for one row of logits, to 50 digits."""
    with mpmath.workdps(50):
        logits = [mpmath.mpf(float(logit)) for logit in pred]
        return mpmath.log(mpmath.fsum(mpmath.e**logit for logit in logits)) - logits[label]


class Positions(NamedTuple):
    """What each position has, with the class axis last."""

    log_p: np.ndarray  # (positions..., C)
    logsumexp: np.ndarray  # (positions...)
    target: np.ndarray  # (positions..., C), times the class weights
    uniform: np.ndarray  # (C,), w_j / C
    is_valid: np.ndarray  # (positions...), whether the label is an integer in [0, C)
    is_counted: np.ndarray  # (positions...), whether the label is not ignore_label


def loss_and_gradient(
    pred,
    label,
    sample_weight=None,
    head=None,
    *,
    reduction='mean',
    axis=-1,
    batch_axis=0,
    weight=None,
    **options,
):
    """The loss by its definition, and the gradient of sum(head * loss) with respect to `pred`. Both are float64.

    Parameters
    ----------
    pred : (..., C at `axis`, ...)
    label : `pred`'s shape without `axis` or with 1 there; or `pred`'s shape with sparse_label=False
    sample_weight : (batch,), (1,), or a shape that broadcasts to `label`'s, to `pred`'s with 1 at `axis`, or to `pred`'s
    head : the loss's shape, optional
    reduction : 'mean', 'sum', 'none' or 'valid'
    options : of `values_per_position` and `read_positions`
    """
    pred = np.asarray(pred)
    axis, batch_axes = normalised(axis, batch_axis, pred.ndim)
    positions = read_positions(pred, label, axis, **_only(options, READING))
    factor = _factor(
        positions, pred.shape, axis, batch_axes, sample_weight, weight, reduction
    )  # (positions...)
    values = values_per_position(positions, **_only(options, TERMS))
    values = np.where(positions.is_counted, np.where(positions.is_valid, values, np.nan), 0)
    if sample_weight is not None:
        values = np.where(fit_sample_weight(sample_weight, pred.shape, axis, batch_axes) == 0, 0, values)
    with np.errstate(invalid='ignore'):
        loss = add_up(np.where(values == 0, 0, values * factor), axis, batch_axes, reduction)

    is_undefined = np.isnan(values_per_position(positions, **_only(options, TERMS)))[..., None]
    gradient = gradient_per_position(
        positions, **_only(options, TERMS), from_logits=options.get('from_logits', False)
    )
    of_head = (
        factor
        if head is None
        else factor * _spread(head, positions.is_valid.shape, axis, batch_axes, reduction)
    )
    scale = np.where(positions.is_valid & positions.is_counted, of_head, 0)[..., None]  # (positions..., 1)
    gradient = np.where(is_undefined, np.nan, gradient * scale)
    if reduction == 'none' and options.get('sparse_label', True) and np.ndim(label) == pred.ndim:
        loss = np.expand_dims(loss, axis)  # the label's shape, which has kept the class axis
    return loss, np.moveaxis(gradient, -1, axis)


def error_bounds(
    pred, label, sample_weight=None, head=None, *, absolute, relative, reduction='mean', axis=-1, batch_axis=0,
    weight=None, **options,
):  # fmt: skip
    """By how much a loss and a gradient may be off whose every logarithm is off by `absolute` and `relative` times itself.

    The errors of all terms add up, so that it makes no difference if the terms cancel. Arguments and shapes are those of
    `loss_and_gradient`.
    """
    pred = np.asarray(pred)
    axis, batch_axes = normalised(axis, batch_axis, pred.ndim)
    positions = read_positions(pred, label, axis, **_only(options, READING))
    smoothing, scale = options.get('label_smoothing', 0), options.get('lse_square_scale', 0)
    factor = np.abs(_factor(positions, pred.shape, axis, batch_axes, sample_weight, weight, reduction))
    amount = np.abs((1 - smoothing) * positions.target) + smoothing * positions.uniform  # (positions..., C)
    log_p, logsumexp = _finite(positions.log_p), np.abs(_finite(positions.logsumexp))
    value = (amount * (absolute + relative * np.abs(log_p))).sum(-1)
    value += 2 * scale * (logsumexp + absolute) * (absolute + relative * logsumexp)
    loss = add_up(value * factor, axis, batch_axes, reduction)
    slope = (absolute + relative) * (amount.sum(-1) + 2 * scale * (logsumexp + 1))
    if head is not None:
        factor = factor * np.abs(_spread(head, positions.is_valid.shape, axis, batch_axes, reduction))
    if reduction == 'none' and options.get('sparse_label', True) and np.ndim(label) == pred.ndim:
        loss = np.expand_dims(loss, axis)
    return loss, np.expand_dims(slope * factor, axis)


def metric_terms(pred, label, *, pred_type, axis=-1, sparse_label=True, ignore_label=None):
    """The NLL of the positions that count and are valid, flat; how many are invalid; how many have impossible predictions."""
    given = np.moveaxis(np.asarray(pred, dtype='float64'), axis, -1)
    with np.errstate(divide='ignore', invalid='ignore'):
        log_p = np.log(np.asarray(pred, dtype='float64')) if pred_type == 'probs' else pred
    options = {
        'sparse_label': sparse_label,
        'ignore_label': ignore_label,
        'from_logits': pred_type != 'logits',
    }
    positions = read_positions(log_p, label, axis % given.ndim, **options)
    low, high = {'logits': (-np.inf, np.inf), 'log_probs': (-np.inf, 1e-3), 'probs': (0, 1 + 1e-3)}[pred_type]
    is_impossible = (((given < low) | (given > high)) & (positions.target != 0)).any(-1)
    values, counted = values_per_position(positions), positions.is_counted & positions.is_valid
    invalid = (positions.is_counted & ~positions.is_valid).sum()
    return values[counted & ~is_impossible], int(invalid), int((counted & is_impossible).sum())


READING = ('sparse_label', 'from_logits', 'ignore_label', 'class_weight', 'invalid_label')
TERMS = ('label_smoothing', 'lse_square_scale')


def read_positions(
    pred,
    label,
    axis,
    sparse_label=True,
    from_logits=False,
    ignore_label=None,
    class_weight=None,
    invalid_label='nan',
):
    """Read predictions and labels as `Positions`."""
    pred = np.moveaxis(np.asarray(pred, dtype='float64'), axis, -1)  # (positions..., C)
    classes = pred.shape[-1]
    weights = np.ones(classes) if class_weight is None else np.asarray(class_weight, dtype='float64')
    is_valid = is_counted = np.ones(pred.shape[:-1], bool)
    if sparse_label:
        label = _exact(np.asarray(label))
        label = label.squeeze(axis) if label.ndim == pred.ndim else label  # (positions...)
        index = _nearest_class(label, classes)
        is_valid = np.ones(label.shape, bool) if invalid_label == 'clip' else index == label
        is_counted = np.ones(label.shape, bool) if ignore_label is None else label != ignore_label
        target = np.eye(classes)[index]
    else:
        target = np.moveaxis(np.asarray(label, dtype='float64'), axis, -1)
    log_p = pred if from_logits else log_softmax(pred)
    return Positions(log_p, _logsumexp(pred), target * weights, weights / classes, is_valid, is_counted)


def values_per_position(positions, label_smoothing=0.0, lse_square_scale=0.0):
    """The loss of each position, before any mask or weight, (positions...).

    Each of the terms of log p is at least 0, also where log-probabilities are above 0; but not where a target has negative entries.
    """
    is_signed = (positions.target < 0).any(-1)
    values = 0.0
    with np.errstate(invalid='ignore', over='ignore'):
        if label_smoothing != 1:
            nll = _expected(positions.target, positions.log_p)
            values = values + (1 - label_smoothing) * np.where(
                is_signed, nll, _raised(nll, positions.log_p, positions.target)
            )
        if label_smoothing:
            uniform_nll = _expected(positions.uniform, positions.log_p)
            values = values + label_smoothing * _raised(uniform_nll, positions.log_p, positions.uniform)
        if lse_square_scale:
            values = values + lse_square_scale * positions.logsumexp**2
    return values


def _raised(nll, log_p, weight):
    """Roundings below 0 count as 0; a log-probability above 0 by more is none."""
    is_impossible = (log_p > np.float32(1e-3)) & (weight != 0)
    return np.where(is_impossible.any(-1), nll, np.maximum(nll, 0))


def gradient_per_position(positions, label_smoothing=0.0, lse_square_scale=0.0, from_logits=False):
    """(sum_j t_j) p - t + 2 s logsumexp p with respect to logits, and -t with respect to log-probabilities, (positions..., C)."""
    target = (1 - label_smoothing) * positions.target + label_smoothing * positions.uniform
    if from_logits:
        return -target
    p, others = np.exp(positions.log_p), target.sum(-1, keepdims=True) - target
    gradient = others * p + target * np.expm1(positions.log_p)  # which does not cancel where p is nearly 1
    if lse_square_scale:
        gradient = gradient + 2 * lse_square_scale * positions.logsumexp[..., None] * p
    return gradient


def align_sample_weight(sample_weight, shape, axis, batch_axes):
    """A sample_weight of any layout, as something that broadcasts to the positions.

    Parameters
    ----------
    shape : of `pred`
    axis, batch_axes : int, list of int
        Counted from 0.
    """
    sample_weight = np.asarray(sample_weight, dtype='float64')
    if sample_weight.ndim == len(
        shape
    ):  # gluon's shape with 1 at `axis`; or pred's, of which the mean over the classes counts
        return sample_weight.mean(axis)
    if sample_weight.shape == tuple(np.delete(shape, axis)):
        return sample_weight
    sizes = iter(sample_weight.shape)  # of the batch axes, or 1
    return sample_weight.reshape(
        [next(sizes) if i in batch_axes else 1 for i in range(len(shape)) if i != axis]
    )


def _exact(label):
    """Labels in a dtype that holds all of them, and any ignore_label."""
    return label.astype('float64' if label.dtype.kind == 'f' else 'int64')


def _nearest_class(label, classes):
    """The nearest class; the integer part of a fraction; class 0 for NaN."""
    return np.clip(np.trunc(np.where(np.isnan(label), 0, label)), 0, classes - 1).astype('int64')


def _expected(target, log_p):
    """sum_j t_j (-log p_j), where 0 * inf is 0, (positions...)."""
    return np.where(target == 0, 0, -target * log_p).sum(-1)


def _logsumexp(pred):
    """The logarithm of sum_j exp z_j, (positions...)."""
    largest = pred.max(-1)
    with np.errstate(invalid='ignore', over='ignore', divide='ignore'):
        return largest + np.log(np.exp(pred - largest[..., None]).sum(-1))


def normalised(axis, batch_axis, ndim):
    """The class axis and the batch axes in ascending order, all counted from 0."""
    return axis % ndim, sorted(one % ndim for one in np.atleast_1d(batch_axis))


def _reduced_axes(count, axis, batch_axes):
    """Those of the `count` axes of the positions that are no batch axes."""
    batch = [one - (one > axis) for one in batch_axes]
    return tuple(i for i in range(count) if i not in batch)


def fit_sample_weight(sample_weight, shape, axis, batch_axes):
    """The weight of each position, (positions...)."""
    return np.broadcast_to(
        align_sample_weight(sample_weight, shape, axis, batch_axes), tuple(np.delete(shape, axis))
    )


def _factor(positions, shape, axis, batch_axes, sample_weight, weight, reduction):
    """What the loss of each position is multiplied by: weights, and one over the divisor of the reduction, (positions...)."""
    factor = np.ones(positions.is_valid.shape)
    if sample_weight is not None:
        factor = factor * fit_sample_weight(sample_weight, shape, axis, batch_axes)
    if weight is not None:
        factor = factor * weight
    count = positions.is_counted.sum(
        _reduced_axes(factor.ndim, axis, batch_axes), keepdims=True
    )  # (batch, 1...)
    if reduction == 'mean':
        return factor / np.maximum(count, 1)
    if reduction == 'valid':  # the mean count; a batch without anything that counts has a loss of 0
        return factor / (count.mean() or 1)
    return factor


def add_up(values, axis, batch_axes, reduction):
    """Add up the positions of each sample, (batch,); with 'none' nothing."""
    return values if reduction == 'none' else values.sum(_reduced_axes(values.ndim, axis, batch_axes))


def _spread(head, shape, axis, batch_axes, reduction):
    """The head gradient of each position, (positions...)."""
    head = np.asarray(head, dtype='float64')
    if reduction == 'none':
        return head.reshape(shape)
    return np.broadcast_to(np.expand_dims(head, _reduced_axes(len(shape), axis, batch_axes)), shape)


def _finite(array):
    return np.where(np.isfinite(array), array, 0)


def _only(options, names):
    return {name: options[name] for name in names if name in options}
