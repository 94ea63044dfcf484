"""The facts that a call relies on of its arrays, as a key: calls with equal keys are planned alike."""

import ctypes
from functools import lru_cache
from typing import Any, Callable, Optional, Tuple

from mxnet.base import _LIB

from ..array_api import is_array
from . import choice, library

# those of `MXNet` in ``fused/signature.cc``, in its order
_FUNCTIONS = (
    'MXNDArrayGetContext',
    'MXNDArrayGetDType',
    'MXNDArrayGetShapeEx',
    'MXAutogradIsRecording',
    'MXAutogradGetSymbol',
    'MXSymbolListAttrShallow',
    'MXSymbolGetName',
    'MXSymbolListOutputs',
    'MXGenAtomicSymbolFromSymbol',
    'MXSymbolPrint',
    'MXSymbolFree',
)
Signature = Tuple[Any, ...]
_Numbers = ctypes.c_int * (1 + 3 * (4 + 32))  # of three arrays of 32 axes


def signature_of(pred: Any, label: Any, sample_weight: Any = None) -> Optional[Signature]:
    """Describe the arrays of a call, and whether the main thread calls. None if not all are arrays.

    The compiled library does it where the fused kernel may be used: MXNet's Python takes longer than the loss
    of a small batch.
    """
    if not (is_array(pred) and is_array(label) and (sample_weight is None or is_array(sample_weight))):
        return None
    kinds, is_main = (type(pred), type(label), type(sample_weight)), choice.is_main_thread()
    if library.compiled is not None and is_main:
        numbers = _Numbers()
        weight = None if sample_weight is None else sample_weight.handle
        if _compiled_function()(pred.handle, label.handle, weight, numbers):
            return (*kinds, bytes(numbers))
    arrays = (pred, label) if sample_weight is None else (pred, label, sample_weight)
    return (*kinds, is_main, *((array.context, array.dtype, array.shape) for array in arrays))


def needs_guard(signature: Any) -> bool:
    """Whether the arrays need what `Call.needs_guard` describes."""
    numbers = signature[-1]
    return not isinstance(numbers, bytes) or ctypes.c_int.from_buffer_copy(numbers).value == 1


@lru_cache(maxsize=None)
def _compiled_function() -> Callable[..., bool]:
    addresses = [ctypes.cast(getattr(_LIB, name), ctypes.c_void_p) for name in _FUNCTIONS]
    library.compiled.stable_ce_use((ctypes.c_void_p * len(addresses))(*addresses))
    function = library.compiled.stable_ce_signature
    function.restype = ctypes.c_bool
    return function
