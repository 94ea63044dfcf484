r"""The numerics: cross entropy per position, as functions of ``F`` (``mx.nd`` or ``mx.sym``), for use inside any HybridBlock.

The only file with mathematics in it. Everything is in nats. The class axis, of size C, is reduced once, by `class_terms`; labels, masks,
weights, smoothing and reductions then work on arrays of one number per position. Arrays are MXNet's classic ones. Where a function
takes `ndim`, it is the rank of ``pred`` if that is known, as it is for arrays and is not for symbols. Shapes that do not fit raise MXNet's
own errors: the checks are the loss's.

>>> import mxnet as mx
>>> loss, _ = softmax_cross_entropy(mx.nd, mx.nd.array([[0, 99], [2, 1]]), mx.nd.array([0, 0]))
>>> loss.asnumpy().round(4)
array([99.    ,  0.3133], dtype=float32)
"""
from collections import namedtuple
from typing import Any, Dict, Optional, Tuple

__all__ = ['class_axis_last', 'class_terms', 'read_labels', 'reduce_positions', 'softmax_cross_entropy', 'weighted']

Labels = namedtuple('Labels', 'index valid counted')
Labels.__doc__ = "Per position: the class `index`, in [0, C) or NaN of NaN; whether the label is `valid`; and `counted`, or None for all."

Terms = namedtuple('Terms', 'nll lse spread')
Terms.__doc__ = "Per position: `nll`; and, or None if not asked for, `lse`, log sum exp of the logits, and `spread`, -1/C sum w_j log p_j."


def class_axis_last(F: Any, array: Any, axis: int, ndim: Optional[int] = None) -> Any:
    """`array` with its class axis last, as MXNet's fast log_softmax wants it; of unknown rank, the axes on one side come out merged."""
    if ndim is not None:
        axis %= ndim
        if axis == ndim - 1:
            return array
        return F.transpose(array, axes=(*range(axis), *range(axis + 1, ndim), axis))
    if axis == -1:
        return array
    if axis >= 0:  # (before..., C, after...) -> (before..., C, A) -> (before..., A, C)
        array = F.reshape(array, shape=(0,) * (axis + 1) + (-1,))
        return F.transpose(array, axes=(*range(axis), axis + 1, axis))
    after = -axis - 1  # (before..., C, after...) -> (B, C, after...) -> (B, after..., C)
    array = F.reshape(array, shape=(-1,) + (0,) * (after + 1), reverse=True)
    return F.transpose(array, axes=(0, *range(2, after + 2), 1))


def weighted(F: Any, term: Any, weight: Any) -> Any:
    """`term` times `weight`, where a weight of 0 removes the term, be it infinite or NaN: 0 * -inf is 0, in value and gradient."""
    return F.where(weight == 0, F.zeros_like(term), term * weight)


def read_labels(F: Any, label: Any, pred: Any, ignore_label: Optional[int] = None, label_dtype: Optional[str] = 'float64',
                classes: Optional[int] = None) -> Labels:
    """What sparse labels mean: the one place that decides which of them are valid and which count.

    Parameters
    ----------
    label : (positions...), any dtype that can name the classes
    pred : (positions..., C); only its last axis is looked at
    ignore_label : int or None
    label_dtype : 'float32', 'float64' or None
        In which dtype labels are compared. 'float64' holds every label of every dtype. 'float32' holds all classes of integers and of
        narrower floats, and rounds none of their other values to a class. None if `label` and `pred` have the same dtype.
    classes : int, optional
        C, where a graph may rely on it: then no array of all classes is made.

    Returns
    -------
    Labels
        A label outside [0, C), NaN or not an integer is not `valid`; an ignored one is whatever it is, but not `counted`.
    """
    label = F.BlockGrad(label)  # its gradient is 0, and MXNet's take cannot add up several of those
    compared = label if label_dtype is None else F.cast(label, dtype=label_dtype)
    if classes is not None and classes <= 2 ** 24:  # up to which float32, the type of the bounds, holds all integers
        index = found = F.floor(F.clip(compared, 0, classes - 1))
    else:
        index = F.take(F.contrib.arange_like(pred, axis=-1), label, mode='clip')  # of pred's dtype
        found = index if label_dtype is None else F.cast(index, dtype=label_dtype)
    return Labels(index, found == compared, None if ignore_label is None else compared != ignore_label)


def class_terms(F: Any, pred: Any, index: Any = None, target: Any = None, pred_type: str = 'logits', lse: bool = False,
                spread: bool = False, class_weight: Any = None) -> Terms:
    r"""Reduce the class axis, the last one, to one number per position. A faster way to do that belongs here; nothing above would notice.

    Parameters
    ----------
    pred : (positions..., C); what `pred_type` says: 'logits', 'log_probs' or 'probs'
    index : (positions...)
        The class of each position, or None if there is a `target`.
    target : (positions..., C)
        How much of each class, or None if there is an `index`.
    lse, spread : bool
        Which other terms are wanted.
    class_weight : (C,), optional
        The weights in `spread`.

    Returns
    -------
    Terms
        `nll` is never negative.
    """
    if index is not None and pred_type == 'probs':  # take one number per position first, then be exact about it
        return Terms(F.relu(-F.log(F.cast(F.pick(pred, index, axis=-1), dtype='float64'))), None, None)
    zero = F.slice_axis(F.contrib.arange_like(pred, axis=-1), axis=0, begin=0, end=1)  # (1,)
    if pred_type == 'logits':
        # oneDNN answers log 1 with -1.4e-6, and that is nearly all of its error where p is nearly 1: measure it on one class, take it out
        log_p, log_1 = F.log_softmax(pred, axis=-1), F.log_softmax(zero, axis=-1)
    else:
        log_p, log_1 = pred if pred_type == 'log_probs' else F.log(pred), zero
    if index is None:
        nll = _expected_nll(F, log_p, target, log_1)
    else:
        nll = F.relu(_nll_of(F, log_p, index, log_1))
    if lse and index is None:
        index = F.argmax(pred, axis=-1)
    return Terms(nll,
                 _logsumexp(F, pred, log_p, index, log_1) if lse else None,
                 _spread(F, log_p, log_1, class_weight) if spread else None)


def _nll_of(F, log_p, index, log_1):
    """-log p of the class `index`, with `log_1` for the zero of the scale."""
    return F.take(log_1, index, mode='clip') - F.pick(log_p, index, axis=-1)  # take broadcasts to any rank


def _expected_nll(F, log_p, target, log_1):
    """-sum_j target_j log p_j. Sums over classes are matrix-vector products, ten times as fast as MXNet's own sum."""
    ones = F.ones_like(F.contrib.arange_like(log_p, axis=-1))  # (C,)
    zero_of_scale = F.dot(target, F.broadcast_mul(log_1, ones))
    return F.relu(zero_of_scale - F.dot(weighted(F, log_p, target), ones))


def _spread(F, log_p, log_1, class_weight):
    """-1/C sum_j w_j log p_j."""
    uniform = F.softmax(F.zeros_like(F.contrib.arange_like(log_p, axis=-1)))  # 1/C for each class
    if class_weight is None:
        return F.relu(-F.dot(log_p, uniform))
    return _expected_nll(F, log_p, _at_every_position(F, uniform * class_weight, log_p), log_1)


def _logsumexp(F, logits, log_p, index, log_1):
    """Log sum exp of the logits, from any one class of finite logit: its logit less its log-probability."""
    logit = F.pick(logits, index, axis=-1)
    # a label on a logit of -inf has an infinite loss whatever is added to it
    return F.where(logit == float('-inf'), F.zeros_like(logit), logit + _nll_of(F, log_p, index, log_1))


def _at_every_position(F, vector, like):
    """(C,) repeated over (positions..., C), of whatever rank."""
    ones = F.ones_like(F.slice_axis(like, axis=-1, begin=0, end=1))  # (positions..., 1)
    return F.dot(ones, F.expand_dims(vector, axis=0))


def softmax_cross_entropy(F: Any, pred: Any, label: Any, axis: int = -1, sparse_label: bool = True, pred_type: str = 'logits',
                          ignore_label: Optional[int] = None, class_weight: Any = None, label_smoothing: float = 0.0,
                          lse_square_scale: float = 0.0, invalid_label: str = 'nan', label_dtype: Optional[str] = 'float64',
                          ndim: Optional[int] = None) -> Tuple[Any, Any]:
    r"""Cross entropy of every position, in nats.

    .. math:: \ell = (1-a)\, w_y (-\log p_y) + \frac{a}{C} \sum_j w_j (-\log p_j) + s \log^2 \sum_j e^{z_j}

    with label smoothing a, class weights w and `lse_square_scale` s.

    Parameters
    ----------
    pred : (..., C at `axis`, ...) float32 or float64
    label : `pred`'s shape without `axis`, or with `sparse_label=False` `pred`'s shape
    class_weight : (C,) of `pred`'s dtype, optional
    axis, sparse_label, ignore_label, label_smoothing, lse_square_scale, invalid_label
        As for `StableSoftmaxCrossEntropyLoss`; 'raise' cannot be told in a graph, and is 'nan' here.
    label_dtype
        As for `read_labels`.

    Returns
    -------
    loss : `pred`'s shape without `axis`
    counted : likewise, 1 where the position counts and 0 where it is ignored; or None if all count
    """
    merged = ndim is None and axis != -1  # class_axis_last will have merged axes
    like = label if sparse_label else class_axis_removed(F, pred, axis)
    pred = class_axis_last(F, pred, axis, ndim)
    wanted: Dict[str, Any] = {'pred_type': pred_type, 'lse': bool(lse_square_scale), 'class_weight': class_weight}
    if sparse_label:
        if merged:
            label = F.reshape_like(label, class_axis_removed(F, pred, -1))
        labels = read_labels(F, label, pred, ignore_label, label_dtype)
        terms = class_terms(F, pred, index=labels.index, spread=bool(label_smoothing), **wanted)
        loss = terms.nll
        if class_weight is not None:
            loss = weighted(F, loss, F.take(class_weight, labels.index, mode='clip'))
        if label_smoothing:
            loss = (1 - label_smoothing) * loss + label_smoothing * terms.spread
    else:
        target = class_axis_last(F, label, axis, ndim)
        if label_smoothing:
            target = (1 - label_smoothing) * target + label_smoothing * F.softmax(F.zeros_like(target), axis=-1)
        if class_weight is not None:
            target = target * _at_every_position(F, class_weight, target)
        terms = class_terms(F, pred, target=target, **wanted)
        loss = terms.nll
    if lse_square_scale:
        loss = loss + lse_square_scale * F.square(terms.lse)
    if sparse_label and invalid_label != 'clip':
        loss = F.where(labels.valid, loss, labels.index * float('nan'))
    counted = None
    if ignore_label is not None:
        counted = F.where(labels.counted, F.ones_like(loss), F.zeros_like(loss))
        loss = F.where(labels.counted, loss, F.zeros_like(loss))
    if merged:
        loss = F.reshape_like(loss, like)
        counted = counted if counted is None else F.reshape_like(counted, like)
    return loss, counted


def class_axis_removed(F, pred, axis):
    """Something of `pred`'s shape without `axis`, to shape others by."""
    return F.BlockGrad(F.squeeze(F.slice_axis(pred, axis=axis, begin=0, end=1), axis=axis))


def reduce_positions(F: Any, loss: Any, counted: Any = None, axis: int = -1, batch_axis: int = 0, reduction: str = 'mean',
                     sample_weight: Any = None, ndim: Optional[int] = None) -> Any:
    """Weigh the losses of all positions and reduce them to one per sample.

    Parameters
    ----------
    loss, counted : as `softmax_cross_entropy` returns them
    axis, batch_axis : int
        Class axis and batch axis of the predictions.
    reduction : 'mean' over the positions that count, 'sum' or 'none'
    sample_weight : what `loss` broadcasts with once it has an axis of size 1 at `axis`, optional

    Returns
    -------
    loss : (batch,), or with 'none' as it came
    """
    kept = F.expand_dims(loss, axis=axis)  # the rank of pred, so that axes are counted as the caller counts them
    if sample_weight is not None:
        kept = weighted(F, kept, F.broadcast_like(sample_weight, kept))
        loss = F.reshape_like(kept, loss)
    if reduction == 'none' or ndim == 2:  # then each position is a sample
        return loss
    over = {'axis': batch_axis, 'exclude': True}
    if reduction == 'mean' and counted is None:
        return F.mean(kept, **over)
    total = F.sum(kept, **over)
    if reduction == 'sum':
        return total
    count = F.sum(F.expand_dims(counted, axis=axis), **over)
    return total / F.broadcast_maximum(count, F.ones_like(count))  # where nothing counts, 0 / 1
