"""Exact all-reduce of integers over the workers of an MXNet KVStore or of a Horovod job."""

import os
import sys
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
    """Sum each of `numbers` over all workers of a store or of Horovod, exactly.

    This is a collective call: it returns when every worker has made it.

    Workers exchange their numbers in pieces of 16 bits, which float64 and float32 hold exactly, and each
    worker adds them up as Python integers. The store's treatment of gradients does not change them: on the
    servers, the numbers of each worker go to a new key, and a server stores the first value of a key
    unchanged. So an optimizer on the servers (``update_on_kvstore``) does not matter.

    Pass the trainer's store. (A process can have only one distributed store: a second one waits for ever.)

    Parameters
    ----------
    store : mxnet.kv.KVStore, module horovod.mxnet, or object with `rank`, `num_workers` and `pushpull`
        A store is what ``mx.kv.create`` returns. With one worker ('local', 'device') the sums are the
        numbers.

        In a job of Horovod 0.24 or later: the module, that is `hvd` of ``import horovod.mxnet as hvd``, after
        ``hvd.init()``; ``mx.kv.create('horovod')`` returns a store of one worker.

        Any other store, such as one that is registered with ``mx.kv.KVStoreBase.register``, must sum float64
        arrays in ``pushpull(key, value, out=out)``.
    numbers : list of int
        Integers from -2**2239 to 2**2239 - 1. Every worker gives equally many, in the same order.

    Returns
    -------
    list of int
        The sums, the same on every worker.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described above, if Horovod is not initialised, or if a store has one worker
        in a job of several Horovod processes. Then nothing is sent, and the other workers go on waiting for
        this one.
    RuntimeError
        If the keys of the store are strings (`Module` uses strings, `gluon.Trainer` integers), if it
        compresses gradients, or if it changes values. Every worker raises it.

    Notes
    -----
    With servers, a call waits for all work that is queued in this process. It leaves up to 2 kB per number
    and worker on the servers and in each process, since MXNet never frees a key. It uses integer keys from
    2**16 on; those below are free for other use. A worker that is restarted while the servers go on running
    cannot join, since it counts keys from the beginning.

    The tests run real processes on one machine: 'dist_sync', 'dist_device_sync' and 'dist_async' with one and
    two servers and two and three workers; 'local' and 'device'; Horovod 0.28.1 over Gloo with two and three
    processes. BytePS is replaced by a Python store with the same interface. BytePS, Horovod over MPI or NCCL,
    and several machines were not run.

    Examples
    --------
    >>> all_reduce(mx.kv.create('local'), [3, -2 ** 1126])[0]
    3
    """
    rank, workers, exchange = _way_of(store)
    row = _row_of(rank, numbers)
    if workers == 1:
        return [int(number) for number in numbers]
    rows = exchange(store, rank, workers, row)  # (workers, 2 + limbs)
    limbs = rows.astype('<u2')
    heads = np.stack([np.arange(1, workers + 1), limbs[:, 2:].sum(axis=1) % 2**16], axis=1)
    if not (np.array_equal(limbs, rows) and np.array_equal(limbs[:, :2], heads)):
        raise RuntimeError(f'store: expected the sum of the numbers of {workers} workers, got another one')
    columns = limbs[:, 2:].reshape(workers, len(numbers), _BYTES // 2).swapaxes(0, 1)
    return [sum(int.from_bytes(part.tobytes(), 'little', signed=True) for part in parts) for parts in columns]


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


def _by_sum(store, rank, workers, row):
    """Exchange the rows of all workers by a sum of arrays, each of which is 0 in the rows of the others."""
    rows = np.zeros((workers, len(row)))
    rows[rank] = row
    rows, name = mx.nd.array(rows, dtype='float64'), f'gluon_stable_ce.all_reduce.{len(row)}'
    if _is_horovod(store):
        return store.allreduce(rows, op=store.Sum, name=name).asnumpy()
    total = mx.nd.zeros(rows.shape, dtype='float64')
    store.pushpull(name, rows, out=total)
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


def _way_of(store):
    """Return the rank, the number of workers, and the function that exchanges their rows."""
    if _is_horovod(store):
        return store.rank(), store.size(), _by_sum
    rank, workers = getattr(store, 'rank', None), getattr(store, 'num_workers', None)
    has_servers = isinstance(store, mx.kv.KVStore)
    known = has_servers or callable(getattr(store, 'pushpull', None))
    if not (known and isinstance(rank, int) and isinstance(workers, int)):
        raise TypeError(
            'store: expected a store as mx.kv.create makes it, the module horovod.mxnet, or an object with '
            f'rank, num_workers and pushpull; got {store!r:.80}'
        )
    if workers == 1 and _horovod_processes() > 1:
        raise ValueError(
            f'store: expected the module horovod.mxnet, as this is one of {_horovod_processes()} Horovod '
            f'processes; got a store of type {getattr(store, "type", None)!r}, which has one worker. '
            'Pass hvd of `import horovod.mxnet as hvd`'
        )
    return rank, workers, _over_servers if has_servers else _by_sum


def _is_horovod(store):
    return all(callable(getattr(store, name, None)) for name in ('rank', 'size', 'allreduce'))


def _horovod_processes():
    """Return how many processes the Horovod job has that this process is one of; 1 if there is none."""
    hvd = sys.modules.get('horovod.mxnet')
    if hvd is not None and hvd.is_initialized():
        return hvd.size()
    return int(os.environ.get('HOROVOD_SIZE', 1))  # which horovodrun sets
