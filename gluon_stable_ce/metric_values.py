"""The values of an update: one array that the device computes, and the meaning of its numbers.

`packed` and `judged` belong together: what one puts into the array, the other takes out of it.
"""

from typing import Any, List, Optional, Tuple

import numpy as np

from . import array_api
from .array_api import Array, F
from .call import METRIC_FILL, Call
from .kernels import class_terms
from .kernels.stock import class_axis_last
from .labels import align_label, read_labels
from .options import Options
from .reduction import with_class_axis

ROUNDING = 1e-3  # by which probabilities may be above 1, and log-probabilities above 0


@array_api.without_amp
def packed(F: F, call: Call, pred: Array, label: Array, *_: Optional[Array]) -> Array:
    """Compute the values of an update, (rows * positions,), or of any shape if there is one row.

    Logits and sparse labels: the NLL of each position, with the marks of `METRIC_FILL`. Other predictions and
    sparse labels: the prediction for each label, and the label. Dense labels: the NLL of each position, and,
    unless `pred` is logits, how many of its predictions are impossible.
    """
    if not call.options.sparse_label:
        rows = _dense_rows(F, call, pred, label)
    elif call.options.pred_type == 'logits':
        rows = [class_terms(F, call, pred, label).nll]
    else:
        rows = _picked_rows(F, call, pred, label)
    return rows[0] if len(rows) == 1 else F.concat(*(F.reshape(row, shape=(-1,)) for row in rows), dim=0)


def _picked_rows(F: F, call: Call, pred: Array, label: Array) -> List[Array]:
    label = align_label(F, call, label, pred)  # (positions...)
    index = label  # of labels that are no class, any prediction is picked
    if call.options.invalid_label == 'clip':
        index = read_labels(F, call, label, pred).index
    picked = F.pick(pred, index, axis=call.options.axis)
    dtype = call.label_compare_dtype
    return [_as(F, picked, call.dtype, dtype), _as(F, label, call.label_dtype, dtype)]


def _dense_rows(F: F, call: Call, pred: Array, target: Array) -> List[Array]:
    rows = [class_terms(F, call, pred, target).nll]
    if call.options.pred_type != 'logits':
        rows.append(_count_impossible(F, call, _as(F, pred, call.dtype, call.compute_dtype), target))
    if call.options.summed_axes:
        return [F.squeeze(with_class_axis(F, call, row), axis=call.options.class_axes) for row in rows]
    return rows


def _count_impossible(F: F, call: Call, pred: Any, target: Any) -> Array:
    """Count the impossible predictions of each position that its target does not leave out."""
    if call.options.pred_type == 'probs':
        is_impossible = (pred > 1 + ROUNDING) + (pred < 0)
    else:
        is_impossible = pred > ROUNDING
    is_impossible = is_impossible * _as(F, target != 0, call.label_dtype, call.compute_dtype)
    is_impossible = class_axis_last(F, is_impossible, call.options.axis, call.ndim)
    return F.dot(is_impossible, F.ones_like(F.contrib.arange_like(is_impossible, axis=-1)))


def _as(F: F, array: Array, dtype: Optional[str], wanted: str) -> Array:
    return array if dtype == wanted else F.cast(array, dtype=wanted)


def judged(options: Options, classes: int, values: np.ndarray) -> Tuple[np.ndarray, int, int]:
    """Judge the values of an update, float64 (rows * positions,).

    Returns
    -------
    The NLL of the positions that count, float64; how many labels are invalid; how many positions have
    impossible predictions.
    """
    if options.sparse_label and options.pred_type == 'logits':
        is_marked = values < 0
        return values[~is_marked], int((values == METRIC_FILL.invalid).sum()), 0
    if options.sparse_label:
        return _judged_picks(options, classes, *values.reshape(2, -1))
    if options.pred_type == 'logits':
        return values, 0, 0
    nll, impossible = values.reshape(2, -1)
    return nll[impossible == 0], 0, int((impossible != 0).sum())


def _judged_picks(
    options: Options, classes: int, picked: np.ndarray, label: np.ndarray
) -> Tuple[np.ndarray, int, int]:
    if options.ignore_label is not None:
        is_counted = label != options.ignore_label
        picked, label = picked[is_counted], label[is_counted]
    total = len(label)
    if options.invalid_label != 'clip':
        picked = picked[(label >= 0) & (label < classes) & (label == np.floor(label))]  # NaN is not
    if options.pred_type == 'probs':
        is_possible = ~((picked < 0) | (picked > 1 + ROUNDING))  # NaN is
        with np.errstate(all='ignore'):
            nll = 0.0 - np.log(np.minimum(picked, 1))
    else:
        is_possible, nll = ~(picked > ROUNDING), 0.0 - np.minimum(picked, 0)
    return nll[is_possible], total - len(picked), int((~is_possible).sum())
