"""The facts that a call relies on of its arrays, as a key: calls with equal keys are planned alike."""

import ctypes
from functools import lru_cache
from typing import Callable, Hashable, NamedTuple, Optional

from mxnet.base import _LIB

from ..array_api import Array
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
_Numbers = ctypes.c_int * (1 + 3 * (4 + 32))  # of three arrays of 32 axes


class Signature(NamedTuple):
    """What is known of the arrays of a call."""

    facts: Hashable  # types, contexts, dtypes and shapes
    needs_guard: bool  # as in `Call`


def signature_of(pred: Array, label: Array, sample_weight: Optional[Array] = None) -> Signature:
    """Describe the arrays of a call.

    The compiled library does it where the fused kernel may be used: MXNet's Python takes longer than the loss
    of a small batch.
    """
    arrays = (pred, label) if sample_weight is None else (pred, label, sample_weight)
    kinds = tuple(map(type, arrays))
    if library.compiled is not None and choice.is_main_thread():
        numbers = _Numbers()
        weight = None if sample_weight is None else sample_weight.handle
        size = _compiled_function()(pred.handle, label.handle, weight, numbers)
        if size:
            return Signature((kinds, ctypes.string_at(numbers, size)), bool(numbers[0]))
    return Signature((kinds, *((array.context, array.dtype, array.shape) for array in arrays)), True)


@lru_cache(maxsize=None)
def _compiled_function() -> Callable[..., int]:
    addresses = [ctypes.cast(getattr(_LIB, name), ctypes.c_void_p) for name in _FUNCTIONS]
    library.compiled.stable_ce_use((ctypes.c_void_p * len(addresses))(*addresses))
    return library.compiled.stable_ce_signature
