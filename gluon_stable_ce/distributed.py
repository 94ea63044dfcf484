"""All-reduce of integers over the workers of an MXNet KVStore: exact, whatever the store does to the gradients that it carries."""

from itertools import count
from numbers import Integral
from typing import Any, List

import mxnet as mx
import numpy as np

__all__ = ['all_reduce']

_BYTES = 280  # of two's complement: room for 2**88 times the greatest float64, in units of 2**-1126
# Keys of no parameter, each used once. MXNet picks a key's server by the int32 key * 9973, and knows no
# server of negative numbers.
_KEYS = (key for key in count(2**16) if key * 9973 % 2**32 < 2**31)


def all_reduce(kvstore: Any, numbers: List[int]) -> List[int]:
    """Sum each of `numbers` over all workers of a store, exactly. A collective call: it returns when every worker has made it.

    Workers exchange their numbers in pieces of 16 bits, which float64 and float32 hold exactly, and each
    worker adds up all of them in Python's integers. Nothing that the store does to gradients touches them: on
    the servers each worker's numbers go to a new key of their own, and a server keeps the first value of a
    key as it is. So the store may be the trainer's, with or without an optimizer on the servers
    (``update_on_kvstore``). It has to be: MXNet waits for ever in ``mx.kv.create`` of a process's second
    distributed store.

    Parameters
    ----------
    kvstore : mxnet.kv.KVStore, or any object with `rank`, `num_workers` and `pushpull`
        What ``mx.kv.create`` returns. With one worker ('local', 'device') the sums are the numbers. A store
        other than MXNet's own ('horovod', or registered with ``mx.kv.KVStoreBase.register``) must sum float64
        arrays in ``pushpull(key, value, out=out)``.
    numbers : list of int
        Integers from -2**2239 to 2**2239 - 1, as many on every worker, and in the same order.

    Returns
    -------
    list of int
        The sums, the same on every worker.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the store is not asked. The other workers go on waiting for this one.
    RuntimeError
        The store has names for keys (`Module` uses names, `gluon.Trainer` integers), or compresses gradients,
        or gave back something else than it got. Every worker raises it.

    Notes
    -----
    A reduce waits for all work queued in this process, and leaves up to 2 kB per number and worker behind, on
    the servers and in each process, as MXNet forgets no key. Integers below 2**16 stay free for the user's
    keys. A worker that is restarted while the servers live on cannot join, since it counts keys anew.

    Run by ``tests/test_kvstore.py``, with real processes on one machine: 'dist_sync', 'dist_device_sync' and
    'dist_async', one and two servers, two and three workers; 'local' and 'device'. Not run: Horovod and
    BytePS, in whose place the tests have a store in Python with the same interface; several machines.

    Examples
    --------
    >>> all_reduce(mx.kv.create('local'), [3, -2 ** 1126])[0]
    3
    """
    rank, workers = _place(kvstore)
    row = _row_of(rank, numbers)
    if workers == 1:
        return [int(number) for number in numbers]
    exchange = _over_servers if isinstance(kvstore, mx.kv.KVStore) else _by_pushpull
    rows = exchange(kvstore, rank, workers, row)  # (workers, 2 + limbs)
    limbs = rows.astype('<u2')
    heads = np.stack([np.arange(1, workers + 1), limbs[:, 2:].sum(axis=1) % 2**16], axis=1)
    if not (np.array_equal(limbs, rows) and np.array_equal(limbs[:, :2], heads)):
        raise RuntimeError(f'kvstore: expected the sum of what {workers} workers gave, got something else')
    data = limbs[:, 2:].tobytes()
    parts = [
        int.from_bytes(data[start : start + _BYTES], 'little', signed=True)
        for start in range(0, len(data), _BYTES)
    ]
    return [sum(parts[index :: len(numbers)]) for index in range(len(numbers))]


def _over_servers(kvstore, rank, workers, row):
    """Every worker's row, each under a key that is new to the servers: they keep such a row as it is, optimizer or not."""
    keys = [next(_KEYS) for _ in range(workers)]
    row = mx.nd.array(row, dtype='float64')
    rows = [mx.nd.zeros(row.shape, dtype='float64') for _ in keys]
    try:
        if rank:
            kvstore.push(keys[rank], row)
        mx.nd.waitall()  # the row has arrived
        kvstore.init(keys[0], row)  # of worker 0, and only of it; returns when every worker is here
        kvstore.pull(keys, out=rows)
    except mx.MXNetError as error:
        raise RuntimeError(
            'kvstore: expected integers for keys, not names as Module uses, and no gradient compression'
        ) from error
    return np.stack([row.asnumpy() for row in rows])


def _by_pushpull(kvstore, rank, workers, row):
    """Every worker's row, by a sum of arrays that are zero in all other rows."""
    rows = np.zeros((workers, len(row)))
    rows[rank] = row
    total = mx.nd.zeros(rows.shape, dtype='float64')
    kvstore.pushpull(f'gluon_stable_ce.all_reduce.{len(row)}', mx.nd.array(rows, dtype='float64'), out=total)
    return total.asnumpy()


def _row_of(rank, numbers):
    """What a worker gives: whose it is, a checksum, and the limbs of the numbers; (2 + limbs,) of 16 bits."""
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


def _place(kvstore):
    rank, workers = getattr(kvstore, 'rank', None), getattr(kvstore, 'num_workers', None)
    known = isinstance(kvstore, mx.kv.KVStore) or callable(getattr(kvstore, 'pushpull', None))
    if not (known and isinstance(rank, int) and isinstance(workers, int)):
        raise TypeError(
            f'kvstore: expected a store as mx.kv.create makes it, or with rank, num_workers and pushpull; got {kvstore!r:.80}'
        )
    return rank, workers
