"""The dtypes of a graph that a hybridized block traces, from the arrays that the block was called with."""

import functools
import threading
from contextlib import nullcontext
from typing import Any, Callable, Optional

import mxnet as mx
from mxnet.gluon.block import _flatten

from . import array_api
from .array_api import Array


class _Trace(threading.local):
    block: Any = None  # the outermost one of this thread
    dtypes: Any = {}  # of its inputs, by their names in its graph  # noqa: RUF012


_trace = _Trace()
_tracing = threading.RLock()


def known_to_graphs(call_cached_op: Callable) -> Callable:
    """Wrap ``HybridBlock._call_cached_op``, so that `dtype_of` knows the dtypes of a graph that is traced.

    Gluon uses one graph for all dtypes. A block whose graph depends on them is traced again when they change.
    Threads trace one after the other: MXNet fails if two trace a block at once.
    """

    @functools.wraps(call_cached_op)
    def call(block, *args):
        dtypes = _dtypes_of(args)
        if vars(block).get('_traced_dtypes', dtypes) != dtypes:
            block._clear_cached_op()
        before = _trace.block, _trace.dtypes
        _trace.block, _trace.dtypes = block, dtypes
        try:
            with nullcontext() if block._cached_op else _tracing:
                return call_cached_op(block, *args)
        finally:
            _trace.block, _trace.dtypes = before

    return call


def _dtypes_of(args):
    """Return the dtypes of a block's inputs, by the names that gluon gives them."""
    arrays = [array for array in _flatten(args, 'input')[0] if array is not None]
    names = ['data'] if len(arrays) == 1 else [f'data{i}' for i in range(len(arrays))]
    return {name: getattr(array, 'dtype', None) for name, array in zip(names, arrays)}


def dtype_of(array: Array) -> Optional[str]:
    """Name the dtype of an array, or of a symbol as far as it is known (else None)."""
    if not array_api.is_symbol(array) or _trace.block is None:
        return array_api.dtype_name(array)
    vars(_trace.block)['_traced_dtypes'] = _trace.dtypes
    # a variable may have the dtype that its parameter had before a cast
    parameters = {name: parameter.dtype for name, parameter in _trace.block.collect_params().items()}
    dtypes = {**parameters, **_trace.dtypes}
    graph = mx.sym.identity(array_api.as_classic(array))  # a variable alone could not be replaced
    inputs = {name: mx.sym.var(name, dtype=dtypes[name]) for name in graph.list_inputs() if name in dtypes}
    return array_api.dtype_name(graph(**inputs) if inputs else graph)
