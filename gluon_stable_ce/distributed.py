"""Exact all-reduce of integers over the workers of an MXNet KVStore.

The result does not depend on what the store does to the gradients that it carries.
"""

from itertools import count
from numbers import Integral
from typing import Any, List

import mxnet as mx
import numpy as np

__all__ = ['all_reduce']

_BYTES = 280  # in two's complement: they hold 2**88 times the largest float64, in units of 2**-1126
# Keys that no parameter has, each used once. MXNet computes the server of a key from the int32 key * 9973,
# which must not be negative.
_KEYS = (key for key in count(2**16) if key * 9973 % 2**32 < 2**31)


def all_reduce(store: Any, numbers: List[int]) -> List[int]:
    """Sum each of `numbers` over all workers of a store, exactly.

    This is a collective call: it returns when every worker has made it.

    Workers exchange their numbers in pieces of 16 bits, which float64 and float32 hold exactly, and each
    worker adds them up as Python integers. What the store does to gradients does not change them: on the
    servers, the numbers of each worker go to a new key, and a server stores the first value of a key
    unchanged. So the store may be the trainer's, with or without an optimizer on the servers
    (``update_on_kvstore``). It has to be the trainer's: MXNet waits for ever when a process creates a second
    distributed store.

    Parameters
    ----------
    store : mxnet.kv.KVStore, or an object with `rank`, `num_workers` and `pushpull`
        What ``mx.kv.create`` returns. With one worker ('local', 'device') the sums are the numbers. A store
        that is not an ``mx.kv.KVStore``, such as one that is registered with
        ``mx.kv.KVStoreBase.register``, must sum float64 arrays in ``pushpull(key, value, out=out)``.
    numbers : list of int
        Integers from -2**2239 to 2**2239 - 1. Every worker gives equally many, in the same order.

    Returns
    -------
    list of int
        The sums, the same on every worker.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described above. Then nothing is sent, and the other workers go on waiting
        for this one.
    RuntimeError
        If the keys of the store are strings (`Module` uses strings, `gluon.Trainer` integers), if it
        compresses gradients, or if it returns other values than were sent. Every worker raises it.

    Notes
    -----
    A call waits for all work that is queued in this process. It leaves up to 2 kB per number and worker on
    the servers and in each process, since MXNet never frees a key. It uses integer keys from 2**16 on; those
    below are free for other use. A worker that is restarted while the servers go on running cannot join,
    since it counts keys from the beginning.

    The tests run real processes on one machine: 'dist_sync', 'dist_device_sync' and 'dist_async' with one and
    two servers and two and three workers; 'local' and 'device'. Horovod and BytePS are replaced by a Python
    store with the same interface. Horovod, BytePS and several machines were not run.

    Examples
    --------
    >>> all_reduce(mx.kv.create('local'), [3, -2 ** 1126])[0]
    3
    """
    rank, workers = _place(store)
    row = _row_of(rank, numbers)
    if workers == 1:
        return [int(number) for number in numbers]
    exchange = _over_servers if isinstance(store, mx.kv.KVStore) else _by_pushpull
    rows = exchange(store, rank, workers, row)  # (workers, 2 + limbs)
    limbs = rows.astype('<u2')
    heads = np.stack([np.arange(1, workers + 1), limbs[:, 2:].sum(axis=1) % 2**16], axis=1)
    if not (np.array_equal(limbs, rows) and np.array_equal(limbs[:, :2], heads)):
        raise RuntimeError(f'store: expected the sum of what {workers} workers gave, got something else')
    data = limbs[:, 2:].tobytes()
    parts = [
        int.from_bytes(data[start : start + _BYTES], 'little', signed=True)
        for start in range(0, len(data), _BYTES)
    ]
    return [sum(parts[index :: len(numbers)]) for index in range(len(numbers))]


def _over_servers(store, rank, workers, row):
    """Exchange the rows of all workers, each under a new key: a server stores its first value unchanged."""
    keys = [next(_KEYS) for _ in range(workers)]
    row = mx.nd.array(row, dtype='float64')
    rows = [mx.nd.zeros(row.shape, dtype='float64') for _ in keys]
    try:
        if rank:
            store.push(keys[rank], row)
        mx.nd.waitall()  # until the row has arrived
        store.init(keys[0], row)  # stores the row of worker 0; returns when every worker has called it
        store.pull(keys, out=rows)
    except mx.MXNetError as error:
        raise RuntimeError(
            'store: expected integers for keys, not names as Module uses, and no gradient compression'
        ) from error
    return np.stack([row.asnumpy() for row in rows])


def _by_pushpull(store, rank, workers, row):
    """Exchange the rows of all workers by a sum of arrays that are zero in all other rows."""
    rows = np.zeros((workers, len(row)))
    rows[rank] = row
    total = mx.nd.zeros(rows.shape, dtype='float64')
    store.pushpull(f'gluon_stable_ce.all_reduce.{len(row)}', mx.nd.array(rows, dtype='float64'), out=total)
    return total.asnumpy()


def _row_of(rank, numbers):
    """Return what a worker sends: its rank + 1, a checksum and the limbs of the numbers, (2 + limbs,)."""
    if not isinstance(numbers, (list, tuple)) or not all(isinstance(number, Integral) for number in numbers):
        raise TypeError(f'numbers: expected a list of integers, got {numbers!r:.80}')
    try:
        data = b''.join(int(number).to_bytes(_BYTES, 'little', signed=True) for number in numbers)
    except OverflowError:
        bits, most = 8 * _BYTES - 1, max(int(number).bit_length() for number in numbers)
        raise ValueError(
            f'numbers: expected integers from -2**{bits} to 2**{bits} - 1, got one of {most} bits'
        ) from None
    limbs = np.frombuffer(data, dtype='<u2')
    return np.concatenate([[rank + 1, limbs.sum() % 2**16], limbs])


def _place(store):
    """Return the rank and the number of workers."""
    rank, workers = getattr(store, 'rank', None), getattr(store, 'num_workers', None)
    known = isinstance(store, mx.kv.KVStore) or callable(getattr(store, 'pushpull', None))
    if not (known and isinstance(rank, int) and isinstance(workers, int)):
        raise TypeError(
            'store: expected a store as mx.kv.create makes it, or with rank, num_workers and pushpull; '
            f'got {store!r:.80}'
        )
    return rank, workers
