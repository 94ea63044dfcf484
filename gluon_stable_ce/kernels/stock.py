r"""The class axis reduced by MXNet's log_softmax and pick, in every MXNet 1.x, on every device, exportable.

The NLL of a label y is the softplus of the log-odds L against it, as exact for p near 1 as for p near 0:

.. math:: -\log p_y = \log(1 + e^L), \qquad L = \log \sum_{j \ne y} e^{z_j} - z_y

`log_softmax` of the logits does not give L: it adds 1 for the largest logit to the sum, and so rounds off
what is below 1e-7. So the label's logit is lowered by T = 64 first. Then

.. math:: u = -\log \mathrm{softmax}(z - T e_y)_y = \log(1 + e^{L + T}), \qquad L = u - T + \log(1 - e^{-u})

and the gradient that autograd makes of this is as exact, in each entry. An error in L is the relative error
of the NLL: 1e-5 in float32, up to 50,257 classes, most of it the rounding of numbers near 64; 1e-13 in
float64, up to 10,000 (``test_exactness.py``). Where hundreds of logits are equal, `log_softmax` rounds each
addition to the same side: that adds up to 8e-9 per class, and 1.2e-16 in float64. The page on accuracy
derives the formula.

The layout of the class axis, casts of 16-bit floats and graphs of unknown rank are dealt with here, because
only this kernel needs it.
"""

from typing import Any, NamedTuple, Optional, Tuple

from .. import array_api, graph_checks
from ..array_api import Array, F
from ..call import Call
from ..class_terms import ClassTerms, is_impossible, weighted
from ..labels import fill, read_labels

HALF = ('float16', 'bfloat16')
T = 64.0  # by which the label's logit is lowered: the NLL is exact down to exp(-T)
LEAST = 1e-30  # in the place of u = 0, whose logarithm has no gradient


def class_terms(
    F: F, call: Call, pred: Array, label: Array, class_weight: Optional[Array] = None
) -> ClassTerms:
    """Reduce the class axis as `kernels.class_terms` describes."""
    if call.dtype in HALF:  # unlike log_softmax's own `dtype`, a cast in front of it reaches the fast kernel
        pred = F.cast(pred, dtype='float32')
    if class_weight is not None:
        class_weight = _read_class_weight(F, call, pred, class_weight)  # (C,)
    if not call.options.sparse_label:
        return _dense_terms(F, call, pred, label, class_weight)
    labels = read_labels(F, call, label, pred)
    terms = _sparse_terms(F, call, pred, labels.index, class_weight)
    if class_weight is not None:
        weight = F.take(class_weight, labels.index, mode='clip')  # (positions...)
        terms = terms._replace(nll=weighted(F, terms.nll, weight))
    return ClassTerms(*(None if term is None else fill(F, call, labels, term) for term in terms))


def _read_class_weight(F: F, call: Call, pred: Array, class_weight: Array) -> Array:
    class_weight = F.BlockGrad(class_weight)
    if call.ndim is None:
        class_weight = graph_checks.require_length(F, class_weight, pred, call.options.axis)
    if call.dtype is None:
        return array_api.promoted(F, class_weight, F.contrib.arange_like(pred, axis=call.options.axis))
    return F.cast(class_weight, dtype=call.compute_dtype)


# Sparse labels


def _sparse_terms(F: F, call: Call, pred: Array, index: Array, class_weight: Optional[Array]) -> ClassTerms:
    """Compute the terms of an index, (positions...), not yet weighted by its class."""
    axis, pred_type = call.options.axis, call.options.pred_type
    compute = _terms_of_logits if pred_type == 'logits' else _terms_of_log_probs
    pred = class_axis_last(F, pred, axis, call.ndim)  # (positions..., C)
    if call.ndim is not None or axis == -1:
        return compute(F, call, pred, index, class_weight)
    merged = F.reshape_like(index, class_axis_removed(F, pred, -1))  # as some axes of `pred` are
    terms = compute(F, call, pred, merged, class_weight)
    return ClassTerms(*(None if term is None else F.reshape_like(term, index) for term in terms))


def _terms_of_log_probs(F, call, log_p, index, class_weight):
    picked: Any = _promoted(F, call, F.pick(log_p, index, axis=-1))
    nll = _clamped(F, -picked, _is_impossible(F, picked))
    if not call.options.label_smoothing:
        return ClassTerms(nll)
    log_p = _promoted(F, call, log_p)
    is_signed = _dot(F, _is_impossible(F, log_p), _share(F, log_p, class_weight))
    return ClassTerms(nll, uniform_nll=_clamped(F, _uniform_nll(F, log_p, class_weight), is_signed))


def _terms_of_logits(F, call, logits, index, class_weight):
    """Compute the terms of logits, (positions..., C), by the formula at the head of this file."""
    options = call.options
    lowered = _lower(F, call, logits, index)  # (positions..., C)
    log_p = F.log_softmax(lowered, axis=-1)
    odds = _odds(F, call, logits, lowered, log_p, index)
    nll = F.where(odds.u <= 0, F.zeros_like(odds.u), odds.above + odds.log1p)  # where u <= 0, p_y is 1
    return ClassTerms(
        nll,
        _logsumexp(F, lowered, log_p, odds) if options.lse_square_scale else None,
        _uniform_of_lowered(F, log_p, odds, index, class_weight) if options.label_smoothing else None,
    )


def _lower(F: F, call: Call, logits: Array, index: Array) -> Array:
    """Lower the label's logit by T: by an addition, which has no gradient of what is added."""
    if call.one_hot_depth is not None:
        by = F.one_hot(index, depth=call.one_hot_depth, on_value=-T, dtype=call.compute_dtype)
        return logits + F.BlockGrad(by)
    by = F.BlockGrad(_is_label(F, call, logits, index) * -T)
    return array_api.add_float32(F, logits, by) if call.dtype is None else logits + by


def _is_label(F: F, call: Call, logits: Array, index: Array) -> Array:
    """Compute 1 at the label and 0 at other classes, (positions..., C)."""
    if call.ndim is not None:  # few classes, which float32 holds as they are
        classes = F.contrib.arange_like(logits, axis=-1)  # (C,)
        index = F.cast(index, dtype=call.compute_dtype)
    else:
        row = F.slice_axis(logits, axis=0, begin=0, end=1)  # arange_like counts in the dtype of its input
        classes = _distinct(F, call, F.contrib.arange_like(F.cast(row, dtype='float64'), axis=-1))
        index = _distinct(F, call, index)
    return F.broadcast_equal(F.expand_dims(index, axis=-1), classes)


def _distinct(F: F, call: Call, index: Any) -> Array:
    """Return another float32 for each class: float32 has as many numbers, but no integers beyond 2**24."""
    high = F.floor(index / 2**23)
    return F.cast((1 + (index / 2**23 - high)) * 2**high, dtype=call.compute_dtype)


class _Odds(NamedTuple):
    """What the terms of logits are made of, (positions...) each."""

    u: Array  # softplus(L + T)
    by: Array  # T, or what is left of it where logits are so large that the subtraction rounds
    is_above: Array  # whether L > 0
    above: Array  # max(L, 0)
    log1p: Array  # log(1 + exp(-|L|)): softplus(L) is the sum of both
    z_label: Array


def _odds(F, call, logits, lowered, log_p, index):
    z_label = _promoted(F, call, F.pick(logits, index, axis=-1))
    z_lowered = F.pick(lowered, index, axis=-1)
    by = F.BlockGrad(z_label - z_lowered)
    rest = F.BlockGrad(z_lowered + by - z_label)  # what the subtraction of T rounded off
    u = -F.pick(log_p, index, axis=-1)
    positive = F.maximum(u, LEAST)
    log_odds = (positive - by) + rest + F.log(-F.expm1(-positive))
    log_odds = F.where(log_odds == log_odds, log_odds, u)  # a label of -inf makes `by` NaN, and u infinite
    is_above = log_odds > 0
    # by `where`: relu and abs have gradient 0 at L = 0, where two logits are equal
    above = F.where(is_above, log_odds, F.zeros_like(log_odds))
    return _Odds(u, by, is_above, above, F.log1p(F.exp(F.where(is_above, -log_odds, log_odds))), z_label)


def _logsumexp(F: F, lowered: Array, log_p: Array, odds: _Odds) -> Array:
    """Log sum_j exp z_j: of the lowered logits, it is that of the others where these have most of the sum."""
    largest = F.argmax(lowered, axis=-1)  # (positions...), at which it is finite wherever the sum is
    others = F.pick(lowered, largest, axis=-1) - F.pick(log_p, largest, axis=-1)
    return F.where(odds.is_above, others, odds.z_label) + odds.log1p


def _uniform_of_lowered(F, log_p, odds, index, class_weight):
    """1/C sum_j w_j (-log p_j), from the lowered logits.

    Their logsumexp is smaller by `delta`, and the label's logit by T.
    """
    zero = F.zeros_like(odds.u)
    delta = odds.log1p - F.where(odds.is_above, zero, odds.u - odds.by)
    share = _share(F, log_p, class_weight)  # (C,), w_j / C
    all_classes = F.broadcast_mul(delta, F.reshape(F.dot(share, F.ones_like(share)), shape=(1,)))
    by = F.where(odds.by == odds.by, odds.by, F.ones_like(odds.by) * T)
    label = by * F.take(share, index, mode='clip')
    return _clamped(F, _uniform_nll(F, log_p, class_weight) + all_classes - label)


# Dense labels


def _dense_terms(F: F, call: Call, pred: Array, target: Array, class_weight: Optional[Array]) -> ClassTerms:
    """Compute the terms of a target, of `pred`'s shape."""
    options, axis, ndim = call.options, call.options.axis, call.ndim
    pred = _promoted(F, call, pred)
    if call.ndim is None:  # the graph reads pred first
        target = array_api.promoted(F, target, F.slice_axis(pred, axis=0, begin=0, end=1))
    if call.dtype is not None:
        target = F.cast(target, dtype=call.compute_dtype)
    if ndim is None and axis != -1:
        like = graph_checks.positions_of(F, pred, class_axis_removed(F, target, axis), axis)
    pred, target = (class_axis_last(F, array, axis, ndim) for array in (pred, target))  # (positions..., C)
    log_p = F.log_softmax(pred, axis=-1) if options.pred_type == 'logits' else pred
    if options.pred_type == 'probs':
        log_p = F.log(pred)
    weighted_target = target if class_weight is None else target * _at_each_position(F, class_weight, log_p)
    is_signed: Any = _has_negative(F, target)
    is_uniform_signed = None
    if options.pred_type == 'log_probs':
        is_counted = F.BlockGrad(weighted_target) != 0
        is_signed = is_signed + _dot(F, _is_impossible(F, log_p) * is_counted, _ones_per_class(F, log_p))
        is_uniform_signed = _dot(F, _is_impossible(F, log_p), _share(F, log_p, class_weight))
    uniform_nll = None
    if options.label_smoothing:
        uniform_nll = _clamped(F, _uniform_nll(F, log_p, class_weight), is_uniform_signed)
    terms: Tuple[Optional[Array], ...] = (
        _clamped(F, _expected_nll(F, log_p, weighted_target), is_signed),
        _logsumexp_of(F, pred, log_p) if options.lse_square_scale else None,
        uniform_nll,
    )
    if ndim is None and axis != -1:
        terms = tuple(None if term is None else F.reshape_like(term, like) for term in terms)
    return ClassTerms(*terms)


def _expected_nll(F: F, log_p: Array, target: Any) -> Array:
    """Sum_j target_j (-log p_j). A target of 0 removes its class, also from the gradients."""
    nll = F.where(target == 0, F.zeros_like(log_p), -log_p)
    return _dot(F, nll * target, _ones_per_class(F, log_p))


def _has_negative(F: F, target: Any) -> Array:
    """Where a target has negative entries, as a policy gradient's have: its loss may be below 0."""
    # (positions...), 0 where there are none
    return _dot(F, F.relu(-F.BlockGrad(target)), _ones_per_class(F, target))


def _logsumexp_of(F: F, logits: Array, log_p: Array) -> Array:
    """Log sum_j exp z_j from the class of the largest logit, which is finite wherever the sum is."""
    index = F.argmax(logits, axis=-1)  # (positions...)
    return F.pick(logits, index, axis=-1) - F.pick(log_p, index, axis=-1)


# Both


def _uniform_nll(F: F, log_p: Array, class_weight: Optional[Array]) -> Array:
    """1/C sum_j w_j (-log p_j)."""
    share = _share(F, log_p, class_weight)
    if class_weight is None:
        return -_dot(F, log_p, share)
    return _expected_nll(F, log_p, _at_each_position(F, share, log_p))


def _dot(F: F, array: Any, per_class: Array) -> Any:
    """Sum an array of (positions..., C) with a weight per class, (C,).

    A matrix product is ten times as fast as MXNet's sum over classes. It is one with (C, 1), as onnxruntime
    1.16 computes a transposed matrix times a vector wrongly.
    """
    return F.squeeze(F.dot(array, F.expand_dims(per_class, axis=1)), axis=-1)


def _share(F: F, log_p: Array, class_weight: Optional[Array]) -> Array:
    """(C,), w_j / C."""
    share: Any = F.softmax(F.zeros_like(F.contrib.arange_like(log_p, axis=-1)))  # 1/C for each class
    return share if class_weight is None else share * class_weight


def _clamped(F: F, nll: Any, is_signed: Optional[Array] = None) -> Array:
    """Raise rounding errors below 0 to 0. The gradient is that of `nll`.

    Where `is_signed`, what is below 0 is no rounding error.
    """
    below = F.relu(-F.BlockGrad(nll))
    if is_signed is not None:
        below = F.where(is_signed, F.zeros_like(below), below)
    return nll + below


def _is_impossible(F: F, log_p: Any) -> Any:
    """Where log-probabilities are above 0 by more than a rounding error. There the loss is negative."""
    return is_impossible(F.BlockGrad(log_p), 'log_probs')


def _promoted(F: F, call: Call, array: Array) -> Array:
    return array if call.dtype is not None else array_api.float32_or_64(F, array)


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


def _at_each_position(F: F, per_class: Array, like: Array) -> Array:
    """Repeat (C,) over (positions..., C), of whatever rank."""
    ones = F.ones_like(F.slice_axis(like, axis=-1, begin=0, end=1))  # (positions..., 1)
    return F.dot(ones, F.expand_dims(per_class, axis=0))


def _ones_per_class(F: F, array: Any) -> Array:
    """(C,) ones for an array of (positions..., C)."""
    return F.ones_like(F.contrib.arange_like(array, axis=-1))
