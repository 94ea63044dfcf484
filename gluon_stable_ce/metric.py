"""Metrics: what the loss computes, with exact sums and without waiting for the device."""

import math
from functools import cached_property
from typing import Any, List, Optional, Sequence, Union

import mxnet as mx
import numpy as np
from mxnet import autograd

from . import array_api, graphs
from .array_api import Array, Arrays
from .array_checks import check_array_type
from .call import METRIC_FILL
from .exact_sums import ExactSums
from .kernels import choice
from .metric_queue import RunningMean
from .options import check_metric_options
from .pipeline import nll_of
from .plan import plan


@mx.metric.register
@mx.metric.alias('stable_loss')
class StableLoss(RunningMean, mx.metric.Loss):
    """Mean of given loss values, in the place of `mx.metric.Loss`, of which it is a subclass.

    The values are copied on their device and read some updates later, so they may be written over afterwards.

    Parameters
    ----------
    name : str, default 'loss'
    output_names, label_names : list of str, optional
        The names of the outputs and labels that ``update_dict`` passes to `update`.

    Raises
    ------
    TypeError
        By `update`, if it is given something else than arrays; then nothing is taken in.

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

    def __init__(
        self,
        name: str = 'loss',
        output_names: Optional[List[str]] = None,
        label_names: Optional[List[str]] = None,
    ) -> None:
        # not through mx.metric.Loss.__init__, which may be ours if that was put in its place
        mx.metric.EvalMetric.__init__(self, name, output_names, label_names, has_global_stats=True)

    def update(self, _: Any, preds: Arrays) -> None:
        """Take in an array of loss values of any shape, or a list of them, each on its own context."""
        self._push([_copied(array) for array in _as_list('preds', preds)])


@mx.metric.register
@mx.metric.alias('stable_cross_entropy')
class StableCrossEntropy(RunningMean, mx.metric.EvalMetric):
    r"""Mean negative log-likelihood of the labels, in nats, with no epsilon.

    .. math:: \frac{1}{N} \sum_n -\log p_{n, y_n}

    Reads labels as the loss does and computes what the loss computes, without weights or smoothing. Invalid
    labels are counted apart, and `get` raises ValueError if there are any.

    Parameters
    ----------
    axis : int, default -1
        Class axis of the predictions. With dense labels that are no logits it may be several, as in the loss.
    pred_type : 'probs', 'logits' or 'log_probs'
        What the predictions are.
    ignore_label : int, optional
        Label of positions that do not count.
    sparse_label : bool, default True
        Whether labels are class indices, and not distributions over the classes.
    kernel : 'auto', 'stock' or 'fused'
        What reduces the class axis of logits, as for the loss.
    name : str, default 'cross-entropy'
    output_names, label_names : list of str, optional
        The names of the outputs and labels that ``update_dict`` passes to `update`.

    Raises
    ------
    TypeError, ValueError
        By `update`, if arrays do not fit each other; then nothing is taken in. By `get`, if there were
        invalid labels, until `reset`.

    Notes
    -----
    Shapes and dtypes are those of the loss. Labels of any shape also fit 2-D predictions
    with as many rows, as in `mx.metric`.

    *Numerics.* Probabilities are picked first, and their logarithm is taken in float64 (1e-15 relative).
    Logits are reduced as in the loss, with its relative error (``test_exactness.py``). Sums are exact and the
    division rounds once. So with one kernel, the result is the same to the last bit however the data is split
    into batches, devices and workers
    (``test_metric.py::test_results_do_not_depend_on_batches_devices_or_when_get_is_called``).

    *Memory.* An update only waits for the one two updates ago. The arrays of the last two stay in memory, to
    be computed again if an error on the device skips them.

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

    def __init__(
        self,
        *args: Any,
        axis: Union[int, Sequence[int]] = -1,
        pred_type: str = 'probs',
        ignore_label: Optional[int] = None,
        sparse_label: bool = True,
        kernel: str = 'auto',
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
            'kernel': kernel,
        }
        self._options = choice.configured(check_metric_options(given))
        config = {**{option: getattr(self._options, option) for option in given}, 'kernel': kernel}
        if self._options.summed_axes:
            config['axis'] = list(self._options.class_axes)  # as JSON has it
        mx.metric.EvalMetric.__init__(self, name, output_names, label_names, has_global_stats=True, **config)

    @cached_property
    def _graphs(self) -> graphs.Graphs:
        return graphs.Graphs(nll_of, self)

    def update(self, labels: Arrays, preds: Arrays) -> None:
        """Take in labels and predictions: an array each, or lists of arrays, each pair on its own context."""
        labels, preds = _as_list('labels', labels), _as_list('preds', preds)
        if len(labels) != len(preds):
            raise ValueError(f'labels: expected as many arrays as preds, {len(preds)}, got {len(labels)}')
        self._push([self._compute(*pair) for pair in zip(labels, preds)], list(zip(labels, preds)))

    def _compute(self, label: Any, pred: Any) -> Array:
        """Compute the NLL of each position; `label` is moved to the context of `pred`."""
        label = label.as_in_context(pred.context)
        rows = pred.shape[0] if self._options.sparse_label and len(pred.shape) == 2 else None
        if len(label.shape) > 1 and label.size == rows:
            label = label.reshape((-1,))  # the rows of `pred` are the positions, as in mx.metric
        with autograd.pause():
            call, inputs = plan(self._options, pred, label, fill=METRIC_FILL)
            return self._graphs[call](*inputs)

    def _sums_of(self, values: np.ndarray) -> ExactSums:
        is_marked = (values < 0) & self._options.sparse_label
        return ExactSums.of(values[~is_marked], int((values[is_marked] == METRIC_FILL.invalid).sum()))

    def _value_of(self, sums: ExactSums) -> float:
        if sums.invalid:
            raise ValueError(
                f'labels: expected integers in [0, C); invalid labels: {sums.invalid} of '
                f'{sums.invalid + sums.count}. If they are padding, set ignore_label. reset() clears them'
            )
        return super()._value_of(sums)


@mx.metric.register
@mx.metric.alias('stable_perplexity')
class StablePerplexity(StableCrossEntropy):
    """Exponential of the mean negative log-likelihood of the labels, with no floor under small probabilities.

    `mx.metric.Perplexity` has one at p = 1e-10. The positional arguments are those of `mx.metric.Perplexity`.
    Parameters, shapes, errors and numerics are those of `StableCrossEntropy`.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StablePerplexity
    >>> metric = StablePerplexity(0, pred_type='logits')
    >>> metric.update(mx.nd.array([[1, 0], [3, 2]]), mx.nd.zeros((4, 8)))
    >>> metric.get()[0], round(metric.get()[1], 3)
    ('perplexity', 8.0)
    """

    def __init__(
        self,
        ignore_label: Optional[int] = None,
        axis: int = -1,
        name: str = 'perplexity',
        output_names: Optional[List[str]] = None,
        label_names: Optional[List[str]] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            ignore_label=ignore_label,
            axis=axis,
            name=name,
            output_names=output_names,
            label_names=label_names,
            **kwargs,
        )

    def _value_of(self, sums: ExactSums) -> float:
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

    def __init__(self, *, name: str = 'bits-per-token', **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)

    def _value_of(self, sums: ExactSums) -> float:
        return super()._value_of(sums) / math.log(2)


def _copied(array: Array) -> Array:
    """Return a copy, in a dtype that NumPy has."""
    array = array_api.as_classic(array)
    with autograd.pause():
        return array.astype('float32') if array_api.dtype_name(array) == 'bfloat16' else mx.nd.identity(array)


def _as_list(name: str, arrays: Any) -> List[Array]:
    arrays = list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]
    for array in arrays:
        check_array_type(name, type(array))
    return arrays
