"""How the class axis is reduced to one number per position: the one place that chooses an implementation."""

from typing import NamedTuple, Optional

from .._array_api import Array, F
from . import stock

__all__ = ['ClassTerms', 'class_terms']


class ClassTerms(NamedTuple):
    """The reductions of the class axis, (positions...), in nats. None for what was not asked for."""

    nll: Array  # -log p of the class `index`, or -sum_j w_j target_j log p_j
    logsumexp: Optional[Array] = None  # log sum_j exp z_j
    uniform_nll: Optional[Array] = None  # -1/C sum_j w_j log p_j


def class_terms(
    F: F,
    kernel: str,
    pred: Array,
    axis: int = -1,
    index: Optional[Array] = None,
    target: Optional[Array] = None,
    pred_type: str = 'logits',
    logsumexp: bool = False,
    uniform: bool = False,
    class_weight: Optional[Array] = None,
    ndim: Optional[int] = None,
    dtype: Optional[str] = None,
) -> ClassTerms:
    """Reduce the class axis of `pred` to one number per position.

    Parameters
    ----------
    kernel : 'stock'
        Which implementation computes.
    pred : (..., C at `axis`, ...)
        What `pred_type` says: 'logits', 'log_probs' or 'probs'.
    index : (positions...), optional
        The class of each position, in [0, C). `pred`'s shape without `axis`.
    target : (..., C at `axis`, ...), optional
        How much of each class, in the place of `index`.
    logsumexp, uniform : bool
        Which other terms are needed.
    class_weight : (C,), optional
        The weights w in `uniform_nll`, and in the `nll` of a `target`.
    ndim, dtype : int and str, optional
        Rank and dtype of `pred`, as far as they are known.

    Returns
    -------
    ClassTerms
        For an `index`, `nll` is never negative, and its gradient goes on where it is 0. float32 for float16
        and bfloat16.
    """
    if kernel == 'stock':
        terms = stock.class_terms(
            F, pred, axis, index, target, pred_type, logsumexp, uniform, class_weight, ndim, dtype
        )
        return ClassTerms(*terms)
    raise ValueError(f"kernel: expected 'stock', got {kernel!r}")
