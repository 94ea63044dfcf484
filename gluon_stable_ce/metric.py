"""Metrics: the same numerics as the loss, exact sums, and no waiting for the device."""
from collections import deque
from numbers import Integral

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from . import _ops, functional
from ._door import Door, check_choice, check_number
from ._sums import Sums

__all__ = ['StableCrossEntropy', 'StableLoss']

_IGNORED, _INVALID = -1.0, -2.0  # marks among NLLs, which are never negative
_AHEAD = 4  # updates that the device may be behind
_AT_ONCE = 32  # arrays that are worth a look together


class _DeferredMean:
    """Mixin for an EvalMetric: the mean of values that are still being computed.

    `update` queues arrays of one value per position, and only waits for what it queued `_AHEAD` updates ago, so that neither work nor
    memory pile up. Sums are exact, so the result does not depend on when the queue is read.
    """

    def reset(self):
        """Forget everything."""
        self._pending = deque()
        self._local, self._global = Sums(), Sums()

    def reset_local(self):
        """Begin a new window for `get`; `get_global` goes on."""
        self._settle()
        self._local = Sums()

    def get(self):
        """(name, value) of all that came since the last `reset` or `reset_local`; NaN if nothing did."""
        self._settle()
        return self.name, self._value_of(self._local)

    def get_global(self):
        """(name, value) of all that came since the last `reset`; NaN if nothing did."""
        self._settle()
        return self.name, self._value_of(self._global)

    @property
    def num_inst(self):
        """How many values `get` is the mean of."""
        self._settle()
        return self._local.count

    @property
    def sum_metric(self):
        """The sum of the values that `get` is the mean of."""
        self._settle()
        return self._local.over(1)

    @property
    def global_num_inst(self):
        """How many values `get_global` is the mean of."""
        self._settle()
        return self._global.count

    @property
    def global_sum_metric(self):
        """The sum of the values that `get_global` is the mean of."""
        self._settle()
        return self._global.over(1)

    def _value_of(self, sums):
        return sums.over(sums.count)

    def _push(self, arrays):
        self._pending.extend(arrays)
        if len(self._pending) > _AHEAD:
            self._pending[-_AHEAD - 1].wait_to_read()
        if len(self._pending) > _AT_ONCE + _AHEAD:
            self._settle(_AHEAD)

    def _settle(self, ahead=0):
        """Take all but the last `ahead` arrays of the queue into the sums."""
        arrays = [self._pending.popleft() for _ in range(len(self._pending) - ahead)]
        if arrays:
            sums = self._sums_of(np.concatenate([array.asnumpy().ravel() for array in arrays]).astype('float64', copy=False))
            self._local, self._global = self._local + sums, self._global + sums

    def _sums_of(self, values):
        return Sums.of(values)

    def __getstate__(self):
        self._settle()
        return self.__dict__.copy()


@mx.metric.register
@mx.metric.alias('stable_loss')
class StableLoss(_DeferredMean, mx.metric.Loss):
    """Mean of loss values that are already there, in the place of `mx.metric.Loss`."""

    def update(self, _, preds):
        """Take in an array of loss values, or a list of them."""
        self._push(_as_list('preds', preds))


@mx.metric.register
@mx.metric.alias('stable_cross_entropy')
class StableCrossEntropy(_DeferredMean, mx.metric.EvalMetric):
    """Mean negative log-likelihood of the labels, in nats, with no epsilon."""

    def __init__(self, axis=-1, pred_type='probs', ignore_label=None, sparse_label=True, name='cross-entropy', output_names=None,
                 label_names=None):
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

    def update(self, labels, preds):
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
        flat = self._kwargs['sparse_label'] and pred.ndim == 2 and label.ndim > 1 and label.size == pred.shape[0]
        return label.reshape((-1,)) if flat else label

    def _sums_of(self, values):
        marked = values < 0
        if not marked.any():
            return Sums.of(values)
        return Sums.of(values[~marked], invalid=int((values == _INVALID).sum()))

    def _value_of(self, sums):
        if sums.invalid:
            raise ValueError(f'labels: expected integers in [0, {self._classes}), got {sums.invalid} others beside {sums.count} valid ones; '
                             'reset() forgets them')
        return super()._value_of(sums)

    def __getstate__(self):
        state = super().__getstate__()
        del state['_nll']  # its compiled graphs stay behind
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._nll = _LabelNLL(**self._kwargs)


class _LabelNLL(Door, gluon.HybridBlock):
    """Negative log-likelihood of each label, float64; -1 marks an ignored position and -2 an invalid label."""

    def __init__(self, axis, pred_type, ignore_label, sparse_label):
        super().__init__()
        self._axis, self._sparse_label = axis, sparse_label
        self._pred_type, self._ignore_label = pred_type, ignore_label
        self.hybridize()

    def hybrid_forward(self, F, pred, label):
        ndim = self._seen.ndim
        pred = functional.class_axis_last(F, self._widened(F, _ops.classic(pred)), self._axis, ndim)
        label = _ops.classic(label)
        if not self._sparse_label:
            target = functional.class_axis_last(F, label, self._axis, ndim)
            return F.cast(functional.class_terms(F, pred, target=target, pred_type=self._pred_type).nll, dtype='float64')
        labels = functional.read_labels(F, label, pred, self._ignore_label)
        nll = F.cast(functional.class_terms(F, pred, index=labels.index, pred_type=self._pred_type).nll, dtype='float64')
        nll = F.where(labels.valid, nll, F.ones_like(nll) * _INVALID)
        return nll if labels.counted is None else F.where(labels.counted, nll, F.ones_like(nll) * _IGNORED)


def _as_list(name, arrays):
    arrays = list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]
    for array in arrays:
        if not _ops.is_array(array):
            raise TypeError(f'{name}: expected MXNet arrays, got {type(array).__name__}')
    return arrays
