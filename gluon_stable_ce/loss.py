"""The loss: a HybridBlock that checks at the door, leaves the mathematics to `functional`, and keeps gluon's manners."""
from numbers import Integral

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import _ops, functional
from ._door import Door, check_choice, check_number, compute_dtype
from .metric import StableCrossEntropy

__all__ = ['StableSoftmaxCELoss', 'StableSoftmaxCrossEntropyLoss']


class StableSoftmaxCrossEntropyLoss(Door, gluon.loss.SoftmaxCrossEntropyLoss):
    r"""Softmax cross entropy in nats, with no floor under small probabilities and never below 0. (alias: StableSoftmaxCELoss)"""

    def __init__(self, axis=-1, sparse_label=True, from_logits=False, weight=None, batch_axis=0, *, ignore_label=None,
                 class_weight=None, label_smoothing=0.0, lse_square_scale=0.0, reduction='mean', invalid_label='nan', **kwargs):
        super().__init__(axis, sparse_label, from_logits, weight, batch_axis, **kwargs)
        check_number('axis', axis, Integral)
        check_number('batch_axis', batch_axis, Integral)
        check_number('weight', weight, optional=True)
        check_number('ignore_label', ignore_label, Integral, optional=True)
        check_number('label_smoothing', label_smoothing, low=0, high=1)
        check_number('lse_square_scale', lse_square_scale, low=0)
        check_choice('reduction', reduction, ('mean', 'sum', 'none'))
        check_choice('invalid_label', invalid_label, ('nan', 'raise', 'clip'))
        if axis == batch_axis:
            raise ValueError(f'batch_axis: expected another axis than the class axis, got {batch_axis} for both')
        if from_logits and lse_square_scale:
            raise ValueError('lse_square_scale: expected 0 with from_logits=True, as log-probabilities have a log sum exp of 0; '
                             f'got {lse_square_scale}')
        if not sparse_label and ignore_label is not None:
            raise ValueError('ignore_label: expected None with sparse_label=False, as a distribution has no label to compare with '
                             f'{ignore_label}; a sample_weight of 0 removes a position')
        if not sparse_label and invalid_label != 'nan':
            raise ValueError("invalid_label: expected 'nan' with sparse_label=False, as a distribution has no label to check; "
                             f'got {invalid_label!r}')
        self._ignore_label = ignore_label
        self._label_smoothing = label_smoothing
        self._lse_square_scale = lse_square_scale
        self._reduction = reduction
        self._invalid_label = invalid_label
        self._own_inputs = type(self).hybrid_forward is StableSoftmaxCrossEntropyLoss.hybrid_forward
        self.class_weight = None
        if class_weight is not None:
            with self.name_scope():
                self.class_weight = ClassWeight(class_weight)
        self.hybridize()

    def check_arrays(self, pred, label):
        positions = super().check_arrays(pred, label)
        classes = pred.shape[self._axis]
        if self.class_weight is not None and self.class_weight.classes != classes:
            raise ValueError(f'class_weight: expected one weight for each of the {classes} classes of pred, '
                             f'got {self.class_weight.classes}')
        if self._invalid_label == 'raise':
            axis_only = mx.nd.zeros((1, classes), ctx=label.context)
            labels = functional.read_labels(mx.nd, _ops.classic(label), axis_only, self._ignore_label)
            invalid = 1 - labels.valid if self._ignore_label is None else (1 - labels.valid) * labels.counted
            count = int(invalid.sum().asscalar())
            if count:
                raise ValueError(f'label: expected integers in [0, {classes}), got {count} others among {label.size}')
        return positions

    def hybrid_forward(self, F, pred, label, sample_weight=None):
        """The graph, of arrays or symbols; the door has said what is known about them."""
        given, seen = (pred, label), self._seen
        pred, label, sample_weight = self._inputs(F, pred, label, sample_weight)
        class_weight = self.class_weight
        if class_weight is not None:
            class_weight = F.cast(_ops.classic(class_weight(pred)), dtype=compute_dtype(seen.dtype))
        loss, counted = functional.softmax_cross_entropy(
            F, pred, label, axis=self._axis, sparse_label=self._sparse_label, pred_type='log_probs' if self._from_logits else 'logits',
            ignore_label=self._ignore_label, class_weight=class_weight, label_smoothing=self._label_smoothing,
            lse_square_scale=self._lse_square_scale, invalid_label=self._invalid_label, label_dtype=self._label_dtype(),
            ndim=seen.ndim)
        loss = functional.reduce_positions(F, loss, counted, self._axis, self._batch_axis, self._reduction, sample_weight, seen.ndim)
        if self._reduction == 'none' and self._sparse_label and seen.label_ndim in (None, seen.ndim):  # the label may have kept an axis
            loss = F.reshape_like(loss, _ops.classic(given[1]))
        return _ops.in_style_of(given[0], loss if self._weight is None else loss * self._weight)

    def valid_count(self, label):
        """How many positions of `label` count, which is what ``trainer.step`` divides a summed loss by.

        Parameters
        ----------
        label : array, or list of arrays
            Labels as the loss takes them; a list as ``gluon.utils.split_and_load`` makes it. They are waited for.

        Returns
        -------
        int
            The number of labels other than `ignore_label`, invalid ones included.
        """
        if isinstance(label, (list, tuple)):
            return sum(self.valid_count(part) for part in label)
        return label.size if self._ignore_label is None else int((label.asnumpy() != self._ignore_label).sum())

    def create_metric(self, **kwargs):
        """A `StableCrossEntropy` that reads what this loss reads, labels and `pred` as they are given to the loss.

        It reports the plain NLL: weights, label smoothing and `lse_square_scale` are not in it. `kwargs` are the metric's `name`,
        `output_names` and `label_names`.
        """
        return StableCrossEntropy(axis=self._axis, pred_type='log_probs' if self._from_logits else 'logits',
                                  ignore_label=self._ignore_label, sparse_label=self._sparse_label, **kwargs)


StableSoftmaxCELoss = StableSoftmaxCrossEntropyLoss


class ClassWeight(gluon.HybridBlock):
    """The weights of a loss's classes as a constant of its graph, (C,) float32. Called with anything on the context in question."""

    def __init__(self, weights, **kwargs):
        super().__init__(**kwargs)
        weights = np.asarray(weights.asnumpy() if _ops.is_array(weights) else weights, dtype='float64')
        if weights.ndim != 1 or not np.all(np.isfinite(weights)) or np.any(weights < 0):
            raise ValueError(f'class_weight: expected one finite weight >= 0 per class, got {weights} of shape {weights.shape}')
        self.classes = len(weights)
        self.value = _Everywhere(self.prefix + 'value', mx.nd.array(weights, dtype='float32'))
        self.params.update({self.value.name: self.value})

    def cast(self, dtype):
        """Stay in float32: the graph casts to what it computes in, and a weight of 0.1 is not to become 0.09998 on the way."""

    def hybrid_forward(self, F, like, value):
        return value


class _Everywhere(gluon.Constant):
    """A Constant that is there on whatever context asks for it, initialised or not, in np mode or not."""

    def initialize(self, *args, **kwargs):
        with mx.util.np_array(False):  # its value is a classic array
            super().initialize(*args, **kwargs)

    def reset_ctx(self, ctx):
        with mx.util.np_array(False):
            super().reset_ctx(ctx)

    def data(self, ctx=None):
        ctx = ctx or mx.current_context()
        known = self._known()
        if not known:
            self.initialize(ctx=ctx)
        elif ctx not in known:
            with known[0]:  # where gluon will look for the value
                self.reset_ctx(known + [ctx])
        return super().data(ctx)

    def list_data(self):
        if not self._known():
            self.data()
        return super().list_data()

    def _known(self):
        try:
            return self.list_ctx()
        except RuntimeError:  # not initialised
            return []
