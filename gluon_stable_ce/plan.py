"""What is decided of a call before anything is computed: `plan`."""

from threading import active_count
from typing import Any, Dict, Hashable, Optional, Sequence, Tuple

from . import array_api, array_checks
from .call import INPUTS, LOSS_FILL, Call, Fill
from .kernels import choice
from .kernels.signature import needs_guard, signature_of
from .options import Options

FEW = 2048  # classes
OWN_GRAPH_ABOVE = 256  # classes: the stock kernel then has a graph for each number of them, which is faster
# Classes: on a CPU, the roundings of a sum of more exponentials exceed the bounds of the stock kernel. A
# graph of symbols does not know its device.
MANY_ABOVE, MANY_ABOVE_IN_FLOAT64 = 65536, 500
FLOAT32_INTEGERS = 2**24  # float32 holds all integers up to this one
NARROW = ('int8', 'uint8', 'float16', 'float32')  # labels that float32 holds as they are

MOST_CALLS = 1024
_CALLS: Dict[Hashable, Call] = {}  # that were planned: most calls look like one before

Inputs = Sequence[Any]  # pred, label, sample_weight


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
        return _plan_symbols(options, pred, label, sample_weight, class_weights, fill)
    inputs: Inputs = (pred, label, sample_weight)
    key = options, fill, class_weights, signature_of(*inputs)
    call = _CALLS.get(key)
    if call is None:
        call, inputs = _plan_arrays(options, inputs, class_weights, fill)
        if inputs[0] is pred and inputs[1] is label and inputs[2] is sample_weight:
            _remember(key, call)
    if options.invalid_label == 'raise':
        array_checks.check_labels(call, *inputs[:2])
    return call, (inputs[0], thread_safe_label(call, inputs[1]), inputs[2])


def _plan_symbols(options, pred, label, sample_weight, class_weights, fill):
    classes = array_api.units_of_dense(pred) if options.axis == -1 else None
    pred, dtype = array_api.logits_of_symbol(pred)
    label, sample_weight = (
        array if array is None else array_api.without_bfloat16(array, array_api.dtype_name(array))
        for array in (label, sample_weight)
    )
    call = Call(
        options,
        fill,
        _names(sample_weight, class_weights),
        np_style=array_api.is_np_style(pred),
        dtype=dtype,
        classes=classes,
        has_many_classes=_has_many_classes(dtype, classes or 0),
        kernel=choice.resolve(options, is_symbol=True),
    )
    return call, (array_api.apart(pred), label, sample_weight)


def _remember(key: Hashable, call: Call) -> None:
    if len(_CALLS) >= MOST_CALLS:
        _CALLS.clear()
    _CALLS[key] = call


def _plan_arrays(
    options: Options, inputs: Inputs, class_weights: Optional[int], fill: Fill
) -> Tuple[Call, Inputs]:
    """Return the `Call`, and the inputs in the form and on the context in which its graph takes them."""
    pred, label, sample_weight = inputs
    if array_api.is_array(pred):
        pred = array_api.without_bfloat16(pred, array_api.dtype_name(pred))
    try:
        call = _call_of(options, (pred, label, sample_weight), class_weights, fill)
    except (TypeError, ValueError):
        usual = array_checks.in_usual_form(options, pred, label, sample_weight)
        if usual is None:
            raise
        options, pred, label, sample_weight = usual
        call = _call_of(options, (pred, label, sample_weight), class_weights, fill)
    label = array_checks.on_context('label', label, pred.context)
    if sample_weight is not None:
        sample_weight = array_checks.on_context('sample_weight', sample_weight, pred.context)
    return call, (pred, label, sample_weight)


def _call_of(options: Options, inputs: Inputs, class_weights: Optional[int], fill: Fill) -> Call:
    for name, array in zip(INPUTS, inputs):
        if array is not None or name != 'sample_weight':
            array_checks.check_array_type(name, type(array))
    pred, label, sample_weight = inputs
    shape, dtype, label_dtype = pred.shape, array_api.dtype_name(pred), array_api.dtype_name(label)
    array_checks.check_pred_dtype('pred', dtype)
    array_checks.check_shapes(shape, label.shape, label_dtype, options.axis, options.sparse_label)
    array_checks.check_axes('axis', options.class_axes, shape)
    array_checks.check_axes('batch_axis', options.batch_axes, shape)
    if class_weights is not None:
        array_checks.check_class_weights(class_weights, shape[options.axis])
    layout = None
    if sample_weight is not None:
        layout = array_checks.weight_layout(
            sample_weight.shape, shape, options.class_axes, options.batch_axes
        )
    is_empty = 0 in shape
    kernel = choice.resolve(
        options, pred.context.device_type, is_main_thread=choice.is_main_thread(), is_empty=is_empty
    )
    classes = shape[options.axis]
    # an empty array does not tell MXNet its number of classes
    needs_classes = is_empty or (kernel == 'stock' and classes > OWN_GRAPH_ABOVE)
    is_gpu = pred.context.device_type == 'gpu'  # a GPU adds up in a tree, with less rounding
    return Call(
        options,
        fill,
        _names(sample_weight, class_weights),
        np_style=array_api.is_np_style(pred),
        dtype=dtype,
        ndim=len(shape),
        label_dtype=label_dtype,
        label_ndim=len(label.shape),
        weight_layout=layout,
        has_few_classes=_has_few_classes(options, dtype, label_dtype, shape),
        classes=classes if needs_classes else None,
        has_many_classes=kernel == 'stock' and not is_gpu and _has_many_classes(dtype, classes),
        is_empty=is_empty,
        kernel=kernel,
        # the stock kernel has no guard: one value for all its calls, and so one graph
        needs_guard=kernel == 'stock' or needs_guard(signature_of(*inputs)),
    )


def _has_many_classes(dtype: Optional[str], classes: int) -> bool:
    return classes > (MANY_ABOVE_IN_FLOAT64 if dtype == 'float64' else MANY_ABOVE)


def _has_few_classes(options, dtype, label_dtype, shape):
    is_narrow = label_dtype in (dtype, *NARROW) and abs(options.ignore_label or 0) <= FLOAT32_INTEGERS
    return shape[options.axis] <= FEW and dtype in ('float32', 'float64') and is_narrow


def _names(sample_weight: Any, class_weights: Optional[int]) -> Tuple[str, ...]:
    given = (True, True, sample_weight is not None, class_weights is not None)
    return tuple(name for name, is_given in zip(INPUTS, given) if is_given)


def thread_safe_label(call: Call, label: Any) -> Any:
    """Return a sparse label that other threads may read at the same time.

    Autograd marks the inputs of what it records, and crashes if another thread reads a handle meanwhile.
    A label whose gradient is asked for is recorded all the same.
    """
    is_shared = call.options.sparse_label and active_count() > 1 and label.grad is None
    return label.detach() if is_shared else label
