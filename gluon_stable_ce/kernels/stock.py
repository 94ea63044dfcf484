r"""The class axis reduced by MXNet's log_softmax and pick, in every MXNet 1.x, on every device, exportable.

The NLL of a label y is the softplus of the log-odds L against it, as exact for p near 1 as for p near 0:

.. math:: -\log p_y = \log(1 + e^L), \qquad L = \log \sum_{j \ne y} e^{z_j} - z_y

`log_softmax` of the logits does not give L: it adds 1 for the largest logit to the sum, and so rounds off
what is below 1e-7. So the label's logit is lowered by T = 64 first. Then

.. math:: u = -\log \mathrm{softmax}(z - T e_y)_y = \log(1 + e^{L + T}), \qquad e^L = e^{u - T} - e^{-T}

and the gradient that autograd makes of this is as exact, in each entry. An error in u is the relative error
of e^L, and so of the NLL: 1e-5 in float32, from roundings of numbers near 64 and of the sum; 1e-13 in float64
(``test_exactness.py``). Where hundreds of logits are equal, `log_softmax` rounds each addition to the same
side: its error grows by up to 8e-9 per class (6e-8 with MXNet 1.6 and 1.7; 1.2e-16 in float64). So this file
adds up many classes once more. The page on accuracy derives the formulas.

This file also moves the class axis to the end and casts float16, which the fused operator does not need.
"""

from functools import partial
from typing import Any, Dict, NamedTuple, Optional

from .. import array_api, graph_checks
from ..array_api import Array, F
from ..call import Call
from ..class_terms import ClassTerms, is_impossible, weighted
from ..labels import class_indices, fill, one_per_class, read_labels
from ..options import FLOAT32_MAX

# Classes in a block of the one-hot labels, where their number is unknown. Larger blocks save little time, and
# take more memory where there are few classes.
ONE_HOT_BLOCK = 8 if array_api.HAS_SLICE_LIKE_OF_UNKNOWN_RANK else 1
T = 64.0  # by which the label's logit is lowered: the NLL is exact down to exp(-T)
MOST = 36.0  # of u - T: above it, the NLL is u - T in all digits
LEAST = -FLOAT32_MAX  # in the place of logits of -inf
LEAST_P = 1e-37  # smaller probabilities have fewer digits
SUM_BLOCK = 2**15  # classes that are added up before the rest
MOST_BLOCKS = 7  # also where the number of classes is unknown: more would take more memory


def class_terms(
    F: F, call: Call, pred: Array, label: Array, class_weight: Optional[Array] = None
) -> ClassTerms:
    """Reduce the class axis as `kernels.class_terms` describes."""
    # unlike log_softmax's own `dtype`, a cast in front of it reaches the fast kernel
    if call.dtype == 'float16':
        pred = F.cast(pred, dtype='float32')
    if class_weight is not None:
        class_weight = _read_class_weight(F, call, pred, class_weight)  # (C, 1)
    if not call.options.sparse_label:
        return _dense_terms(F, call, pred, label, class_weight)
    labels = read_labels(F, call, label, pred)
    terms = _sparse_terms(F, call, pred, labels.index, class_weight)
    if class_weight is not None:
        weight = F.squeeze(F.take(class_weight, labels.index, mode='clip'), axis=-1)
        terms = terms._replace(nll=weighted(F, terms.nll, weight))
    return terms.map(partial(fill, F, call, labels))


def _read_class_weight(F: F, call: Call, pred: Array, class_weight: Array) -> Array:
    class_weight = F.BlockGrad(F.reshape(class_weight, shape=(1, -1)))
    if call.ndim is None:
        one = one_per_class(F, pred, call.options.axis)  # (1, C)
        class_weight = graph_checks.require_equal(F, class_weight, F.cast(one, dtype='float32'))
        class_weight = array_api.promoted(F, class_weight, one)
    if call.dtype is not None:
        class_weight = F.cast(class_weight, dtype=call.compute_dtype)
    return F.transpose(class_weight)


# Sparse labels


def _sparse_terms(F: F, call: Call, pred: Array, index: Array, class_weight: Optional[Array]) -> ClassTerms:
    """Compute the terms of an index, of the shape of `align_label`, not yet weighted by its class."""
    axis = call.options.axis
    compute = _terms_of_logits if call.options.pred_type == 'logits' else _terms_of_log_probs
    pred = class_axis_last(F, pred, axis, call.ndim)  # (..., C)
    last = class_axis_last(F, index, axis) if call.ndim is None else index
    return _restored(F, call, compute(F, call, pred, last, class_weight), index)


def _restored(F: F, call: Call, terms: ClassTerms, like: Array) -> ClassTerms:
    """Give terms, (..., 1) each, the shape of the positions; in a graph of symbols, that of `like`."""
    if call.ndim is None and call.options.axis == -1:
        return terms
    return terms.map(
        lambda term: F.reshape_like(term, like) if call.ndim is None else F.squeeze(term, axis=-1)
    )


def _pick(F: F, array: Array, index: Array) -> Any:
    return F.pick(array, index, axis=-1, keepdims=True)  # (..., 1)


def _terms_of_log_probs(F, call, log_p, index, class_weight):
    picked: Any = _promoted(F, call, _pick(F, log_p, index))
    nll = _clamped(F, -picked, _is_impossible(F, picked))
    if not call.options.label_smoothing:
        return ClassTerms(nll)
    log_p = _promoted(F, call, log_p)
    share = _share(F, call, log_p, class_weight)
    is_signed = F.dot(_is_impossible(F, log_p), share)
    return ClassTerms(nll, uniform_nll=_clamped(F, _uniform_nll(F, log_p, share, class_weight), is_signed))


def _terms_of_logits(F, call, logits, index, class_weight):
    """Compute the terms of logits, (..., C), and an index of their positions, by this file's formula."""
    options = call.options
    lowered = _lowered(F, call, logits, index)
    nll, shift, rise = _nll_of_lowered(F, call, logits, lowered)
    if not options.lse_square_scale and not options.label_smoothing:
        return ClassTerms(nll)
    logsumexp = _logsumexp_of(F, lowered.logits, lowered.log_p, lowered.total) + rise
    uniform_nll = None
    if options.label_smoothing:
        uniform_nll = _uniform_of_lowered(F, call, lowered, logsumexp, shift, rise, class_weight)
    return ClassTerms(nll, logsumexp if options.lse_square_scale else None, uniform_nll)


class _Lowered(NamedTuple):
    """Logits of which the label's is lowered. The last two are for many classes, else None."""

    logits: Array  # (..., C)
    index: Array  # of the label
    log_p: Array  # (..., C), by log_softmax
    p_label: Optional[Array]  # (..., 1), exp log_p at the label, which knows nothing of the rounding of log_p
    total: Optional[Array]  # (..., 1), sum_j exp log_p_j: 1 if `log_softmax` made no error


def _lowered(F: F, call: Call, logits: Array, index: Array) -> _Lowered:
    lowered = _lower(F, call, logits, index)
    log_p = F.log_softmax(lowered, axis=-1)
    if not call.has_many_classes:
        return _Lowered(lowered, index, log_p, None, None)
    p = _probabilities(F, lowered, log_p)
    return _Lowered(lowered, index, log_p, _pick(F, p, index), _sum_over_classes(F, call, p))


def _lower(F: F, call: Call, logits: Array, index: Array) -> Array:
    """Add -T to the label's logit. The logits keep their gradient."""
    arguments = {'on_value': -T, 'dtype': call.compute_dtype}
    if call.classes is not None:
        shift = F.one_hot(index, depth=call.classes, **arguments)
        shift = _last_two_merged(F, shift) if call.ndim is None else shift  # (..., 1, C)
    else:
        shift = _one_hot_in_blocks(F, call, logits, index, arguments)
    shift = F.BlockGrad(shift)
    # the shift comes first: MXNet adds to the first array in place
    return shift + logits if call.dtype is not None else array_api.add_float32(F, logits, shift)


def _one_hot_in_blocks(F: F, call: Call, logits: Array, index: Array, arguments: Dict[str, Any]) -> Array:
    """Make a `one_hot` of unknown depth: one for each block of classes. An index outside of it gives zeros.

    Calls of arrays have `call.classes`, unless the classes are few: then a block has one class.
    """
    block = ONE_HOT_BLOCK if call.ndim is None else 1
    if call.ndim is None:
        classes = class_indices(F, logits, -1)  # (1, C)
    else:
        index = F.expand_dims(index, axis=-1)  # (..., 1)
        classes = F.expand_dims(F.contrib.arange_like(logits, axis=-1), axis=0)
    index, classes = (F.cast(array, dtype=call.label_compare_dtype) for array in (index, classes))
    firsts = F.slice(classes, begin=(None, None), end=(None, None), step=(1, block))  # (1, K)
    in_block = F.broadcast_sub(F.expand_dims(index, axis=-1), firsts)  # (..., 1, K)
    one_hot = F.one_hot(in_block, depth=block, **arguments)  # (..., 1, K, block)
    one_hot = _last_two_merged(F, _last_two_merged(F, one_hot))
    return one_hot if block == 1 else F.slice_like(one_hot, logits)  # (..., C)


def _last_two_merged(F: F, array: Array) -> Array:
    return F.reshape(array, shape=(-2, -3), reverse=True)


def _nll_of_lowered(F, call, logits, lowered):
    """Return three arrays, (..., 1) each.

    - the NLL
    - by how much the label's logit was lowered: -T, or less where logits are so large that this rounds
    - by how much the logsumexp of the logits is above that of the lowered ones, as `log_softmax` has it
    """
    z_label, log_p_label = (_pick(F, array, lowered.index) for array in (logits, lowered.log_p))
    p_label, total = lowered.p_label, lowered.total
    if call.dtype is None:
        z_label = array_api.multiply(F, F.ones_like(log_p_label), z_label)  # in log_p's dtype
    z_label = F.maximum(z_label, LEAST)
    z = F.BlockGrad(z_label)
    z_lowered = z - T
    shift = z_lowered - z
    rounded_off = (z_lowered - shift) - z  # by the first of these subtractions
    if total is not None:
        log_p_label = _with_true_gradient(F, log_p_label, z_label, total)
    u_less_t = shift - log_p_label  # what is rounded off is too little to be added to it
    if total is not None:  # p is too large by the factor of its sum; `u_less_t` was rounded, and log_p before
        too_large = F.exp(F.BlockGrad(shift - u_less_t)) * total / p_label
        too_large = F.where(p_label > LEAST_P, too_large, total)
    bounded = F.minimum(u_less_t, MOST)
    odds = F.exp(bounded) if total is None else F.exp(bounded) * too_large
    # where p_y is 1, both exponentials are equal
    log1p = F.log1p(F.exp(rounded_off) * F.relu(odds - F.exp(shift)))
    rise = log1p - bounded - rounded_off
    return log1p + F.relu(u_less_t - MOST), shift, rise if total is None else rise + F.log(total / too_large)


def _probabilities(F: F, lowered: Array, log_p: Array) -> Any:
    """Return exp log_p_j, (..., C). `softmax` has the same error, and takes a tenth of the time of `exp`."""
    if array_api.HAS_ONEDNN_LOG_SOFTMAX:
        return F.softmax(F.BlockGrad(lowered), axis=-1)
    return F.exp(F.BlockGrad(log_p))


def _with_true_gradient(F: F, log_p: Any, z: Any, total: Any) -> Array:
    """Return the log_p of a class of each position, which has logit z, with its true gradient.

    The gradient of `log_softmax` has its probabilities, which are too large by a factor, their sum. So that
    gradient is divided by the sum, and what the class's own entry then lacks goes to its logit.
    """
    excess, value = 1 - 1 / total, F.BlockGrad(log_p)
    mended = value + (1 - excess) * (log_p - value) + excess * (z - F.BlockGrad(z))
    return F.where(value - value == 0, mended, log_p)


def _uniform_of_lowered(F, call, lowered, logsumexp, shift, rise, class_weight):
    """Compute the uniform NLL from lowered logits.

    Each of their log_p is too large by the rise, and the label's is too small by T. The gradient,
    p sum_j share_j - share, is that of the logsumexp and of the logits. `log_softmax` would add up a gradient
    for each class, one by one: off by 1e-3 for 50,257 classes.
    """
    share = _share(F, call, lowered.log_p, class_weight)  # (C, 1), w_j / C
    sum_of_shares = _sum_over_classes(F, call, F.transpose(share))  # (1, 1)
    share_of_label = F.take(share, lowered.index, mode='clip')
    if call.ndim is None:
        share_of_label = F.squeeze(share_of_label, axis=-1)
    of_lowered = -_sum_over_classes(F, call, F.maximum(lowered.log_p, LEAST), share)
    value = of_lowered + F.broadcast_mul(rise, sum_of_shares) + shift * share_of_label
    # 0 with these gradients; inf where a class is masked
    of_logsumexp = F.broadcast_mul(logsumexp - F.BlockGrad(logsumexp), sum_of_shares)
    zeros = lowered.logits - F.maximum(F.BlockGrad(lowered.logits), LEAST)
    of_logits = _uniform_nll(F, zeros, share, class_weight)
    return F.BlockGrad(_clamped(F, value)) + (of_logsumexp + of_logits)


# Dense labels


def _dense_terms(F: F, call: Call, pred: Array, target: Array, class_weight: Optional[Array]) -> ClassTerms:
    """Compute the terms of a target, of `pred`'s shape."""
    options, axis, ndim = call.options, call.options.axis, call.ndim
    pred = _promoted(F, call, pred)
    like = pred
    if ndim is None:  # the graph reads pred first
        target = array_api.promoted(F, target, array_api.first(F, pred))
    if call.dtype is not None:
        target = F.cast(target, dtype=call.compute_dtype)
    if ndim is None and axis != -1:
        like, other = (F.BlockGrad(array_api.first(F, array, axis)) for array in (pred, target))
        like = graph_checks.require_equal(F, like, other)
    pred, target = (class_axis_last(F, array, axis, ndim) for array in (pred, target))  # (..., C)
    log_p = F.log_softmax(pred, axis=-1) if options.pred_type == 'logits' else pred
    if options.pred_type == 'probs':
        log_p = F.log(pred)
    ones = F.ones_like(_column(F, call, log_p))  # (C, 1)
    weighted_target = target if class_weight is None else target * _at_each_position(F, class_weight, log_p)
    is_signed: Any = F.dot(F.relu(-F.BlockGrad(target)), ones)  # the loss may be below 0, as policy gradients
    share = _share(F, call, log_p, class_weight) if options.label_smoothing else None
    is_uniform_signed = None
    if options.pred_type == 'log_probs':
        is_counted = F.BlockGrad(weighted_target) != 0
        is_signed = is_signed + F.dot(_is_impossible(F, log_p) * is_counted, ones)
        if share is not None:
            is_uniform_signed = F.dot(_is_impossible(F, log_p), share)
    uniform_nll = None
    if share is not None:
        uniform_nll = _clamped(F, _uniform_nll(F, log_p, share, class_weight), is_uniform_signed)
    terms = ClassTerms(
        _clamped(F, _expected_nll(F, log_p, weighted_target, ones), is_signed),
        _logsumexp_of(F, pred, log_p) if options.lse_square_scale else None,
        uniform_nll,
    )
    return _restored(F, call, terms, like)


def _expected_nll(F: F, log_p: Array, target: Any, ones: Array) -> Array:
    """Sum_j target_j (-log p_j). A target of 0 removes its class, also from the gradients."""
    nll = F.where(target == 0, F.zeros_like(log_p), -log_p)
    return F.dot(nll * target, ones)


# Both


def _logsumexp_of(F: F, logits: Array, log_p: Array, total: Optional[Array] = None) -> Array:
    """Log sum_j exp z_j from the class of the largest logit, which is finite wherever the sum is."""
    index = F.argmax(logits, axis=-1, keepdims=True)
    z, log_p_largest = _pick(F, logits, index), _pick(F, log_p, index)
    return z - (log_p_largest if total is None else _with_true_gradient(F, log_p_largest, z, total))


def _uniform_nll(F: F, log_p: Array, share: Array, class_weight: Optional[Array]) -> Array:
    """1/C sum_j w_j (-log p_j)."""
    if class_weight is None:
        return -F.dot(log_p, share)
    return _expected_nll(F, log_p, _at_each_position(F, share, log_p), F.ones_like(share))


# Sums over classes are products with (C, 1): a matrix product is ten times as fast as MXNet's sum. Not with
# (C,): onnxruntime 1.16 computes a transposed matrix times a vector wrongly.


def _sum_over_classes(F: F, call: Call, array: Array, share: Optional[Array] = None) -> Any:
    """Sum_j array_j share_j, (..., 1), of finite numbers; sum_j array_j without shares, which are (C, 1).

    Of many classes, the even and the odd ones of each block are added up first. So fewer roundings add up in
    one sum. A matrix product adds up hundreds of neighbours before the rest: hence even and odd.
    """
    ones = F.ones_like(_column(F, call, array))  # (C, 1)
    if not call.has_many_classes:
        return F.dot(array, ones if share is None else share)
    blocks = MOST_BLOCKS if call.classes is None else min(MOST_BLOCKS, 1 + call.classes // SUM_BLOCK)
    index = F.contrib.arange_like(ones)
    block, is_odd = F.floor(index * _equal_share(F, ones) * blocks), index - 2 * F.floor(index / 2)
    # one block more, in case that 1 / C is rounded up
    is_in_sum = F.one_hot(2 * block + is_odd, depth=2 * blocks + 2, dtype=call.compute_dtype)
    is_in_sum = _last_two_merged(F, is_in_sum)  # (C, sums)
    if call.dtype is None:
        is_in_sum = array_api.promoted(F, is_in_sum, ones)
    sums = F.dot(array, is_in_sum if share is None else F.broadcast_mul(share, is_in_sum))  # (..., sums)
    return F.dot(sums, F.ones_like(F.transpose(array_api.first(F, is_in_sum))))


def _column(F: F, call: Call, array: Array) -> Array:
    """(C, 1) in the dtype of an array of (..., C). Its values mean nothing."""
    if call.ndim is None:
        return F.transpose(one_per_class(F, array, -1))
    return F.expand_dims(F.contrib.arange_like(array, axis=-1), axis=1)


def _share(F: F, call: Call, log_p: Array, class_weight: Optional[Array]) -> Array:
    """(C, 1), w_j / C."""
    share = _equal_share(F, _column(F, call, log_p))
    return share if class_weight is None else share * class_weight


def _equal_share(F: F, column: Array) -> Any:
    """(C, 1), 1 / C."""
    return F.softmax(F.zeros_like(column), axis=0)


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

    If the rank is unknown, all other axes are merged to two.
    """
    if axis == -1 or axis + 1 == ndim:
        return array
    if ndim is None:
        return F.transpose(array_api.three_axes(F, array, axis), axes=(0, 2, 1))
    axis %= ndim
    return F.transpose(array, axes=(*range(axis), *range(axis + 1, ndim), axis))


def _at_each_position(F: F, per_class: Array, like: Array) -> Array:
    """Repeat (C, 1) over (..., C), of whatever rank."""
    return F.dot(F.ones_like(array_api.first(F, like, axis=-1)), F.transpose(per_class))
