"""Compiles the sources of the fused kernel, and verifies the result before it is put in place."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Tuple

import mxnet as mx
import numpy as np

from ..call import Call
from ..options import Options
from . import fused, library, stock

STALE = 3600  # seconds after which a build is taken to have been killed
# dtype, relative error of the NLL, and of its gradient
TOLERANCES = (('float16', 1e-6, 1e-3), ('float32', 1e-6, 1e-6), ('float64', 1e-12, 1e-12))


class BuildError(RuntimeError):
    """The operator cannot be compiled here, or what was compiled is wrong."""


def build(force: bool = False) -> str:
    """Compile the operator, unless it is there already, and test it.

    Returns
    -------
    str
        Where it is.

    Raises
    ------
    BuildError
        Without a compiler, with another MXNet, or if the result is wrong.
    """
    reason = library.why_unsupported()
    if reason:
        raise BuildError(reason)
    found = library.find()
    if found and not force:
        return found
    folder = writable_folder()
    remove_stale(folder)
    if sys.stderr.isatty():
        print('gluon_stable_ce build: compiling and testing ...', file=sys.stderr)
    handle, path = tempfile.mkstemp(prefix='building-', suffix='.so', dir=folder)
    os.close(handle)
    try:
        compile_to(path)
        compiled = Path(path).read_bytes()
        Path(path).write_bytes(library.sealed(compiled))
        os.chmod(path, 0o755)
        _verify_in_fresh_process(path)
        final = os.path.join(folder, library.file_name())
        os.replace(path, final)
    finally:
        if os.path.exists(path):
            os.remove(path)
    return final


def writable_folder() -> str:
    """Where to put a new library: the package's own folder if it can be written, else the user's cache."""
    if os.access(library.HERE, os.W_OK):
        return library.HERE
    folder = library.cache_folder()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if not library.is_private(folder):
        raise BuildError(f'{folder}: expected a folder that only this user may write')
    return folder


def remove_stale(folder: str) -> None:
    """Remove what killed builds have left and, beside the sources, what was built from other sources."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        was_killed = name.startswith('building-') and time.time() - os.path.getmtime(path) > STALE
        is_of_others = folder == library.HERE and name.startswith('fused-') and library.digest() not in name
        if was_killed or is_of_others:
            os.remove(path)


def compile_to(path: str) -> None:
    """Compile the sources into the library `path`; BuildError if that fails."""
    try:
        compiler = shlex.split(os.environ.get('CXX', '')) or ['g++']
    except ValueError as error:
        raise BuildError(f'CXX: expected a command, got {os.environ["CXX"]!r}') from error
    if shutil.which(compiler[0]) is None:
        raise BuildError(f'no C++ compiler: {compiler[0]} was not found; install g++, or name one in CXX')
    root = os.path.dirname(mx.__file__)
    include = os.path.join(root, 'include')
    sources = [*sorted(glob(f'{library.SOURCES}/*.cc')), os.path.join(root, 'src', 'lib_api.cc')]
    missing = [file for file in (include, *sources) if not os.path.exists(file)]
    if missing:
        raise BuildError(f'this MXNet comes without {", ".join(missing)}')
    command = [*compiler, *library.FLAGS, f'-I{include}', *sources, '-o', path]
    done = subprocess.run(command, capture_output=True, errors='replace', check=False)
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines() or [f'exit code {done.returncode}']
    raise BuildError(f'{compiler[0]} failed: {next((line for line in lines if "error" in line), lines[-1])}')


def _verify_in_fresh_process(path: str) -> None:
    command = [sys.executable, '-c', f'from {__name__} import verify; verify({path!r})']
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, os.environ.get('PYTHONPATH', '')])
    environment = {**os.environ, 'PYTHONPATH': paths}
    done = subprocess.run(command, capture_output=True, errors='replace', env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
        raise BuildError(f'the compiled operator fails its test: {last}')


def verify(path: str) -> None:
    """Load the library at `path` and compare it with the stock kernel; AssertionError if it is wrong."""
    library.load_library(path)
    rng = np.random.RandomState(0)
    for classes in (2, 10, 1333, 70000):  # lines, lines, rows, split rows
        # (positions, C, 1): p near 1, p near 0, NaN, ignored, all between
        logits = rng.standard_normal((6, classes, 1)) * 3
        label = rng.randint(0, classes - 1, (6, 1))
        logits[0, label[0]], logits[1, label[1]], logits[2, -1], label[3] = 60, -60, np.nan, -1
        for dtype, tolerance, grad_tolerance in TOLERANCES:
            rounded = logits.astype(dtype)
            nll, grad = _run(stock, rounded.astype('float64'), label)
            for inner in (1, 70):
                got = _run(fused, rounded.repeat(inner, axis=2), label.repeat(inner, axis=1))
                least = float(np.finfo(dtype).tiny)
                is_right = np.allclose(got[0], nll, tolerance, 0, equal_nan=True)
                if not is_right or not np.allclose(got[1], grad, grad_tolerance, least, equal_nan=True):
                    raise AssertionError(f'{dtype}, {classes} classes, {inner} in a line is wrong')


def _run(kernel: ModuleType, logits: np.ndarray, label: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return the NLL of (positions, C, inner) logits and its gradient; the label -1 is ignored."""
    pred = mx.nd.array(logits, dtype=logits.dtype)
    pred.attach_grad()
    call = Call(Options(axis=1, ignore_label=-1), dtype=str(logits.dtype), ndim=3, classes=logits.shape[1])
    with mx.autograd.record():
        nll = kernel.class_terms(mx.nd, call, pred, mx.nd.array(label, dtype='int32'), None).nll
    nll.backward()
    return nll.asnumpy(), pred.grad.asnumpy()
