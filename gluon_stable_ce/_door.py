"""The door: where arrays come in, what needs a shape or a dtype is decided here, before the mathematics.

Checks that raise, what lets the graph be short (see `Seen`), and one cached graph for each kind of call.
"""
from functools import lru_cache
from numbers import Integral, Real
from types import MappingProxyType
from typing import NamedTuple, Optional

from . import _ops
from .functional import class_axis_removed


class Seen(NamedTuple):
    """What the door saw of a call, for the graph to rely on. None for what is not known."""

    inputs: int
    np_style: bool  # whether they are of the NumPy API
    dtype: Optional[str] = None
    ndim: Optional[int] = None
    classes: Optional[int] = None  # told only to a block that asks for them, whose graphs then serve no other number
    label_ndim: Optional[int] = None
    label_dtype: Optional[str] = None
    weight_shape: Optional[str] = None  # whose shape sample_weight has: 'kept', 'positions', 'batch'


LABEL_DTYPES = ('int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64')
_GRAPHS = 16  # once a block has so many, the numbers of classes that are still to come share one
_MANTISSA = {'float16': 11, 'float32': 24}  # bits, counting the hidden one: integers up to 2**bits are exact


def check_shapes(shape, got, dtype, axis, sparse_label=True):
    """Raise TypeError or ValueError unless a label of shape `got` and `dtype` fits predictions of `shape`; return the positions' shape."""
    ndim = len(shape)
    if ndim < 2 or not -ndim <= axis < ndim or not shape[axis]:
        raise ValueError(f'pred: expected at least 2 axes, with the classes on axis {axis}, got shape {shape}')
    axis %= ndim
    classes = shape[axis]
    positions = shape[:axis] + shape[axis + 1:]
    if not sparse_label:
        if got != shape:
            hint = '; class indices need sparse_label=True' if got == positions else ''
            raise ValueError(f'label: expected shape {shape} like pred with sparse_label=False, got {got}{hint}')
        return positions
    if got not in (positions, shape[:axis] + (1,) + shape[axis + 1:]):
        hint = '; one-hot labels and distributions need sparse_label=False' if got == shape else ''
        raise ValueError(f'label: expected shape {positions} for pred of shape {shape} with the classes on axis {axis}, got {got}{hint}')
    if dtype not in LABEL_DTYPES:
        raise TypeError(f"label: expected one of the dtypes {', '.join(LABEL_DTYPES)}, got {dtype}")
    if classes > 2 ** _MANTISSA.get(dtype, 53):
        raise TypeError(f'label: expected a dtype that can name {classes} classes, got {dtype}, exact up to {2 ** _MANTISSA[dtype]} only')
    return positions


@lru_cache(maxsize=1024)
def look(pred, label, weight, axis, batch_axis, sparse_label, tell_classes):
    """Check what the arrays of a call look like, each given as (type, dtype, shape), and return what its graph may know of them.

    Cached, as most calls look like the one before.
    """
    for name, (kind, *_) in (('pred', pred), ('label', label), *((('sample_weight', weight),) if weight else ())):
        if not issubclass(kind, _ops.ARRAY):
            raise TypeError(f'{name}: expected an MXNet array, got {kind.__name__}')
    dtype, shape, label_dtype, label_shape = _ops.name_of(pred[1]), pred[2], _ops.name_of(label[1]), label[2]
    weight_shape = weight and weight[2]
    positions = check_shapes(shape, label_shape, label_dtype, axis, sparse_label)
    inputs, ndim = 2 + (weight_shape is not None), len(shape)
    kept = positions[:axis % ndim] + (1,) + positions[axis % ndim:]
    if weight_shape is None:
        fits = None
    elif len(weight_shape) == ndim and all(n in (1, full) for n, full in zip(weight_shape, kept)):
        fits = 'kept'
    elif weight_shape == positions:
        fits = 'positions'
    elif weight_shape == (kept[batch_axis],):
        fits = 'batch'
    else:
        raise ValueError(f'sample_weight: expected one weight per sample {(kept[batch_axis],)}, one per label {positions}, '
                         f'or a shape that broadcasts to {kept}, got {weight_shape}')
    classes = shape[axis] if tell_classes else None
    return Seen(inputs, issubclass(pred[0], _ops.NP_STYLE), dtype, ndim, classes, len(label_shape), label_dtype, fits)


def check_contexts(pred, label, sample_weight=None):
    """Raise ValueError unless the arrays live on one context."""
    for name, array in (('label', label), ('sample_weight', sample_weight)):
        if array is not None and array.context != pred.context:
            raise ValueError(f'{name}: expected an array on {pred.context} like pred, got one on {array.context}')


def check_number(name, value, kind=Real, low=float('-inf'), high=float('inf'), optional=False):
    """Raise TypeError or ValueError unless the option `name` is a number of that kind and range, or None if `optional`."""
    if value is None and optional:
        return
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {'an integer' if kind is Integral else 'a number'}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f'{name}: expected a number from {low} to {high}, got {value}')


def check_choice(name, value, choices):
    """Raise ValueError unless the option `name` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def compute_dtype(dtype):
    """Name of the dtype in which predictions of `dtype` (None if unknown) are reduced."""
    return 'float64' if dtype == 'float64' else 'float32'


class Door:
    """Mixin for a HybridBlock of (pred, label, sample_weight=None) with attributes ``_axis``, ``_batch_axis`` and ``_sparse_label``.

    `hybrid_forward` finds in ``self._seen`` what is known about the call. A gluon block caches one graph and refuses a call of another
    structure; this one keeps a graph for each kind of call, so one block serves batches with and without weights, of any rank and dtype.
    """

    _seen = Seen(0, False)
    _own_inputs = True  # False if a subclass's hybrid_forward decides what the inputs mean
    _tell_classes = False  # True if hybrid_forward wants to know their number
    _order = None  # in which the cached graph takes the inputs, if it takes nothing else
    _CACHED = MappingProxyType({'_cached_graph': (), '_cached_op': None, '_cached_op_args': (), '_in_format': None, '_out_format': None,
                                '_order': None})

    def forward(self, pred, label, sample_weight=None, *others):
        """Check the arrays and run the graph of such a call; a symbol goes into the caller's graph."""
        inputs = (pred, label, *others) if sample_weight is None else (pred, label, sample_weight, *others)
        if _ops.is_symbol(pred):
            seen_before, self._seen = self._seen, Seen(len(inputs), _ops.is_np_style(pred), _ops.dtype_name(pred))
            try:
                return super().forward(*inputs)
            finally:
                self._seen = seen_before
        seen = self._look_at(*inputs) if self._own_inputs else Seen(len(inputs), _ops.is_np_style(pred), _ops.dtype_name(pred))
        if seen != self._seen:
            self._use_graph_for(seen)
        if seen.dtype == 'bfloat16' and self._own_inputs and self._sparse_label:  # AMP's casts in a graph cannot read 64-bit labels
            inputs = (pred, label.astype('float32'), *inputs[2:])
        try:
            return self._run(inputs)
        except (_ops.MXNetError, ValueError):  # MXNet's error and gluon's name no argument
            if self._own_inputs:
                check_contexts(*inputs)
            raise

    def _run(self, inputs):
        """What gluon's forward does; but once a graph is there, without the Python that other blocks need, a twentieth of a small step."""
        if self._order is not None and self._active and not self._callback:
            return self._cached_op(*[inputs[i] for i in self._order])
        out = super().forward(*inputs)
        if self._active and self._own_inputs and all(is_input for is_input, _ in self._cached_op_args):
            self._order = [i for _, i in self._cached_op_args]
        return out

    def _look_at(self, pred, label, sample_weight=None):
        """What is seen of a call with arrays, once they are checked."""
        try:
            weight = None if sample_weight is None else (type(sample_weight), sample_weight.dtype, sample_weight.shape)
            arrays = (type(pred), pred.dtype, pred.shape), (type(label), label.dtype, label.shape), weight
        except AttributeError:  # no arrays at all
            arrays = ((type(array), None, None) for array in (pred, label, sample_weight))
        return look(*arrays, self._axis, self._batch_axis, self._sparse_label, self._tell_classes)

    def _inputs(self, F, pred, label, sample_weight=None):
        """The inputs of the graph as `functional` takes them: pred in the dtype to compute in, the others in their one shape."""
        seen, axis, dtype = self._seen, self._axis, compute_dtype(self._seen.dtype)
        pred, label, sample_weight = _ops.classic(pred), _ops.classic(label), _ops.classic(sample_weight)
        if self._sparse_label:
            if seen.ndim is None:
                label = F.reshape_like(label, class_axis_removed(F, pred, axis))
            elif seen.ndim == seen.label_ndim:
                label = F.squeeze(label, axis=axis)
        elif seen.label_dtype not in (None, dtype):
            label = F.cast(label, dtype=dtype)
        if seen.dtype in ('float16', 'bfloat16'):  # unlike log_softmax's own `dtype`, a cast in front of it reaches the fast kernel
            pred = F.cast(pred, dtype=dtype)
        if seen.weight_shape is not None:
            sample_weight = F.cast(sample_weight, dtype=dtype)
        if seen.weight_shape == 'positions':
            sample_weight = F.expand_dims(sample_weight, axis=axis)
        elif seen.weight_shape == 'batch':
            sample_weight = F.reshape(sample_weight, shape=[-1 if i == self._batch_axis % seen.ndim else 1 for i in range(seen.ndim)])
        return pred, label, sample_weight

    def _label_dtype(self):
        """What `functional.read_labels` compares these labels in. AMP casts cannot read float64, so that is for float64 labels only."""
        dtype = compute_dtype(self._seen.dtype)
        if self._seen.label_dtype == dtype:
            return None
        return 'float64' if self._seen.label_dtype == 'float64' else dtype

    def hybridize(self, active=True, *args, **kwargs):
        """As gluon's, but with static memory unless told otherwise: the outputs are fresh arrays all the same."""
        if active and not args:
            kwargs.setdefault('static_alloc', True)
            kwargs.setdefault('static_shape', kwargs['static_alloc'])
        self._order = None  # as another graph may come, with clear=False too
        super().hybridize(active, *args, **kwargs)

    def _use_graph_for(self, seen):
        if seen not in self._graphs and len(self._graphs) >= _GRAPHS:
            seen = seen._replace(classes=None)
        self._graphs[self._seen] = {name: getattr(self, name, value) for name, value in self._CACHED.items()}
        for name, value in self._graphs.get(seen, self._CACHED).items():
            setattr(self, name, value)
        self._seen = seen

    def _clear_cached_op(self):
        super()._clear_cached_op()
        self._graphs, self._order = {}, None
