"""How a graph of symbols, which have no shape, is made to raise MXNet's shape error when it first runs.

Many operators would take arrays of wrong shapes and compute numbers. So what these functions return depends
on an operator that takes no other shapes.
"""

from .array_api import Array, F, first, float32_or_64


def positions_of(F: F, pred: Array, label: Array, axis: int) -> Array:
    """Return an array of `pred`'s shape with 1 at `axis`; require that `label` has it, or has no such axis.

    `pick` takes no other shape.
    """
    one_class = F.BlockGrad(first(F, pred, axis))
    return F.BlockGrad(F.pick(one_class, label, axis=axis, keepdims=True))


def require_equal(F: F, array: Array, like: Array) -> Array:
    """Return `array`, and require that it has the shape of `like`, and its dtype."""
    return array + F.BlockGrad(F.zeros_like(like))


def require_equal_or_1(F: F, array: Array, pred: Array, axis: int) -> Array:
    """Return `array`, and require that its `axis` has length 1, or is as long as that of `pred`."""
    other = 0 if axis > 0 or axis == -1 else -1  # an axis that is no class axis, of which one entry is enough
    row, like = first(F, array, other), float32_or_64(F, first(F, pred, other))  # of one dtype before 1.8
    return F.broadcast_add(array, F.zeros_like(first(F, F.broadcast_like(row, like), axis)))
