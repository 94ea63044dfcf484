"""Read predictions and labels from files. Nothing is ever unpickled, and no header is trusted."""

import math
import os
import stat
import struct
import warnings
import zipfile
from typing import List, Tuple

import mxnet as mx
import numpy as np
from numpy.lib import format as npy

_MAGIC = 0x112  # at the head of a file of mx.nd.save
_CLASSIC, _NUMPY_SHAPE = (
    0xF993FAC9,
    0xF993FACA,
)  # at the head of its arrays: saved by mx.nd, and in NumPy mode
_ITEM_SIZES = {0: 4, 1: 8, 2: 2, 3: 1, 4: 4, 5: 1, 6: 8, 7: 1}  # bytes, by MXNet's number of the dtype


def read_files(paths: List[str]) -> Tuple[np.ndarray, np.ndarray]:
    """Read predictions and labels from files.

    Parameters
    ----------
    paths : list of str
        One ``.npz`` with the keys ``pred`` and ``label``; or two ``.npy``, predictions, then labels; or one
        ``.params`` or ``.nd`` of ``mx.nd.save``, a dict with those keys or a list of two.

    Returns
    -------
    pred, label : numpy.ndarray
        Memory maps for ``.npy``. Other files are read whole.

    Raises
    ------
    OSError
        If a file is not there.
    ValueError
        If a file is not a regular one, is not what its suffix says, is damaged, holds pickled objects or
        lacks one of the two arrays, or if an array is empty.

    Examples
    --------
    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, 'predictions.npz')
    ...     np.savez(path, pred=[[0.5, 0.5]], label=[1])
    ...     read_files([path])
    (array([[0.5, 0.5]]), array([1]))
    """
    suffixes = [os.path.splitext(path)[1].lower() for path in paths]
    if suffixes not in (['.npy', '.npy'], ['.npz'], ['.params'], ['.nd']):
        names = ', '.join(map(repr, paths))
        raise ValueError(
            f'expected one .npz, .params or .nd, or two .npy (predictions, then labels), got {names}'
        )
    read = {'.npy': _read_npy, '.npz': _read_npz}.get(suffixes[0], _read_params)
    arrays = [_read_safely(read, path) for path in paths]
    pred, label = arrays if len(arrays) == 2 else arrays[0]
    _check_not_empty(pred=pred, label=label)
    return pred, label


def _read_safely(read, path):
    """Call ``read(path)``, and name the file in whatever is wrong with it."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for a writer
        raise ValueError(f'{path}: expected a regular file')
    try:
        with warnings.catch_warnings():  # the parsers of a damaged header warn before they fail
            warnings.simplefilter('ignore')
            return read(path)
    except Exception as error:  # which one NumPy, zipfile or MXNet raises depends on the bytes
        raise ValueError(f'{path}: cannot be read: {error or type(error).__name__}') from error


def _check_not_empty(**arrays):
    for name, array in arrays.items():
        if not array.size:
            raise ValueError(f'{name}: expected at least one number, got shape {array.shape}')


def _read_npy(path):
    with open(path, 'rb') as file:
        shape = _read_npy_shape(file)
    if min(shape, default=0) < 0:  # NumPy would infer it, and crash the process if the dtype has no bytes
        raise ValueError(f'expected a shape without negative sizes, got {shape}')
    return npy.open_memmap(path, mode='r')  # which refuses pickled objects


def _read_npy_shape(file):
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:  # 3 is for records, which are no predictions
        raise ValueError(f'expected version 1 or 2 of the .npy format, got {version}')
    return readers[version](file)[0]


def _read_npz(path):
    if not zipfile.is_zipfile(path):
        raise ValueError('not a zip archive, as an .npz file is')
    with np.load(path, allow_pickle=False) as archive:
        _check_names(archive.files)
        pred, label = archive['pred'], archive['label']
    if not isinstance(pred, np.ndarray) or not isinstance(label, np.ndarray):
        raise ValueError("expected arrays in NumPy's .npy format, got other bytes")
    return pred, label


def _read_params(path):
    with mx.util.np_shape(_check_params(path)):
        arrays = mx.nd.load(path)
    if isinstance(arrays, dict):
        _check_names(arrays)
        arrays = arrays['pred'], arrays['label']
    if len(arrays) != 2:
        raise ValueError(f'expected two arrays, predictions and labels, got {len(arrays)}')
    return tuple(array.asnumpy() for array in arrays)


def _check_names(names):
    if not {'pred', 'label'} <= set(names):
        raise ValueError(
            f"expected arrays named 'pred' and 'label', got {', '.join(map(repr, sorted(names))) or 'none'}"
        )


def _check_params(path):
    """Raise ValueError unless the sizes in the file fit its length; return whether NumPy mode has written it.

    ``mx.nd.load`` trusts what it reads. One changed byte can make it allocate for 40 seconds, or crash the
    process.
    """
    with open(path, 'rb') as file:
        try:
            versions = _walk_params(file)
        except struct.error as error:
            raise ValueError('the file is cut short') from error
        if file.tell() != os.path.getsize(path):  # a seek goes past the end without an error
            raise ValueError(f'expected {file.tell()} bytes, got {os.path.getsize(path)}')
    if len(versions) != 1:
        raise ValueError('expected arrays of one version of the format, and at least one')
    return versions == {_NUMPY_SHAPE}


def _walk_params(file):
    """Move over all arrays and names without reading their contents; return the versions of the arrays."""
    magic, _, arrays = _unpack(file, 'QQQ')
    if magic != _MAGIC:
        raise ValueError('expected a file that mx.nd.save of MXNet 1.x has written')
    versions = {_walk_array(file) for _ in range(arrays)}
    (names,) = _unpack(file, 'Q')
    for _ in range(names):
        file.seek(*_unpack(file, 'Q'), os.SEEK_CUR)
    return versions


def _walk_array(file):
    version, storage, axes = _unpack(file, 'Iii')
    if version not in (_CLASSIC, _NUMPY_SHAPE):
        raise ValueError('expected arrays that mx.nd.save of MXNet 1.x has written')
    if storage:
        raise ValueError('expected dense arrays, got a sparse one')
    if not 1 <= axes <= 32:
        raise ValueError(f'expected arrays of 1 to 32 axes, got {axes}')
    shape = _unpack(file, f'{axes}q')
    _, _, dtype = _unpack(file, 'iii')  # the first two are the device, which the audit does not need
    if min(shape) < 1:
        raise ValueError(f'expected arrays with at least one number, got shape {shape}')
    if dtype not in _ITEM_SIZES:
        raise ValueError(
            f"expected integers, float16, float32 or float64, got number {dtype} of MXNet's dtypes"
        )
    file.seek(math.prod(shape) * _ITEM_SIZES[dtype], os.SEEK_CUR)
    return version


def _unpack(file, layout):
    return struct.unpack('<' + layout, file.read(struct.calcsize('<' + layout)))
