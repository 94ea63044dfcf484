"""From the loss of each position to the loss of each sample: sample weights, and sums or means."""

from typing import Any, Optional

from . import array_api, graph_checks
from .array_api import Array, F
from .call import Call
from .class_terms import weighted
from .labels import align_label, is_counted


def reduce(
    F: F, call: Call, loss: Array, pred: Array, label: Array, sample_weight: Optional[Array] = None
) -> Array:
    """Weigh the losses of all positions and reduce them to one per sample.

    Parameters
    ----------
    loss : (positions...); in a graph of symbols, with 1 at the class axis
    pred : (..., C at the class axis, ...)
        Only its shape is read.
    label : as `class_terms` takes it
        Read to count the positions of a sample.
    sample_weight : optional

    Returns
    -------
    loss : (batch,), or with ``reduction='none'`` the shape of `loss`
    """
    options = call.options
    expanded = with_class_axis(F, call, loss)  # of pred's rank
    if sample_weight is not None and not call.is_empty:  # MXNet fails to broadcast some empty arrays
        expanded = weighted(F, expanded, align_sample_weight(F, call, sample_weight, expanded, pred))
        is_shaped = options.summed_axes or call.ndim is None
        loss = expanded if is_shaped else F.reshape_like(expanded, loss)
    needs_count = options.ignore_label is not None and options.reduction in ('mean', 'valid')
    is_own_mean = _has_one_position(call)
    if options.reduction == 'none' or (is_own_mean and not (needs_count and options.reduction == 'valid')):
        return loss
    over = {'axis': options.batch_axes, 'exclude': True}
    if needs_count and not call.is_empty:
        counted = is_counted(F, call, align_label(F, call, label, pred))
        counted = F.where(counted, F.ones_like(loss), F.zeros_like(loss))
        count = F.sum(with_class_axis(F, call, counted), keepdims=True, **over)  # (batch..., 1...)
        if options.reduction == 'valid':
            count = F.mean(count, keepdims=True)
        divisor = F.where(count == 0, F.ones_like(count), count)  # where nothing counts, 0 / 1
        expanded = F.broadcast_div(F.sum(expanded, keepdims=True, **over), divisor)
        return F.sum(expanded, **over)
    if call.is_empty:
        return array_api.sum_of_none(F, expanded, options.batch_axes, call.ndim)
    return F.sum(expanded, **over) if options.reduction == 'sum' else F.mean(expanded, **over)


def _has_one_position(call: Call) -> bool:
    """Whether each sample has one position. As in gluon, a batch axis may be the class axis."""
    if call.ndim is None:
        return False
    class_axes, batch_axes = (
        {axis % call.ndim for axis in axes} for axes in (call.options.class_axes, call.options.batch_axes)
    )
    return call.ndim == 1 + len(batch_axes) and not class_axes & batch_axes


def with_class_axis(F: F, call: Call, loss: Array) -> Array:
    """Give losses the axes of `pred`, with length 1 for the classes, and sum over further class axes."""
    expanded = loss if call.ndim is None else F.expand_dims(loss, axis=call.options.axis)
    summed_axes = call.options.summed_axes
    return F.sum(expanded, axis=summed_axes, keepdims=True) if summed_axes else expanded


def align_sample_weight(F: F, call: Call, sample_weight: Array, expanded: Array, pred: Array) -> Array:
    """Give sample weights the shape of `expanded`, the losses with an axis of length 1 for the classes."""
    if call.ndim is None:
        sample_weight = _align_unknown_weight(F, call, sample_weight, expanded, pred)
    if call.dtype is not None:
        sample_weight = F.cast(sample_weight, dtype=call.compute_dtype)
    if call.ndim is not None:
        sample_weight = _align_known_weight(F, call, sample_weight)
    return F.broadcast_like(sample_weight, expanded)


def _align_known_weight(F: F, call: Call, sample_weight: Array) -> Array:
    """Give weights the rank of `pred`, with an axis of length 1 for the classes."""
    ndim: Any = call.ndim
    class_axes = [axis % ndim for axis in call.options.class_axes]
    if call.weight_layout == 'pred':  # pred's shape: the mean over the classes counts
        return F.mean(sample_weight, axis=tuple(class_axes), keepdims=True)
    if call.weight_layout == 'positions':  # (positions...)
        missing = class_axes
    elif call.weight_layout == 'batch':  # (batch...)
        missing = list(set(range(ndim)) - {axis % ndim for axis in call.options.batch_axes})
    else:  # 'keepdims'
        missing = []
    for axis in sorted(missing):
        sample_weight = F.expand_dims(sample_weight, axis=axis)
    return sample_weight


def _align_unknown_weight(F: F, call: Call, sample_weight: Array, expanded: Array, pred: Array) -> Array:
    """Do the same for symbols, whose shapes are unknown. A weight of another shape is MXNet's shape error.

    It has the shape of `expanded` or of `pred`, or one that broadcasts to them. With the classes last and the
    batch first, it may also have the first axes only, such as (batch,).
    """
    if call.np_style:  # it may be bool, of which MXNet has no transpose
        sample_weight = array_api.multiply(F, F.np.ones(1, dtype='float32'), sample_weight)
    if call.options.axis == -1 and call.options.batch_axes == (0,):
        # MXNet broadcasts from the last axis on, so the order of the axes is reversed
        ones = F.transpose(F.ones_like(expanded))  # (1, ..., batch); the graph reads pred and label first
        sample_weight = array_api.multiply(F, ones, F.transpose(sample_weight))
        sample_weight = F.transpose(sample_weight)  # (batch, ..., 1 or C)
    else:
        sample_weight = array_api.promoted(F, sample_weight, expanded)
    for axis in call.options.class_axes:
        sample_weight = graph_checks.require_equal_or_1(F, sample_weight, pred, axis)
    return F.mean(sample_weight, axis=call.options.class_axes, keepdims=True)
