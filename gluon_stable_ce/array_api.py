"""One vocabulary over nd/sym and np/npx: the only file that knows which array API is in use.

The mathematics is written once, in MXNet's classic operators. They exist in every MXNet 1.x, export, and run
in np mode as well: a NumPy-style array or symbol is viewed as a classic one (no copy, gradients included) on
the way in, and the result is viewed back on the way out.
"""

import json
from ast import literal_eval
from functools import lru_cache, wraps
from string import ascii_lowercase
from threading import active_count
from types import ModuleType
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import ndarray, numpy, symbol
from mxnet.base import MXNetError
from mxnet.contrib.amp import amp
from mxnet.symbol.numpy import _Symbol as NumpySymbol
from mxnet.util import is_np_array

F = ModuleType  # mx.nd or mx.sym: the operators to compute with
Array = Union[ndarray.NDArray, symbol.Symbol]  # of either API

ARRAY = ndarray.NDArray
NP_STYLE = (numpy.ndarray, NumpySymbol)
SPARSE = ndarray.sparse.BaseSparseNDArray
BFLOAT16 = np.dtype([('bfloat16', 'uint16')])
# else slice_like is an error in a graph whose ranks are not all known yet
HAS_SLICE_LIKE_OF_UNKNOWN_RANK = not mx.__version__.startswith(('1.6', '1.7'))
HAS_ONEDNN_LOG_SOFTMAX = not mx.__version__.startswith(('1.6', '1.7'))  # which adds up as `softmax` does
HAS_MIXED_ADD = not mx.__version__.startswith(('1.6', '1.7', '1.8'))  # np.add of two dtypes

# operators whose inputs have the shape of their output
_ELEMENTWISE = (
    *(f'elemwise_{name}' for name in ('add', 'sub', 'mul', 'div')),
    *(f'_{name}_scalar' for name in ('plus', 'minus', 'rminus', 'mul', 'div')),
    *(f'_npi_{name}_scalar' for name in ('add', 'subtract', 'rsubtract', 'multiply', 'true_divide')),
    *('negative', 'clip', 'tanh', 'Activation', 'Cast', '_copy', 'BlockGrad', 'Dropout'),
)


def is_symbol(array: Any) -> bool:
    """Whether `array` stands for a node of a graph, whose shape and dtype may be unknown."""
    return isinstance(array, symbol.Symbol)


def is_array(array: Any) -> bool:
    """Whether `array` is an MXNet array of either API."""
    return isinstance(array, ARRAY)


def is_np_style(array: Any) -> bool:
    """Whether `array` belongs to the NumPy-style API (``mx.np``)."""
    return isinstance(array, NP_STYLE)


def as_classic(array: Any) -> Any:
    """View `array`, which may be None, as a member of the classic API."""
    return array.as_nd_ndarray() if is_np_style(array) else array


def in_style_of(example: Array, array: Array) -> Array:
    """View the classic `array` as a member of the API that `example` belongs to."""
    return array.as_np_ndarray() if is_np_style(example) else array


def add_float32(F: F, array: Array, other: Array) -> Array:
    """Add a float32 array to one of unknown dtype: float16 becomes float32, and float64 stays."""
    if HAS_MIXED_ADD:
        return F.np.add(array.as_np_ndarray(), other.as_np_ndarray()).as_nd_ndarray()
    array = promoted(F, array, first(F, other))
    return array + promoted(F, other, first(F, array))


def promoted(F: F, array: Array, like: Array) -> Array:
    """Return `array` in the dtype of `like` if that is the wider one. Both may be unknown.

    A graph reads `like` first: MXNet lists the inputs in the order in which a walk from the output meets
    them. What has one axis gets two.
    """
    return multiply(F, F.ones_like(first(F, F.reshape(like, shape=(-1, 1)))), array)  # (1, 1)


def multiply(F: F, array: Array, other: Array) -> Array:
    """Multiply with broadcasting, in the wider one of the two dtypes."""
    return F.np.multiply(array.as_np_ndarray(), other.as_np_ndarray()).as_nd_ndarray()


def unshared(array: Array) -> Array:
    """Return an array that has no gradient in a form that other threads may read at the same time.

    Autograd marks the inputs of what it records, and crashes if another thread reads a handle meanwhile. An
    array whose gradient is asked for is recorded all the same.
    """
    return array.detach() if active_count() > 1 and array.grad is None else array


def first(F: F, array: Array, axis: int = 0) -> Array:
    """Return the first slice of an axis, which stays, with length 1."""
    return F.slice_axis(array, axis=axis, begin=0, end=1)


def three_axes(F: F, array: Array, axis: int) -> Array:
    """Merge the axes before and behind one axis of an array of unknown rank: (B, C, A)."""
    if axis >= 0:
        merged = F.reshape(array, shape=(0,) * (axis + 1) + (-1,))  # (before..., C, A)
        return F.reshape(merged, shape=(-1, 0, 0), reverse=True)
    merged = F.reshape(array, shape=(-1,) + (0,) * -axis, reverse=True)  # (B, C, after...)
    return F.reshape(merged, shape=(0, 0, -1))


def float32_or_64(F: F, array: Array) -> Array:
    """Return an array of unknown dtype as float64 if it is that, else as float32."""
    # AMP does not let a graph have the classic operator, as that has no input to cast
    return F.np.multiply(array.as_np_ndarray(), F.np.ones((1, 1), dtype='float32')).as_nd_ndarray()


def apart(symbol_: Any) -> Array:
    """Put an operator that copies nothing behind a graph.

    With static memory, MXNet has wrong gradients where some operators read a sum such as ``Dense(x) + mask``.
    """
    if symbol_.get_children() is None:  # a variable
        return symbol_
    return in_style_of(symbol_, mx.sym.identity(as_classic(symbol_)))


def is_amp_on() -> bool:
    """Whether ``amp.init`` was called, since when MXNet's operators cast their inputs."""
    return bool(amp._amp_initialized)


def without_amp(build: Callable[..., Array]) -> Callable[..., Array]:
    """Keep AMP's casts out of the graph that ``build(F, call, *inputs)`` makes.

    On a CPU these casts fail for 64-bit arrays, in which labels are compared.
    """

    @wraps(build)
    def build_alone(F: F, call: Any, *inputs: Optional[Array]) -> Array:
        if not is_amp_on() or not is_symbol(inputs[0]):
            return build(F, call, *inputs)
        given = {f'input{i}': array for i, array in enumerate(inputs) if array is not None}
        variables = [
            None if array is None else variable(f'input{i}', is_np_style(array))
            for i, array in enumerate(inputs)
        ]
        graph = build(F, call, *variables)
        graph_alone = mx.sym.load_json(graph.tojson())  # JSON leaves AMP's casts out
        return in_style_of(graph, graph_alone(**given))

    return build_alone


def amp_float32(array: Array) -> Array:
    """Cast a symbol of bfloat16 or float16 to float32, in the way that exports leave out."""
    return in_style_of(array, mx.sym.amp_cast(as_classic(array), dtype='float32'))


def as_dtype(array: Array, dtype: str) -> Array:
    """Cast an array or a symbol. An export keeps this cast."""
    F = mx.sym if is_symbol(array) else mx.nd
    return in_style_of(array, F.cast(as_classic(array), dtype=BFLOAT16 if dtype == 'bfloat16' else dtype))


def in_mode(array: Array) -> Array:
    """View `array` as a member of the API that MXNet is set to."""
    return array.as_np_ndarray() if is_np_array() else array.as_nd_ndarray()


def classic_mode() -> Any:
    """Make a context in which MXNet makes classic arrays."""
    return mx.util.np_array(False)


def variable(name: str, np_style: bool) -> Array:
    """Make an input of a graph, a symbol of either API."""
    symbol_ = mx.sym.var(name)
    return symbol_.as_np_ndarray() if np_style else symbol_


def save(path: str, arrays: Dict[str, Array]) -> None:
    """Save arrays of the API that MXNet is set to."""
    (mx.npx if is_np_array() else mx.nd).save(path, arrays)


def sum_of_none(F: F, array: Array, kept_axes: Sequence[int], ndim: Any) -> Array:
    """Sum a classic array of size 0 over its other axes. The classic sums fail for some of these shapes."""
    axes = ascii_lowercase[:ndim]
    kept = ''.join(axes[axis] for axis in sorted(axis % ndim for axis in kept_axes))
    total = F.np.einsum(f'{axes}->{kept}', array.as_np_ndarray()).as_nd_ndarray()
    return total if kept else total.reshape((1,))


def dtype_name(array: Array) -> Optional[str]:
    """Name the dtype of an array or, as far as its graph knows it, of a symbol (else None)."""
    if not is_symbol(array):
        return name_of(array.dtype)
    try:
        return name_of(array.infer_type_partial()[1][0])
    except MXNetError:  # operators that do not infer a partial type, before 1.8
        return None


def without_bfloat16(array: Any, dtype: Optional[str]) -> Any:
    """Return an array of this dtype, as float32 if it is bfloat16, which promotes to no other dtype."""
    return as_dtype(array, 'float32') if dtype == 'bfloat16' else array


def logits_of_symbol(symbol_: Array) -> Tuple[Array, Optional[str]]:
    """Return a symbol, cast to float32 if it may be bfloat16, and its dtype if that is certain.

    What a graph says of dtypes is not: a parameter that was cast after its first use keeps the old one, and
    some operators say float32 whatever their input is.
    """
    dtype = dtype_name(symbol_)
    if dtype is None and is_amp_on():
        return amp_float32(symbol_), 'float32'
    return without_bfloat16(symbol_, dtype), 'float32' if dtype == 'bfloat16' else None


def last_axis_of(symbol_: Any) -> Optional[int]:
    """Return the length of a symbol's last axis, if a dense layer or a reshape in its graph tells; else None.

    MXNet's own inference of shapes tells nothing while the shape of the data is unknown.
    """
    graph = json.loads(symbol_.tojson())
    lengths: List[Optional[int]] = []
    for node in graph['nodes']:  # the inputs of a node come before it
        attrs, length = node.get('attrs', {}), None
        if node['op'] == 'FullyConnected':
            length = int(attrs['num_hidden'])
        elif node['op'] == 'Reshape':
            shape = np.ravel(literal_eval(attrs.get('shape', '()'))).tolist()
            length = shape[-1] if shape and shape[-1] > 0 else None  # others are codes
        elif node['op'] in _ELEMENTWISE:
            length = next((lengths[i] for i, *_ in node['inputs'] if lengths[i]), None)
        lengths.append(length)
    return lengths[graph['heads'][0][0]]


@lru_cache(maxsize=None)
def name_of(dtype: Any) -> Optional[str]:
    """Name a dtype as MXNet does; None for None."""
    if dtype is None:
        return None
    dtype = np.dtype(dtype)
    return dtype.names[0] if dtype.names else dtype.name  # bfloat16 is a record of that name
