r"""The numerics: cross entropy per position, as functions of ``F`` (``mx.nd`` or ``mx.sym``).

They are for use inside any HybridBlock. Everything is in nats. The flow is `align_label`, `read_labels`,
`kernels.class_terms`, `combine`, `mask`, `reduce_positions`. Only `class_terms` reads the class axis; the
others work on arrays of one number per position. Arrays are MXNet's classic ones. Where a function takes
`ndim`, it is the rank of ``pred`` if that is known, as it is for arrays and is not for symbols. Shapes that
do not fit raise MXNet's own errors: the checks that name an argument are the loss's.

>>> import mxnet as mx
>>> from gluon_stable_ce.kernels import class_terms
>>> pred, label = mx.nd.array([[0, 99], [2, 1], [0, 0]]), mx.nd.array([0, 0, 7])
>>> labels = read_labels(mx.nd, label, pred)
>>> loss = combine(mx.nd, class_terms(mx.nd, 'stock', pred, index=labels.index))
>>> mask(mx.nd, loss, labels, invalid=float('nan'), ignored=0.0).asnumpy().round(4)
array([99.    ,  0.3133,     nan], dtype=float32)
"""

from typing import Any, NamedTuple, Optional, Sequence

from .array_api import Array, F, sum_of_none
from .kernels import ClassTerms

__all__ = [
    'Labels',
    'align_label',
    'align_sample_weight',
    'combine',
    'is_counted',
    'mask',
    'read_labels',
    'reduce_positions',
]


class Labels(NamedTuple):
    """What sparse labels mean, (positions...) each. A condition is 1 or 0; None if it holds everywhere."""

    index: Array  # the class, in [0, C) and never NaN
    is_valid: Optional[Array]
    is_counted: Optional[Array]


def align_label(
    F: F, label: Array, pred: Array, axis: int, ndim: Optional[int] = None, label_ndim: Optional[int] = None
) -> Array:
    """Give a sparse label, which may have the class axis with length 1, the shape of the positions.

    If the rank is unknown, in a graph of symbols, a label of another shape causes MXNet's shape error when
    the graph first runs.
    """
    if ndim is not None:
        return F.squeeze(label, axis=axis) if label_ndim == ndim else label
    one_class = F.BlockGrad(F.slice_axis(pred, axis=axis, begin=0, end=1))  # (..., 1 at `axis`, ...)
    positions = F.pick(one_class, label, axis=axis)  # takes no label of another shape
    return F.reshape_like(label, F.BlockGrad(positions))  # which does not read its input; pick must be read


def is_counted(
    F: F, label: Array, ignore_label: Optional[int], label_dtype: str = 'float64'
) -> Optional[Array]:
    """Compute which positions count: 1 where `label` is not `ignore_label`, else 0; None if all count."""
    return None if ignore_label is None else F.cast(label, dtype=label_dtype) != ignore_label


def read_labels(
    F: F,
    label: Array,
    pred: Array,
    axis: int = -1,
    ignore_label: Optional[int] = None,
    invalid_label: str = 'nan',
    label_dtype: str = 'float64',
    is_cast: bool = False,
    few_classes: bool = False,
) -> Labels:
    """Read sparse labels: decide which of them are valid, which count, and what class they name.

    A label outside [0, C), NaN or not an integer is invalid. With ``invalid_label='clip'`` no label is: it
    names the nearest class, a fraction the class of its integer part, and NaN the class 0.

    Parameters
    ----------
    label : (positions...), any dtype that can name the classes
    pred : (..., C at `axis`, ...)
        Only its shape is read.
    ignore_label : int, optional
        Positions with this label do not count, whether it is valid or not.
    label_dtype, is_cast : str, bool
        In which dtype labels are compared, and whether they have it. 'float64' holds every class of every
        dtype.
    few_classes : bool
        Whether `pred` has few classes and is of `label_dtype`: then an array of all classes is cheap, and
        exact.
    """
    label = F.BlockGrad(label if is_cast else F.cast(label, dtype=label_dtype))  # its gradient is 0
    counted = None if ignore_label is None else label != ignore_label
    if few_classes and invalid_label != 'clip':
        index = F.take(F.contrib.arange_like(pred, axis=axis), label, mode='clip')
        return Labels(index, index == label, counted)
    classes = F.slice_axis(F.shape_array(pred), axis=0, begin=axis, end=(axis + 1) or None)
    classes = F.cast(classes, dtype=label_dtype)  # (1,), C
    if invalid_label == 'clip':
        nearest = F.broadcast_minimum(F.floor(F.maximum(label, 0)), classes - 1)
        return Labels(F.where(label == label, nearest, F.zeros_like(label)), None, counted)
    is_valid = F.broadcast_mod(F.floor(label), classes) == label  # neither NaN nor inf is
    return Labels(F.where(is_valid, label, F.zeros_like(label)), is_valid, counted)


def combine(
    F: F,
    terms: ClassTerms,
    weight_of_label: Optional[Array] = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
) -> Array:
    r"""Combine the terms of each position.

    .. math:: \ell = (1-a)\, w_y (-\log p_y) + \frac{a}{C} \sum_j w_j (-\log p_j) + s \log^2 \sum_j e^{z_j}

    with label smoothing a, class weights w and `lse_square_scale` s.

    Parameters
    ----------
    terms : ClassTerms
        `uniform_nll` is needed for label smoothing, `logsumexp` for `lse_square_scale`.
    weight_of_label : (positions...), optional
        The class weight of each label.
    """
    loss: Any = terms.nll if weight_of_label is None else _weighted(F, terms.nll, weight_of_label)
    if label_smoothing == 1:  # 0 * inf would be NaN
        loss = terms.uniform_nll
    elif label_smoothing:
        uniform: Any = terms.uniform_nll
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if lse_square_scale:
        logsumexp: Any = terms.logsumexp
        # the gradient of an infinite one's square is infinite, and NaN where it is multiplied by 0
        is_finite = logsumexp - logsumexp == 0
        logsumexp = F.where(is_finite, logsumexp, F.BlockGrad(logsumexp))
        loss = loss + lse_square_scale * F.square(logsumexp)
    return loss


def _weighted(F: F, term: Array, weight: Array) -> Array:
    """Multiply; a weight of 0 removes the term, and both gradients are 0, also if it is infinite or NaN."""
    return F.where(weight == 0, F.zeros_like(term), term) * weight


def mask(F: F, values: Array, labels: Labels, invalid: float, ignored: float) -> Array:
    """Fill in what stands for the positions that are invalid, and for those that are ignored."""
    if labels.is_valid is not None:
        values = F.where(labels.is_valid, values, F.ones_like(values) * invalid)
    if labels.is_counted is not None:
        values = F.where(labels.is_counted, values, F.ones_like(values) * ignored)
    return values


def align_sample_weight(
    F: F,
    sample_weight: Array,
    expanded: Array,
    pred: Array,
    axis: int = -1,
    batch_axes: Sequence[int] = (0,),
    layout: Optional[str] = None,
    ndim: Optional[int] = None,
) -> Array:
    """Give sample weights the shape of `expanded`, the losses with an axis of size 1 at `axis`.

    Parameters
    ----------
    layout : str, optional
        'keepdims': what broadcasts to `expanded`; 'pred': what broadcasts to `pred`, of which the mean over
        the classes counts; 'positions': `expanded` without `axis`; 'batch': the batch axes alone. None, for
        symbols of unknown shape: 'keepdims' or 'pred', and if the classes come last and the batch axis is 0,
        also the first axes of 'positions', such as (batch,). A weight of another shape is MXNet's shape
        error.
    ndim : int, optional
        The rank of `expanded`, if it is known.
    """
    if layout == 'positions':
        sample_weight = F.expand_dims(sample_weight, axis=axis)
    elif layout == 'batch':
        axes = [batch_axis % ndim if ndim else batch_axis for batch_axis in batch_axes]
        for other in range(ndim or max(axes)):
            if other not in axes:
                sample_weight = F.expand_dims(sample_weight, axis=other)
    if ndim is None and (layout == 'batch' or (layout is None and axis == -1 and tuple(batch_axes) == (0,))):
        # MXNet broadcasts from the last axis on, so the order of the axes is reversed
        ones = F.transpose(F.ones_like(expanded))
        sample_weight = F.transpose(F.broadcast_mul(ones, F.transpose(sample_weight)))
    if layout is None:
        sample_weight = _refuse_other_classes(F, sample_weight, pred, axis)
    if layout in (None, 'pred'):
        sample_weight = F.mean(sample_weight, axis=axis, keepdims=True)
    return F.broadcast_like(sample_weight, expanded)


def _refuse_other_classes(F: F, sample_weight: Array, pred: Array, axis: int) -> Array:
    """Return weights of 1 or C classes; another number of classes causes MXNet's shape error."""
    classes = F.contrib.arange_like(sample_weight, axis=axis)
    classes = F.broadcast_like(
        classes, F.contrib.arange_like(pred, axis=axis)
    )  # (C,), its first element is 0
    return F.broadcast_add(sample_weight, F.slice_axis(classes, axis=0, begin=0, end=1))


def _refuse_class_axis(F: F, expanded: Array, pred: Array, batch_axis: int) -> Array:
    """Return `expanded`. If its batch axis is the class axis, that becomes MXNet's shape error."""
    samples = F.contrib.arange_like(expanded, axis=batch_axis)
    samples = F.reshape_like(samples, F.contrib.arange_like(pred, axis=batch_axis))  # its first element is 0
    return F.broadcast_add(expanded, F.slice_axis(samples, axis=0, begin=0, end=1))


def reduce_positions(
    F: F,
    loss: Array,
    pred: Array,
    is_counted: Optional[Array] = None,
    axis: int = -1,
    batch_axes: Sequence[int] = (0,),
    reduction: str = 'mean',
    sample_weight: Optional[Array] = None,
    weight_layout: Optional[str] = None,
    ndim: Optional[int] = None,
    is_empty: bool = False,
    summed_axes: Sequence[int] = (),
) -> Array:
    """Weigh the losses of all positions and reduce them to one per sample.

    Parameters
    ----------
    loss : (positions...)
    pred : (..., C at `axis`, ...)
        Only its shape is read, to check `sample_weight` in a graph.
    is_counted : (positions...), optional
        1 where a position counts, else 0; None if all count.
    axis, batch_axes : int, sequence of int
        Class axis and batch axes of the predictions.
    reduction : str
        'mean' over the positions that count; 'valid', the sum divided by how many count in a sample on
        average; 'sum'; 'none'.
    sample_weight, weight_layout : optional
        As for `align_sample_weight`.
    is_empty : bool
        Whether there are no positions. Then all losses are 0, and `sample_weight` is not read.
    summed_axes : sequence of int
        Further class axes of the predictions, over which the losses are summed first.

    Returns
    -------
    loss : (batch,), or with 'none' the shape of `loss`
    """
    # of pred's rank, so that axes are counted as the caller counts them
    expanded = F.expand_dims(loss, axis=axis)
    for batch_axis in batch_axes:
        if ndim is None and (batch_axis < 0) != (axis < 0):  # then they may be the same axis
            expanded = _refuse_class_axis(F, expanded, pred, batch_axis)
    if summed_axes:
        expanded = F.sum(expanded, axis=tuple(summed_axes), keepdims=True)
    if sample_weight is not None and not is_empty:  # MXNet fails to broadcast some empty arrays
        weight = align_sample_weight(F, sample_weight, expanded, pred, axis, batch_axes, weight_layout, ndim)
        expanded = _weighted(F, expanded, weight)
        loss = F.reshape_like(expanded, loss) if not summed_axes else expanded
    all_samples = ndim == 1 + len(batch_axes) and not (reduction == 'valid' and is_counted is not None)
    if reduction == 'none' or all_samples:  # each position is a sample
        return loss
    if is_empty:
        return sum_of_none(F, expanded, batch_axes, ndim)
    over = {'axis': tuple(batch_axes), 'exclude': True}
    if reduction in ('mean', 'valid') and is_counted is None:
        return F.mean(expanded, **over)
    total = F.sum(expanded, **over)  # (batch,)
    if reduction == 'sum':
        return total
    counted = F.where(is_counted, F.ones_like(loss), F.zeros_like(loss))
    count = F.sum(F.expand_dims(counted, axis=axis), **over)  # (batch,)
    if reduction == 'valid':
        count = F.mean(count, keepdims=True)
    return F.broadcast_div(
        total, F.where(count == 0, F.ones_like(count), count)
    )  # where nothing counts, 0 / 1
