"""Export to ONNX, with the converters for the graph of the loss that MXNet lacks or has wrong.

MXNet has one registry of converters. Those of this module are in it only while `export_model` runs, and they
never replace a user's converter.
"""

import json
from ast import literal_eval
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Dict

import mxnet as mx
import numpy as np

from .kernels.fused import NAME as FUSED

__all__ = ['export_model']

_CONVERTERS: Dict[str, Any] = {}
_OPSETS = (12, 13)  # those that MXNet has converters for
_LOCK = Lock()  # an export changes globals of the process while it runs


def export_model(
    sym: Any,
    params: Any,
    in_shapes: Any = None,
    in_types: Any = np.float32,
    onnx_file_path: str = 'model.onnx',
    verbose: bool = False,
    dynamic: bool = False,
    dynamic_input_shapes: Any = None,
    run_shape_inference: bool = False,
    input_type: Any = None,
    input_shape: Any = None,
    *,
    opset_version: int = 13,
) -> str:
    """Export a graph that may contain the loss to an ONNX file.

    This is ``mx.onnx.export_model`` with more converters. MXNet converts to operators of opset 12 or 13 and
    labels the model with the newest opset that the installed onnx has. This function converts to, checks
    against and labels with `opset_version`.

    Parameters
    ----------
    sym, params : str and str, Symbol and dict, or Symbol and list of two dicts
        The files that ``block.export`` writes, or a graph and its parameters.
    in_shapes, in_types : dict or list of tuple, dict or list of dtype
        Shapes and dtypes of the inputs. A dict has them by the name of the input. A list has them in the
        order of ``sym.list_inputs()``: for the loss, that is pred, label, sample_weight. A single dtype is
        for all inputs.
    onnx_file_path, verbose, dynamic, dynamic_input_shapes, run_shape_inference, input_type, input_shape
        As in MXNet. With ``dynamic=True``, None in `dynamic_input_shapes` stands for an axis of any length.
        `dynamic_input_shapes`, `input_type` and `input_shape` may be dicts, too.
    opset_version : int, 12 or 13
        The opset of the model.

    Returns
    -------
    str
        `onnx_file_path`.

    Raises
    ------
    ImportError
        If onnx is not installed, or MXNet is older than 1.9.
    ValueError
        If `opset_version` is another opset, if a dict lacks an input or has a name that no input has, or if
        the loss in the graph has ``kernel='fused'``.
    NotImplementedError
        If an operator has options that no converter handles.

    Examples
    --------
    >>> files = 'net-symbol.json', 'net-0000.params'
    >>> shapes = {'data0': (8, 3, 32, 32), 'data1': (8,)}
    >>> export_model(*files, shapes, onnx_file_path='net.onnx')  # doctest: +SKIP
    'net.onnx'
    """
    onnx = _import_onnx()
    if opset_version not in _OPSETS:
        raise ValueError(f'opset_version: expected {" or ".join(map(str, _OPSETS))}, got {opset_version!r}')
    _check_operators(sym)
    given = {
        'in_shapes': in_shapes,
        'in_types': in_types,
        'dynamic_input_shapes': dynamic_input_shapes,
        'input_type': input_type,
        'input_shape': input_shape,
    }
    with _LOCK, _newest_opset(onnx, opset_version), _registered(opset_version):
        return mx.onnx.export_model(
            sym,
            params,
            onnx_file_path=onnx_file_path,
            verbose=verbose,
            dynamic=dynamic,
            run_shape_inference=run_shape_inference,
            **_lists_of(given, sym, params),
        )


def _check_operators(sym):
    """Raise ValueError if a graph has the fused operator. It need not be known to this process."""
    graph = Path(sym).read_text() if isinstance(sym, str) else sym.tojson()
    if any(node['op'] == FUSED for node in json.loads(graph)['nodes']):
        raise ValueError(
            "sym: expected a graph of MXNet's own operators, got one of a loss with kernel='fused'; "
            "export it with kernel='stock'"
        )


def _lists_of(given, sym, params):
    """Return the arguments with lists in MXNet's order in place of dicts by the name of the input."""
    if not any(isinstance(values, dict) for values in given.values()):
        return given
    inputs = _inputs_of(sym, params)
    return {
        argument: _list_of(argument, values, inputs) if isinstance(values, dict) else values
        for argument, values in given.items()
    }


def _list_of(argument, values, inputs):
    missing = [name for name in inputs if name not in values]
    unknown = [name for name in values if name not in inputs]
    if missing or unknown:
        raise ValueError(
            f'{argument}: expected a dict with the inputs {inputs}, got {list(values)}; '
            f'missing: {missing}, unknown: {unknown}'
        )
    return [values[name] for name in inputs]


def _inputs_of(sym, params):
    """Return the names of a graph's inputs: all that have no value, but for the label of an output layer."""
    if isinstance(sym, str):
        sym = mx.sym.load(sym)
    if isinstance(params, str):
        params = {key.split(':', 1)[-1] for key in mx.nd.load(params)}  # arg:weight
    elif not isinstance(params, dict):
        params = set().union(*params)
    label = f'{list(sym.get_internals())[-1].name}_label'  # such as softmax_label, which MXNet leaves out
    return [name for name in sym.list_inputs() if name not in params and name != label]


def _import_onnx():
    if not hasattr(mx, 'onnx'):
        raise ImportError(
            'gluon_stable_ce.onnx needs MXNet 1.9, the first with mx.onnx.export_model; '
            f'this is MXNet {mx.__version__}'
        )
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            'gluon_stable_ce.onnx needs the onnx package: pip install "gluon-stable-ce[onnx]"'
        ) from error
    if not _registry():  # importing MXNet fills it, if onnx is installed
        raise ImportError(
            'gluon_stable_ce.onnx needs an MXNet that was imported after onnx was installed: restart Python'
        )
    return onnx


def _registry():
    from mxnet.onnx.mx2onnx._export_onnx import MXNetGraph

    return MXNetGraph.registry_


@contextmanager
def _newest_opset(onnx, version):
    """Let onnx report `version` as its newest opset, which MXNet writes, and check nodes against it."""
    name_newest, context = onnx.defs.onnx_opset_version, onnx.checker.DEFAULT_CONTEXT
    checked = context.opset_imports
    try:
        onnx.defs.onnx_opset_version, context.opset_imports = (lambda: version), {'': version}
        yield
    finally:
        onnx.defs.onnx_opset_version, context.opset_imports = name_newest, checked


@contextmanager
def _registered(opset_version):
    """Add the converters of this module to MXNet's registry, in place of MXNet's but not of a user's."""
    # in the order in which MXNet searches them
    tables = [_registry()[version] for version in range(opset_version, 11, -1)]
    before = tables[0].copy()
    try:
        for op, convert in _CONVERTERS.items():
            stock = next((table[op] for table in tables if op in table), None)
            if stock is None or _is_of_mxnet(stock):
                tables[0][op] = partial(_converted, convert, stock)
        yield
    finally:
        tables[0].clear()
        tables[0].update(before)


def _is_of_mxnet(converter):
    # not by __module__: a user's wrapper may have the name and the __module__ of what it wraps
    return getattr(converter, '__globals__', {}).get('__name__', '').startswith('mxnet.onnx.')


def _converted(convert, stock, node, **kwargs):
    at = _Node(node, stock, kwargs)
    result = convert(at)
    if result is None:  # then the output of the last node made is the result
        at.made[-1].output[0] = node['name']
        result = at.made  # MXNet takes its dtype for that of the first input
    return result


class _Node:
    """An MXNet node that is being converted: its inputs by name, its attributes, the ONNX nodes `made`."""

    def __init__(self, node, stock, kwargs):
        sources = [kwargs['outputs_lookup'][source][output] for source, output, *_ in node['inputs']]
        self.inputs, self.dtypes = [source.name for source in sources], [source.dtype for source in sources]
        self.name, self.op, self.attrs, self.made = node['name'], node['op'], node.get('attrs', {}), []
        self.opset = kwargs['opset_version']
        self.stock = partial(stock, node, **kwargs) if stock else None  # MXNet's converter
        self._initializers = kwargs['initializer']
        self._names = (f'{node["name"]}/{i}' for i in count())  # MXNet's converters join with _

    def is_true(self, attr):
        return self.attrs.get(attr) in ('True', '1')

    def constant(self, value, dtype='int64'):
        """Add a constant and return its name."""
        import onnx

        self._initializers.append(onnx.numpy_helper.from_array(np.array(value, dtype), next(self._names)))
        return self._initializers[-1].name

    def make(self, op, *inputs, **attrs):
        """Add an ONNX node and return the name of its output."""
        import onnx

        self.made.append(onnx.helper.make_node(op, inputs, [next(self._names)], **attrs))
        return self.made[-1].output[0]

    def make_over(self, axes, op, data, **attrs):
        """Add a node of an operator whose axes are an attribute before opset 13 and an input since."""
        return (
            self.make(op, data, axes=axes, **attrs)
            if self.opset < 13
            else self.make(op, data, self.constant(axes), **attrs)
        )

    def cast(self, data, dtype):
        import onnx

        return self.make('Cast', data, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def length(self, data, axis):
        return self.make('Gather', self.make('Shape', data), self.constant(axis))


def _converts(*ops):
    def register(convert):
        _CONVERTERS.update(dict.fromkeys(ops, convert))
        return convert

    return register


@_converts('pick')
def _pick(at):
    """Convert `pick`, for which MXNet has no converter."""
    axis, mode = at.attrs.get('axis', '-1'), at.attrs.get('mode', 'clip')
    if axis == 'None' or mode != 'clip':
        raise NotImplementedError(
            f"pick: expected an axis, and mode 'clip', got axis {axis} and mode {mode!r}"
        )
    (data, index), axis = at.inputs, int(axis)
    one = at.make('Slice', data, at.constant([0]), at.constant([1]), at.constant([axis]))
    index = at.make('Reshape', index, at.make('Shape', one))  # it may have the axis or not
    index = at.cast(index, 'int64')  # NaN may become any integer; the clipping makes it harmless
    index = at.make('Min', index, at.make('Sub', at.length(data, axis), at.constant(1)))
    picked = at.make('GatherElements', data, at.make('Max', index, at.constant(0)), axis=axis)
    if not at.is_true('keepdims'):
        at.make_over([axis], 'Squeeze', picked)


@_converts('_equal', '_not_equal_scalar')
def _compare(at):
    """Convert comparisons, for which MXNet has no converter: 1 or 0 in the dtype of the inputs."""
    if at.op != '_equal':
        at.inputs.append(at.constant(float(at.attrs['scalar']), at.dtypes[0]))
    is_true = at.make('Equal', *at.inputs)
    at.cast(at.make('Not', is_true) if at.op == '_not_equal_scalar' else is_true, at.dtypes[0])


@_converts('log1p')
def _log1p(at):
    """Convert `log1p`, which ONNX lacks: log(1 + x) x / ((1 + x) - 1) has no error of the rounded 1 + x.

    See Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 1.14.1.
    """
    (x,), one = at.inputs, at.constant(1, at.dtypes[0])
    above = at.make('Add', x, one)
    rounded = at.make('Sub', above, one)
    is_0 = at.make('Equal', rounded, at.constant(0, at.dtypes[0]))
    ratio = at.make('Div', at.make('Log', above), rounded)
    # inf / inf is NaN, and log(1 + inf) is inf
    is_infinite = at.make('IsInf', at.cast(x, 'float32'))
    at.make('Where', at.make('Or', is_0, is_infinite), x, at.make('Mul', x, ratio))


@_converts('_npi_ones')
def _ones(at):
    """Convert the ones of the NumPy-style API, for which MXNet has no converter."""
    dtype = np.dtype(at.attrs.get('dtype', 'float32'))
    at.make('Identity', at.constant(np.ones(literal_eval(at.attrs['shape'])), dtype))
    at.made[-1].output[0] = at.name
    return at.made, (dtype,)


@_converts('_npi_add', '_npi_multiply')
def _promote(at):
    """Convert the operators that promote: float16 and float32 are computed in float32."""
    dtype = np.result_type(*at.dtypes)
    at.make({'_npi_add': 'Add', '_npi_multiply': 'Mul'}[at.op], *(at.cast(data, dtype) for data in at.inputs))
    at.made[-1].output[0] = at.name
    return at.made, (dtype,)


@_converts('one_hot')
def _one_hot(at):
    """Convert `one_hot`, which has no 1 for a negative index. That of ONNX counts it from the end."""
    dtype = np.dtype(at.attrs.get('dtype', 'float32'))
    on = at.constant(float(at.attrs.get('on_value', 1)), dtype)
    off = at.constant(float(at.attrs.get('off_value', 0)), dtype)
    index = at.make_over([-1], 'Unsqueeze', at.cast(at.inputs[0], 'int64'))
    is_on = at.make('Equal', index, at.constant(np.arange(int(at.attrs['depth']))))
    at.make('Where', is_on, on, off)
    at.made[-1].output[0] = at.name
    return at.made, (dtype,)


@_converts('Reshape')
def _reshape(at):
    """Convert the reshape that merges the last two axes, for which MXNet has no converter."""
    if (literal_eval(at.attrs['shape']), at.is_true('reverse')) != ((-2, -3), True):
        return at.stock()
    sizes = at.make('Slice', at.make('Shape', at.inputs[0]), at.constant([0]), at.constant([-2]))
    at.make('Reshape', at.inputs[0], at.make('Concat', sizes, at.constant([-1]), axis=0))
    return None


@_converts('where')
def _where(at):
    """Convert `where`: MXNet's converter says that the result has the condition's dtype."""
    return at.stock(), (at.dtypes[1],)


@_converts('_contrib_arange_like')
def _arange_like(at):
    """Convert `arange_like` of an axis alone.

    MXNet's converter takes a negative axis for one of length 1, and makes a Range of float16, which ONNX
    lacks.
    """
    axis = at.attrs.get('axis', 'None')
    if at.attrs.keys() - {'axis'} and axis.startswith('-'):
        raise NotImplementedError(f'_contrib_arange_like: expected a negative axis alone, got {at.attrs}')
    if axis == 'None' or at.attrs.keys() - {'axis'}:
        return at.stock()
    at.cast(
        at.make('Range', at.constant(0), at.length(at.inputs[0], int(axis)), at.constant(1)), at.dtypes[0]
    )


@_converts('log_softmax')
def _log_softmax(at):
    """Convert `log_softmax` to opset 12, where MXNet's converter takes exponentials that overflow."""
    if at.opset > 12 or at.attrs.get('axis', '-1') != '-1' or at.attrs.keys() - {'axis'}:
        return at.stock()
    at.make('LogSoftmax', *at.inputs, axis=-1)


@_converts('mean', 'sum')
def _reduce(at):
    """Convert `mean` and `sum` with `exclude`, which MXNet's converter does not read."""
    if not at.is_true('exclude'):
        return at.stock()
    axes = np.ravel(literal_eval(at.attrs.get('axis', '()'))).tolist()
    if not axes:  # over all axes, of which none is excluded
        total = at.make({'mean': 'ReduceMean', 'sum': 'ReduceSum'}[at.op], at.inputs[0])
        if not at.is_true('keepdims'):
            at.make('Reshape', total, at.constant([1]))
        return None
    if len(axes) != 1:
        raise NotImplementedError(f'{at.op}: expected one axis with exclude=True, got {at.attrs}')
    data, axis = at.inputs[0], axes[0]
    # the rank is not known, so the axes on one side are merged first
    if axis >= 0:  # (before..., excluded, after...) -> (before..., excluded, A)
        shape, over = at.constant([0] * (axis + 1) + [-1]), [*range(axis), axis + 1]
    else:  # -> (B, excluded, after...)
        end = at.constant([np.iinfo('int64').max])
        sizes = at.make('Slice', at.make('Shape', data), at.constant([axis]), end)
        shape, over = at.make('Concat', at.constant([-1]), sizes, axis=0), [0, *range(2, 1 - axis)]
    data = at.make('Reshape', data, shape)
    if at.op == 'mean':
        total = at.make('ReduceMean', data, axes=over, keepdims=0)
    else:
        total = at.make_over(over, 'ReduceSum', data, keepdims=0)
    if at.is_true('keepdims'):
        sizes, place = at.make('Shape', at.inputs[0]), at.constant([axis])
        ones = at.make('Expand', at.constant([1]), at.make('Shape', sizes))
        kept = at.make('ScatterElements', ones, place, at.make('Gather', sizes, place), axis=0)
        at.make('Reshape', total, kept)
    return None
