"""The compiled library of the fused kernel: how it is named, found, guarded and loaded."""

import ctypes
import hashlib
import os
import platform
import stat
import sys
import threading
import warnings
from typing import Any, Optional

import mxnet as mx
from mxnet.base import _LIB, OpHandle, c_str, check_call
from mxnet.ndarray.register import _make_ndarray_function
from mxnet.symbol.register import _make_symbol_function

from ..version import __version__
from .fused import NAME

HOW_TO_BUILD = 'python -m gluon_stable_ce build'
HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = os.path.join(HERE, 'fused')
# -ffast-math is not among them: it would make the whole process round denormals to 0
FLAGS = (
    *('-O3', '-std=c++14', '-fPIC', '-shared', '-pthread', '-fopenmp-simd', '-w'),
    *('-fno-math-errno', '-fno-trapping-math', '-ffp-contract=fast'),
    # Horovod makes MXNet's symbols global. The library's own of the same names are of another compiler.
    *(('-Wl,-Bsymbolic',) if sys.platform.startswith('linux') else ()),
)
END = b'end of stable_ce_class_terms'  # a checksum follows: a library that was damaged crashes when loaded


def why_unsupported() -> Optional[str]:
    """What keeps this machine from running the operator, or None."""
    if not mx.__version__.startswith('1.9.'):
        return f'it needs MXNet 1.9, got {mx.__version__}'
    if not sys.platform.startswith(('linux', 'darwin')):
        return f'it runs on Linux and macOS, got {sys.platform}'
    return None


def why_unavailable() -> str:
    """Say what keeps the operator from being used, where `load` is False."""
    return why_unsupported() or f'it is not compiled, or did not load; run `{HOW_TO_BUILD}`'


def file_name() -> str:
    """Name the library of these sources, for this MXNet and this kind of processor."""
    return f'fused-{__version__}-mxnet{mx.__version__}-{platform.machine()}-{digest()}.so'


def digest() -> str:
    """Hash the sources and how they are compiled."""
    hashed = hashlib.sha256(' '.join(FLAGS).encode())
    for name in sorted(os.listdir(SOURCES)):
        with open(os.path.join(SOURCES, name), 'rb') as file:
            hashed.update(name.encode() + file.read())
    return hashed.hexdigest()[:12]


def cache_folder() -> str:
    """The user's folder for libraries, which need not exist."""
    from platformdirs import user_cache_dir

    return user_cache_dir('gluon_stable_ce', appauthor=False)


def find() -> Optional[str]:
    """The path of the compiled operator, or None.

    It is in the package's own folder or in the user's cache. A library that other users may write, or in a
    cache that they may write, is not used: loading it would run their code. (Who may write the package's
    folder may write the package.)
    """
    try:
        name = file_name()
    except OSError:  # without its sources, nobody knows which library is the right one
        return None
    for folder in (HERE, cache_folder()):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        is_safe = (
            is_private(path, like=SOURCES) if folder == HERE else is_private(folder) and is_private(path)
        )
        if is_safe and is_whole(path):
            return path
    return None


def is_private(path: str, like: Optional[str] = None) -> bool:
    """Whether nobody but this user, root and those who may write `like` may write `path`.

    If others may, that is a warning.
    """
    status, allowed = os.stat(path), os.stat(like) if like else None
    others_may_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) & ~(allowed.st_mode if allowed else 0)
    if not others_may_write and status.st_uid in (0, os.getuid(), allowed and allowed.st_uid):
        return True
    warnings.warn(f'{path}: not used, as other users may write it', RuntimeWarning, stacklevel=3)
    return False


def sealed(content: bytes) -> bytes:
    """Append the checksum by which `is_whole` knows a library that is as it was built."""
    return content + END + hashlib.sha256(content).digest()


def is_whole(path: str) -> bool:
    """Whether the library can be read and is as it was built: a full disk cuts it off; a warning if not."""
    try:
        with open(path, 'rb') as file:
            found = file.read()
        if found == sealed(found.rpartition(END)[0]):
            return True
        reason = 'it is damaged'
    except OSError as error:
        reason = f'it cannot be read ({error.strerror})'
    warnings.warn(
        f'{path}: not used, as {reason}. To rebuild it: {HOW_TO_BUILD}', RuntimeWarning, stacklevel=3
    )
    return False


_lock = threading.Lock()
_is_loaded: Optional[bool] = None  # None: not tried yet
compiled: Any = None  # the library, whose C functions can be called, once it is loaded


def load() -> bool:
    """Load the operator, once per process, and return whether it is there."""
    global _is_loaded
    with _lock:
        if _is_loaded is None:
            path = None if why_unsupported() else find()
            _is_loaded = path is not None and _load_or_warn(path)
        return _is_loaded


def _load_or_warn(path: str) -> bool:
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


def load_library(path: str) -> None:
    """Load an operator library silently, and make `mx.nd` and `mx.sym` know its operator.

    ``mx.library.load`` would make all functions of `mx.nd` and `mx.sym` anew, which undoes ``amp.init``.
    """
    global compiled
    encoded = os.fsencode(os.path.abspath(path))  # as the locale may have no characters for it
    check_call(_LIB.MXLoadLib(encoded, ctypes.c_uint(0)))  # 0: not verbose
    handle = OpHandle()
    check_call(_LIB.NNGetOpHandle(c_str(NAME), ctypes.byref(handle)))
    for module, make in ((mx.nd, _make_ndarray_function), (mx.sym, _make_symbol_function)):
        function = make(handle, NAME, NAME)
        for place in (module, module.op):
            setattr(place, NAME, function)
    compiled = ctypes.CDLL(path)
