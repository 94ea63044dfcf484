"""The values of an update: one array that the device computes, and the meaning of its numbers.

`packed` and `judged` belong together: what one puts into the array, the other takes out of it.
"""

from typing import Any, List, Optional, Tuple

import numpy as np

from . import array_api
from .array_api import Array, F
from .call import Call, Fill
from .class_terms import is_impossible
from .kernels import class_terms
from .kernels.stock import class_axis_last
from .labels import align_label, read_labels
from .options import Options
from .reduction import with_class_axis


@array_api.without_amp
def packed(F: F, call: Call, pred: Array, label: Array, *_: Optional[Array]) -> Array:
    """Compute the values of an update, (positions...) or (rows, positions...).

    Logits and sparse labels: the NLL of each position, with the marks of `Fill.METRIC`. Other predictions and
    sparse labels: the prediction for each label, and the label. Dense labels: the NLL of each position, and,
    unless `pred` is logits, how many of its predictions are impossible.
    """
    if not call.options.sparse_label:
        arrays = _dense_rows(F, call, pred, label)
    elif call.options.pred_type == 'logits':
        arrays = [class_terms(F, call, pred, label).nll]
    else:
        arrays = _picked_rows(F, call, pred, label)
    return F.stack(*arrays, axis=0) if len(arrays) > 1 else arrays[0]


def _picked_rows(F: F, call: Call, pred: Array, label: Array) -> List[Array]:
    aligned = align_label(F, call, label, pred)  # (positions...)
    # of labels that are no class, any prediction is picked
    index = read_labels(F, call, label, pred).index if call.options.invalid_label == 'clip' else aligned
    picked = F.pick(pred, index, axis=call.options.axis)
    dtype = call.label_compare_dtype
    return [_as(F, picked, call.dtype, dtype), _as(F, aligned, call.label_dtype, dtype)]


def _dense_rows(F: F, call: Call, pred: Array, target: Array) -> List[Array]:
    arrays = [class_terms(F, call, pred, target).nll]
    if call.options.pred_type != 'logits':
        arrays.append(_count_impossible(F, call, _as(F, pred, call.dtype, call.compute_dtype), target))
    if call.options.summed_axes:
        axes = call.options.class_axes
        return [F.squeeze(with_class_axis(F, call, array), axis=axes) for array in arrays]
    return arrays


def _count_impossible(F: F, call: Call, pred: Any, target: Any) -> Array:
    """Count the impossible predictions of each position that its target does not leave out."""
    is_counted = _as(F, target != 0, call.label_dtype, call.compute_dtype)
    found = is_impossible(pred, call.options.pred_type) * is_counted
    found = class_axis_last(F, found, call.options.axis, call.ndim)
    return F.dot(found, F.ones_like(F.contrib.arange_like(found, axis=-1)))


def _as(F: F, array: Array, dtype: Optional[str], wanted: str) -> Array:
    return array if dtype == wanted else F.cast(array, dtype=wanted)


def rows(options: Options) -> int:
    """Return how many values `packed` computes for each position."""
    return 1 if options.pred_type == 'logits' else 2


def judged(options: Options, classes: int, values: np.ndarray) -> Tuple[np.ndarray, int, int]:
    """Judge the values of some updates, (rows, positions).

    Returns
    -------
    The NLL of the positions that count, float64; how many labels are invalid; how many positions have
    impossible predictions.
    """
    values = values.astype('float64', copy=False)
    if options.sparse_label and options.pred_type == 'logits':
        nll, is_marked = values[0], values[0] < 0
        return nll[~is_marked], np.count_nonzero(nll == Fill.METRIC.invalid), 0
    if options.sparse_label:
        return _judged_picks(options, classes, *values)
    if options.pred_type == 'logits':
        return values[0], 0, 0
    nll, impossible = values
    return nll[impossible == 0], 0, np.count_nonzero(impossible)


def _judged_picks(
    options: Options, classes: int, picked: np.ndarray, label: np.ndarray
) -> Tuple[np.ndarray, int, int]:
    if options.ignore_label is not None:
        is_counted = label != options.ignore_label
        picked, label = picked[is_counted], label[is_counted]
    total = len(label)
    with np.errstate(all='ignore'):
        if options.invalid_label != 'clip':
            picked = picked[np.floor(label) % classes == label]  # the rule of labels.py
        possible = picked[~is_impossible(picked, options.pred_type)]
        log_p = possible if options.pred_type == 'log_probs' else np.log(possible)
        nll = 0.0 - np.minimum(log_p, 0)
    return nll, total - len(picked), len(picked) - len(possible)
