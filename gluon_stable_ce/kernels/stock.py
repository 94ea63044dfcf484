"""The class axis reduced by MXNet's log_softmax and pick, in every MXNet 1.x, on every device, exportable.

The layout of the class axis, casts of 16-bit floats and graphs of unknown rank are dealt with here, because
only this kernel needs it.
"""

from typing import Any, Optional, Tuple

from .. import graph_checks
from ..array_api import Array, F
from ..call import Call
from ..labels import fill, read_labels
from .terms import ClassTerms, weighted

HALF = ('float16', 'bfloat16')
Terms = Tuple[
    Array, Optional[Array], Optional[Array]
]  # those of ClassTerms, not weighted by the label's class


def class_terms(
    F: F, call: Call, pred: Array, label: Array, class_weight: Optional[Array] = None
) -> ClassTerms:
    """Reduce the class axis as `kernels.class_terms` describes."""
    if class_weight is not None:
        class_weight = _read_class_weight(F, call, pred, class_weight)  # (C,)
    if not call.options.sparse_label:
        target = label if call.dtype is None else F.cast(label, dtype=call.compute_dtype)
        return ClassTerms(*_reduce(F, call, pred, None, target, class_weight))
    labels = read_labels(F, call, label, pred)
    nll, *others = _reduce(F, call, pred, labels.index, None, class_weight)
    if class_weight is not None:
        nll = weighted(F, nll, F.take(class_weight, labels.index, mode='clip'))
    terms = (None if term is None else fill(F, call, labels, term) for term in (nll, *others))
    return ClassTerms(*terms)


def _read_class_weight(F: F, call: Call, pred: Array, class_weight: Array) -> Array:
    class_weight = F.BlockGrad(F.cast(class_weight, dtype=call.compute_dtype))
    if call.ndim is not None:
        return class_weight
    return graph_checks.with_length(F, class_weight, pred, call.options.axis)


def _reduce(
    F: F,
    call: Call,
    pred: Array,
    index: Optional[Array],
    target: Optional[Array],
    class_weight: Optional[Array],
) -> Terms:
    """Compute the terms of an index, (positions...), or of a target, of `pred`'s shape."""
    axis, ndim = call.options.axis, call.ndim
    if index is not None and call.options.pred_type == 'probs':  # one number per position is enough
        probs = F.cast(F.pick(pred, index, axis=axis), dtype='float64')  # (positions...)
        return _clamped(F, F.log(probs)), None, None
    if call.dtype in HALF:  # unlike log_softmax's own `dtype`, a cast in front of it reaches the fast kernel
        pred = F.cast(pred, dtype='float32')
    if ndim is not None or axis == -1:
        pred = class_axis_last(F, pred, axis, ndim)  # (positions..., C)
        if target is not None:
            target = class_axis_last(F, target, axis, ndim)
        return _terms(F, call, pred, index, target, class_weight)
    if target is None:
        like = index  # (positions...)
    else:
        like = graph_checks.positions_of(F, pred, class_axis_removed(F, target, axis), axis)
        target = class_axis_last(F, target, axis)
    pred = class_axis_last(F, pred, axis)  # some axes of the positions merged
    if index is not None:
        index = F.reshape_like(index, class_axis_removed(F, pred, -1))
    nll, *others = _terms(F, call, pred, index, target, class_weight)
    return (
        F.reshape_like(nll, like),
        *(None if term is None else F.reshape_like(term, like) for term in others),
    )


def class_axis_last(F: F, array: Array, axis: int, ndim: Optional[int] = None) -> Array:
    """Move the class axis to the end, where MXNet's log_softmax is fast.

    If the rank is unknown, the axes on one side of the class axis are merged.
    """
    if ndim is not None:
        axis %= ndim
        if axis == ndim - 1:
            return array
        return F.transpose(array, axes=(*range(axis), *range(axis + 1, ndim), axis))
    if axis == -1:
        return array
    if axis >= 0:
        array = F.reshape(array, shape=(0,) * (axis + 1) + (-1,))  # (before..., C, A)
        return F.transpose(array, axes=(*range(axis), axis + 1, axis))  # (before..., A, C)
    after = -axis - 1
    array = F.reshape(array, shape=(-1,) + (0,) * (after + 1), reverse=True)  # (B, C, after...)
    return F.transpose(array, axes=(0, *range(2, after + 2), 1))  # (B, after..., C)


def class_axis_removed(F: F, pred: Array, axis: int) -> Array:
    """Take one class of `pred`, (positions...), for its shape."""
    return F.BlockGrad(F.squeeze(F.slice_axis(pred, axis=axis, begin=0, end=1), axis=axis))


def _terms(
    F: F, call: Call, pred: Array, index: Optional[Array], target: Any, class_weight: Optional[Array]
) -> Terms:
    """Reduce the last axis of `pred`, (positions..., C)."""
    options = call.options
    zero = F.slice_axis(F.contrib.arange_like(pred, axis=-1), axis=0, begin=0, end=1)  # (1,)
    if options.pred_type == 'logits':
        # for p = 1 oneDNN returns 1.4e-6, which is nearly all of its error where p is nearly 1: measured on
        # one class, it is taken out
        log_p, log_1 = F.log_softmax(pred, axis=-1), F.log_softmax(zero, axis=-1)
    else:
        log_p, log_1 = pred if options.pred_type == 'log_probs' else F.log(pred), zero
    if index is None:
        if class_weight is not None:
            target = target * _at_each_position(F, class_weight, log_p)
        nll = _clamped(F, _expected_log_p(F, log_p, target, log_1), _has_negative(F, target))
    else:
        nll = _clamped(F, _log_p_at(F, log_p, index, log_1))
    return (
        nll,
        _logsumexp(F, pred, log_p, log_1) if options.lse_square_scale else None,
        _clamped(F, _uniform_log_p(F, log_p, log_1, class_weight)) if options.label_smoothing else None,
    )


def _clamped(F: F, log_p: Array, is_signed: Optional[Array] = None) -> Array:
    """Return -`log_p`, with rounding errors below 0 raised to 0. The gradient is that of -`log_p`.

    Where `is_signed`, what is below 0 is no rounding error.
    """
    above = F.relu(log_p)
    if is_signed is not None:
        above = F.where(is_signed, F.zeros_like(above), above)
    return F.BlockGrad(above) - log_p


def _log_p_at(F: F, log_p: Array, index: Array, log_1: Array) -> Array:
    """Log p of the class `index`, with `log_1` for the zero of the scale."""
    return F.pick(log_p, index, axis=-1) - F.take(log_1, index, mode='clip')  # take broadcasts to any rank


def _expected_log_p(F: F, log_p: Array, target: Any, log_1: Array) -> Array:
    """Sum_j target_j (log p_j - log 1). A target of 0 removes its class, also from the gradients.

    A matrix-vector product is ten times as fast as MXNet's sum over classes.
    """
    ones = _ones_per_class(F, log_p)
    log_1 = F.broadcast_mul(log_1, ones)  # (C,)
    # with log 1 at a target of 0, the target's gradient from one sum is minus that from the other
    log_p = F.where(target == 0, _at_each_position(F, log_1, log_p), log_p)
    return F.dot(log_p * target, ones) - F.dot(target, log_1)


def _has_negative(F: F, target: Any) -> Array:
    """Where a target has negative entries, as a policy gradient's have: its loss may be below 0."""
    return F.dot(
        F.relu(-F.BlockGrad(target)), _ones_per_class(F, target)
    )  # (positions...), 0 where there are none


def _uniform_log_p(F: F, log_p: Array, log_1: Array, class_weight: Optional[Array]) -> Array:
    """1/C sum_j w_j log p_j."""
    share = F.softmax(F.zeros_like(F.contrib.arange_like(log_p, axis=-1)))  # (C,), 1/C for each class
    if class_weight is None:
        return F.dot(log_p, share)
    return _expected_log_p(F, log_p, _at_each_position(F, share * class_weight, log_p), log_1)


def _logsumexp(F: F, logits: Array, log_p: Array, log_1: Array) -> Array:
    """Log sum_j exp z_j from the class of the largest logit, which is finite wherever the sum is."""
    index = F.argmax(logits, axis=-1)  # (positions...)
    return F.pick(logits, index, axis=-1) - _log_p_at(F, log_p, index, log_1)


def _at_each_position(F: F, per_class: Array, like: Array) -> Array:
    """Repeat (C,) over (positions..., C), of whatever rank."""
    ones = F.ones_like(F.slice_axis(like, axis=-1, begin=0, end=1))  # (positions..., 1)
    return F.dot(ones, F.expand_dims(per_class, axis=0))


def _ones_per_class(F: F, array: Any) -> Array:
    """(C,) ones for an array of (positions..., C)."""
    return F.ones_like(F.contrib.arange_like(array, axis=-1))
