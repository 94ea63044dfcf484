"""The door: where arrays come in, what needs a shape or a dtype is decided here, before the mathematics.

Checks that raise, the rank and dtype that let the graph be short, and one cached graph for each kind of call.
"""
from collections import namedtuple
from numbers import Integral, Real

from mxnet import symbol

from . import _ops
from .functional import class_axis_removed

Seen = namedtuple('Seen', 'ndim dtype np_style inputs')
Seen.__doc__ = "What the door saw of a call: the rank of pred (None for symbols), the name of its dtype (or None), the API, how many inputs."

LABEL_DTYPES = ('int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64')
_MANTISSA = {'float16': 11, 'float32': 24}  # bits, counting the hidden one: integers up to 2**bits are exact


def check_shapes(pred, label, axis, sparse_label):
    """Raise ValueError or TypeError unless `label` fits `pred`; return `pred`'s shape without `axis`."""
    for name, array in (('pred', pred), ('label', label)):
        if not _ops.is_array(array):
            raise TypeError(f'{name}: expected an MXNet array, got {type(array).__name__}')
    shape, got = pred.shape, label.shape
    ndim = len(shape)
    if ndim < 2 or not -ndim <= axis < ndim:
        raise ValueError(f'pred: expected at least 2 axes and a class axis at {axis}, got shape {shape}')
    axis %= ndim
    positions = shape[:axis] + shape[axis + 1:]
    if not sparse_label:
        if got != shape:
            hint = '; labels that are class indices need sparse_label=True' if got == positions else ''
            raise ValueError(f'label: expected the shape {shape} of pred, as sparse_label=False, got {got}{hint}')
        return positions
    if got != positions and got != shape[:axis] + (1,) + shape[axis + 1:]:
        hint = '; labels that are distributions over classes need sparse_label=False' if got == shape else ''
        raise ValueError(f'label: expected shape {positions} for pred of shape {shape} with classes on axis {axis}, got {got}{hint}')
    dtype = _ops.dtype_name(label)
    if dtype not in LABEL_DTYPES:
        raise TypeError(f"label: expected one of the dtypes {', '.join(LABEL_DTYPES)}, got {dtype}")
    if shape[axis] > 2 ** _MANTISSA.get(dtype, 53):
        raise TypeError(f'label: {dtype} cannot name all of {shape[axis]} classes, only {2 ** _MANTISSA[dtype]}; use int32')
    return positions


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

    _UNSEEN = Seen(None, None, False, 0)
    _seen = _UNSEEN
    _CACHED = {'_cached_graph': (), '_cached_op': None, '_cached_op_args': [], '_in_format': None, '_out_format': None}

    def forward(self, pred, label, sample_weight=None):
        inputs = [pred, label] if sample_weight is None else [pred, label, sample_weight]
        if _ops.is_symbol(pred):
            return self._forward_symbols(inputs)
        positions = self.check_arrays(pred, label)
        seen = Seen(len(positions) + 1, _ops.dtype_name(pred), _ops.is_np_style(pred), len(inputs))
        if not self._sparse_label:
            inputs[1] = _as_dtype(label, compute_dtype(seen.dtype))
        elif label.ndim > len(positions):
            inputs[1] = label.reshape(positions)
        if self._sparse_label and seen.dtype == 'bfloat16':  # the casts that AMP adds cannot read 64-bit labels
            inputs[1] = inputs[1].astype('float32')
        if sample_weight is not None:
            inputs[2] = _as_dtype(self._fit_weight(sample_weight, positions), compute_dtype(seen.dtype))
        self._use_graph_for(seen)
        return super().forward(*inputs)

    def check_arrays(self, pred, label):
        """Raise unless `pred` and `label` belong together; return the shape of the positions."""
        return check_shapes(pred, label, self._axis, self._sparse_label)

    def hybridize(self, active=True, *args, **kwargs):
        """As gluon's, but with static memory unless told otherwise: its outputs are fresh arrays all the same."""
        if active and not args:
            kwargs.setdefault('static_alloc', True)
            kwargs.setdefault('static_shape', kwargs['static_alloc'])
        super().hybridize(active, *args, **kwargs)

    def _forward_symbols(self, inputs):
        """The same without a shape: a label's kept axis is removed by the graph, and the dtype is known if the net's parameters tell it."""
        pred = inputs[0]
        if self._sparse_label:
            inputs[1] = _ops.reshape_like(inputs[1], class_axis_removed(symbol, _ops.classic(pred), self._axis))
        before, self._seen = self._seen, Seen(None, _ops.dtype_name(pred), _ops.is_np_style(pred), len(inputs))
        try:
            return super().forward(*inputs)
        finally:
            self._seen = before

    def _use_graph_for(self, seen):
        if seen != self._seen:
            self._graphs[self._seen] = {name: getattr(self, name) for name in self._CACHED}
            for name, value in self._graphs.get(seen, self._CACHED).items():
                setattr(self, name, value)
            self._seen = seen

    def _clear_cached_op(self):
        super()._clear_cached_op()
        self._graphs = {}

    def _fit_weight(self, weight, positions):
        """`weight` in the shape that gluon wants: the rank of pred, with 1 where it is to be broadcast."""
        if not _ops.is_array(weight):
            raise TypeError(f'sample_weight: expected an MXNet array, got {type(weight).__name__}')
        ndim = len(positions) + 1
        axis, batch_axis = self._axis % ndim, self._batch_axis % ndim
        kept = positions[:axis] + (1,) + positions[axis:]
        got = weight.shape
        if len(got) == ndim and all(n in (1, full) for n, full in zip(got, kept)):
            return weight
        if got == positions:
            return weight.reshape(kept)
        if got == (kept[batch_axis],):
            return weight.reshape(tuple(n if i == batch_axis else 1 for i, n in enumerate(kept)))
        raise ValueError(f'sample_weight: expected one weight per sample {(kept[batch_axis],)}, one per label {positions}, '
                         f'or a shape that broadcasts to {kept}, got {got}')

    def _widened(self, F, pred):
        """`pred` in the dtype it is computed in. Unlike log_softmax's own `dtype`, a cast in front of it reaches the fast kernel."""
        return F.cast(pred, dtype='float32') if self._seen.dtype in ('float16', 'bfloat16') else pred


def _as_dtype(array, dtype):
    return array if _ops.dtype_name(array) == dtype else array.astype(dtype)
