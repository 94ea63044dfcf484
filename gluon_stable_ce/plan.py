"""What is decided of a call before anything is computed: `plan`."""

from functools import lru_cache
from threading import active_count
from typing import Any, Optional, Tuple

from . import array_api, array_checks
from .call import INPUTS, LOSS_FILL, Call, Fill
from .kernels import choice, fused
from .options import Options

FEW = 2048  # classes
ONE_HOT_ABOVE = 256  # classes: the stock kernel then has a graph for each number of them, which is faster
FLOAT32_INTEGERS = 2**24  # float32 holds all integers up to this one
NARROW = ('int8', 'uint8', 'float16', 'float32')  # labels that float32 holds as they are

Inputs = Tuple[Any, Any, Any]  # pred, label, sample_weight
Description = Tuple[type, Any, Any]  # type, dtype, shape


def plan(
    options: Options,
    pred: Any,
    label: Any,
    sample_weight: Any = None,
    class_weights: Optional[int] = None,
    fill: Fill = LOSS_FILL,
) -> Tuple[Call, Inputs]:
    """Check the arrays of a call, put them on one context, and choose its kernel.

    Parameters
    ----------
    pred, label, sample_weight : arrays or symbols
    class_weights : int, optional
        How many class weights there are.

    Returns
    -------
    Call, (pred, label, sample_weight)

    Raises
    ------
    TypeError, ValueError
        If the inputs are no arrays, or do not fit each other. Symbols are not checked.
    """
    if array_api.is_symbol(pred):
        pred, dtype = array_api.logits_of_symbol(pred)
        label, sample_weight = (
            array if array is None else array_api.without_bfloat16(array, array_api.dtype_name(array))
            for array in (label, sample_weight)
        )
        call = Call(
            options,
            fill,
            _names(sample_weight is not None, class_weights is not None),
            np_style=array_api.is_np_style(pred),
            dtype=dtype,
            kernel=choice.resolve(options, is_symbol=True),
        )
        return call, (array_api.apart(pred), label, sample_weight)
    context = pred.context if array_api.is_array(pred) else None
    if context is not None:
        pred = array_api.without_bfloat16(pred, array_api.name_of(pred.dtype))
    described = _describe(pred)
    try:
        call = _plan_arrays(
            options,
            fill,
            (described, _describe(label), None if sample_weight is None else _describe(sample_weight)),
            class_weights,
            'cpu' if context is None else context.device_type,
            choice.is_main_thread(),
            options.kernel != 'stock' and context is not None and fused.needs_guard(pred, described[2]),
        )
    except (TypeError, ValueError):
        usual = array_checks.in_usual_form(options, pred, label, sample_weight)
        if usual is None:
            raise
        return plan(*usual, class_weights, fill)
    label = array_checks.on_context('label', label, context)
    if sample_weight is not None:
        sample_weight = array_checks.on_context('sample_weight', sample_weight, context)
    if options.invalid_label == 'raise':
        array_checks.check_labels(call, pred, label)
    return call, (pred, _prepared(call, label), sample_weight)


def _describe(array: Any) -> Description:
    try:
        return type(array), array.dtype, array.shape
    except AttributeError:
        return type(array), None, None


@lru_cache(maxsize=1024)  # most calls look like one before
def _plan_arrays(
    options: Options,
    fill: Fill,
    described: Tuple[Description, Description, Optional[Description]],  # pred, label, sample_weight
    class_weights: Optional[int],
    device_type: str,
    is_main_thread: bool,
    needs_guard: bool,
) -> Call:
    for name, array in zip(INPUTS, described):
        if array is not None:
            array_checks.check_array_type(name, array[0])
    (kind, dtype, shape), (_, label_dtype, label_shape), sample_weight = described
    dtype, label_dtype = array_api.name_of(dtype), array_api.name_of(label_dtype)
    array_checks.check_pred_dtype('pred', dtype)
    array_checks.check_shapes(shape, label_shape, label_dtype, options.axis, options.sparse_label)
    array_checks.check_axes('axis', options.class_axes, shape)
    array_checks.check_axes('batch_axis', options.batch_axes, shape)
    if class_weights is not None:
        array_checks.check_class_weights(class_weights, shape[options.axis])
    layout = None
    if sample_weight is not None:
        layout = array_checks.weight_layout(sample_weight[2], shape, options.class_axes, options.batch_axes)
    is_empty = 0 in shape
    kernel = choice.resolve(options, device_type, is_main_thread=is_main_thread, is_empty=is_empty)
    one_hot_depth = shape[options.axis] if kernel == 'stock' and shape[options.axis] > ONE_HOT_ABOVE else None
    return Call(
        options,
        fill,
        _names(sample_weight is not None, class_weights is not None),
        np_style=issubclass(kind, array_api.NP_STYLE),
        dtype=dtype,
        ndim=len(shape),
        label_dtype=label_dtype,
        label_ndim=len(label_shape),
        weight_layout=layout,
        has_few_classes=_has_few_classes(options, dtype, label_dtype, shape),
        one_hot_depth=one_hot_depth,
        is_empty=is_empty,
        kernel=kernel,
        needs_guard=kernel == 'stock' or needs_guard,  # of the stock kernel, it makes no other graph
    )


def _has_few_classes(options, dtype, label_dtype, shape):
    is_narrow = label_dtype in (dtype, *NARROW) and abs(options.ignore_label or 0) <= FLOAT32_INTEGERS
    return shape[options.axis] <= FEW and dtype in ('float32', 'float64') and is_narrow


def _names(has_sample_weight, has_class_weight):
    return tuple(
        name for name, is_given in zip(INPUTS, (True, True, has_sample_weight, has_class_weight)) if is_given
    )


def _prepared(call: Call, label: Any) -> Any:
    """Return a sparse label that other threads may read at the same time.

    Autograd marks the inputs of what it records, and crashes if another thread reads a handle meanwhile.
    A label whose gradient is asked for is recorded all the same.
    """
    is_shared = call.options.sparse_label and active_count() > 1 and label.grad is None
    return label.detach() if is_shared else label
