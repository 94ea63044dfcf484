"""Read predictions and labels from files. Nothing is ever unpickled, and no header is trusted."""

import os
import stat
import warnings
import zipfile
from typing import List, Tuple

import numpy as np
from numpy.lib import format as npy


def read_files(paths: List[str]) -> Tuple[np.ndarray, np.ndarray]:
    """Read predictions and labels from files; OSError or ValueError says what is wrong with one.

    `paths` are one ``.npz`` with the keys ``pred`` and ``label``, which is read whole; or two ``.npy``,
    predictions, then labels, which are memory-mapped.
    """
    suffixes = [os.path.splitext(path)[1].lower() for path in paths]
    if suffixes == ['.npz']:
        pred, label = _read_safely(_read_npz, paths[0])
    elif suffixes == ['.npy', '.npy']:
        pred, label = (_read_safely(_read_npy, path) for path in paths)
    else:
        raise ValueError(
            'expected one .npz, or two .npy (predictions, then labels), got '
            f'{", ".join(map(repr, paths))}; to save MXNet arrays: '
            "numpy.savez('predictions.npz', pred=pred.asnumpy(), label=label.asnumpy())"
        )
    for name, array in (('pred', pred), ('label', label)):
        if not array.size:
            raise ValueError(f'{name}: expected at least one number, got shape {array.shape}')
    return pred, label


def _read_safely(read, path):
    """Call ``read(path)``, and name the file in whatever is wrong with it."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for a writer
        raise ValueError(f'{path}: expected a regular file')
    try:
        with warnings.catch_warnings():  # the parsers of a damaged header warn before they fail
            warnings.simplefilter('ignore')
            return read(path)
    except Exception as error:  # which one NumPy or zipfile raises depends on the bytes
        raise ValueError(f'{path}: cannot be read: {error or type(error).__name__}') from error


def _read_npy(path):
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    with open(path, 'rb') as file:
        version = npy.read_magic(file)
        if version not in readers:  # 3 is for records, which are no predictions
            raise ValueError(f'expected version 1 or 2 of the .npy format, got {version}')
        shape, _, _ = readers[version](file)
    if min(shape, default=0) < 0:  # NumPy would infer it, and crash the process if the dtype has no bytes
        raise ValueError(f'expected a shape without negative sizes, got {shape}')
    return npy.open_memmap(path, mode='r')  # which refuses pickled objects


def _read_npz(path):
    if not zipfile.is_zipfile(path):
        raise ValueError('not a zip archive, as an .npz file is')
    with np.load(path, allow_pickle=False) as archive:
        if not {'pred', 'label'} <= set(archive.files):
            names = ', '.join(map(repr, sorted(archive.files))) or 'none'
            raise ValueError(f"expected arrays named 'pred' and 'label', got {names}")
        pred, label = archive['pred'], archive['label']
    if not isinstance(pred, np.ndarray) or not isinstance(label, np.ndarray):
        raise ValueError("expected arrays in NumPy's .npy format, got other bytes")
    return pred, label
