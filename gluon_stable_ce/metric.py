"""Metrics: the same numerics as the loss, exact sums, and no waiting for the device."""
import math
from collections import OrderedDict
from numbers import Integral
from typing import Any, List, Optional

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from . import _ops, functional
from ._deferred import DeferredMean
from ._door import Door, check_choice, check_number
from ._sums import Sums

__all__ = ['StableBitsPerToken', 'StableCrossEntropy', 'StableLoss', 'StablePerplexity']

_IGNORED, _INVALID = -1.0, -2.0  # marks among NLLs, which are never negative


@mx.metric.register
@mx.metric.alias('stable_loss')
class StableLoss(DeferredMean, mx.metric.Loss):
    """Mean of loss values that are already there, in the place of `mx.metric.Loss`, whose subclass it is.

    An update does no work on the device: the arrays are kept, and read some updates later. So do not change them in place afterwards, and
    hand over a copy of what an executor or a Module will write over, as ``metric.update(None, executor.outputs[0].copy())``; Module's own
    ``update_metric`` is taken care of.

    Parameters
    ----------
    name : str, default 'loss'
    output_names, label_names : list of str, optional
        What ``update_dict`` picks.

    Raises
    ------
    TypeError
        By `update`, if something else than arrays comes, with nothing taken in.

    Notes
    -----
    Numerics: the values are added up without rounding, and divided with one (``test_metric.py::test_sums_are_exact``).

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StableLoss
    >>> metric = StableLoss()
    >>> metric.update(None, mx.nd.array([0.5, 1.5, float('inf')]))
    >>> metric.get(), metric.num_infinite
    (('loss', inf), 1)
    """

    def update(self, _: Any, preds: Any) -> None:
        """Take in an array of loss values of any shape, or a list of them, each on a context of its own."""
        self._push(_as_list('preds', preds))

    def update_dict(self, label: Any, pred: Any) -> None:
        """The same of outputs by name, which are copied: this is how Module calls, and it computes each batch into the same arrays."""
        super().update_dict(label, OrderedDict((name, array.copy()) for name, array in pred.items()))


@mx.metric.register
@mx.metric.alias('stable_cross_entropy')
class StableCrossEntropy(DeferredMean, mx.metric.EvalMetric):
    r"""Mean negative log-likelihood of the labels, in nats, with no epsilon: :math:`\frac{1}{N} \sum_n -\log p_{n, y_n}`.

    Reads labels as the loss does and computes what the loss computes, without weights or smoothing. Invalid labels are counted apart, and
    `get` raises ValueError if there are any.

    Parameters
    ----------
    axis : int, default -1
        Class axis of the predictions.
    pred_type : 'probs', 'logits' or 'log_probs'
        What the predictions are.
    ignore_label : int, optional
        Label of positions that do not count.
    sparse_label : bool, default True
        Whether labels are class indices, and not distributions over the classes.
    name : str, default 'cross-entropy'
    output_names, label_names : list of str, optional
        What ``update_dict`` picks.

    Raises
    ------
    TypeError, ValueError
        By `update`, if arrays do not fit each other, with nothing taken in; by `get`, if there were invalid labels, until `reset`.

    Notes
    -----
    Shapes: as for the loss, float16, float32 or float64. Labels of any shape also fit 2-D predictions with as many rows, as in `mx.metric`.

    Numerics: probabilities are picked first, and their logarithm is taken in float64 (1e-15 relative); logits are reduced as in the
    loss, with its error. Sums are exact and the division rounds once, so the result is the same to the last bit however the data comes in
    batches, devices and workers (``test_metric.py::test_results_do_not_depend_on_batches_devices_or_when_somebody_looks``). An update
    only waits for the one four updates ago.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StableCrossEntropy
    >>> stock, metric = mx.metric.CrossEntropy(), StableCrossEntropy()
    >>> for m in (stock, metric):
    ...     m.update([mx.nd.array([0])], [mx.nd.array([[1e-43, 1]])])
    >>> round(float(stock.get()[1]), 2), round(metric.get()[1], 2)
    (27.63, 99.02)
    """

    def __init__(self, axis: int = -1, pred_type: str = 'probs', ignore_label: Optional[int] = None, sparse_label: bool = True,
                 name: str = 'cross-entropy', output_names: Optional[List[str]] = None, label_names: Optional[List[str]] = None) -> None:
        check_number('axis', axis, Integral)
        check_number('ignore_label', ignore_label, Integral, optional=True)
        check_choice('pred_type', pred_type, ('probs', 'logits', 'log_probs'))
        if not sparse_label and ignore_label is not None:
            raise ValueError('ignore_label: expected None with sparse_label=False, as a distribution has no label to compare with '
                             f'{ignore_label}')
        super().__init__(name, output_names, label_names, axis=axis, pred_type=pred_type, ignore_label=ignore_label,
                         sparse_label=sparse_label, has_global_stats=True)
        self._classes = None
        self._nll = _LabelNLL(axis, pred_type, ignore_label, sparse_label)

    def update(self, labels: Any, preds: Any) -> None:
        """Take in labels and predictions: an array each, or lists of as many arrays, of which each pair lives on a context of its own."""
        labels, preds = _as_list('labels', labels), _as_list('preds', preds)
        if len(labels) != len(preds):
            raise ValueError(f'labels: expected as many arrays as preds, {len(preds)}, got {len(labels)}')
        with autograd.pause():
            self._push([self._nll(pred, self._fit(label, pred)) for label, pred in zip(labels, preds)])
        if preds:
            self._classes = preds[-1].shape[self._kwargs['axis']]

    def _fit(self, label, pred):
        """`label` next to `pred`, and flat where the rows of `pred` are the positions of a label of any shape, as in mx.metric."""
        if label.context != pred.context:
            label = label.as_in_context(pred.context)
        flat = self._kwargs['sparse_label'] and len(pred.shape) == 2 and len(label.shape) > 1 and label.size == pred.shape[0]
        return label.reshape((-1,)) if flat else label

    def _sums_of(self, values):
        marked = values < 0
        if not marked.any():
            return Sums.of(values)
        return Sums.of(values[~marked], invalid=int((values == _INVALID).sum()))

    def _value_of(self, sums):
        if sums.invalid:
            raise ValueError(f"labels: expected integers in [0, {self._classes or 'C'}), got {sums.invalid} others beside {sums.count} "
                             'valid ones; reset() forgets them')
        return super()._value_of(sums)

    def __getstate__(self):
        state = super().__getstate__()
        del state['_nll']  # its compiled graphs stay behind
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._nll = _LabelNLL(**self._kwargs)


@mx.metric.register
@mx.metric.alias('stable_perplexity')
class StablePerplexity(StableCrossEntropy):
    """exp of the mean negative log-likelihood of the labels, with no floor, where `mx.metric.Perplexity` has one at p = 1e-10.

    Parameters, shapes, errors and numerics are those of `StableCrossEntropy`.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StablePerplexity
    >>> metric = StablePerplexity(pred_type='logits', ignore_label=0)
    >>> metric.update(mx.nd.array([[1, 0], [3, 2]]), mx.nd.zeros((4, 8)))
    >>> metric.get()[0], round(metric.get()[1], 5)
    ('perplexity', 8.0)
    """

    def __init__(self, axis: int = -1, pred_type: str = 'probs', ignore_label: Optional[int] = None, sparse_label: bool = True,
                 name: str = 'perplexity', output_names: Optional[List[str]] = None, label_names: Optional[List[str]] = None) -> None:
        super().__init__(axis, pred_type, ignore_label, sparse_label, name, output_names, label_names)

    def _value_of(self, sums):
        with np.errstate(over='ignore'):
            return float(np.exp(super()._value_of(sums)))


@mx.metric.register
@mx.metric.alias('stable_bits_per_token')
class StableBitsPerToken(StableCrossEntropy):
    """Mean negative log-likelihood of the labels in bits: nats divided by log 2.

    Parameters, shapes, errors and numerics are those of `StableCrossEntropy`.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StableBitsPerToken
    >>> metric = StableBitsPerToken()
    >>> metric.update(mx.nd.array([1, 2]), mx.nd.full((2, 4), 0.25))
    >>> metric.get()
    ('bits-per-token', 2.0)
    """

    def __init__(self, axis: int = -1, pred_type: str = 'probs', ignore_label: Optional[int] = None, sparse_label: bool = True,
                 name: str = 'bits-per-token', output_names: Optional[List[str]] = None, label_names: Optional[List[str]] = None) -> None:
        super().__init__(axis, pred_type, ignore_label, sparse_label, name, output_names, label_names)

    def _value_of(self, sums):
        return super()._value_of(sums) / math.log(2)


class _LabelNLL(Door, gluon.HybridBlock):
    """Negative log-likelihood of each label, float64; -1 marks an ignored position and -2 an invalid label."""

    def __init__(self, axis, pred_type, ignore_label, sparse_label):
        super().__init__()
        self._axis, self._batch_axis, self._sparse_label = axis, 0, sparse_label
        self._pred_type, self._ignore_label = pred_type, ignore_label
        self._tell_classes = pred_type == 'probs'  # then nothing else takes time
        self.hybridize()

    def hybrid_forward(self, F, pred, label):
        given, ndim = pred, self._seen.ndim
        pred, label, _ = self._inputs(F, pred, label)
        pred = functional.class_axis_last(F, pred, self._axis, ndim)
        if self._sparse_label:
            labels = functional.read_labels(F, label, pred, self._ignore_label, self._label_dtype(), self._seen.classes)
            nll = F.cast(functional.class_terms(F, pred, index=labels.index, pred_type=self._pred_type).nll, dtype='float64')
            nll = F.where(labels.valid, nll, F.ones_like(nll) * _INVALID)
            if labels.counted is not None:
                nll = F.where(labels.counted, nll, F.ones_like(nll) * _IGNORED)
        else:
            target = functional.class_axis_last(F, label, self._axis, ndim)
            nll = F.cast(functional.class_terms(F, pred, target=target, pred_type=self._pred_type).nll, dtype='float64')
        return _ops.in_style_of(given, nll)


def _as_list(name, arrays):
    arrays = list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]
    for array in arrays:
        if not _ops.is_array(array):
            raise TypeError(f'{name}: expected MXNet arrays, got {type(array).__name__}')
    return arrays
