"""How the class axis is reduced to one number per position: the one place that chooses an implementation."""

import os
from threading import get_ident, main_thread
from typing import Optional

from ..array_api import Array, F
from ..call import Call
from ..options import KERNELS, Options, check_choice
from ..terms import ClassTerms
from . import fused, library, stock

__all__ = ['ClassTerms', 'class_terms', 'configured', 'resolve']

KERNEL_VARIABLE = 'GLUON_STABLE_CE_KERNEL'  # of the environment
MAIN_THREAD = main_thread().ident


def configured(options: Options) -> Options:
    """Return the options with the kernel that the environment names in the place of 'auto'.

    Raises
    ------
    ValueError
        If the fused kernel is asked for, and no call with these options could use it.
    """
    if options.kernel == 'auto':
        default = check_choice(KERNEL_VARIABLE, os.environ.get(KERNEL_VARIABLE) or 'auto', KERNELS)
        options = options._replace(kernel=default if _is_for_fused(options) else 'stock')
    resolve(options, is_symbol=True)
    return options


def resolve(
    options: Options,
    dtype: Optional[str] = None,
    device_type: str = 'cpu',
    is_symbol: bool = False,
    is_main_thread: bool = True,
) -> str:
    """Choose the kernel of a call.

    Parameters
    ----------
    dtype, device_type : str
        Of ``pred``. The dtype is None where a symbol does not tell.
    is_symbol : bool
        Whether ``pred`` is a symbol. Then 'auto' is 'stock', whose graphs run anywhere.
    is_main_thread : bool
        MXNet has two resources that all calls of a library's operator share. Each call waits for one, and
        then for the other. So two threads that call at the same time may deadlock.

    Returns
    -------
    'stock' or 'fused'

    Raises
    ------
    ValueError
        If the options ask for the fused kernel, and it cannot compute this.
    """
    if options.kernel == 'stock' or (options.kernel == 'auto' and is_symbol):
        return 'stock'
    if not _is_for_fused(options):
        reason: Optional[str] = 'it computes sparse labels and logits only'
    elif not device_type.startswith('cpu'):
        reason = f'it runs on the CPU, and pred is on a {device_type}'
    elif dtype == 'bfloat16':
        reason = 'it computes float16, float32 and float64, and pred is bfloat16'
    elif not is_main_thread:
        reason = 'it is for the main thread only'
    else:
        reason = None if library.load() else library.why_unavailable()
    if reason and options.kernel == 'fused':
        raise ValueError(f"kernel: expected 'auto' or 'stock', as the fused kernel cannot be used: {reason}")
    return 'stock' if reason else 'fused'


def is_main_thread() -> bool:
    """Whether this is the main thread, the only one for the fused kernel."""
    return get_ident() == MAIN_THREAD


def _is_for_fused(options: Options) -> bool:
    return options.sparse_label and options.pred_type == 'logits'


def class_terms(
    F: F, call: Call, pred: Array, label: Array, class_weight: Optional[Array] = None
) -> ClassTerms:
    """Reduce the class axis of `pred`, and read the labels.

    Parameters
    ----------
    pred : (..., C at the class axis, ...)
        What ``call.options.pred_type`` says: logits, log-probabilities or probabilities.
    label : (positions...), or with the class axis of length 1; with dense labels `pred`'s shape
        Sparse labels have any dtype that can name the classes.
    class_weight : (C,), optional

    Returns
    -------
    ClassTerms
        Weighted by class. For sparse labels they are what ``call.fill`` says at invalid and at ignored
        positions, with gradient 0 there; elsewhere `nll` is never negative, and its gradient is computed also
        where it is 0. float32 for float16 and bfloat16.
    """
    compute = fused.class_terms if call.kernel == 'fused' else stock.class_terms
    return compute(F, call, pred, label, class_weight)
