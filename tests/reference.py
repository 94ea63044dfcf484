"""The truth, in float64 NumPy and 50 digits of mpmath. Imports nothing of ours and nothing of MXNet's."""

import mpmath
import numpy as np


def log_softmax(pred):
    """Over the last axis. The largest logit is taken out first; logits may be -inf."""
    pred = pred.astype('float64')
    shifted = pred - pred.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def nll(pred, label):
    """-log softmax(pred)[label] for one row of logits, to 50 digits."""
    with mpmath.workdps(50):
        logits = [mpmath.mpf(float(logit)) for logit in pred]
        return mpmath.log(mpmath.fsum(mpmath.e**logit for logit in logits)) - logits[label]


def loss_and_gradient(
    pred,
    label,
    sample_weight=None,
    *,
    axis=-1,
    batch_axis=0,
    sparse_label=True,
    from_logits=False,
    weight=None,
    ignore_label=None,
    class_weight=None,
    label_smoothing=0.0,
    lse_square_scale=0.0,
    reduction='mean',
    invalid_label='nan',
):
    """The loss by its definition and the gradient of its sum with respect to `pred` in closed form, both float64.

    Every position has a target t, the amount of each class: its loss is sum_j t_j (-log p_j) + s lse^2, and the gradient
    (sum_j t_j) p - t + 2 s lse p with respect to logits, -t with respect to log-probabilities.
    """
    axis, batch_axis = axis % pred.ndim, batch_axis % pred.ndim
    pred = np.moveaxis(np.asarray(pred, dtype='float64'), axis, -1)  # (positions..., C)
    classes = pred.shape[-1]
    positions = pred.shape[:-1]
    log_p = pred if from_logits else log_softmax(pred)
    p = np.exp(log_p)
    weights = np.ones(classes) if class_weight is None else np.asarray(class_weight, dtype='float64')
    counted, valid = np.ones(positions, bool), np.ones(positions, bool)
    if sparse_label:
        label = np.asarray(label, dtype='float64').reshape(positions)
        if ignore_label is not None:
            counted = label != ignore_label
        clipped = np.clip(np.nan_to_num(np.trunc(label)), 0, classes - 1)
        if invalid_label != 'clip':
            valid = clipped == label
        onehot = np.eye(classes)[clipped.astype(int)]
    else:
        onehot = np.moveaxis(np.asarray(label, dtype='float64'), axis, -1)
    target = weights * ((1 - label_smoothing) * onehot + label_smoothing / classes)
    with np.errstate(invalid='ignore', divide='ignore'):
        values = np.where(target == 0, 0, -target * log_p).sum(-1)  # 0 * inf is 0
        log_sum_exp = np.log(np.exp(pred).sum(-1))
    gradient = -target if from_logits else target.sum(-1, keepdims=True) * p - target
    if lse_square_scale:
        values = values + lse_square_scale * log_sum_exp**2
        gradient = gradient + 2 * lse_square_scale * log_sum_exp[..., None] * p
    values = np.where(counted, np.where(valid, values, np.nan), 0)

    scale = (counted & valid).astype('float64')
    if sample_weight is not None:
        fitted = np.broadcast_to(
            _fit(np.asarray(sample_weight, dtype='float64'), positions, axis, batch_axis), positions
        )
        values, scale = np.where(fitted == 0, 0, values * fitted), scale * fitted
    if weight is not None:
        values, scale = values * weight, scale * weight
    others = tuple(i for i in range(len(positions)) if i != batch_axis - (batch_axis > axis))
    if reduction == 'mean':
        count = np.maximum(counted.sum(others, keepdims=True), 1)
        values, scale = values / count, scale / count
    if reduction != 'none':
        values = values.sum(others)
    gradient = np.where(scale[..., None] == 0, 0, gradient * scale[..., None])
    return values, np.moveaxis(gradient, -1, axis)


def _fit(sample_weight, positions, axis, batch_axis):
    """A sample_weight of any of the three shapes, as something that broadcasts to the positions."""
    if sample_weight.ndim == len(positions) + 1:
        return sample_weight.squeeze(axis)
    if sample_weight.shape == positions:
        return sample_weight
    shape = [1] * len(positions)
    shape[batch_axis - (batch_axis > axis)] = -1
    return sample_weight.reshape(shape)
