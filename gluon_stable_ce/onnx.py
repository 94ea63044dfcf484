"""Export to ONNX: what MXNet's exporter lacks, or has wrong, for the graph of the loss.

MXNet keeps its converters in one registry. Ours are in it only while `export_model` runs, and never in the
place of a user's.
"""

from ast import literal_eval
from contextlib import contextmanager
from functools import partial
from itertools import count
from threading import Lock
from typing import Any, Dict

import mxnet as mx
import numpy as np

__all__ = ['export_model']

_CONVERTERS: Dict[str, Any] = {}
_OPSETS = (12, 13)  # those that MXNet has converters for
_LOCK = Lock()  # what an export changes for a while belongs to the whole process


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
    """Export a graph that may contain the loss to an ONNX file: ``mx.onnx.export_model`` with the converters that it lacks.

    MXNet converts to operators of opset 12 or 13 and labels the model with the newest opset that the
    installed onnx knows; here it is converted to, checked against and labelled with the one asked for.

    Parameters
    ----------
    sym, params : str and str, Symbol and dict, or Symbol and list of two dicts
        The files that ``block.export`` writes, or a graph and its parameters.
    in_shapes, in_types : list of tuple, list of dtype
        Of the inputs in the order of ``sym.list_inputs()``. That is the order in which the graph reads them,
        and may put labels first.
    onnx_file_path, verbose, dynamic, dynamic_input_shapes, run_shape_inference, input_type, input_shape
        As in MXNet. With ``dynamic=True``, None in `dynamic_input_shapes` is an axis of any length.
    opset_version : int, 12 or 13
        The opset of the model.

    Returns
    -------
    str
        `onnx_file_path`

    Raises
    ------
    ImportError
        Without onnx, or with an MXNet older than 1.9.
    ValueError, NotImplementedError
        For another opset; for an operator in a form that has no converter.

    Examples
    --------
    >>> export_model('net-symbol.json', 'net-0000.params', [(8, 3, 32, 32), (8,)], onnx_file_path='net.onnx')  # doctest: +SKIP
    'net.onnx'
    """
    onnx = _import_onnx()
    if opset_version not in _OPSETS:
        raise ValueError(f'opset_version: expected {" or ".join(map(str, _OPSETS))}, got {opset_version!r}')
    with _LOCK, _newest_opset(onnx, opset_version), _registered(opset_version):
        return mx.onnx.export_model(
            sym,
            params,
            in_shapes,
            in_types,
            onnx_file_path,
            verbose,
            dynamic,
            dynamic_input_shapes,
            run_shape_inference,
            input_type,
            input_shape,
        )


def _import_onnx():
    if not hasattr(mx, 'onnx'):
        raise ImportError(
            f'gluon_stable_ce.onnx needs MXNet 1.9, the first with mx.onnx.export_model; this is MXNet {mx.__version__}'
        )
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            'gluon_stable_ce.onnx needs the onnx package: pip install "gluon-stable-ce[onnx]"'
        ) from error
    if not _registry():  # MXNet fills it while it is imported, if it finds onnx
        raise ImportError(
            'gluon_stable_ce.onnx needs an MXNet that was imported after onnx was installed: restart Python'
        )
    return onnx


def _registry():
    from mxnet.onnx.mx2onnx._export_onnx import MXNetGraph

    return MXNetGraph.registry_


@contextmanager
def _newest_opset(onnx, version):
    """Have onnx name `version` as its newest opset, which is what MXNet asks it for, and check nodes against it."""
    name_newest, context = onnx.defs.onnx_opset_version, onnx.checker.DEFAULT_CONTEXT
    checked = context.opset_imports
    try:
        onnx.defs.onnx_opset_version, context.opset_imports = (lambda: version), {'': version}
        yield
    finally:
        onnx.defs.onnx_opset_version, context.opset_imports = name_newest, checked


@contextmanager
def _registered(opset_version):
    """Have our converters in MXNet's registry, each in the place of none or of MXNet's own."""
    tables = [
        _registry()[version] for version in range(opset_version, 11, -1)
    ]  # the order in which MXNet looks them up
    before = tables[0].copy()
    try:
        for op, convert in _CONVERTERS.items():
            stock = next((table[op] for table in tables if op in table), None)
            if stock is None or _is_mxnets_own(stock):
                tables[0][op] = partial(_converted, convert, stock)
        yield
    finally:
        tables[0].clear()
        tables[0].update(before)


def _is_mxnets_own(converter):
    # a user's wrapper may well carry the name and the __module__ of what it wraps
    return getattr(converter, '__globals__', {}).get('__name__', '').startswith('mxnet.onnx.')


def _converted(convert, stock, node, **kwargs):
    at = _Node(node, stock, kwargs)
    answer = convert(at)
    if answer is None:  # then the last node made is the result
        at.made[-1].output[0] = node['name']
        answer = at.made  # for MXNet a result of the dtype of the first input
    return answer


class _Node:
    """An MXNet node on its way to ONNX: its inputs by name, its attributes, and the ONNX nodes `made` of it."""

    def __init__(self, node, stock, kwargs):
        sources = [kwargs['outputs_lookup'][source][output] for source, output, *_ in node['inputs']]
        self.inputs, self.dtypes = [source.name for source in sources], [source.dtype for source in sources]
        self.op, self.attrs, self.made = node['op'], node.get('attrs', {}), []
        self.opset = kwargs['opset_version']
        self.stock = partial(stock, node, **kwargs) if stock else None  # MXNet's own converter of it
        self._initializers = kwargs['initializer']
        self._names = (f'{node["name"]}/{i}' for i in count())  # MXNet's own converters join with _

    def is_true(self, attr):
        return self.attrs.get(attr) in ('True', '1')

    def constant(self, value, dtype='int64'):
        """A new constant; its name."""
        import onnx

        self._initializers.append(onnx.numpy_helper.from_array(np.array(value, dtype), next(self._names)))
        return self._initializers[-1].name

    def make(self, op, *inputs, **attrs):
        """A new ONNX node; the name of its output."""
        import onnx

        self.made.append(onnx.helper.make_node(op, inputs, [next(self._names)], **attrs))
        return self.made[-1].output[0]

    def make_over(self, axes, op, data, **attrs):
        """The same for an operator whose axes became an input with opset 13."""
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
    """MXNet has none."""
    axis, mode = at.attrs.get('axis', '-1'), at.attrs.get('mode', 'clip')
    if axis == 'None' or mode != 'clip':
        raise NotImplementedError(
            f"pick: expected an axis, and mode 'clip', got axis {axis} and mode {mode!r}"
        )
    (data, index), axis = at.inputs, int(axis)
    one = at.make('Slice', data, at.constant([0]), at.constant([1]), at.constant([axis]))
    index = at.make('Reshape', index, at.make('Shape', one))  # it may come with the axis or without
    index = at.cast(index, 'int64')  # NaN may become any integer; the clipping makes it harmless
    index = at.make('Min', index, at.make('Sub', at.length(data, axis), at.constant(1)))
    picked = at.make('GatherElements', data, at.make('Max', index, at.constant(0)), axis=axis)
    if not at.is_true('keepdims'):
        at.make_over([axis], 'Squeeze', picked)


@_converts('_equal', '_not_equal_scalar')
def _compare(at):
    """MXNet has none. Its truth is 1 in the dtype of what is compared."""
    if at.op == '_equal':
        truth = at.make('Equal', *at.inputs)
    else:
        truth = at.make(
            'Not', at.make('Equal', *at.inputs, at.constant(float(at.attrs['scalar']), at.dtypes[0]))
        )
    at.cast(truth, at.dtypes[0])


@_converts('broadcast_maximum')
def _maximum(at):
    """MXNet has none."""
    at.make('Max', *at.inputs)


@_converts('where')
def _where(at):
    """MXNet's own gives its result out as of the condition's dtype."""
    return at.stock(), (at.dtypes[1],)


@_converts('_contrib_arange_like')
def _arange_like(at):
    """MXNet's own takes axis -1 for an axis of length 1."""
    axis = at.attrs.get('axis', 'None')
    if not axis.startswith('-'):
        return at.stock()
    if at.attrs.keys() - {'axis'}:
        raise NotImplementedError(f'_contrib_arange_like: expected a negative axis alone, got {at.attrs}')
    at.cast(
        at.make('Range', at.constant(0), at.length(at.inputs[0], int(axis)), at.constant(1)), at.dtypes[0]
    )


@_converts('log_softmax')
def _log_softmax(at):
    """MXNet's own for opset 12 takes exponentials, which overflow, and their logarithm."""
    if at.opset > 12 or at.attrs.get('axis', '-1') != '-1' or at.attrs.keys() - {'axis'}:
        return at.stock()
    at.make('LogSoftmax', *at.inputs, axis=-1)


@_converts('mean', 'sum')
def _reduce(at):
    """MXNet's own does not read `exclude`."""
    if not at.is_true('exclude'):
        return at.stock()
    axes = np.ravel(literal_eval(at.attrs.get('axis', '()'))).tolist()
    if len(axes) != 1 or at.is_true('keepdims'):
        raise NotImplementedError(
            f'{at.op}: expected one axis and no keepdims with exclude=True, got {at.attrs}'
        )
    data, axis = at.inputs[0], axes[0]
    # the rank is not known, so the axes on one side are merged first
    if axis >= 0:  # (before..., kept, after...) -> (before..., kept, A)
        shape, over = at.constant([0] * (axis + 1) + [-1]), [*range(axis), axis + 1]
    else:  # -> (B, kept, after...)
        kept = at.make(
            'Slice', at.make('Shape', data), at.constant([axis]), at.constant([np.iinfo('int64').max])
        )
        shape, over = at.make('Concat', at.constant([-1]), kept, axis=0), [0, *range(2, 1 - axis)]
    data = at.make('Reshape', data, shape)
    if at.op == 'mean':
        at.make('ReduceMean', data, axes=over, keepdims=0)
    else:
        at.make_over(over, 'ReduceSum', data, keepdims=0)
