"""Metrics of the same values as the loss, with exact sums and without waiting for the device."""

import math
from contextlib import nullcontext
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, ContextManager, List, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import autograd

from . import array_api, device_errors, graphs
from .array_api import Array
from .array_checks import as_dense
from .call import Fill
from .exact_sums import ExactSums
from .kernels import choice
from .metric_queue import Queued, RunningMean
from .metric_values import judged, packed, rows
from .options import Kernel, MetricInvalidLabel, Options, PredType, check_metric_options, checks_names
from .plan import plan

IMPOSSIBLE = {
    'probs': 'not probabilities: they are below 0 or above 1',
    'log_probs': 'not log-probabilities: they are above 0',
}


class StableLoss(RunningMean, mx.metric.Loss, is_kind=True):
    """Mean of given loss values, in place of `mx.metric.Loss`, of which it is a subclass.

    The values are copied on their device and read some updates later, so they may be written over afterwards.

    Parameters
    ----------
    name : str, default 'loss'
    output_names, label_names : list of str, optional
        The names of the outputs and labels that ``update_dict`` passes to `update`.

    Raises
    ------
    TypeError
        By `update`, if a value is not an array; then nothing is taken in.
    MXNetError
        As by `StableCrossEntropy`.

    Notes
    -----
    *Numerics.* The values are added up without rounding, and divided with one
    (``test_exact_sums.py::test_sum_is_that_of_fractions``).

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StableLoss
    >>> metric = StableLoss()
    >>> metric.update(None, mx.nd.array([0.5, 1.5, float('inf')]))
    >>> metric.get(), metric.num_infinite
    (('loss', inf), 1)
    """

    @checks_names
    def __init__(
        self,
        name: str = 'loss',
        output_names: Optional[List[str]] = None,
        label_names: Optional[List[str]] = None,
    ) -> None:
        # not through mx.metric.Loss.__init__, which may be ours if that was put in its place
        mx.metric.EvalMetric.__init__(self, name, output_names, label_names, has_global_stats=True)

    def update(self, _: Any, preds: Any) -> None:
        """Take in an array of loss values of any shape, or a list of them, each on its own context."""
        errors = device_errors.count()
        self._push([_copied(array) for array in _as_list('preds', preds) if array.size], errors)


def _option(name: str) -> Any:
    """Make a property of an option that may be set later: the next update checks it."""

    def get_value(metric):
        if name in metric._kwargs:
            return metric._kwargs[name]
        raise AttributeError(f'{type(metric).__name__} has no option {name!r}')

    def set_value(metric, value):
        metric._window('local')  # counts the updates before, with the options that they had
        metric._kwargs = {**vars(metric).get('_kwargs', {}), name: value}
        vars(metric).pop('_options', None)

    return property(get_value, set_value, doc=f'The option `{name}`.')


class StableCrossEntropy(RunningMean, mx.metric.EvalMetric, is_kind=True):
    r"""Mean negative log-likelihood of the labels, in nats, with no epsilon.

    .. math:: \frac{1}{N} \sum_n -\log p_{n, y_n}

    Reads labels and computes values as the loss does, without weights or smoothing.

    Parameters
    ----------
    axis : int, default -1
        Class axis of the predictions. With dense labels it may be several, unless these are logits.
    pred_type : 'probs', 'logits' or 'log_probs'
        The kind of the predictions.
    ignore_label : int, optional
        Label of positions that do not count.
    sparse_label : bool, default True
        Whether labels are class indices, and not distributions over the classes.
    invalid_label : 'raise' or 'clip'
        How to treat labels that are outside [0, C), NaN or not an integer. 'raise': they are counted apart,
        and `get` raises ValueError until `reset`. 'clip': as the loss does, the nearest class counts, a
        fraction as the class of its integer part, and NaN as class 0. That is what `mx.metric.Perplexity`
        does.
    kernel : 'auto', 'stock' or 'fused'
        The code that reduces the class axis of logits, as for the loss.
    name : str, default 'cross-entropy'
    output_names, label_names : list of str, optional
        The names of the outputs and labels that ``update_dict`` passes to `update`.

    Raises
    ------
    TypeError, ValueError
        By `update`, if arrays do not fit each other; then nothing is taken in. By `get`, until `reset`: if
        there were invalid labels, or predictions for labels that are impossible: probabilities below 0 or
        above 1 + 1e-3, log-probabilities above 1e-3.
    MXNetError
        By `update` and `get`: an error on the device. By `get`, until `reset`: if it is not known whether the
        device computed all values, after such an error.

    Notes
    -----
    Shapes and dtypes are as for the loss. Labels of any shape also fit 2-D predictions
    with as many rows, as in `mx.metric`.

    *Numerics.* Probabilities are picked first, and their logarithm is taken in float64 (1e-15 relative).
    Logits are reduced as in the loss, with its relative error (``test_exactness.py``). Sums are exact and the
    division rounds once. So with sparse labels, the result is the same to the last bit however the data is
    split into batches, devices and workers: from logits, with one kernel and the classes on the last axis
    (``test_metric.py::test_results_do_not_depend_on_batches_devices_or_when_get_is_called``).

    *Waiting.* An update only waits for the one two updates ago.

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

    axis, ignore_label = _option('axis'), _option('ignore_label')  # which mx.metric.Perplexity has, too

    @checks_names
    def __init__(
        self,
        *args: Any,
        axis: Union[int, Sequence[int]] = -1,
        pred_type: PredType = 'probs',
        ignore_label: Optional[int] = None,
        sparse_label: bool = True,
        invalid_label: MetricInvalidLabel = 'raise',
        kernel: Kernel = 'auto',
        name: str = 'cross-entropy',
        output_names: Optional[List[str]] = None,
        label_names: Optional[List[str]] = None,
    ) -> None:
        if args:
            raise TypeError(f'{type(self).__name__}: expected keyword arguments only, got {args}')
        given = {
            'axis': axis,
            'pred_type': pred_type,
            'ignore_label': ignore_label,
            'sparse_label': sparse_label,
            'invalid_label': invalid_label,
            'kernel': kernel,
        }
        options = check_metric_options(given)
        config = {option: getattr(options, option) for option in given}
        config.update(invalid_label=invalid_label)
        if options.summed_axes:
            config['axis'] = list(options.class_axes)  # as JSON has it
        mx.metric.EvalMetric.__init__(self, name, output_names, label_names, has_global_stats=True, **config)
        self._options  # noqa: B018, which chooses the kernel

    @cached_property
    def _options(self) -> Options:
        """The checked options."""
        return choice.configured(check_metric_options(self._kwargs))

    @cached_property
    def _graphs(self) -> graphs.Graphs:
        return graphs.Graphs(packed, Fill.METRIC, self)

    # Any: type checkers take the result of most operators of MXNet, such as softmax, for a tuple
    def update(self, labels: Any, preds: Any) -> None:
        """Take in labels and predictions: an array each, or lists of arrays, each pair on its own context."""
        errors, labels, preds = device_errors.count(), _as_list('labels', labels), _as_list('preds', preds)
        if len(labels) != len(preds):
            raise ValueError(f'labels: expected as many arrays as preds, {len(preds)}, got {len(labels)}')
        queued = [self._compute(*pair) for pair in zip(labels, preds)]
        self._push([item for item in queued if item is not None], errors)

    def _compute(self, label: Any, pred: Any) -> Optional[Queued]:
        """Compute the values of each position; `label` is moved to the context of `pred`."""
        options = self._options
        with _unrecorded():
            pred, label = array_api.as_classic(pred), array_api.as_classic(label).as_in_context(pred.context)
            shape = pred.shape
            if options.sparse_label and len(shape) == 2 and len(label.shape) > 1 and label.size == shape[0]:
                label = label.reshape((-1,))  # the rows of `pred` are the positions, as in mx.metric
            if 0 in shape:
                plan(options, pred, label)  # which checks them
                return None
            return Queued(self._graphs.compute(options, pred, label), shape[options.axis])

    def _sums_of(self, arrays: Sequence[Tuple[int, np.ndarray]]) -> ExactSums:
        sums, count = ExactSums(), rows(self._options)
        for classes, alike in groupby(arrays, itemgetter(0)):
            values = np.concatenate([array.reshape(count, -1) for _, array in alike], axis=1)
            nll, invalid, impossible = judged(self._options, classes, values)
            sums += ExactSums.of(nll, invalid=invalid, impossible=impossible)
        return sums

    def _value_of(self, sums: ExactSums) -> float:
        value, total = super()._value_of(sums), sums.count + sums.invalid + sums.impossible
        if sums.invalid:
            raise ValueError(
                f'{sums.invalid} of {total} labels are invalid. If they are padding, set ignore_label. '
                'reset() clears them'
            )
        if sums.impossible:
            raise ValueError(
                f'{sums.impossible} of {total} predictions are {IMPOSSIBLE[self._options.pred_type]}. If '
                "they are logits, set pred_type='logits' (in a loss from_logits=False). reset() clears them"
            )
        return value


class StablePerplexity(StableCrossEntropy, is_kind=True):
    """Exponential of the mean negative log-likelihood of the labels, with no floor under small probabilities.

    `mx.metric.Perplexity` has one at p = 1e-10. It takes the same positional arguments. Parameters, shapes,
    errors and numerics are as for `StableCrossEntropy`.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StablePerplexity
    >>> metric = StablePerplexity(0, pred_type='logits')
    >>> metric.update(mx.nd.array([[1, 0], [3, 2]]), mx.nd.zeros((4, 8)))
    >>> metric.get()[0], round(metric.get()[1], 3)
    ('perplexity', 8.0)
    """

    @checks_names
    def __init__(
        self,
        ignore_label: Optional[int] = None,
        axis: Union[int, Sequence[int]] = -1,
        name: str = 'perplexity',
        output_names: Optional[List[str]] = None,
        label_names: Optional[List[str]] = None,
        *,
        pred_type: PredType = 'probs',
        sparse_label: bool = True,
        invalid_label: MetricInvalidLabel = 'raise',
        kernel: Kernel = 'auto',
    ) -> None:
        super().__init__(
            axis=axis,
            pred_type=pred_type,
            ignore_label=ignore_label,
            sparse_label=sparse_label,
            invalid_label=invalid_label,
            kernel=kernel,
            name=name,
            output_names=output_names,
            label_names=label_names,
        )

    def _value_of(self, sums: ExactSums) -> float:
        with np.errstate(over='ignore'):
            return float(np.exp(super()._value_of(sums)))


class StableBitsPerToken(StableCrossEntropy, is_kind=True):
    """Mean negative log-likelihood of the labels in bits: nats divided by log 2.

    Parameters, shapes, errors and numerics are as for `StableCrossEntropy`.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StableBitsPerToken
    >>> metric = StableBitsPerToken()
    >>> metric.update(mx.nd.array([1, 2]), mx.nd.full((2, 4), 0.25))
    >>> metric.get()
    ('bits-per-token', 2.0)
    """

    @checks_names
    def __init__(
        self,
        *,
        axis: Union[int, Sequence[int]] = -1,
        pred_type: PredType = 'probs',
        ignore_label: Optional[int] = None,
        sparse_label: bool = True,
        invalid_label: MetricInvalidLabel = 'raise',
        kernel: Kernel = 'auto',
        name: str = 'bits-per-token',
        output_names: Optional[List[str]] = None,
        label_names: Optional[List[str]] = None,
    ) -> None:
        super().__init__(
            axis=axis,
            pred_type=pred_type,
            ignore_label=ignore_label,
            sparse_label=sparse_label,
            invalid_label=invalid_label,
            kernel=kernel,
            name=name,
            output_names=output_names,
            label_names=label_names,
        )

    def _value_of(self, sums: ExactSums) -> float:
        return super()._value_of(sums) / math.log(2)


def _unrecorded() -> ContextManager[Any]:
    """Record nothing for gradients."""
    return autograd.pause() if autograd.is_recording() else nullcontext()


def _copied(array: Array) -> Queued:
    """Copy values, in a dtype that NumPy has."""
    array = array_api.as_classic(array)
    with _unrecorded():
        is_bfloat16 = array_api.dtype_name(array) == 'bfloat16'
        return Queued(array.astype('float32') if is_bfloat16 else mx.nd.identity(array))


def _as_list(name: str, arrays: Any) -> List[Array]:
    arrays = arrays if isinstance(arrays, (list, tuple)) else [arrays]
    return [as_dense(name, array) for array in arrays]


# not as decorators, which have no types: a type checker would not know the classes
for _metric, _alias in (
    (StableLoss, 'stable_loss'),
    (StableCrossEntropy, 'stable_cross_entropy'),
    (StablePerplexity, 'stable_perplexity'),
    (StableBitsPerToken, 'stable_bits_per_token'),
):
    mx.metric.register(_metric)
    mx.metric.register(_metric, _alias)
