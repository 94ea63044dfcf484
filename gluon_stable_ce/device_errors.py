"""How many errors of a device were reported in this process.

MXNet computes later than it is called. After an error it skips all work that needs the failed arrays, or that
shares memory with it. It reports the error to the first one who waits for any of these arrays. From then on
all of them look computed. So whoever did not wait first can only tell by this count that arrays may hold
anything.

If another thread is told of an error, there is a moment before it is counted.
"""

from mxnet.base import _LIB

# The functions of MXNet that may wait for arrays, and so report such errors.
_WAITING = (
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
)
_SUCCESS, _FAILURE = 0, -1  # what these functions return
_found = {_SUCCESS: _SUCCESS}
_count = 0


def count() -> int:
    """Return how many errors were reported since this package was imported, to whomever.

    Those between two calls are counted as one.
    """
    global _count
    if _found.pop(_FAILURE, _SUCCESS) != _SUCCESS:
        _count += 1
    return _count


for _name in _WAITING:
    # ctypes calls this with what the function returned. It is no code of Python, in which an interrupt could
    # come between an error and its record.
    getattr(_LIB, _name).restype = _found.setdefault
