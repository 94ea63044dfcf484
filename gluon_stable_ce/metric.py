"""Metrics: the same numerics as the loss, exact sums, and no waiting for the device."""
import math
from collections import deque
from numbers import Integral

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from . import _ops, functional
from ._door import Door, check_choice, check_number
from ._sums import Sums
from .kvstore import all_reduce

__all__ = ['StableBitsPerToken', 'StableCrossEntropy', 'StableLoss', 'StablePerplexity']

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
        self._own = {'local': Sums(), 'global': Sums()}  # seen here
        self._others = {'local': Sums(), 'global': Sums()}  # and by other workers, as of the last all_reduce

    def reset_local(self):
        """Begin a new window for `get`; `get_global` goes on."""
        self._settle()
        self._own['local'] = self._others['local'] = Sums()

    def get(self):
        """(name, value) of all that came since the last `reset` or `reset_local`; NaN if nothing did."""
        return self.name, self._value_of(self._window('local'))

    def get_global(self):
        """(name, value) of all that came since the last `reset`; NaN if nothing did."""
        return self.name, self._value_of(self._window('global'))

    @property
    def num_inst(self):
        """How many values `get` is the mean of."""
        return self._window('local').count

    @property
    def sum_metric(self):
        """The sum of the values that `get` is the mean of, rounded once."""
        return self._window('local').over(1)

    @property
    def global_num_inst(self):
        """How many values `get_global` is the mean of."""
        return self._window('global').count

    @property
    def global_sum_metric(self):
        """The sum of the values that `get_global` is the mean of, rounded once."""
        return self._window('global').over(1)

    @property
    def num_infinite(self):
        """How many of the values that `get` is the mean of are infinite."""
        return self._window('local').infinite

    def merge(self, other):
        """Take in what another metric of this kind has seen, as if its updates had come here, after ours.

        Raises
        ------
        TypeError
            If `other` is not the same class of metric.
        """
        if type(other) is not type(self):
            raise TypeError(f'other: expected a {type(self).__name__}, got {type(other).__name__}')
        self._settle()
        other._settle()
        for mine, theirs in ((self._own, other._own), (self._others, other._others)):
            for window in mine:
                mine[window] = mine[window] + theirs[window]

    def state_dict(self):
        """All that was seen, as plain JSON values: what a run that may be killed has to save."""
        self._settle()
        return {part: {window: sums.as_dict() for window, sums in getattr(self, '_' + part).items()} for part in ('own', 'others')}

    def load_state_dict(self, state):
        """Go on from a `state_dict`, in the place of what was seen here.

        Raises
        ------
        ValueError
            If `state` is something else; nothing is changed then.
        """
        try:
            own, others = ({window: Sums.from_dict(state[part][window]) for window in ('local', 'global')} for part in ('own', 'others'))
        except (TypeError, KeyError) as error:
            raise ValueError(f'state: expected what state_dict() returns, got {state!r}') from error
        self._pending.clear()
        self._own, self._others = own, others

    def all_reduce(self, kvstore):
        """Let every worker's result be the result of the whole. All workers must call this, with data or without.

        Afterwards `get` and `get_global` of each worker are exactly what one process would report that had seen all the data. Updates
        go on as before, and a later call takes them in; a second call without any changes nothing.

        Parameters
        ----------
        kvstore : mxnet.kvstore.KVStore, or anything with its ``rank``, ``num_workers`` and ``pushpull``
            See `gluon_stable_ce.kvstore.all_reduce`.
        """
        self._settle()
        windows = ('local', 'global')
        numbers = all_reduce(kvstore, [number for window in windows for number in self._own[window]])
        for window, start in zip(windows, (0, len(Sums.FIELDS))):
            self._others[window] = Sums(*numbers[start:start + len(Sums.FIELDS)]) - self._own[window]

    def _window(self, window):
        self._settle()
        return self._own[window] + self._others[window]

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
            self._own = {window: before + sums for window, before in self._own.items()}

    def _sums_of(self, values):
        return Sums.of(values)

    def __getstate__(self):
        self._settle()
        return self.__dict__.copy()


@mx.metric.register
@mx.metric.alias('stable_loss')
class StableLoss(_DeferredMean, mx.metric.Loss):
    """Mean of loss values that are already there, in the place of `mx.metric.Loss`, whose subclass it is.

    An update takes two microseconds and waits for nothing: the arrays are kept, and read some updates later. So do not change them in
    place afterwards.

    Parameters
    ----------
    name : str, default 'loss'
    output_names, label_names : list of str, optional
        What ``update_dict`` picks.

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

    def update(self, _, preds):
        """Take in an array of loss values of any shape, or a list of them, each on a context of its own."""
        self._push(_as_list('preds', preds))


@mx.metric.register
@mx.metric.alias('stable_cross_entropy')
class StableCrossEntropy(_DeferredMean, mx.metric.EvalMetric):
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

    def __init__(self, axis=-1, pred_type='probs', ignore_label=None, sparse_label=True, name='perplexity', output_names=None,
                 label_names=None):
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

    def __init__(self, axis=-1, pred_type='probs', ignore_label=None, sparse_label=True, name='bits-per-token', output_names=None,
                 label_names=None):
        super().__init__(axis, pred_type, ignore_label, sparse_label, name, output_names, label_names)

    def _value_of(self, sums):
        return super()._value_of(sums) / math.log(2)


class _LabelNLL(Door, gluon.HybridBlock):
    """Negative log-likelihood of each label, float64; -1 marks an ignored position and -2 an invalid label."""

    def __init__(self, axis, pred_type, ignore_label, sparse_label):
        super().__init__()
        self._axis, self._sparse_label = axis, sparse_label
        self._pred_type, self._ignore_label = pred_type, ignore_label
        self.hybridize()

    def hybrid_forward(self, F, pred, label):
        given, ndim = pred, self._seen.ndim
        pred, label, _ = self._inputs(F, pred, label)
        pred = functional.class_axis_last(F, pred, self._axis, ndim)
        if self._sparse_label:
            labels = functional.read_labels(F, label, pred, self._ignore_label, self._label_dtype())
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
