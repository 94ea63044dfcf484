"""How the class axis is reduced to one number per position: the one place that chooses an implementation."""

import os
from threading import get_ident, main_thread
from typing import Any, NamedTuple, Optional

from ..array_api import CPU, Array, F
from ..options import KERNELS, check_choice
from . import fused, stock

__all__ = ['ClassTerms', 'check_kernel', 'choose', 'class_terms', 'kernel_for_thread']

KERNEL_VARIABLE = 'GLUON_STABLE_CE_KERNEL'  # of the environment
MAIN_THREAD = main_thread().ident


class ClassTerms(NamedTuple):
    """The reductions of the class axis, (positions...), in nats. None for what was not asked for."""

    nll: Array  # -log p of the class `index`, or -sum_j w_j target_j log p_j
    logsumexp: Optional[Array] = None  # log sum_j exp z_j
    uniform_nll: Optional[Array] = None  # -1/C sum_j w_j log p_j


def check_kernel(kernel: Any, sparse_label: bool, pred_type: str) -> str:
    """Return the option `kernel` as calls need it: 'stock' for what only that computes.

    'auto' is what the environment says.

    Raises
    ------
    ValueError
        If `kernel` is no kernel, or 'fused' where that cannot be used.
    """
    is_default = check_choice('kernel', kernel, KERNELS) == 'auto'
    if is_default:
        kernel = check_choice(KERNEL_VARIABLE, os.environ.get(KERNEL_VARIABLE) or 'auto', KERNELS)
    if sparse_label and pred_type == 'logits':
        choose(kernel, 'float32', 'cpu')  # raises if 'fused' has not been compiled
        return kernel
    if kernel == 'fused' and not is_default:
        raise ValueError(
            "kernel: expected 'auto' or 'stock', as the fused kernel computes sparse labels and logits, "
            f'got {kernel!r} with sparse_label={sparse_label} and {pred_type}'
        )
    return 'stock'


def choose(kernel: str, dtype: Optional[str], device_type: Optional[str] = None) -> str:
    """Choose the kernel for logits and sparse labels.

    Parameters
    ----------
    kernel : 'auto', 'stock' or 'fused'
    dtype, device_type : str, optional
        The dtype of ``pred`` and the type of its context; None if unknown, as for symbols. With 'auto',
        symbols get 'stock', whose graphs run anywhere.

    Returns
    -------
    'stock' or 'fused'

    Raises
    ------
    ValueError
        If `kernel` is 'fused' and the fused kernel cannot compute this.
    """
    if kernel == 'stock' or (kernel == 'auto' and device_type is None):
        return 'stock'
    reason = _why_not_fused(dtype, device_type)
    if reason is None:
        return 'fused'
    if kernel == 'fused':
        raise ValueError(f"kernel: expected 'auto' or 'stock', as {reason}; got 'fused'")
    return 'stock'


def kernel_for_thread(kernel: str) -> str:
    """Return `kernel`, or 'stock' for 'auto' if this is not the main thread.

    MXNet has two resources that all calls of a library's operator share. Each call waits for one, and then
    for the other. So two threads that call at the same time may deadlock.

    Raises
    ------
    ValueError
        If `kernel` is 'fused' and this is not the main thread.
    """
    if kernel == 'stock' or get_ident() == MAIN_THREAD:
        return kernel
    if kernel == 'fused':
        raise ValueError(
            "kernel: expected 'auto' or 'stock', as the fused kernel is for the main thread only; got 'fused'"
        )
    return 'stock'


def _why_not_fused(dtype: Optional[str], device_type: Optional[str]) -> Optional[str]:
    """Say what keeps the fused kernel from computing this, or None."""
    if device_type not in (None, *CPU):
        return f'the fused kernel runs on the CPU, and pred is on a {device_type}'
    if dtype == 'bfloat16':
        return 'the fused kernel computes float16, float32 and float64'
    return None if fused.load() else fused.why_unavailable()


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
    is_needed: Optional[Array] = None,
    is_leaf: bool = True,
) -> ClassTerms:
    """Reduce the class axis of `pred` to one number per position.

    Parameters
    ----------
    kernel : 'stock' or 'fused'
        Which implementation computes. 'fused' takes logits with an `index`, on the CPU.
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
    is_needed : (positions...), optional
        1 where terms are needed, else 0; None if they all are. 'fused' does not read the other positions,
        whose terms are then 0.
    is_leaf : bool
        Whether `pred` may be a variable, into whose gradient autograd may add.

    Returns
    -------
    ClassTerms
        For an `index`, `nll` is never negative, and its gradient is computed also where it is 0. float32 for
        float16 and bfloat16.
    """
    if kernel == 'fused' and index is not None and pred_type == 'logits':
        terms = fused.class_terms(F, pred, axis, index, logsumexp, uniform, class_weight, is_needed, is_leaf)
    elif kernel == 'stock':
        terms = stock.class_terms(
            F, pred, axis, index, target, pred_type, logsumexp, uniform, class_weight, ndim, dtype
        )
    else:
        raise ValueError(f"kernel: expected 'stock', or 'fused' for logits and an index, got {kernel!r}")
    return ClassTerms(*terms)
