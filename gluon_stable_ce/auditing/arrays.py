"""Check the predictions and labels of an audit, and split them into chunks."""

import math
from typing import Any, Iterator, Tuple

import mxnet as mx
import numpy as np

from ..array_checks import check_shapes

_CHUNK = 2**20  # predictions in a chunk: 8 MB in float64


def check_arrays(pred: Any, label: Any, axis: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return predictions, and labels without `axis`, in NumPy; TypeError or ValueError if they do not fit."""
    try:
        return _checked(pred, label, axis)
    except (TypeError, ValueError) as error:
        if math.prod(getattr(label, 'shape', ())) > math.prod(getattr(pred, 'shape', ())):
            raise type(error)(f'{error}; swapped? There are more labels than predictions') from error
        raise


def _checked(pred, label, axis):
    pred = _to_numpy('pred', pred, 'f', 'float16, float32 or float64')
    label = _to_numpy('label', label, 'iufb', 'integers, floats or bools')
    _check_not_one_hot(pred.shape, label.shape, axis)
    # the integers of files come in more kinds than MXNet's, and float64 holds the indices of all of them
    dtype = label.dtype.name if label.dtype.kind == 'f' else 'float64'
    return pred, label.reshape(check_shapes(pred.shape, label.shape, dtype, axis, sparse_label=True))


def _to_numpy(name, array, kinds, expected):
    if not isinstance(array, (np.ndarray, mx.nd.NDArray)):
        raise TypeError(f'{name}: expected a NumPy array or an MXNet array, got {type(array).__name__}')
    stype = getattr(array, 'stype', 'default')
    if stype != 'default':
        raise TypeError(f'{name}: expected a dense array, got {stype}')
    dtype = np.dtype(array.dtype)
    if dtype.kind not in kinds or dtype.itemsize > 8:
        raise TypeError(f'{name}: expected {expected}, got {dtype}')
    return np.asarray(array) if isinstance(array, np.ndarray) else array.asnumpy()


def _check_not_one_hot(shape, label_shape, axis):
    """Raise ValueError for a label of `pred`'s shape: the general message has an option of the loss in it."""
    if label_shape == shape and len(shape) > 1 and -len(shape) <= axis < len(shape) and shape[axis] > 1:
        axis %= len(shape)
        raise ValueError(
            f'label: expected class indices of shape {shape[:axis] + shape[axis + 1 :]} '
            f'for pred of shape {shape} with the classes on axis {axis}, got {label_shape}; '
            f'if the labels are one-hot, pass their argmax over axis {axis}'
        )


def split_into_chunks(
    pred: np.ndarray, label: np.ndarray, axis: int, progress: bool = False
) -> Iterator[Tuple[int, np.ndarray, np.ndarray]]:
    """Yield chunks of about a million predictions, so that a memory map is never read as a whole.

    Yields the flat index in `label` of the first position, rows (n, C), and labels (n,) float64.
    """
    rows = np.moveaxis(pred, axis, -1)  # (N, ..., C)
    classes = rows.shape[-1]
    if rows.flags.c_contiguous:
        rows, label = rows.reshape(label.size, classes), label.reshape(label.size)
    positions = math.prod(label.shape[1:])  # of one index of the first axis
    step = max(1, _CHUNK // max(1, classes * positions))
    starts = range(0, len(label) if label.size else 0, step)
    for start in _with_bar(starts) if progress else starts:
        part = slice(start, start + step)
        yield start * positions, rows[part].reshape(-1, classes), label[part].reshape(-1).astype('float64')


def _with_bar(starts):
    try:
        from tqdm import tqdm
    except ImportError:
        return starts
    return tqdm(starts, unit='chunk', leave=False, disable=None)  # None: only on a terminal
