"""The loss: its options, and its graph as a short composition of `functional`."""

import inspect
from numbers import Integral
from threading import active_count
from typing import Any, Dict, Iterable, NamedTuple, Optional, Sequence, Set, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import array_api, functional
from ._signature import Signature, check_array_type, infer_signature, on_one_context
from .array_api import Array, F
from .class_weight import ClassWeight
from .graphs import INPUTS, STATIC, Graph, compiled, trace
from .kernels import check_kernel, choose, class_terms
from .metric import StableCrossEntropy
from .options import (
    FLOAT32_MAX,
    INVALID_LABELS,
    REDUCTIONS,
    as_numbers,
    check_choice,
    check_flag,
    check_ignore_label,
    check_number,
)

__all__ = ['StableSoftmaxCELoss', 'StableSoftmaxCrossEntropyLoss']


_Loss = gluon.loss.Loss
_GLUON_OPTIONS = ('_axis', '_sparse_label', '_from_logits', '_weight', '_batch_axis')
_FLAGS = ('static_alloc', 'static_shape', 'inline_limit', 'forward_bulk_size', 'backward_bulk_size')


class LossOptions(NamedTuple):
    """What the graph of a loss depends on, beside the signature of a call."""

    axis: int
    summed_axes: Tuple[int, ...]  # further class axes of dense log-probabilities, over which is summed
    batch_axes: Tuple[int, ...]
    sparse_label: bool
    pred_type: str
    weight: Optional[float]
    ignore_label: Optional[int]
    label_smoothing: float
    lse_square_scale: float
    reduction: str
    invalid_label: str
    kernel: str


def compose_loss(
    F: F,
    options: LossOptions,
    signature: Signature,
    pred: Array,
    label: Array,
    sample_weight: Optional[Array] = None,
    class_weight: Optional[Array] = None,
) -> Array:
    """Compose the loss of each sample, of arrays or symbols; the signature is what is known of them."""
    given, given_label, dtype = pred, array_api.as_classic(label), signature.compute_dtype
    pred, sample_weight, class_weight = map(array_api.as_classic, (pred, sample_weight, class_weight))
    if sample_weight is not None and signature.dtype is not None:
        sample_weight = F.cast(sample_weight, dtype=dtype)
    if class_weight is not None:
        class_weight = F.BlockGrad(F.cast(class_weight, dtype=dtype))  # (C,)
        if signature.ndim is None:  # in a graph of symbols, another length than C is MXNet's shape error
            class_weight = F.reshape_like(class_weight, F.contrib.arange_like(pred, axis=options.axis))
    positions = _sparse_positions if options.sparse_label else _dense_positions
    loss, is_counted = positions(F, options, signature, pred, given_label, class_weight)  # (positions...)
    loss = functional.reduce_positions(
        F,
        loss,
        pred,
        is_counted,
        axis=options.axis,
        batch_axes=options.batch_axes,
        reduction=options.reduction,
        sample_weight=sample_weight,
        weight_layout=signature.weight_layout,
        ndim=signature.ndim,
        is_empty=signature.is_empty,
        summed_axes=options.summed_axes,
    )
    if (
        options.reduction == 'none'
        and options.sparse_label
        and signature.label_ndim in (None, signature.ndim)
    ):
        loss = F.reshape_like(loss, given_label)  # it may have the class axis, of length 1
    return array_api.in_style_of(given, loss if options.weight is None else loss * options.weight)


def _sparse_positions(F, options, signature, pred, label, class_weight):
    """Compose the loss of each position, and whether it counts."""
    axis = options.axis
    label = functional.align_label(F, label, pred, axis, signature.ndim, signature.label_ndim)
    labels = functional.read_labels(
        F,
        label,
        pred,
        axis,
        options.ignore_label,
        options.invalid_label,
        **signature.reading,
    )
    terms = _class_terms(
        F, options, signature, pred, class_weight, index=labels.index, is_needed=labels.is_counted
    )
    weight_of_label = None if class_weight is None else F.take(class_weight, labels.index, mode='clip')
    loss = functional.combine(F, terms, weight_of_label, options.label_smoothing, options.lse_square_scale)
    return functional.mask(F, loss, labels, invalid=float('nan'), ignored=0.0), labels.is_counted


def _dense_positions(F, options, signature, pred, label, class_weight):
    """Compose the same of dense labels, which all count."""
    if signature.dtype is not None:
        label = F.cast(label, dtype=signature.compute_dtype)
    terms = _class_terms(F, options, signature, pred, class_weight, target=label)
    return functional.combine(F, terms, None, options.label_smoothing, options.lse_square_scale), None


def _class_terms(F, options, signature, pred, class_weight, **labels):
    return class_terms(
        F,
        signature.kernel,
        pred,
        options.axis,
        pred_type=options.pred_type,
        logsumexp=bool(options.lse_square_scale),
        uniform=bool(options.label_smoothing),
        class_weight=class_weight,
        ndim=signature.ndim,
        dtype=signature.dtype,
        is_leaf=signature.is_leaf,
        **labels,
    )


class StableSoftmaxCrossEntropyLoss(gluon.loss.SoftmaxCrossEntropyLoss):
    r"""Compute the softmax cross entropy in nats, with no floor under small probabilities and never below 0.

    Takes the place of `gluon.loss.SoftmaxCrossEntropyLoss`, of which it is a subclass. The first five
    arguments and the call are gluon's. `StableSoftmaxCELoss` is an alias.

    .. math::

        \ell = (1-a)\, w_y (-\log p_y) + \frac{a}{C} \sum_{j=1}^C w_j (-\log p_j)
        + s \log^2 \sum_{j=1}^C e^{z_j}, \qquad p = \mathrm{softmax}(z)

    for every position with logits z and label y. Label smoothing a, class weights w and z-loss s are off by
    default. A sample's loss is the mean over its positions that count.

    Parameters
    ----------
    axis : int, default -1
        Class axis of ``pred``. With dense log-probabilities it may be several, as in gluon.
    sparse_label : bool, default True
        Whether labels are class indices, and not distributions over the classes.
    from_logits : bool, default False
        Whether ``pred`` holds log-probabilities (gluon's name for it), and not logits.
    weight : float, optional
        Multiplies the loss.
    batch_axis : int or sequence of int, default 0
        Batch axes of ``pred``.
    ignore_label : int, optional
        Positions with this label have loss 0 and gradient 0, and do not count in the mean.
    class_weight : (C,) array or list of finite numbers >= 0, optional
        Multiplies each class's term. The divisor of the mean stays the count, as for ``sample_weight``, where
        PyTorch divides by the sum of the weights. Held in float32, as a constant of the graph that needs no
        initialisation.
    label_smoothing : float from 0 to 1, default 0
        How much of the target is spread over all C classes, as in PyTorch and Keras; `SoftmaxOutput` spreads
        over the other C - 1.
    lse_square_scale : float >= 0, default 0
        Adds this times the squared logsumexp of the logits (z-loss).
    reduction : 'mean', 'valid', 'sum' or 'none'
        'mean' and 'sum' are per sample, over the positions that count. 'valid' is per sample too, the sum
        divided by how many positions count in a sample on average: then the mean over the batch is the mean
        over all positions of the batch that count, as with `SoftmaxOutput`'s ``normalization='valid'``.
        'none' is no reduction.
    invalid_label : 'nan', 'raise' or 'clip'
        How to treat labels that are outside [0, C), NaN or not an integer. 'nan': the loss is NaN and its
        gradient 0, on every device, without synchronisation. 'raise': ValueError; waits for the labels at
        every call, so it is for debugging, and in a graph of symbols it is 'nan'. 'clip': trains the nearest
        class, a fraction the class of its integer part, and NaN class 0. For labels that fit int32, that is
        what gluon does.
    kernel : 'auto', 'stock' or 'fused'
        What reduces the class axis. 'stock': MXNet's ``log_softmax`` and ``pick``. 'fused': an operator that
        ``python -m gluon_stable_ce build`` compiles, for sparse labels and logits on the CPU; also in graphs
        of symbols, which then need that operator. 'auto': for arrays, 'fused' where it can be used, else
        'stock'; for symbols 'stock', so that what is exported runs anywhere. In threads other than the main
        one, 'auto' is 'stock', and 'fused' a ValueError. The environment variable ``GLUON_STABLE_CE_KERNEL``
        says what 'auto' is.
    **kwargs
        ``prefix`` and ``params`` of a Block.

    Inputs
        - **pred** : (N, ..., C at `axis`, ...) float16, bfloat16, float32 or float64; logits, finite or -inf.
        - **label** : ``pred``'s shape without `axis`, or with 1 there; class indices in int8, uint8, int32,
          int64, float16 (up to 2048 classes), float32 or float64. With ``sparse_label=False``: ``pred``'s
          shape.
        - **sample_weight** : optional; (N,), or ``pred``'s shape without `axis`, or a shape that broadcasts
          to ``pred``'s with 1 at `axis` (gluon's), or to ``pred``'s, of which the mean over the classes
          counts. A weight of 0 removes a position, also if its loss is infinite or NaN. In a graph of
          symbols: gluon's shape or ``pred``'s; with ``axis=-1, batch_axis=0`` also (N,).
    Outputs
        - **loss** : (N,) nats, or with ``reduction='none'`` the shape of ``label``; float32, or float64 if
          ``pred`` is.

    Raises
    ------
    TypeError, ValueError
        If an option, or a combination of them, means nothing; if arrays do not fit each other. The message
        names the argument, what was expected and what it got. A subclass with a `hybrid_forward` of its own
        is not checked, as its inputs may mean something else.

    Notes
    -----
    *Numerics.* float16 and bfloat16 are computed in float32. The loss of one position, with the stock kernel
    of MXNet 1.9.1, is off by at most

    ======== ===================== =========
    dtype    classes               nats
    ======== ===================== =========
    float32  2 to 1,000            2e-5
    float32  50,257                6e-5
    float32  2 to 10, if p > 0.98  3e-7
    float64  2 to 50,257           2e-12
    ======== ===================== =========

    for logits up to 100 in size. Each entry of its gradient is off by as much, but p > 0.98 is no special
    case there. Larger logits add their own rounding (``test_loss.py::test_stated_bounds``,
    ``::test_two_logits``). A probability of 0 gives inf. NaN or +inf at the label gives NaN. oneDNN's kernel
    hides a NaN of another class from the loss; it shows in the gradient. A logit of -inf masks a class: that
    changes nothing, unless the class is the label.

    With the fused kernel, the loss and the gradient at the label are off by at most 3e-7 of their value, and
    float64 by 2e-13, for probabilities near 0 and near 1 and up to 1,000,000 classes (``test_fused.py``).
    Below 1e-38, where float32 has fewer digits, they are off by its least number, 1e-45; float64 is 0 below
    2e-308. A NaN of any class gives NaN. The gradient of float16 logits is rounded to float16.

    *Gradients.* Where the loss rounds to 0, the gradient is still computed. The gradient with respect to a
    sample weight of 0 is 0, where gluon's is the loss; likewise with respect to dense targets of 0.

    *Graphs.* A call with arrays runs a compiled graph with static memory, and its outputs are fresh arrays.
    Losses of equal options share their graphs, of which a process keeps the 64 used last, each with the
    memory of its last batch. ``hybridize(False)`` computes operator by operator, for debugging. A subclass
    with a `hybrid_forward` of its own runs operator by operator unless it calls ``hybridize()``.
    One loss may be called from several threads. MXNet marks the inputs of what it records, so threads that
    record must not share one array for ``pred``, ``sample_weight`` or a dense label.

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
    Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7 (label smoothing); de Brebisson
    and Vincent, "The Z-loss", 2016, and Chowdhery et al., "PaLM", 2022, section 5 (squared logsumexp).
    """

    def __init__(
        self,
        axis: Union[int, Sequence[int]] = -1,
        sparse_label: bool = True,
        from_logits: bool = False,
        weight: Optional[float] = None,
        batch_axis: Union[int, Sequence[int]] = 0,
        *,
        ignore_label: Optional[int] = None,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        reduction: str = 'mean',
        invalid_label: str = 'nan',
        kernel: str = 'auto',
        **kwargs: Any,
    ) -> None:
        # not through SoftmaxCrossEntropyLoss.__init__, which looks up its own name and may find ours there
        _Loss.__init__(self, weight, batch_axis, **kwargs)
        self._axis, self._sparse_label, self._from_logits = axis, sparse_label, from_logits  # as gluon's
        self._keyword_options: Dict[str, Any] = {
            'ignore_label': ignore_label,
            'label_smoothing': label_smoothing,
            'lse_square_scale': lse_square_scale,
            'reduction': reduction,
            'invalid_label': invalid_label,
            'kernel': kernel,
        }
        self._options = self._read_options()
        self.class_weight: Optional[ClassWeight] = None
        if class_weight is not None:
            with self.name_scope():
                self.class_weight = ClassWeight(class_weight)
        self._is_compiled, self._graph_flags = True, STATIC
        self._op_hook: Optional[Tuple[Any, bool]] = None
        # for `export`: the dtype of pred and the layout of sample_weight, of all calls so far
        self._call_kinds: Set[Tuple[Optional[str], Optional[str]]] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Those of gluon's options may be set later, as gluon reads them at each call."""
        super().__setattr__(name, value)
        if name in _GLUON_OPTIONS and '_options' in self.__dict__:
            self._options = self._read_options()

    def _read_options(self) -> LossOptions:
        """Check all options and return them as the graph needs them."""
        given = self._keyword_options
        sparse_label = check_flag('sparse_label', self._sparse_label)
        pred_type = 'log_probs' if check_flag('from_logits', self._from_logits) else 'logits'
        class_axis, *summed_axes = _as_axes('axis', self._axis)
        options = LossOptions(
            axis=class_axis,
            summed_axes=tuple(summed_axes),
            batch_axes=_as_axes('batch_axis', self._batch_axis),
            sparse_label=sparse_label,
            pred_type=pred_type,
            weight=check_number('weight', self._weight, low=-FLOAT32_MAX, high=FLOAT32_MAX, optional=True),
            ignore_label=check_ignore_label(given['ignore_label'], sparse_label),
            label_smoothing=check_number('label_smoothing', given['label_smoothing'], low=0, high=1),
            lse_square_scale=check_number(
                'lse_square_scale', given['lse_square_scale'], low=0, high=FLOAT32_MAX
            ),
            reduction=check_choice('reduction', given['reduction'], REDUCTIONS),
            invalid_label=check_choice('invalid_label', given['invalid_label'], INVALID_LABELS),
            kernel=check_kernel(given['kernel'], sparse_label, pred_type),
        )
        _check_combination(options)
        return options

    def forward(
        self, pred: Array, label: Array, sample_weight: Optional[Array] = None, *others: Array
    ) -> Array:
        """Compute the loss of arrays in a compiled graph; a symbol becomes part of the caller's graph."""
        if array_api.is_symbol(pred) or self._has_own_graph:
            weight = () if sample_weight is None and not others else (sample_weight,)
            return super().forward(pred, label, *weight, *others)
        if others:
            raise TypeError(f'expected pred, label and sample_weight, got {3 + len(others)} inputs')
        try:
            return self._compute(pred, label, sample_weight)
        except array_api.MXNetError:  # it may be that of a graph whose inputs are on several contexts
            moved = on_one_context(pred, label, sample_weight)
            if all(before is after for before, after in zip((pred, label, sample_weight), moved)):
                raise
            return self._compute(*moved)

    def _signature_of(self, pred, label, sample_weight):
        """Infer the signature of a call, and check its arrays."""
        options = self._options
        signature = infer_signature(
            pred,
            label,
            sample_weight,
            options.axis,
            options.batch_axes,
            options.sparse_label,
            options.summed_axes,
            options.kernel,
        )
        if self.class_weight is not None and signature.ndim is not None:
            self.class_weight.check_classes(pred.shape[options.axis])
        if options.invalid_label == 'raise' and signature.ndim is not None:
            self._check_labels(pred, label)
        return signature

    def _compute(self, pred, label, sample_weight):
        options, signature = self._options, self._signature_of(pred, label, sample_weight)
        self._call_kinds.add((signature.dtype, signature.weight_layout))
        if (
            signature.dtype == 'bfloat16' and options.sparse_label
        ):  # AMP's casts in a graph cannot read 64-bit labels
            label = label.astype('float32')
        if signature.is_empty or not self._is_compiled:
            class_weight = None if self.class_weight is None else self.class_weight(pred)
            return compose_loss(mx.nd, options, signature, pred, label, sample_weight, class_weight)
        class_weight = None if self.class_weight is None else self.class_weight.value.data(pred.context)
        if active_count() > 1:
            label, class_weight = self._new_handle(label), self._new_handle(class_weight)
        inputs = pred, label, sample_weight, class_weight
        given = {name: array for name, array in zip(INPUTS, inputs) if array is not None}
        return self._graph(signature, tuple(given))(*given.values())

    def _new_handle(self, array: Optional[Array]) -> Optional[Array]:
        """Return a new handle of an array that needs no gradient, so that threads may share the array.

        Autograd marks the inputs of what it records. It crashes if another thread reads a handle meanwhile.
        """
        return (
            array.detach()
            if array is not None and self._options.sparse_label and array.grad is None
            else array
        )

    def _graph(self, signature, names):
        if self._op_hook is None:
            return compiled(compose_loss, self._options, signature, names, self._graph_flags)
        graph = Graph(compose_loss, self._options, signature, names, ())
        graph.cached_op._register_op_hook(*self._op_hook)
        return graph

    def __repr__(self) -> str:
        """Show the options that differ from their defaults, and the kernel in use."""
        shown = {name[1:]: getattr(self, name) for name in _GLUON_OPTIONS}
        shown.update(self._keyword_options, class_weight=self.class_weight)
        # what float32 arrays on the CPU get
        kernel = choose('stock' if self._options.kernel == 'stock' else 'auto', 'float32', 'cpu')
        del shown['kernel']
        parameters = inspect.signature(StableSoftmaxCrossEntropyLoss.__init__).parameters
        changed = [
            f'{name}={shown[name]!r}'
            for name, parameter in parameters.items()
            if name in shown and shown[name] != parameter.default
        ]
        return f'{type(self).__name__}({", ".join([*changed, f"kernel={kernel!r}"])})'

    @property
    def _has_own_graph(self) -> bool:
        """Whether a subclass has its own `hybrid_forward`, which decides what the inputs mean."""
        return type(self).hybrid_forward is not StableSoftmaxCrossEntropyLoss.hybrid_forward

    def _check_labels(self, pred, label):
        """Raise ValueError if there are invalid labels that count."""
        pred, label, _ = map(array_api.as_classic, on_one_context(pred, label, None))
        options = self._options
        labels = functional.read_labels(mx.nd, label, pred, options.axis, options.ignore_label)
        is_invalid: Any = labels.is_valid == 0
        if labels.is_counted is not None:
            is_invalid = is_invalid * labels.is_counted
        count = int(is_invalid.sum().asscalar())
        if count:
            classes = pred.shape[options.axis]
            raise ValueError(
                f'label: expected integers in [0, {classes}), got {count} invalid ones among {label.size}'
            )

    def hybrid_forward(self, F: F, pred: Array, label: Array, sample_weight: Optional[Array] = None) -> Array:
        """Compose the graph, of symbols or, with ``hybridize(False)``, operator by operator of arrays."""
        signature = self._signature_of(pred, label, sample_weight)
        class_weight = None if self.class_weight is None else self.class_weight(pred)
        return compose_loss(F, self._options, signature, pred, label, sample_weight, class_weight)

    def hybridize(self, active: bool = True, *args: Any, **kwargs: Any) -> None:
        """Switch compiled graphs on or off. They have static memory by default.

        Parameters
        ----------
        active : bool, default True
        static_alloc, static_shape, inline_limit, forward_bulk_size, backward_bulk_size : optional
            As in gluon. `static_alloc` is True by default, and `static_shape` defaults to `static_alloc`.
            Outputs are fresh arrays all the same.
        """
        super().hybridize(active, *args, **kwargs)  # for the graph that a subclass has of its own
        flags = {name: kwargs[name] for name in _FLAGS if kwargs.get(name) is not None}
        flags.setdefault('static_alloc', True)
        flags.setdefault('static_shape', flags['static_alloc'])
        self._is_compiled, self._graph_flags = active, tuple(flags.items())

    def register_op_hook(self, callback: Any, monitor_all: bool = False) -> None:
        """Call `callback` with the name and output of each operator, as in gluon. Each call compiles then."""
        super().register_op_hook(callback, monitor_all)
        self._op_hook = (callback, monitor_all) if callback else None

    def export(
        self, path: str, epoch: int = 0, remove_amp_cast: bool = True, *, sample_weight: Optional[bool] = None
    ) -> Tuple[str, str]:
        """Export the loss as a graph of stock operators, as ``HybridBlock.export`` does, at any time.

        The inputs are ``data0`` (pred) and ``data1`` (label). With `sample_weight` there is a third one,
        ``data2``. What is written does not depend on the order of earlier calls: of them it uses what all
        have in common, the dtype of ``pred`` and the layout of ``sample_weight``. Without that, ``pred`` is
        float32 if there are class weights, and ``sample_weight`` has a shape that a graph of symbols accepts.

        Parameters
        ----------
        path : str
            The files are ``path-symbol.json`` and ``path-0000.params``.
        epoch : int
            The number in the name of the second file.
        sample_weight : bool, optional
            Whether there is a third input. By default there is one if all calls so far had one, and there was
            a call.

        Returns
        -------
        (str, str)
            The names of the two files.
        """
        if self._has_own_graph:
            return super().export(path, epoch, remove_amp_cast)
        dtypes, layouts = zip(*(self._call_kinds or {(None, None)}))
        if sample_weight is None:
            sample_weight = all(layouts)
        np_style = mx.util.is_np_array()
        names = INPUTS[: 3 if sample_weight else 2]
        inputs = {name: array_api.variable(f'data{i}', np_style) for i, name in enumerate(names)}
        params = {}
        if self.class_weight is not None:
            value = self.class_weight.value
            inputs['class_weight'] = value.var()
            params[f'arg:{value.name}'] = value.data(mx.cpu())
        symbol = trace(
            compose_loss,
            self._options,
            Signature(np_style, _common(dtypes), weight_layout=_common(layouts)),
            inputs,
        )
        symbol_file, params_file = f'{path}-symbol.json', f'{path}-{epoch:04d}.params'
        symbol.save(symbol_file, remove_amp_cast=remove_amp_cast)
        (mx.npx if np_style else mx.nd).save(params_file, params)
        return symbol_file, params_file

    def valid_count(self, label: Any) -> int:
        """Count the positions of `label` that count, by which ``trainer.step`` divides a summed loss.

        Parameters
        ----------
        label : array, or list of arrays
            Labels as the loss takes them; a list as ``gluon.utils.split_and_load`` makes it. They are waited
            for.

        Returns
        -------
        int
            The number of positions with another label than `ignore_label`, invalid ones included. It may be
            0: write ``trainer.step(max(1, loss_fn.valid_count(label)))``.

        Examples
        --------
        >>> import mxnet as mx
        >>> from gluon_stable_ce import StableSoftmaxCELoss
        >>> StableSoftmaxCELoss(ignore_label=-1).valid_count(mx.nd.array([[3, 1, -1], [2, -1, -1]]))
        3
        """
        if isinstance(label, (list, tuple)) and any(hasattr(part, 'shape') for part in label):
            return sum(self.valid_count(part) for part in label)
        if isinstance(label, (np.ndarray, list, tuple)):
            if not np.size(label):
                return 0
            label = mx.nd.array(as_numbers('label', label), dtype='float64')
        check_array_type('label', type(label))
        if not self._options.sparse_label:
            return label.size // label.shape[self._options.axis]
        is_counted = functional.is_counted(mx.nd, array_api.as_classic(label), self._options.ignore_label)
        return label.size if is_counted is None else int(is_counted.sum().asscalar())

    def create_metric(self, **kwargs: Any) -> StableCrossEntropy:
        """Create a `StableCrossEntropy` that reads labels and predictions as they are given to this loss.

        It reports the plain NLL: weights, label smoothing and `lse_square_scale` are not in it. `kwargs` are
        the metric's `name`, `output_names` and `label_names`.

        Examples
        --------
        >>> from gluon_stable_ce import StableSoftmaxCELoss
        >>> metric = StableSoftmaxCELoss(axis=1, ignore_label=-1).create_metric(name='val-nll')
        >>> metric.get()
        ('val-nll', nan)
        """
        options = self._options
        return StableCrossEntropy(
            axis=options.axis,
            pred_type=options.pred_type,
            ignore_label=options.ignore_label,
            sparse_label=options.sparse_label,
            kernel=self._keyword_options['kernel'],
            **kwargs,
        )


def _common(values: Iterable[Any]) -> Any:
    """Return the value that all are, or None."""
    first, *others = set(values)
    return None if others else first


def _as_axes(name: str, axes: Any) -> Tuple[int, ...]:
    """Return one axis or several as a tuple; TypeError or ValueError if they are something else."""
    axes = axes.tolist() if isinstance(axes, np.ndarray) else axes
    axes = axes if isinstance(axes, (list, tuple)) else (axes,)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f'{name}: expected one axis or several different ones, got {axes}')
    return tuple(check_number(name, axis, Integral) for axis in axes)


def _check_combination(options: LossOptions) -> None:
    """Raise ValueError unless the options mean something together."""
    if options.summed_axes and (options.sparse_label or options.pred_type == 'logits'):
        raise ValueError(
            'axis: expected one class axis unless sparse_label=False and from_logits=True, '
            f'got {(options.axis, *options.summed_axes)}'
        )
    if options.summed_axes and (options.label_smoothing or options.reduction == 'none'):
        raise ValueError("axis: expected one class axis with label_smoothing or reduction='none'")
    shared = {options.axis, *options.summed_axes} & set(options.batch_axes)
    if shared:
        raise ValueError(
            f'batch_axis: expected another axis than the class axis, got {shared.pop()} for both'
        )
    if options.pred_type == 'log_probs' and options.lse_square_scale:
        raise ValueError(
            'lse_square_scale: expected 0 with from_logits=True, as log-probabilities have a logsumexp of 0; '
            f'got {options.lse_square_scale}'
        )
    if not options.sparse_label and options.invalid_label != 'nan':
        raise ValueError(
            "invalid_label: expected 'nan' with sparse_label=False, as a distribution has no label to check; "
            f'got {options.invalid_label!r}'
        )


StableSoftmaxCELoss = StableSoftmaxCrossEntropyLoss
