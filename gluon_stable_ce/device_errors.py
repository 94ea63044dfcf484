"""How many errors of a device were reported in this process.

MXNet computes later than it is called. After an error it skips all work that needs the failed arrays or
shares memory with them. It reports the error once: to the first caller that waits for one of these arrays.
From then on, all of them look computed, and hold anything. This count tells the other callers.
"""

from typing import Any

from mxnet.base import _LIB

# The functions of MXNet that wait for arrays, and so report such errors.
_WAITING = (
    'MXNDArrayWaitToRead',
    'MXNDArrayWaitToWrite',
    'MXNDArrayWaitAll',
    'MXNDArraySyncCopyToCPU',
    'MXNDArraySyncCopyFromCPU',
    'MXNDArraySyncCopyFromNDArray',
    'MXNDArraySave',
    'MXNDArraySaveRawBytes',
    'MXNDArrayToDLPack',
)
_count = 0


def count() -> int:
    """Return how many errors were reported since this package was imported, to any caller."""
    return _count


def _check(result: int, _: Any, __: Any) -> int:
    """Count a call that failed. ctypes calls this after each call of one of these functions."""
    global _count
    if result:
        _count += 1
    return result


for _name in _WAITING:
    getattr(_LIB, _name).errcheck = _check
