"""How many errors of a device were reported in this process.

MXNet computes later than it is called. After an error it skips all work that needs the failed arrays, or that
shares memory with it. It reports the error to the first one who waits for any of these arrays. From then on
all of them look computed, and work that is still queued computes from whatever they hold. So whoever did not
wait first can only tell by this count that arrays may hold anything.
"""

import sys
import time
from threading import get_ident
from types import FrameType
from typing import Dict, List

from mxnet.base import _LIB

# The functions of MXNet that may wait for arrays, and so report such errors.
_WAITING = {
    'MXNDArrayWaitToRead',
    'MXNDArrayWaitToWrite',
    'MXNDArrayWaitAll',
    'MXNDArraySyncCopyToCPU',
    'MXNDArraySyncCopyFromCPU',
    'MXNDArraySyncCopyFromNDArray',
    'MXNDArraySyncCheckFormat',
    'MXNDArraySave',
    'MXNDArraySaveRawBytes',
    'MXNDArrayToDLPack',
    'MXNDArrayGetData',
    'MXNDArrayGetSharedMemHandle',
    'MXImperativeInvoke',  # of operators whose shape depends on their values
    'MXImperativeInvokeEx',
    'MXInvokeCachedOp',
    'MXInvokeCachedOpEx',
    'MXAutogradBackwardEx',
    'MXExecutorForward',
    'MXExecutorBackwardEx',
    'MXExecutorOutputs',
    'MXKVStoreInitEx',  # of a distributed store
    'MXKVStoreBroadcastEx',
}
_SUCCESS = 0  # what these functions return, else -1
_PAUSE, _PAUSES = 2e-4, 1000  # seconds; how often another thread can run before it surely has
_reported: List[int] = []


class _Results(dict):
    """What the functions return: success as it is, and None for a failure, which is recorded."""

    __missing__ = _reported.append


def count() -> int:
    """Return how many errors were reported since this package was imported, to whomever."""
    return len(_reported)


def count_all() -> int:
    """Return the same, with the errors that other threads have been told of and could not count yet.

    They do when their calls return to Python. Calls that do not return in 0.2 seconds are still waiting.
    """
    calls = _calls()
    for _ in range(_PAUSES):
        if not calls:
            break
        time.sleep(_PAUSE)
        now = sys._current_frames()
        calls = {thread: frame for thread, frame in calls.items() if now.get(thread) is frame}
    return count()


def _calls() -> Dict[int, FrameType]:
    """Find the calls of these functions that other threads are in."""
    return {
        thread: frame
        for thread, frame in sys._current_frames().items()
        if thread != get_ident() and not _WAITING.isdisjoint(frame.f_code.co_names)
    }


for _name in _WAITING:
    if hasattr(_LIB, _name):  # MXNet 1.6 does not have all
        # ctypes calls this with what the function returned. It is no code of Python, in which an interrupt
        # could come between an error and its record.
        getattr(_LIB, _name).restype = _Results({_SUCCESS: _SUCCESS}).__getitem__
