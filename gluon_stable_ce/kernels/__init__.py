"""How the class axis is reduced to one number per position: the stock and the fused kernel."""

from typing import Optional

from ..array_api import Array, F
from ..call import Call
from ..class_terms import ClassTerms
from . import fused, stock


def class_terms(
    F: F, call: Call, pred: Array, label: Array, class_weight: Optional[Array] = None
) -> ClassTerms:
    """Reduce the class axis of `pred`, and read the labels.

    Parameters
    ----------
    pred : (..., C at the class axis, ...)
        What ``call.options.pred_type`` says: logits, log-probabilities, or with dense labels probabilities.
    label : (positions...), or with the class axis of length 1; with dense labels `pred`'s shape
        Sparse labels have any dtype that can name the classes.
    class_weight : (C,), or (1, C) if the rank of `pred` is unknown; optional

    Returns
    -------
    ClassTerms
        Weighted by class. For sparse labels they are what ``call.fill`` says at invalid and at ignored
        positions, with gradient 0 there; elsewhere `nll` is never negative, and its gradient is computed also
        where it is 0. float32 for float16 and bfloat16.
    """
    compute = fused.class_terms if call.kernel == 'fused' else stock.class_terms
    return compute(F, call, pred, label, class_weight)
