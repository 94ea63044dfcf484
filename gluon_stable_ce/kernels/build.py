"""Compiles the sources of the fused kernel, and verifies the result before it is put in place."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Tuple

import mxnet as mx
import numpy as np

from ..call import Call
from ..options import Options
from . import fused, library

STALE = 3600  # seconds after which a build is taken to have been killed


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
        with open(path, 'ab') as file:
            file.write(library.END)
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
        raise BuildError(f'no C++ compiler: {compiler[0]} is not there; install g++, or name one in CXX')
    root = os.path.dirname(mx.__file__)
    include = os.path.join(root, 'include')
    sources = [os.path.join(library.SOURCES, 'operator.cc'), os.path.join(root, 'src', 'lib_api.cc')]
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
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = f'from {__name__} import verify; verify({path!r})'
    paths = [os.path.dirname(package), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'GLUON_STABLE_CE_KERNEL': 'stock'}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, errors='replace', env=environment, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
        raise BuildError(f'the compiled operator fails its test: {last}')


def verify(path: str) -> None:
    """Load the library at `path` and compare it with float64; AssertionError if it is wrong."""
    library.load_library(path)
    rng = np.random.RandomState(0)
    for dtype, tolerance in (('float32', 1e-6), ('float64', 1e-12), ('float16', 1e-6)):
        for classes in (2, 10, 1333, 70000):  # lines, lines, rows, split rows
            # (positions, C): p near 1, p near 0, all between
            logits = rng.standard_normal((6, classes)) * 3
            label = rng.randint(0, classes, 6)
            logits[0, label[0]], logits[1, label[1]] = 60, -60
            for inner in (1, 70):
                _verify_case(np.repeat(logits.astype(dtype)[:, :, None], inner, axis=2), label, tolerance)
    logits = np.zeros((3, 5, 1), 'float32')
    logits[0, 3] = logits[1, 0] = logits[2, 0] = np.nan
    nll, grad = _run(logits, np.array([0, 0, -1]))
    _check(np.isnan(nll[:2]).all() and (nll[2] == 0).all(), 'NaN')
    _check((grad[2] == 0).all(), 'a position that is ignored')


def _verify_case(logits: np.ndarray, label: np.ndarray, tolerance: float) -> None:
    nll, grad = _run(logits, label)
    z = logits[:, :, 0].astype('float64')
    rows = np.arange(len(z))
    others = z - z[rows, label][:, None]  # (positions, C)
    others[rows, label] = -np.inf
    expected = np.logaddexp(0, np.log(np.exp(others).sum(1)))
    expected_grad = np.exp(z - z[rows, label][:, None] - expected[:, None])
    expected_grad[rows, label] = np.expm1(-expected)
    case = f'{logits.dtype}, {logits.shape}'
    _check(np.allclose(nll, expected[:, None], rtol=tolerance, atol=0), f'nll, {case}')
    if logits.dtype == 'float16':
        tolerance = 1e-3
    least = 1e-7 if logits.dtype == 'float16' else 1e-37
    _check(np.allclose(grad, expected_grad[:, :, None], rtol=tolerance, atol=least), f'gradient, {case}')


def _run(logits: np.ndarray, label: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The nll of (positions, C, inner) logits with one label for all of inner, and its gradient."""
    pred = mx.nd.array(logits, dtype=logits.dtype)
    pred.attach_grad()
    repeated = mx.nd.array(np.repeat(label[:, None], logits.shape[2], axis=1), dtype='int32')
    call = Call(Options(axis=1, ignore_label=-1), ndim=3)
    with mx.autograd.record():
        nll = fused.class_terms(mx.nd, call, pred, repeated, None).nll
    nll.backward()
    return nll.asnumpy(), pred.grad.asnumpy()


def _check(is_right: bool, what: str) -> None:
    if not is_right:
        raise AssertionError(f'{what} is wrong')
