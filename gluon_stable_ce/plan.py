"""What is decided of a call before anything is computed: `plan`."""

from typing import Any, Dict, Hashable, Optional, Tuple

from . import array_api, array_checks
from .call import Call, Fill, given
from .class_weight import ClassWeight
from .kernels import choice
from .kernels.signature import needs_guard, signature_of
from .options import Options

FEW_CLASSES = 2048
OWN_GRAPH_ABOVE = 256  # classes: the stock kernel then has a graph for each number of them, which is faster
# Classes: on a CPU, the roundings of a sum of more exponentials exceed the bounds of the stock kernel. OneDNN
# adds up 8 or 16 shorter sums. A graph of symbols does not know its device, and often not its classes.
MANY_ABOVE = 1000 if array_api.HAS_ONEDNN_LOG_SOFTMAX else 100
FLOAT32_INTEGERS = 2**24  # float32 holds all integers up to this one
NARROW = ('int8', 'uint8', 'float16', 'float32')  # labels that float32 holds as they are

MOST_CALLS = 1024  # their facts name the shapes, which may be new in each batch
_CALLS: Dict[Hashable, Call] = {}  # by the facts of arrays that were planned: most calls look like one before

Inputs = Tuple[Any, ...]  # in the order of INPUTS, with None for those that are not given


def plan(
    options: Options,
    pred: Any,
    label: Any,
    sample_weight: Any = None,
    class_weight: Optional[ClassWeight] = None,
    fill: Fill = Fill.LOSS,
) -> Tuple[Call, Inputs]:
    """Check the arrays of a call, put them on one context, and choose its kernel.

    Parameters
    ----------
    pred, label, sample_weight : arrays or symbols

    Returns
    -------
    Call, (pred, label, sample_weight, class_weight)

    Raises
    ------
    TypeError, ValueError
        If the inputs are no arrays, or do not fit each other. Symbols are not checked.
    """
    inputs = pred, label, sample_weight
    if array_api.is_symbol(pred):
        call, inputs = _plan_symbols(options, fill, *inputs, class_weight)
        return call, (*inputs, class_weight and class_weight.beside(pred))
    facts = options, fill, class_weight and class_weight.classes, signature_of(*inputs)
    call = _CALLS.get(facts)
    if call is None:
        call, inputs = _plan_arrays(options, fill, *inputs, class_weight)
        if inputs[0] is pred and inputs[1] is label and inputs[2] is sample_weight:
            if len(_CALLS) >= MOST_CALLS:
                _CALLS.clear()
            _CALLS[facts] = call
        pred, label, sample_weight = inputs
    if options.invalid_label == 'raise':
        array_checks.check_labels(call, pred, label)
    if options.sparse_label:
        label = array_api.unshared(label)
    return call, (pred, label, sample_weight, class_weight and class_weight.beside(pred))


def _plan_symbols(options, fill, pred, label, sample_weight, class_weight):
    names = given((pred, label, sample_weight, class_weight))
    classes = class_weight and class_weight.classes
    if classes is None and options.axis == -1:
        classes = array_api.last_axis_of(pred)
    pred, dtype = array_api.logits_of_symbol(pred)
    label, sample_weight = (
        array if array is None else array_api.without_bfloat16(array, array_api.dtype_name(array))
        for array in (label, sample_weight)
    )
    call = Call(
        options,
        fill,
        names,
        np_style=array_api.is_np_style(pred),
        dtype=dtype,
        classes=classes,
        has_many_classes=has_many_classes(classes),
        kernel=choice.resolve(options, is_symbol=True),
    )
    return call, (array_api.apart(pred), label, sample_weight)


def _plan_arrays(options, fill, pred, label, sample_weight, class_weight):
    names = given((pred, label, sample_weight, class_weight))
    options, layout, (pred, label, sample_weight) = array_checks.checked(
        options, pred, label, sample_weight, class_weight and class_weight.classes
    )
    shape, device = pred.shape, pred.context.device_type
    is_empty, classes = 0 in shape, shape[options.axis]
    kernel = choice.resolve(options, device, is_main_thread=choice.is_main_thread(), is_empty=is_empty)
    # the stock kernel has no guard: one value for all its calls, and so one graph
    is_guarded = kernel == 'stock' or needs_guard(signature_of(pred, label, sample_weight))
    # an empty array does not tell MXNet its number of classes
    needs_classes = is_empty or (kernel == 'stock' and classes > OWN_GRAPH_ABOVE)
    dtype, label_dtype = array_api.dtype_name(pred), array_api.dtype_name(label)
    call = Call(
        options,
        fill,
        names,
        np_style=array_api.is_np_style(pred),
        dtype=dtype,
        ndim=len(shape),
        label_dtype=label_dtype,
        label_ndim=len(label.shape),
        weight_layout=layout,
        has_few_classes=_has_few_classes(options, dtype, label_dtype, shape),
        classes=classes if needs_classes else None,
        # a GPU adds up in a tree, with less rounding
        has_many_classes=kernel == 'stock' and device != 'gpu' and has_many_classes(classes),
        is_empty=is_empty,
        kernel=kernel,
        needs_guard=is_guarded,
    )
    return call, (pred, label, sample_weight)


def has_many_classes(classes: Optional[int]) -> bool:
    """Whether `Call.has_many_classes` holds on a CPU; of an unknown number, it does."""
    return classes is None or classes > MANY_ABOVE


def _has_few_classes(options, dtype, label_dtype, shape):
    is_narrow = label_dtype in (dtype, *NARROW) and abs(options.ignore_label or 0) <= FLOAT32_INTEGERS
    return shape[options.axis] <= FEW_CLASSES and dtype in ('float32', 'float64') and is_narrow
