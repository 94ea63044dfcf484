"""Whether the arrays of a call are right: checks that raise an error with the argument's name; contexts."""

import math
from itertools import accumulate
from operator import mul
from typing import Any, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np

from . import array_api
from .array_api import Array
from .call import Call
from .labels import read_labels
from .options import Options

LABEL_DTYPES = ('int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64')
PRED_DTYPES = ('float16', 'bfloat16', 'float32', 'float64')
MANTISSA = {'float16': 11, 'float32': 24}  # bits, counting the hidden one: integers up to 2**bits are exact
Shape = Tuple[int, ...]


def as_dense(name: str, array: Any) -> Array:
    """Return an MXNet array, dense if its storage is sparse; TypeError if it is no such array."""
    if not array_api.is_array(array):
        kind = type(array)  # NumPy's class has the name of MXNet's
        got = kind.__name__ if kind.__module__ == 'builtins' else f'{kind.__module__}.{kind.__name__}'
        raise TypeError(f'{name}: expected an MXNet array, got {got}')
    return array.tostype('default') if isinstance(array, array_api.SPARSE) else array


def check_pred_dtype(name: str, dtype: Optional[str]) -> None:
    """Raise TypeError unless predictions may have this dtype."""
    if dtype not in PRED_DTYPES:
        raise TypeError(f'{name}: expected one of the dtypes {", ".join(PRED_DTYPES)}, got {dtype}')


def check_shapes(
    shape: Shape, label_shape: Shape, label_dtype: Optional[str], axis: int, sparse_label: bool
) -> Shape:
    """Return the positions' shape; raise TypeError or ValueError unless a label fits `shape`, pred's."""
    ndim = len(shape)
    if ndim < 2 or not -ndim <= axis < ndim or not shape[axis]:
        raise ValueError(
            f'pred: expected at least 2 axes, with the classes on axis {axis}, got shape {shape}'
        )
    axis %= ndim
    positions = shape[:axis] + shape[axis + 1 :]
    if not sparse_label:
        if label_shape != shape:
            hint = '; class indices need sparse_label=True' if label_shape == positions else ''
            if math.prod(label_shape) == math.prod(shape):
                hint = f"; gluon's loss would read its numbers one after the other, as an array of {shape}"
            raise ValueError(
                f'label: expected shape {shape} like pred with sparse_label=False, got {label_shape}{hint}'
            )
        return positions
    if label_shape not in (positions, shape[:axis] + (1,) + shape[axis + 1 :]):
        hint = '; one-hot labels and distributions need sparse_label=False' if label_shape == shape else ''
        raise ValueError(
            f'label: expected shape {positions} for pred of shape {shape} with the classes on axis {axis}, '
            f'got {label_shape}{hint}'
        )
    if label_dtype not in LABEL_DTYPES:
        raise TypeError(f'label: expected one of the dtypes {", ".join(LABEL_DTYPES)}, got {label_dtype}')
    largest = 2 ** MANTISSA.get(str(label_dtype), 53)
    if shape[axis] > largest:
        raise TypeError(
            f'label: expected a dtype that can name {shape[axis]} classes, got {label_dtype}, '
            f'exact up to {largest} only'
        )
    return positions


def check_axes(name: str, axes: Sequence[int], shape: Shape) -> None:
    """Raise ValueError unless these are different axes of `shape`."""
    ndim = len(shape)
    if len({axis % ndim for axis in axes if -ndim <= axis < ndim}) < len(axes):
        raise ValueError(
            f'{name}: expected different axes of pred, of shape {shape}, got {", ".join(map(str, axes))}'
        )


def check_class_weights(weights: int, classes: int) -> None:
    """Raise ValueError unless there is a weight for each of the classes of ``pred``."""
    if weights != classes:
        raise ValueError(
            f'class_weight: expected one weight for each of the {classes} classes of pred, got {weights}'
        )


def weight_layout(got: Shape, shape: Shape, class_axes: Sequence[int], batch_axes: Sequence[int]) -> str:
    """Name the layout of a sample_weight of shape `got`; ValueError if it has none.

    'keepdims' broadcasts to `shape`, pred's, with 1 at the class axes; 'pred' to `shape`; 'positions' to
    `shape` without the class axes; 'batch' has the batch axes alone.
    """
    ndim = len(shape)
    classes = {axis % ndim for axis in class_axes}
    keepdims = tuple(1 if i in classes else size for i, size in enumerate(shape))
    positions = tuple(size for i, size in enumerate(shape) if i not in classes)
    batch = tuple(keepdims[i] for i in sorted(axis % ndim for axis in batch_axes))
    for layout, full in (('keepdims', keepdims), ('pred', shape), ('positions', positions)):
        if len(got) == len(full) and all(size in (1, whole) for size, whole in zip(got, full)):
            return layout
    if got in (batch, (1,) * len(batch)):
        return 'batch'
    hint = _gluons_product(keepdims, got)
    if got == shape[-1:]:
        hint += '; for a weight of each class, use class_weight'
    raise ValueError(
        f'sample_weight: expected one weight per sample {batch}, one per label {positions}, or a shape that '
        f'broadcasts to {keepdims}, or to {shape} for the mean over the classes, got {got}{hint}'
    )


def _gluons_product(losses: Shape, weights: Shape) -> str:
    """Say what gluon's loss would compute of arrays of these shapes; '' if it would raise an error, too."""
    try:
        both = np.broadcast(*(np.broadcast_to(0, shape) for shape in (losses, weights))).shape
    except ValueError:
        return ''
    return f"; gluon's loss would broadcast {losses} * {weights} to {both}"


def checked(
    options: Options, pred: Any, label: Any, sample_weight: Any, class_weights: Optional[int]
) -> Tuple[Options, Optional[str], Tuple[Array, Array, Optional[Array]]]:
    """Check the arrays of a call, and give them the form and the context in which a graph takes them.

    These forms are accepted because gluon's loss accepts them:

    - sparse storage becomes dense;
    - logits of one axis become one sample;
    - a dense label gets the shape of `pred`, if one shape is the other with axes merged;
    - a sample_weight with too few axes becomes that of the last axes, as in broadcasting.

    Parameters
    ----------
    class_weights : int, optional
        How many class weights there are.

    Returns
    -------
    options, weight_layout, (pred, label, sample_weight)

    Raises
    ------
    TypeError, ValueError
        If the inputs are no arrays, or do not fit each other.
    """
    pred, label = as_dense('pred', pred), as_dense('label', label)
    sample_weight = None if sample_weight is None else as_dense('sample_weight', sample_weight)
    dtype = array_api.dtype_name(pred)
    check_pred_dtype('pred', dtype)
    pred = array_api.without_bfloat16(pred, dtype)
    is_one_sample = pred.ndim == 1 and label.size == (1 if options.sparse_label else pred.size)
    if is_one_sample and options.class_axes in ((0,), (-1,)):
        options = options._replace(axis=-1, batch_axes=(0,))
        pred, label, sample_weight = (
            array if array is None else array.reshape((1, -1)) for array in (pred, label, sample_weight)
        )
    if not options.sparse_label and _is_merged(label.shape, pred.shape):
        label = label.reshape(pred.shape)
    shape, label_dtype = pred.shape, array_api.dtype_name(label)
    for axis in options.class_axes:
        check_shapes(shape, label.shape, label_dtype, axis, options.sparse_label)
    check_axes('axis', options.class_axes, shape)
    check_axes('batch_axis', options.batch_axes, shape)
    if class_weights is not None:
        check_class_weights(class_weights, shape[options.axis])
    layout = None
    if sample_weight is not None:
        sample_weight, layout = _with_layout(options, sample_weight, shape)
        sample_weight = on_context('sample_weight', sample_weight, pred.context)
    return options, layout, (pred, on_context('label', label, pred.context), sample_weight)


def _is_merged(shape: Shape, other: Shape) -> bool:
    """Whether one of two shapes is the other with axes merged, so that a reshape keeps rows together."""
    ends, other_ends = ({*accumulate(sizes, mul)} for sizes in (shape, other))
    is_same_size = math.prod(shape) == math.prod(other)
    return shape != other and is_same_size and (ends <= other_ends or other_ends <= ends)


def _with_layout(options: Options, weight: Array, shape: Shape) -> Tuple[Array, str]:
    """Return a sample_weight, and its layout for `shape`, pred's. It may get axes in front."""
    axes = options.class_axes, options.batch_axes
    try:
        return weight, weight_layout(weight.shape, shape, *axes)
    except ValueError:
        full = (1,) * (len(shape) - weight.ndim) + weight.shape
        does_broadcast = all(size in (1, whole) for size, whole in zip(full, shape))
        # weights of classes are no sample weights
        are_of_classes = options.sparse_label and any(full[axis] != 1 for axis in options.class_axes)
        if full == weight.shape or not does_broadcast or are_of_classes:
            raise
        return weight.reshape(full), weight_layout(full, shape, *axes)


def check_labels(call: Call, pred: Array, label: Array) -> None:
    """Raise ValueError if there are invalid labels that count. This waits for the labels."""
    pred, label = array_api.as_classic(pred), array_api.as_classic(label)
    labels = read_labels(mx.nd, call, label, pred)
    is_invalid: Any = labels.is_valid == 0
    if labels.is_counted is not None:
        is_invalid = is_invalid * labels.is_counted
    count = int(is_invalid.sum().asscalar())
    if count:
        classes = pred.shape[call.options.axis]
        raise ValueError(
            f'label: expected integers in [0, {classes}); invalid labels: {count} of {label.size}'
        )


def on_context(name: str, array: Array, wanted: Any) -> Array:
    """Return an array on the context of ``pred``; ValueError if it is on another device.

    All memory of the CPU is one place, as it is for gluon; DataLoader uses cpu_pinned and cpu_shared.
    """
    context = array.context
    if context == wanted:
        return array
    if not all(place.device_type.startswith('cpu') for place in (context, wanted)):
        raise ValueError(
            f'{name}: expected an array on {wanted} like pred, got one on {context}; '
            f'move it with {name}.as_in_context(pred.context)'
        )
    return array.as_in_context(wanted)
