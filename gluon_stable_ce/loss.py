"""The loss: a HybridBlock that checks at the door, leaves the mathematics to `functional`, and keeps gluon's manners."""
from numbers import Integral
from typing import Any, Optional

import mxnet as mx
from mxnet import gluon

from . import _ops, functional
from ._class_weight import ClassWeight
from ._door import Door, check_choice, check_number, compute_dtype
from .metric import StableCrossEntropy

__all__ = ['StableSoftmaxCELoss', 'StableSoftmaxCrossEntropyLoss']


class StableSoftmaxCrossEntropyLoss(Door, gluon.loss.SoftmaxCrossEntropyLoss):
    r"""Softmax cross entropy in nats, with no floor under small probabilities and never below 0. (alias: StableSoftmaxCELoss)

    Takes the place of `gluon.loss.SoftmaxCrossEntropyLoss`, whose subclass it is: the first five arguments and the call are gluon's.

    .. math::

        \ell = (1-a)\, w_y (-\log p_y) + \frac{a}{C} \sum_{j=1}^C w_j (-\log p_j) + s \log^2 \sum_{j=1}^C e^{z_j},
        \qquad p = \mathrm{softmax}(z)

    for every position with logits z and label y; label smoothing a, class weights w and z-loss s are off by default. A sample's loss is the
    mean over its positions that count.

    Parameters
    ----------
    axis : int, default -1
        Class axis of ``pred``.
    sparse_label : bool, default True
        Whether labels are class indices, and not distributions over the classes.
    from_logits : bool, default False
        Whether ``pred`` holds log-probabilities (gluon's name for it), and not logits.
    weight : float, optional
        Multiplies the loss.
    batch_axis : int, default 0
        Batch axis of ``pred``.
    ignore_label : int, optional
        Positions with this label have loss 0 and gradient 0, and do not count in the mean.
    class_weight : (C,) array or list of finite numbers >= 0, optional
        Multiplies each class's term. The divisor of the mean stays the count, as for ``sample_weight``, where PyTorch divides by the sum of
        the weights. Held in float32, as a constant of the graph that needs no initialisation.
    label_smoothing : float from 0 to 1, default 0
        How much of the target is spread over all C classes, as in PyTorch and Keras; `SoftmaxOutput` spreads over the other C - 1.
    lse_square_scale : float >= 0, default 0
        Adds this times the squared log sum exp of the logits (z-loss).
    reduction : 'mean', 'sum' or 'none'
        Per sample over the positions that count, or no reduction.
    invalid_label : 'nan', 'raise' or 'clip'
        What a label does that is outside [0, C), NaN or not an integer. 'nan': its loss is NaN and its gradient 0, on every device, without
        waiting. 'raise': ValueError; waits for the labels at every call, so it is for debugging, and in a graph of symbols it is 'nan'.
        'clip': it trains the nearest class, as in gluon.
    **kwargs
        ``prefix`` and ``params`` of a Block.

    Inputs
        - **pred** : (N, ..., C at `axis`, ...) float16, bfloat16, float32 or float64; logits, finite or -inf.
        - **label** : ``pred``'s shape without `axis`, or with 1 there; class indices in int8, uint8, int32, int64, float16 (up to 2048
          classes), float32 or float64. With ``sparse_label=False``: ``pred``'s shape.
        - **sample_weight** : optional; (N,), or ``pred``'s shape without `axis`, or one that broadcasts to ``pred``'s with 1 at `axis`
          (gluon's, and the only one that symbols may have). A weight of 0 removes a position, be it infinite or NaN.
    Outputs
        - **loss** : (N,) nats, or with ``reduction='none'`` the shape of ``label``; float32, or float64 if ``pred`` is.

    Raises
    ------
    TypeError, ValueError
        If an option, or a combination of them, means nothing; if arrays do not fit each other. The message names the argument, what was
        expected and what came. A subclass with a `hybrid_forward` of its own is not checked, as its inputs may mean something else.

    Notes
    -----
    Numerics: float16 and bfloat16 are computed in float32. With the kernels of MXNet 1.9.1 the loss of one position is off by less than
    8e-6 nats for up to 1000 classes and 6e-5 for 50257 (that is float32's sum), and by less than 3e-7 where p > 0.98 and C <= 10: oneDNN
    answers log 1 with -1.4e-6, which is measured in the graph and taken out. In float64 it is 1e-12. To this comes the rounding of the
    largest logit, if that is large (``test_loss.py::test_the_stated_bounds``, ``::test_both_tails_of_two_logits``). A probability of 0
    gives inf. NaN or +inf at the label gives NaN; a NaN of another class shows in the gradient, but oneDNN's kernel hides it from the
    loss. A logit of -inf masks a class: that is harmless, unless the class is the label.

    Graph and memory: the block runs its own graph with static memory by default, and its outputs are fresh arrays;
    ``hybridize(False)`` switches that off, for debugging.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import StableSoftmaxCrossEntropyLoss
    >>> loss_fn = StableSoftmaxCrossEntropyLoss(ignore_label=-1)
    >>> logits = mx.nd.array([[0, 99], [2, 1], [0, 0], [0, 0]])
    >>> loss_fn(logits, mx.nd.array([0, 0, -1, 7])).asnumpy().round(4)
    array([99.    ,  0.3133,  0.    ,     nan], dtype=float32)

    References
    ----------
    Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7 (label smoothing); de Brebisson and Vincent, "The Z-loss",
    2016, and Chowdhery et al., "PaLM", 2022, section 5 (squared log sum exp).
    """

    def __init__(self, axis: int = -1, sparse_label: bool = True, from_logits: bool = False, weight: Optional[float] = None,
                 batch_axis: int = 0, *, ignore_label: Optional[int] = None, class_weight: Any = None, label_smoothing: float = 0.0,
                 lse_square_scale: float = 0.0, reduction: str = 'mean', invalid_label: str = 'nan', **kwargs: Any) -> None:
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

    def _look_at(self, pred, label, sample_weight=None):
        seen = super()._look_at(pred, label, sample_weight)
        if self.class_weight is not None or self._invalid_label == 'raise':
            self._check_classes(pred, label)
        return seen

    def _check_classes(self, pred, label):
        classes = pred.shape[self._axis]
        if self.class_weight is not None and self.class_weight.classes != classes:
            raise ValueError(f'class_weight: expected one weight for each of the {classes} classes of pred, '
                             f'got {self.class_weight.classes}')
        if self._invalid_label == 'raise':
            labels = functional.read_labels(mx.nd, _ops.classic(label), mx.nd.zeros((1, classes), ctx=label.context), self._ignore_label)
            invalid = 1 - labels.valid if self._ignore_label is None else (1 - labels.valid) * labels.counted
            count = int(invalid.sum().asscalar())
            if count:
                raise ValueError(f'label: expected integers in [0, {classes}), got {count} others among {label.size}')

    def hybrid_forward(self, F, pred, label, sample_weight=None):
        """The graph, of arrays or symbols; the door has said what is known about them."""
        given, seen = (pred, label), self._seen
        pred, label, sample_weight = self._inputs(F, pred, label, sample_weight)
        class_weight = self.class_weight
        if class_weight is not None:
            class_weight = F.BlockGrad(F.cast(_ops.classic(class_weight(pred)), dtype=compute_dtype(seen.dtype)))
        loss, counted = functional.softmax_cross_entropy(
            F, pred, label, axis=self._axis, sparse_label=self._sparse_label, pred_type='log_probs' if self._from_logits else 'logits',
            ignore_label=self._ignore_label, class_weight=class_weight, label_smoothing=self._label_smoothing,
            lse_square_scale=self._lse_square_scale, invalid_label=self._invalid_label, label_dtype=self._label_dtype(),
            ndim=seen.ndim)
        loss = functional.reduce_positions(F, loss, counted, self._axis, self._batch_axis, self._reduction, sample_weight, seen.ndim)
        if self._reduction == 'none' and self._sparse_label and seen.label_ndim in (None, seen.ndim):  # the label may have kept an axis
            loss = F.reshape_like(loss, _ops.classic(given[1]))
        return _ops.in_style_of(given[0], loss if self._weight is None else loss * self._weight)

    def valid_count(self, label: Any) -> int:
        """How many positions of `label` count, which is what ``trainer.step`` divides a summed loss by.

        Parameters
        ----------
        label : array, or list of arrays
            Labels as the loss takes them; a list as ``gluon.utils.split_and_load`` makes it. They are waited for.

        Returns
        -------
        int
            The number of labels other than `ignore_label`, invalid ones included.

        Examples
        --------
        >>> import mxnet as mx
        >>> from gluon_stable_ce import StableSoftmaxCELoss
        >>> StableSoftmaxCELoss(ignore_label=-1).valid_count(mx.nd.array([[3, 1, -1], [2, -1, -1]]))
        3
        """
        if isinstance(label, (list, tuple)):
            return sum(self.valid_count(part) for part in label)
        return label.size if self._ignore_label is None else int((label.asnumpy() != self._ignore_label).sum())

    def create_metric(self, **kwargs: Any) -> StableCrossEntropy:
        """A `StableCrossEntropy` that reads what this loss reads, labels and `pred` as they are given to the loss.

        It reports the plain NLL: weights, label smoothing and `lse_square_scale` are not in it. `kwargs` are the metric's `name`,
        `output_names` and `label_names`.

        Examples
        --------
        >>> from gluon_stable_ce import StableSoftmaxCELoss
        >>> metric = StableSoftmaxCELoss(axis=1, ignore_label=-1).create_metric(name='val-nll')
        >>> metric.get()
        ('val-nll', nan)
        """
        return StableCrossEntropy(axis=self._axis, pred_type='log_probs' if self._from_logits else 'logits',
                                  ignore_label=self._ignore_label, sparse_label=self._sparse_label, **kwargs)


StableSoftmaxCELoss = StableSoftmaxCrossEntropyLoss
