"""The fused kernel: compile, find, load and call the operator of ``fused.cc``."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from importlib.machinery import PathFinder
from itertools import count
from typing import List, Optional, Tuple

import mxnet as mx
import numpy as np

from ..array_api import Array, F

__all__ = ['BuildError', 'build', 'class_terms', 'find', 'load', 'why_unavailable', 'why_unsupported']

NAME = 'stable_ce_class_terms'
HOW_TO_BUILD = 'python -m gluon_stable_ce build'
HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, 'fused.cc')
# -ffast-math is not among them: it would make the whole process round denormals to 0
FLAGS = (
    *('-O3', '-std=c++11', '-fPIC', '-shared', '-pthread', '-fopenmp-simd', '-w'),
    *('-fno-math-errno', '-fno-trapping-math', '-ffp-contract=fast'),
)
STALE = 3600  # seconds after which a build is taken to have been killed
END = b'end of stable_ce_class_terms'  # the last bytes of the file: one that was cut off crashes when loaded

_CALLS = count()


class BuildError(RuntimeError):
    """The operator cannot be compiled here, or what was compiled is wrong."""


def class_terms(
    F: F,
    pred: Array,
    axis: int,
    index: Array,
    logsumexp: bool = False,
    uniform: bool = False,
    class_weight: Optional[Array] = None,
    is_needed: Optional[Array] = None,
    is_leaf: bool = True,
) -> Tuple[Array, Optional[Array], Optional[Array]]:
    """Reduce the class axis as `kernels.class_terms` describes, in one reading of the logits.

    The gradient of all terms together is computed in one more reading, and is written once.

    Notes
    -----
    *Numerics.* The largest relative error for 2 to 1,000,000 classes
    (``test_fused.py::test_terms_and_gradient_equal_long_double``):

    ===================== ================ =======
    term                  float16, float32 float64
    ===================== ================ =======
    nll, logsumexp        3e-7             2e-13
    gradient at the label 3e-7             2e-13
    ===================== ================ =======

    For a logsumexp between -1 and 1, the error is absolute. The gradient of float16 logits is rounded to
    float16.
    A label at -inf has an infinite nll, and so has one beside a class at +inf. A label at +inf has NaN. NaN
    in any class of a position is NaN.
    """
    if not load():
        raise ValueError(f"kernel: expected 'stock', as {why_unavailable()}; got 'fused'")
    if is_leaf:
        # An operator of a library cannot add into a gradient (grad_req='add'), but a reshape can. The
        # attribute keeps MXNet from merging it with other reshapes of `pred`.
        with mx.AttrScope(__stable_ce__=str(next(_CALLS))):
            pred = F.reshape(pred, shape=(-2,))
    if is_needed is not None:
        index = F.where(is_needed, index, -F.ones_like(index))  # -1 is not read
    inputs = (pred, index, class_weight) if uniform and class_weight is not None else (pred, index)
    operator = getattr(F, NAME)
    nll, rounded, _, *others = operator(*inputs, axis=axis, uniform=int(uniform), weighted=len(inputs) - 2)
    return nll, rounded if logsumexp else None, others[0] if uniform else None


def why_unsupported():
    """What keeps this machine from running the operator, or None."""
    if not mx.__version__.startswith('1.9.'):
        return f'the fused kernel needs MXNet 1.9, got {mx.__version__}'
    if not sys.platform.startswith(('linux', 'darwin')):
        return f'the fused kernel runs on Linux and macOS, got {sys.platform}'
    return None


def why_unavailable() -> str:
    """Say what keeps the operator from being used, where `load` is False."""
    return why_unsupported() or f'the fused kernel is not compiled: {HOW_TO_BUILD}'


def file_name():
    """Name the library of this source, for this MXNet and this kind of processor."""
    from .. import __version__

    return f'fused-{__version__}-mxnet{mx.__version__}-{platform.machine()}-{digest()}.so'


def digest():
    """Hash the source and how it is compiled."""
    hashed = hashlib.sha256(' '.join(FLAGS).encode())
    with open(SOURCE, 'rb') as file:
        hashed.update(file.read())
    return hashed.hexdigest()[:12]


def cache_folder():
    """The user's folder for libraries, which need not exist."""
    from platformdirs import user_cache_dir

    return user_cache_dir('gluon_stable_ce', appauthor=False)


def find():
    """The path of the compiled operator, or None.

    It is in the package's own folder or in the user's cache. A library that other users may write, or in a
    cache that they may write, is not used: loading it would run their code. (Who may write the package's
    folder may write the package.)
    """
    try:
        name = file_name()
    except OSError:  # without its source, nobody knows which library is the right one
        return None
    path = os.path.join(HERE, name)
    if os.path.isfile(path) and is_private(path, like=SOURCE) and is_whole(path):
        return path
    folder = cache_folder()
    path = os.path.join(folder, name)
    if os.path.isfile(path) and is_private(folder) and is_private(path) and is_whole(path):
        return path
    return None


def is_private(path, like=None):
    """Whether nobody but this user, root and those who may write the file `like` may write `path`.

    If others may, that is a warning.
    """
    status, allowed = os.stat(path), os.stat(like) if like else None
    others_may_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) & ~(allowed.st_mode if allowed else 0)
    if not others_may_write and status.st_uid in (0, os.getuid(), allowed and allowed.st_uid):
        return True
    warnings.warn(f'{path}: not used, as other users may write it', RuntimeWarning, stacklevel=3)
    return False


def is_whole(path):
    """Whether the library can be read and was not cut off, as by a full disk; a warning if not."""
    try:
        with open(path, 'rb') as file:
            if file.read().endswith(END):
                return True
        reason = 'it is not whole'
    except OSError as error:
        reason = f'it cannot be read ({error.strerror})'
    warnings.warn(
        f'{path}: not used, as {reason}. To rebuild it: {HOW_TO_BUILD}', RuntimeWarning, stacklevel=3
    )
    return False


def writable_folder():
    """Where to put a new library: the package's own folder if it can be written, else the user's cache."""
    if os.access(HERE, os.W_OK):
        return HERE
    folder = cache_folder()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise BuildError(f'{folder}: expected a folder that only this user may write')
    return folder


_lock = threading.Lock()
_is_loaded = None  # None: not tried yet


def load():
    """Load the operator, once per process, and return whether it is there."""
    global _is_loaded
    with _lock:
        if _is_loaded is None:
            path = None if why_unsupported() else find()
            _is_loaded = path is not None and _load_or_warn(path)
        return _is_loaded


def _load_or_warn(path):
    try:
        load_library(path)
    except (mx.MXNetError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        warnings.warn(
            f'{path}: does not load ({reason}); the stock kernel is used. '
            f'To rebuild it: {HOW_TO_BUILD} --force',
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def load_library(path):
    """Load an operator library silently, and make `mx.nd` and `mx.sym` know its operator.

    ``mx.library.load`` would make all functions of `mx.nd` and `mx.sym` anew, which undoes ``amp.init``.
    """
    from mxnet.base import _LIB, OpHandle, c_str, check_call
    from mxnet.ndarray.register import _make_ndarray_function
    from mxnet.symbol.register import _make_symbol_function

    check_call(_LIB.MXLoadLib(c_str(os.path.abspath(path)), ctypes.c_uint(0)))  # 0: not verbose
    handle = OpHandle()
    check_call(_LIB.NNGetOpHandle(c_str(NAME), ctypes.byref(handle)))
    for module, make in ((mx.nd, _make_ndarray_function), (mx.sym, _make_symbol_function)):
        function = make(handle, NAME, NAME)
        for place in (module, module.op):
            setattr(place, NAME, function)


def build(force=False):
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
    reason = why_unsupported()
    if reason:
        raise BuildError(reason)
    found = find()
    if found and not force:
        return found
    folder = writable_folder()
    _remove_stale(folder)
    if sys.stderr.isatty():
        print('gluon_stable_ce build: compiling and testing ...', file=sys.stderr)
    handle, path = tempfile.mkstemp(prefix='building-', suffix='.so', dir=folder)
    os.close(handle)
    try:
        _compile(path)
        with open(path, 'ab') as file:
            file.write(END)
        os.chmod(path, 0o755)
        _verify_in_fresh_process(path)
        final = os.path.join(folder, file_name())
        os.replace(path, final)
    finally:
        if os.path.exists(path):
            os.remove(path)
    return final


def _remove_stale(folder):
    """Remove what killed builds have left and, beside the source, what was built from another source."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        was_killed = name.startswith('building-') and time.time() - os.path.getmtime(path) > STALE
        is_of_another = folder == HERE and name.startswith('fused-') and digest() not in name
        if was_killed or is_of_another:
            os.remove(path)


def _compile(path):
    try:
        compiler = shlex.split(os.environ.get('CXX', '')) or ['g++']
    except ValueError as error:
        raise BuildError(f'CXX: expected a command, got {os.environ["CXX"]!r}') from error
    if shutil.which(compiler[0]) is None:
        raise BuildError(f'no C++ compiler: {compiler[0]} is not there; install g++, or name one in CXX')
    root = os.path.dirname(mx.__file__)
    include = os.path.join(root, 'include')
    sources = [SOURCE, os.path.join(root, 'src', 'lib_api.cc')]
    missing = [file for file in (include, *sources) if not os.path.exists(file)]
    if missing:
        raise BuildError(f'this MXNet comes without {", ".join(missing)}')
    command = [*compiler, *FLAGS, f'-I{include}', *sources, '-o', path]
    done = subprocess.run(command, capture_output=True, errors='replace', check=False)
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines() or [f'exit code {done.returncode}']
    raise BuildError(f'{compiler[0]} failed: {next((line for line in lines if "error" in line), lines[-1])}')


def _verify_in_fresh_process(path):
    package = os.path.dirname(HERE)
    code = f'from {__name__} import verify; verify({path!r})'
    paths = [os.path.dirname(package), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'GLUON_STABLE_CE_KERNEL': 'stock'}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, errors='replace', env=environment, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
        raise BuildError(f'the compiled operator fails its test: {last}')


def verify(path):
    """Load the library at `path` and compare it with float64; AssertionError if it is wrong."""
    global _is_loaded
    load_library(path)
    _is_loaded = True  # and not another one
    rng = np.random.RandomState(0)
    for dtype, tolerance in (('float32', 1e-6), ('float64', 1e-12), ('float16', 1e-6)):
        for classes in (2, 10, 1333, 70000):  # lines, lines, rows, split rows
            # (positions, C): p near 1, p near 0, all between
            logits = rng.standard_normal((6, classes)) * 3
            index = rng.randint(0, classes, 6)
            logits[0, index[0]], logits[1, index[1]] = 60, -60
            for inner in (1, 70):
                _verify_case(np.repeat(logits.astype(dtype)[:, :, None], inner, axis=2), index, tolerance)
    logits = np.zeros((3, 5, 1), 'float32')
    logits[0, 3] = logits[1, 0] = np.nan
    logits[2, 0] = np.nan
    nll, grad = _run(logits, np.array([0, 0, -1]))
    _check(np.isnan(nll[:2]).all() and (nll[2] == 0).all(), 'NaN')
    _check((grad[2] == 0).all(), 'a position that is not needed')


def _verify_case(logits, index, tolerance):
    nll, grad = _run(logits, index)
    z = logits[:, :, 0].astype('float64')
    rows = np.arange(len(z))
    others = z - z[rows, index][:, None]  # (positions, C)
    others[rows, index] = -np.inf
    expected = np.logaddexp(0, np.log(np.exp(others).sum(1)))
    expected_grad = np.exp(z - z[rows, index][:, None] - expected[:, None])
    expected_grad[rows, index] = np.expm1(-expected)
    case = f'{logits.dtype}, {logits.shape}'
    _check(np.allclose(nll, expected[:, None], rtol=tolerance, atol=0), f'nll, {case}')
    if logits.dtype == 'float16':
        tolerance = 1e-3
    least = 1e-7 if logits.dtype == 'float16' else 1e-37
    _check(np.allclose(grad, expected_grad[:, :, None], rtol=tolerance, atol=least), f'gradient, {case}')


def _run(logits, index):
    """The nll of (positions, C, inner) logits with one index for all of inner, and its gradient."""
    pred = mx.nd.array(logits, dtype=logits.dtype)
    pred.attach_grad()
    index = mx.nd.array(np.repeat(index[:, None], logits.shape[2], axis=1), dtype='float64')
    with mx.autograd.record():
        nll, _, _ = class_terms(mx.nd, pred, 1, index)
    nll.backward()
    return nll.asnumpy(), pred.grad.asnumpy()


def _check(is_right, what):
    if not is_right:
        raise AssertionError(f'{what} is wrong')


def add_arguments(parser):
    """Add the options of ``python -m gluon_stable_ce build`` to `parser`."""
    parser.description += (
        ' It needs MXNet 1.9 and a C++ compiler: $CXX, or else g++.'
        ' Without the fused kernel, the stock kernel is used.'
    )
    parser.epilog = 'Example: CXX=clang++ python -m gluon_stable_ce build --force'
    parser.add_argument('--force', action='store_true', help='compile even if it has been compiled already')


def run(args):
    """Compile the operator and print one line: 0, or 2 if that cannot be done."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a library that is not used: here is a new one, or an error
        try:
            path = build(force=args.force)
            if not load():
                raise BuildError(f'{path}: does not load; to rebuild it: {HOW_TO_BUILD} --force')
        except (BuildError, OSError) as error:
            print(f'gluon_stable_ce build: {error}', file=sys.stderr)
            return 2
    installed = PathFinder.find_spec('gluon_stable_ce', sys.path[1:])
    package = os.path.dirname(HERE)
    if installed and installed.origin and not os.path.samefile(os.path.dirname(installed.origin), package):
        print(
            f'gluon_stable_ce build: this is the library of {package}. Another copy of the package is in '
            f'{os.path.dirname(installed.origin)}. To build for that, run the command in another folder',
            file=sys.stderr,
        )
    ratio, shape = ratio_to_gluon()
    problem = f'{" x ".join(map(str, shape))}, with gradient'
    print(f"{path}: {ratio:.2f} of the time of gluon's loss ({problem})")
    return 0


def ratio_to_gluon(shape=(256, 10000), rounds=15):
    """Time our loss over gluon's, hybridized, forward and backward, of logits that an operator made.

    Returns
    -------
    (float, tuple of int)
        The ratio of the medians, and the shape.
    """
    from ..loss import StableSoftmaxCELoss  # which is a level higher: only the command line measures it

    inputs = mx.nd.random.normal(shape=shape)
    label = mx.nd.random.randint(0, shape[1], shape=shape[:1]).astype('float32')
    inputs.attach_grad()
    losses = StableSoftmaxCELoss(kernel='fused'), mx.gluon.loss.SoftmaxCrossEntropyLoss()
    losses[1].hybridize()
    times: List[List[float]] = [[], []]
    for _ in range(rounds):
        for loss_fn, taken in zip(losses, times):
            start = time.perf_counter()
            with mx.autograd.record():
                loss = loss_fn(inputs * 1, label)
            loss.backward()
            inputs.grad.wait_to_read()
            taken.append(time.perf_counter() - start)
    return float(np.median(times[0]) / np.median(times[1])), shape
