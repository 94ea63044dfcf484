"""What the graph of a loss computes: the loss of each sample, in nats."""

from typing import Optional

from . import array_api
from .array_api import Array, F
from .call import Call
from .formula import combine
from .kernels import class_terms
from .reduction import reduce


@array_api.without_amp
def loss_of(
    F: F,
    call: Call,
    pred: Array,
    label: Array,
    sample_weight: Optional[Array] = None,
    class_weight: Optional[Array] = None,
) -> Array:
    """Compute the loss of each sample, (batch,), or of each position."""
    given, options = pred, call.options
    pred, label, sample_weight, class_weight = map(
        array_api.as_classic, (pred, label, sample_weight, class_weight)
    )
    if call.ndim is None and class_weight is not None:
        class_weight = _read_last(F, class_weight, array_api.first(F, pred), label, sample_weight)
    terms = class_terms(F, call, pred, label, class_weight)
    loss = combine(F, call, terms)
    loss = loss if options.weight is None else loss * options.weight
    loss = reduce(F, call, loss, pred, label, sample_weight)  # (batch,)
    if options.reduction == 'none' and options.sparse_label and call.label_ndim in (None, call.ndim):
        loss = F.reshape_like(loss, label)  # which may have the class axis, of length 1
    elif options.reduction == 'none' and call.ndim is None:
        loss = F.squeeze(loss, axis=options.axis)
    return array_api.in_style_of(given, loss)


def _read_last(F: F, array: Array, *others: Optional[Array]) -> Array:
    """Return a float32 array of one axis as (1, C), an input that a graph reads after all others."""
    for other in reversed(others):
        if other is not None:
            one = array_api.first(F, F.reshape(other, shape=(-1, 1)))
            array = F.broadcast_mul(F.ones_like(F.cast(one, dtype='float32')), array)
    return array
