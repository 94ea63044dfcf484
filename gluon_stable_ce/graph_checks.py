"""How a graph of symbols, which have no shape, is made to raise MXNet's shape error when it first runs.

Many operators would take arrays of wrong shapes and compute numbers. So what these functions return depends
on an operator that takes no other shapes.
"""

from .array_api import Array, F


def positions_of(F: F, pred: Array, label: Array, axis: int) -> Array:
    """Return an array of the positions' shape; another shape of `label` is an error.

    `label` has `pred`'s shape without `axis`, or with 1 there. `pick` takes no other.
    """
    one_class = F.BlockGrad(F.slice_axis(pred, axis=axis, begin=0, end=1))  # (..., 1 at `axis`, ...)
    return F.BlockGrad(F.pick(one_class, label, axis=axis))


def with_length(F: F, vector: Array, pred: Array, axis: int) -> Array:
    """Return a vector; another length than that of an axis of `pred` is an error."""
    return F.reshape_like(vector, F.contrib.arange_like(pred, axis=axis))


def with_axis_of(F: F, array: Array, pred: Array, axis: int) -> Array:
    """Return an array of any rank; another length of its `axis` than of `pred`'s is an error."""
    return _added_zero(F, array, with_length(F, F.contrib.arange_like(array, axis=axis), pred, axis))


def with_axis_of_or_1(F: F, array: Array, pred: Array, axis: int) -> Array:
    """Return an array of any rank; a length of its `axis` that is neither 1 nor `pred`'s is an error."""
    counted, wanted = (F.contrib.arange_like(other, axis=axis) for other in (array, pred))
    return _added_zero(F, array, F.broadcast_like(counted, wanted))


def _added_zero(F: F, array: Array, counted: Array) -> Array:
    """Add the first element of ``arange_like``, which is 0."""
    return F.broadcast_add(array, F.slice_axis(counted, axis=0, begin=0, end=1))
