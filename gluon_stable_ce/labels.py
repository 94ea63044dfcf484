"""Sparse labels: which are valid, which count, what class they name, and what stands where they name none.

This file states the rule, in operators of MXNet. The fused operator applies the same rule in C++; metrics of
probabilities and the audit apply it in NumPy.
"""

from typing import Any, NamedTuple, Optional, Tuple

from . import array_api, graph_checks
from .array_api import Array, F
from .call import Call

_INVALID, _IGNORED = -1, -2  # in the place of a class


class Labels(NamedTuple):
    """The meaning of sparse labels, as `align_label` shapes them. Conditions are 1 or 0; None if true."""

    index: Array  # the class, in [0, C) and never NaN
    is_valid: Optional[Array]
    is_counted: Optional[Array]


def read_labels(F: F, call: Call, label: Array, pred: Array) -> Labels:
    """Decide which labels are valid, which count, and what class they name.

    A label outside [0, C), NaN or not an integer is invalid. With ``invalid_label='clip'`` no label is: it
    names the nearest class, a fraction the class of its integer part, and NaN the class 0. A label that is
    `ignore_label` does not count, whether it is valid or not.

    Parameters
    ----------
    label : (positions...), or with the class axis of length 1; any dtype that can name the classes
    pred : (..., C at the class axis, ...)
        Only its shape is read.
    """
    if call.ndim is None:
        return _read_labels_of_symbols(F, call, label, pred)
    label = align_label(F, call, label, pred)  # (positions...)
    counted = is_counted(F, call, label)
    label = F.BlockGrad(_comparable(F, call, label))  # its gradient is 0
    axis = call.options.axis
    if call.has_few_classes and call.options.invalid_label != 'clip':
        index = F.take(F.contrib.arange_like(pred, axis=call.options.axis), label, mode='clip')
        return Labels(index, index == label, counted)
    classes = call.classes
    if classes is None:
        classes = F.slice_axis(F.shape_array(pred), axis=0, begin=axis, end=(axis + 1) or None)
        classes = F.cast(classes, dtype=call.label_compare_dtype)  # (1,)
    nearest, is_valid = _named(F, call, label, classes)
    if is_valid is None:
        return Labels(nearest, None, counted)
    return Labels(F.where(is_valid, nearest, F.zeros_like(label)), is_valid, counted)


def _named(F: F, call: Call, label: Any, classes: Any) -> Tuple[Array, Optional[Array]]:
    """Return the classes that labels name, and which are valid: None if all are.

    `classes` is their number, or an array of it.
    """
    minimum = F.broadcast_minimum if call.classes is None else F.minimum
    nearest = minimum(F.maximum(F.floor(label), 0), classes - 1)
    if call.options.invalid_label == 'clip':
        return F.where(label == label, nearest, F.zeros_like(label)), None
    return nearest, nearest == label  # neither NaN nor inf is valid


def _read_labels_of_symbols(F: F, call: Call, label: Array, pred: Array) -> Labels:
    """Read labels as (B, 1). What they mean, a class or a mark, gets the shape that `align_label` gives."""
    like = graph_checks.positions_of(F, pred, label, call.options.axis)
    label = F.BlockGrad(_comparable(F, call, F.reshape(label, shape=(-1, 1))))
    classes = call.classes
    if classes is None:
        last = F.slice_axis(class_indices(F, pred, call.options.axis), axis=1, begin=-1, end=None)
        classes = F.cast(last + 1, dtype=call.label_compare_dtype)  # (1, 1)
    named, is_valid = _named(F, call, label, classes)
    if is_valid is not None:
        named = F.where(is_valid, named, F.ones_like(label) * _INVALID)
    counted = is_counted(F, call, label)
    if counted is not None:
        named = F.where(counted, named, F.ones_like(label) * _IGNORED)
    named = _reshaped(F, call, named, like)
    return Labels(
        F.maximum(named, 0),
        None if is_valid is None else named != _INVALID,
        None if counted is None else named != _IGNORED,
    )


def align_label(F: F, call: Call, label: Array, pred: Array) -> Array:
    """Give a label, which may have the class axis with length 1, the shape of the positions.

    In a graph of symbols, it gets that axis, as MXNet's `pick` with ``keepdims`` has it.
    """
    axis = call.options.axis
    if call.ndim is None:
        like = graph_checks.positions_of(F, pred, label, axis)
        return _reshaped(F, call, F.reshape(label, shape=(-1, 1)), like)
    return F.squeeze(label, axis=axis) if call.label_ndim == call.ndim else label


def _reshaped(F: F, call: Call, column: Array, like: Array) -> Array:
    """Give (B, 1) the shape of `like`, which the graph reads first, and so pred, as in gluon's graph."""
    # not by reshape_like, which raises an error where shapes are not all known
    place, dtype = F.contrib.arange_like(F.cast(like, dtype='float64')), call.label_compare_dtype
    column = F.squeeze(F.take(column, place), axis=-1)
    return F.ones_like(F.cast(like, dtype=dtype)) * F.cast(column, dtype=dtype)


def class_indices(F: F, pred: Array, axis: int) -> Array:
    """Return the indices of the classes, (1, C) in float64, whatever `pred`'s rank is."""
    return F.contrib.arange_like(F.cast(one_per_class(F, pred, axis), dtype='float64'))


def one_per_class(F: F, pred: Array, axis: int) -> Array:
    """Return an array with an entry for each class, (1, C) in `pred`'s dtype, whatever its rank is.

    Only its shape and its dtype mean something.
    """
    one = array_api.first(F, F.reshape(F.BlockGrad(array_api.first(F, pred, axis)), shape=(-1, 1)))
    return F.broadcast_like(one, pred, lhs_axes=(1,), rhs_axes=(axis,))


def is_counted(F: F, call: Call, label: Array) -> Optional[Array]:
    """Compute which positions count: 1 where the label is not `ignore_label`, else 0; None if all count."""
    ignore_label = call.options.ignore_label
    return None if ignore_label is None else _comparable(F, call, label) != ignore_label


def fill(F: F, call: Call, labels: Labels, terms: Array) -> Array:
    """Put what `call.fill` says at the positions that are invalid, and at those that are ignored."""
    for condition, value in ((labels.is_valid, call.fill.invalid), (labels.is_counted, call.fill.ignored)):
        if condition is not None:
            terms = F.where(condition, terms, F.ones_like(terms) * value)
    return terms


def _comparable(F: F, call: Call, label: Array) -> Array:
    dtype = call.label_compare_dtype
    return label if call.label_dtype == dtype else F.cast(label, dtype=dtype)
