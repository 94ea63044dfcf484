"""How a graph of symbols, which have no shape, is made to raise MXNet's shape error when it first runs.

Many operators would take arrays of wrong shapes and compute numbers. So what these functions return depends
on an operator that takes no other shapes.
"""

from .array_api import Array, F, float32_or_64


def positions_of(F: F, pred: Array, label: Array, axis: int) -> Array:
    """Return an array of the positions' shape, and require that `label` has it, or has 1 at `axis`.

    `pick` takes no other shape.
    """
    one_class = F.BlockGrad(F.slice_axis(pred, axis=axis, begin=0, end=1))  # (..., 1 at `axis`, ...)
    return F.BlockGrad(F.pick(one_class, label, axis=axis))


def require_length(F: F, vector: Array, pred: Array, axis: int) -> Array:
    """Return `vector`, and require that it is as long as `axis` of `pred`."""
    return F.reshape_like(vector, F.contrib.arange_like(pred, axis=axis))


def require_equal_or_1(F: F, array: Array, pred: Array, axis: int) -> Array:
    """Return `array`, and require that its `axis` has length 1, or is as long as that of `pred`."""
    indices, wanted = (F.contrib.arange_like(other, axis=axis) for other in (array, pred))
    indices = F.broadcast_like(indices, float32_or_64(F, wanted))  # of one dtype before 1.8
    return F.broadcast_add(array, F.slice_axis(indices, axis=0, begin=0, end=1))  # the first one is 0
