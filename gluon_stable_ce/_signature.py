"""What is known of a call before it is computed, and the checks that raise."""

from functools import lru_cache
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import array_api
from .array_api import CPU, Array
from .kernels import choose, kernel_for_thread

LABEL_DTYPES = ('int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64')
PRED_DTYPES = ('float16', 'bfloat16', 'float32', 'float64')
_MANTISSA = {'float16': 11, 'float32': 24}  # bits, counting the hidden one: integers up to 2**bits are exact
_FEW = 2048  # classes
_NARROW = ('int8', 'uint8', 'float16', 'float32')  # labels that float32 holds as they are


class Signature(NamedTuple):
    """What is known of a call: all that its graph may rely on. None if unknown, as for symbols."""

    np_style: bool = False  # whether the inputs are of the NumPy-style API
    dtype: Optional[str] = None
    ndim: Optional[int] = None
    label_dtype: Optional[str] = None
    label_ndim: Optional[int] = None
    weight_layout: Optional[str] = (
        None  # of sample_weight: 'keepdims', 'pred', 'positions' or 'batch'; see align_sample_weight
    )
    few_classes: bool = (
        False  # so few that an array of them is cheap, and that `dtype` holds every label exactly
    )
    is_empty: bool = False  # whether there are no positions, for which MXNet's static memory fails
    kernel: str = 'stock'
    is_leaf: bool = True  # whether `pred` may be a variable with a gradient; only set for 'fused'

    @property
    def compute_dtype(self) -> str:
        """In what the class axis is reduced."""
        return 'float64' if self.dtype == 'float64' else 'float32'

    @property
    def label_compare_dtype(self) -> str:
        """In what labels are compared: float64 holds all. AMP, which makes bfloat16, can't read that."""
        return (
            self.compute_dtype if self.few_classes else 'float32' if self.dtype == 'bfloat16' else 'float64'
        )

    @property
    def reading(self) -> Dict[str, Any]:
        """How `functional.read_labels` may read labels of such calls."""
        dtype = self.label_compare_dtype
        return {
            'label_dtype': dtype,
            'is_cast': self.label_dtype == dtype,
            'few_classes': self.few_classes,
        }


def infer_signature(
    pred: Any,
    label: Any,
    sample_weight: Any = None,
    axis: int = -1,
    batch_axes: Tuple[int, ...] = (0,),
    sparse_label: bool = True,
    summed_axes: Tuple[int, ...] = (),
    kernel: str = 'stock',
) -> Signature:
    """Infer the signature of a call, once its arrays are checked.

    Raises
    ------
    TypeError, ValueError
        If the inputs are no arrays, or do not fit each other. Symbols are not checked.
    """
    if array_api.is_symbol(pred):
        dtype = array_api.dtype_name(pred)
        return Signature(array_api.is_np_style(pred), dtype, kernel=choose(kernel, dtype))
    weight = None if sample_weight is None else _describe(sample_weight)
    kernel = kernel_for_thread(kernel)
    may_be_fused = kernel != 'stock' and array_api.is_array(pred)
    return _signature_of(
        _describe(pred),
        _describe(label),
        weight,
        axis,
        batch_axes,
        sparse_label,
        summed_axes,
        kernel,
        pred.context.device_type if may_be_fused else None,
        pred.grad is not None if may_be_fused else True,
    )


def _describe(array: Any) -> Tuple[type, Any, Any]:
    try:
        return type(array), array.dtype, array.shape
    except AttributeError:
        return type(array), None, None


@lru_cache(maxsize=1024)  # most calls look like one before
def _signature_of(
    pred: Any,
    label: Any,
    weight: Any,
    axis: int,
    batch_axes: Tuple[int, ...],
    sparse_label: bool,
    summed_axes: Tuple[int, ...],
    kernel: str,
    device_type: Optional[str],
    is_leaf: bool,
) -> Signature:
    for name, described in (('pred', pred), ('label', label), ('sample_weight', weight)):
        if described is not None:
            check_array_type(name, described[0])
    (kind, dtype, shape), (_, label_dtype, label_shape) = pred, label
    dtype, label_dtype = array_api.name_of(dtype), array_api.name_of(label_dtype)
    if dtype not in PRED_DTYPES:
        raise TypeError(f'pred: expected one of the dtypes {", ".join(PRED_DTYPES)}, got {dtype}')
    positions = check_shapes(shape, label_shape, str(label_dtype), axis, sparse_label)
    _check_axes('axis', summed_axes, shape, [axis])
    _check_axes('batch_axis', batch_axes, shape, [axis, *summed_axes])
    layout = None if weight is None else _weight_layout(weight[2], shape, positions, axis, batch_axes)
    np_style = issubclass(kind, array_api.NP_STYLE)
    few_classes = shape[axis] <= _FEW and dtype in ('float32', 'float64') and label_dtype in (dtype, *_NARROW)
    is_empty = 0 in shape
    chosen = 'stock' if is_empty else choose(kernel, dtype, device_type)
    return Signature(
        np_style,
        dtype,
        len(shape),
        label_dtype,
        len(label_shape),
        layout,
        few_classes,
        is_empty,
        chosen,
        is_leaf or chosen == 'stock',
    )


def check_array_type(name: str, kind: type) -> None:
    """Raise TypeError unless `kind` is a type of dense MXNet arrays."""
    if not issubclass(kind, array_api.ARRAY):
        raise TypeError(f'{name}: expected an MXNet array, got {kind.__name__}')
    if issubclass(kind, array_api.SPARSE):
        raise TypeError(f'{name}: expected a dense array, got {kind.__name__}')


def check_shapes(
    shape: Tuple[int, ...],
    label_shape: Tuple[int, ...],
    label_dtype: str,
    axis: int,
    sparse_label: bool = True,
) -> Tuple[int, ...]:
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
    largest = 2 ** _MANTISSA.get(label_dtype, 53)
    if shape[axis] > largest:
        raise TypeError(
            f'label: expected a dtype that can name {shape[axis]} classes, got {label_dtype}, '
            f'exact up to {largest} only'
        )
    return positions


def _check_axes(name: str, axes: Tuple[int, ...], shape: Tuple[int, ...], class_axes: List[int]) -> None:
    """Raise ValueError unless these are different axes of `shape`, and none is a class axis."""
    ndim = len(shape)
    known = {axis % ndim for axis in axes if -ndim <= axis < ndim}
    if len(known - {axis % ndim for axis in class_axes}) < len(axes):
        raise ValueError(
            f'{name}: expected axes of pred, of shape {shape}, other than the class axis '
            f'{", ".join(map(str, class_axes))}, got {", ".join(map(str, axes))}'
        )


def _weight_layout(
    got: Tuple[int, ...],
    shape: Tuple[int, ...],
    positions: Tuple[int, ...],
    axis: int,
    batch_axes: Tuple[int, ...],
) -> str:
    """Name the layout of a sample_weight of shape `got`."""
    ndim = len(shape)
    keepdims = tuple(1 if i == axis % ndim else size for i, size in enumerate(shape))
    batch = tuple(shape[i] for i in sorted(axis % ndim for axis in batch_axes))
    if len(got) == ndim and all(size in (1, full) for size, full in zip(got, keepdims)):
        return 'keepdims'
    if len(got) == ndim and all(size in (1, full) for size, full in zip(got, shape)):
        return 'pred'
    if len(got) == len(positions) and all(size in (1, full) for size, full in zip(got, positions)):
        return 'positions'
    if got in (batch, (1,) * len(batch)):
        return 'batch'
    raise ValueError(
        f'sample_weight: expected one weight per sample {batch}, one per label {positions}, '
        f'or a shape that broadcasts to {keepdims}, or to {shape} for the mean over the classes, got {got}'
    )


def on_one_context(pred: Array, *others: Optional[Array]) -> Tuple[Optional[Array], ...]:
    """Return the arrays, each on the context of `pred`. Pinned and shared memory of the CPU is copied.

    Raises
    ------
    ValueError
        If an array is on another device.
    """
    moved = [pred]
    for name, array in zip(('label', 'sample_weight'), others):
        if array is not None and array.context != pred.context:
            if not _is_same_place(array.context, pred.context):
                raise ValueError(
                    f'{name}: expected an array on {pred.context} like pred, got one on {array.context}'
                )
            array = array.as_in_context(pred.context)
        moved.append(array)
    return tuple(moved)


def _is_same_place(one: Any, other: Any) -> bool:
    """Whether both contexts are the CPU's memory, at least one of it pinned or shared."""
    kinds = {one.device_type, other.device_type}
    return kinds <= set(CPU) and kinds != {'cpu'}
