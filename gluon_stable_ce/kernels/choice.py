"""Which kernel computes a call: the one place that chooses, with its one message."""

import os
from threading import get_ident, main_thread
from typing import Optional

from ..options import KERNELS, Options, check_choice
from . import library

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
    device_type: str = 'cpu',
    is_symbol: bool = False,
    is_main_thread: bool = True,
    is_empty: bool = False,
) -> str:
    """Choose the kernel of a call.

    Parameters
    ----------
    device_type : str
        Of ``pred``'s context.
    is_symbol : bool
        Whether ``pred`` is a symbol. Then 'auto' is 'stock', whose graphs run anywhere.
    is_main_thread : bool
        Whether this is the main thread. MXNet has two resources that all calls of a library's operator share.
        Each call waits for one, and then for the other. So two threads in the operator may deadlock.
    is_empty : bool
        Whether there are no positions. Then every kernel is 'stock'.

    Returns
    -------
    'stock' or 'fused'

    Raises
    ------
    ValueError
        If the options ask for the fused kernel, and it cannot compute this.
    """
    if options.kernel == 'stock' or (options.kernel == 'auto' and is_symbol) or is_empty:
        return 'stock'
    if not _is_for_fused(options):
        reason: Optional[str] = 'it computes sparse labels and logits only'
    elif not device_type.startswith('cpu'):
        reason = f'it runs on the CPU, and pred is on a {device_type}'
    elif not is_main_thread:
        reason = 'it is for the main thread only'
    else:
        reason = None if library.load() else library.why_unavailable()
    if reason and options.kernel == 'fused':
        raise ValueError(
            f"kernel: expected 'auto' or 'stock', got 'fused'; the fused kernel cannot be used: {reason}"
        )
    return 'stock' if reason else 'fused'


def is_main_thread() -> bool:
    """Whether this is the main thread, the only one for the fused kernel."""
    return get_ident() == MAIN_THREAD


def _is_for_fused(options: Options) -> bool:
    return options.sparse_label and options.pred_type == 'logits'
