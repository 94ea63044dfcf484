"""Predictions and labels, from files or arrays, a chunk at a time, in little memory where the format allows. Nothing is ever unpickled."""
import math
import mmap
import os
import struct
import zipfile
import zlib

import mxnet as mx
import numpy as np
from numpy.lib import format as npy

from . import _array_api
from ._signature import check_shapes

NAMES = ('pred', 'label')
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, LookupError, OverflowError)  # what zipfile raises
_CHUNK = 2 ** 20  # predictions at a time: 8 MB in float64


class Member:
    """An array inside an archive, read forwards: ``member[start:stop]`` along the first axis, each row once and in order.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    """

    def __init__(self, file, name, shape, dtype):
        self.shape, self.dtype = shape, dtype
        self._file, self._name, self._at = file, name, 0

    @property
    def ndim(self):
        """The number of axes."""
        return len(self.shape)

    def reshape(self, shape):
        """The same numbers in another shape: nothing has been read yet."""
        return Member(self._file, self._name, shape, self.dtype)

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.shape[0])
        if start != self._at:
            raise IndexError(f'{self._name}: rows are read in order and once; expected row {self._at}, got {start}')
        shape = (stop - start,) + self.shape[1:]
        size = int(np.prod(shape, dtype='int64')) * self.dtype.itemsize
        try:
            data = self._file.read(size)
        except _BROKEN as error:
            raise ValueError(f'{self._name}: {error}') from error
        if len(data) != size:
            raise ValueError(f'{self._name}: the file ends within row {start + len(data) * (stop - start) // size}')
        self._at = stop
        return np.frombuffer(data, self.dtype).reshape(shape)


def read_files(paths, axis=-1):
    """Predictions and labels from files.

    Parameters
    ----------
    paths : list of str
        One ``.npz`` (keys ``pred`` and ``label``), or two ``.npy`` (predictions, then labels), or one ``.params`` or ``.nd`` as
        ``mx.nd.save`` writes it (a dict with those keys, or a list of two).
    axis : int, default -1
        Class axis of the predictions: an archive cannot be read along any axis but the first.

    Returns
    -------
    pred, label
        Memory maps for ``.npy``, `Member` for ``.npz``; whole arrays for ``.params`` and ``.nd``, for Fortran order in an ``.npz``, and
        for an ``.npz`` whose class axis is the first one.

    Raises
    ------
    OSError, ValueError
        For files that are not there or not what they should be; pickled arrays are refused.
    """
    suffixes = [os.path.splitext(path)[1].lower() for path in paths]
    if suffixes == ['.npy', '.npy']:
        return tuple(_memory_map(path) for path in paths)
    if suffixes == ['.npz']:
        return _members(paths[0], axis)
    if suffixes in (['.params'], ['.nd']):
        return _load(paths[0])
    raise ValueError(f"expected one .npz, .params or .nd, or two .npy (predictions, then labels), got {', '.join(map(repr, paths))}")


def _memory_map(path):
    with open(path, 'rb') as file:
        _header(file, path)
    try:
        return npy.open_memmap(path, mode='r')
    except (ValueError, OverflowError) as error:
        raise ValueError(f'{path}: {error}') from error


def _members(path, axis):
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise ValueError(f'{path}: {error}') from error
    _check_names(path, [os.path.splitext(name)[0] for name in archive.namelist()])
    members = []
    for key in NAMES:
        name = f'{path}: {key}'
        try:
            file = archive.open(key + '.npy')
            shape, fortran, dtype = _header(file, name)
            if fortran or (key == 'pred' and axis in (0, -len(shape))):
                members.append(npy.read_array(archive.open(key + '.npy'), allow_pickle=False))
            else:
                members.append(Member(file, name, shape, dtype))
        except _BROKEN as error:
            raise ValueError(f'{name}: {error}') from error
    return tuple(members)


def _header(file, name):
    """Shape, order and dtype of an array in NumPy's format; `file` is left where its numbers begin."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        version = npy.read_magic(file)
        if version not in readers:
            raise ValueError(f'expected version 1 or 2 of the format, got {version}')
        shape, fortran, dtype = readers[version](file)
    except Exception as error:  # what NumPy raises on a header that is no header depends on the bytes
        raise ValueError(f"{name}: not an array in NumPy's .npy format: {error}") from error
    if dtype.hasobject:
        raise ValueError(f'{name}: expected numbers, got pickled Python objects, which are refused')
    return shape, fortran, dtype


def _load(path):
    with open(path, 'rb'):  # for the plain error of a file that is not there
        pass
    try:
        arrays = mx.nd.load(path)
    except mx.MXNetError as error:
        raise ValueError(f'{path}: not a file that mx.nd.load can read') from error
    if isinstance(arrays, dict):
        _check_names(path, arrays)
        return arrays['pred'], arrays['label']
    if len(arrays) != 2:
        raise ValueError(f'{path}: expected two arrays, predictions and labels, got {len(arrays)}')
    return tuple(arrays)


def _check_names(path, names):
    missing = [name for name in NAMES if name not in names]
    if missing:
        raise ValueError(f"{path}: expected arrays named 'pred' and 'label', got {', '.join(map(repr, sorted(names))) or 'none'}")


def check_arrays(pred, label, axis):
    """The shape of the positions; ValueError or TypeError unless `label` fits `pred`."""
    for name, array, kinds in (('pred', pred, 'f'), ('label', label, 'iuf')):
        if not isinstance(array, (np.ndarray, Member)) and not _array_api.is_array(array):
            raise TypeError(f'{name}: expected a NumPy array or an MXNet array, got {type(array).__name__}')
        if getattr(array, 'stype', 'default') != 'default':
            raise TypeError(f'{name}: expected a dense array, got {array.stype}')
        dtype = np.dtype(array.dtype)
        if dtype.kind not in kinds or dtype.itemsize > 8:
            raise TypeError(f"{name}: expected {'float16, float32 or float64' if kinds == 'f' else 'integers or floats'}, got {dtype}")
    exact = dtype.name if dtype.kind == 'f' else 'float64'  # integers of files come in more kinds than MXNet's
    return check_shapes(tuple(pred.shape), tuple(label.shape), exact, axis)


def chunks(pred, label, axis, progress=False):
    """Yield the number of a chunk's first position, its predictions (n, C) and its labels (n,) float64, from the first to the last.

    A chunk is some steps along the first axis (along the second if the first is the class axis), and at least one, however large.
    """
    positions = pred.shape[:axis] + pred.shape[axis + 1:]
    count, classes = math.prod(positions), pred.shape[axis]
    label = label.reshape(positions)
    if axis == pred.ndim - 1 and (not isinstance(pred, np.ndarray) or pred.flags.c_contiguous):  # then each row is a step of its own
        pred, label, positions = pred.reshape((count, classes)), label.reshape((count,)), (count,)
        axis = 1
    each = math.prod(positions[1:])  # positions in a step along the first axis
    step = max(1, _CHUNK // max(1, classes * each))
    starts = range(0, positions[0] if count else 0, step)
    for start in _with_bar(starts) if progress else starts:
        part = slice(start, min(start + step, positions[0]))
        rows = np.moveaxis(_on_host(pred[part] if axis else pred[:, part]), axis, -1).reshape(-1, classes)
        yield start * each, rows, _on_host(label[part]).reshape(-1).astype('float64')
        _let_go(pred)
        _let_go(label)


def _with_bar(starts):
    try:
        from tqdm import tqdm
    except ImportError:
        return starts
    return tqdm(starts, unit='chunk', leave=False, disable=None)  # None: only on a terminal


def _on_host(array):
    return array.asnumpy() if _array_api.is_array(array) else np.asarray(array)


def _let_go(array):
    """Drop the pages of a read-only memory map: the system would only take them back when it is short of memory."""
    if isinstance(array, np.memmap) and array.mode == 'r' and hasattr(mmap, 'MADV_DONTNEED'):
        array._mmap.madvise(mmap.MADV_DONTNEED)
