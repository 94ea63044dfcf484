"""The loss as a Gluon block: its options, its calls and its export."""

import inspect
import math
from contextlib import suppress
from functools import cached_property
from typing import Any, Dict, Literal, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import array_api, graphs, labels
from .array_api import Array, F
from .array_checks import as_dense
from .call import INPUTS, Call, Fill
from .class_weight import ClassWeight, Unused, file_in_loading
from .kernels import choice
from .metric import StableCrossEntropy
from .options import (
    InvalidLabel,
    Kernel,
    Options,
    Reduction,
    as_numbers,
    check_choice,
    check_loss_options,
    checks_names,
)
from .pipeline import loss_of
from .plan import has_many_classes, plan

_GLUON_DEFAULTS = {'axis': -1, 'sparse_label': True, 'from_logits': False, 'weight': None, 'batch_axis': 0}
_GLUON_OPTIONS = tuple(f'_{name}' for name in _GLUON_DEFAULTS)  # attributes, which may be set later
_FLAGS = ('static_alloc', 'static_shape', 'inline_limit', 'forward_bulk_size', 'backward_bulk_size')


class StableSoftmaxCrossEntropyLoss(gluon.loss.SoftmaxCrossEntropyLoss):
    r"""Compute the softmax cross entropy in nats, accurately for probabilities near 0 and near 1.

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
    batch_axis : int or sequence of int or None, default 0
        Batch axes of ``pred``. With None, the loss is one mean over all positions, (1,).
    ignore_label : int, optional
        Positions with this label have loss 0 and gradient 0, and do not count in the mean.
    class_weight : (C,) array or list of finite numbers >= 0, optional
        Multiplies each class's term. The divisor of the mean stays the count, as for ``sample_weight``, where
        PyTorch divides by the sum of the weights. Held in float32, as a constant of the graph that needs no
        initialisation.
    label_smoothing : float from 0 to 1, default 0
        Share of the target, spread over all C classes as in PyTorch and Keras; `SoftmaxOutput` spreads it
        over the other C - 1.
    lse_square_scale : float >= 0, default 0
        Adds this times the squared logsumexp of the logits (z-loss).
    reduction : 'mean', 'valid', 'sum' or 'none'
        'mean' and 'sum' are per sample, over the positions that count. 'valid' is per sample too, the sum
        divided by the batch's average number of positions that count in a sample: then the mean over the
        batch is the mean over all positions that count, as with `SoftmaxOutput`'s ``normalization='valid'``.
        'none' is no reduction.
    invalid_label : 'nan', 'raise' or 'clip'
        How to treat labels that are outside [0, C), NaN or not an integer. 'nan': the loss is NaN and its
        gradient 0, on every device, without synchronisation. 'raise': ValueError; waits for the labels at
        every call, so it is for debugging, and in a graph of symbols it is 'nan'. 'clip': trains the nearest
        class, a fraction the class of its integer part, and NaN class 0. For labels that fit int32, that is
        what gluon does.
    kernel : 'auto', 'stock' or 'fused'
        The code that reduces the class axis. 'stock': MXNet's own operators. 'fused': an operator that
        ``python -m gluon_stable_ce build`` compiles, for sparse labels and logits on the CPU; also in graphs
        of symbols, which then need that operator. 'auto': for arrays, 'fused' where it can be used, else
        'stock'; for symbols 'stock', so that an export runs anywhere. The environment variable
        ``GLUON_STABLE_CE_KERNEL`` sets the meaning of 'auto'.
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
        If an option or a combination of options is meaningless; if arrays do not fit each other. The message
        names the argument, the expected value and the given one. The inputs of a subclass with a
        `hybrid_forward` of its own are not checked, as they may have another meaning. The first five options
        of a subclass with an `__init__` of its own are checked by the first call, as it may still set them.

    Notes
    -----
    *Numerics.* With sparse labels and logits, the loss of a position and each entry of its gradient have a
    small relative error, for probabilities near 0 and near 1:

    ====== ======= ============== =====
    kernel dtype   classes        error
    ====== ======= ============== =====
    stock  float32 2 to 1,000,000 1e-5
    stock  float64 2 to 1,000,000 1e-13
    fused  float32 2 to 1,000,000 3e-7
    fused  float64 2 to 1,000,000 2e-13
    ====== ======= ============== =====

    These bounds hold in every mode: eager, compiled, nested, exported, in threads (``test_exactness.py``,
    ``test_loss.py::test_stated_bounds``). float16 and bfloat16 logits are computed in float32, and their
    gradient is rounded to their dtype. Losses and entries below 1e-27 have an absolute error with the stock
    kernel: at most 1e-27. The fused kernel's bounds hold down to 1e-38, and for float64 to 2e-308. Where
    hundreds of logits are nearly equal, all additions round to the same side: then the fused kernel's error
    in float32 is below 1e-6. Beside a few logits that are 9 to 18 larger, the stock kernel's is at most
    1.3e-5 with up to 100,000 classes, 3.5e-5 with a million, and 1.3e-13 in float64. Dense labels, label
    smoothing and z-loss have an absolute error with the stock kernel: 1e-5 nats plus 2e-5 of the value; for
    float64, 1e-12 of both. With the fused kernel, label smoothing has 1e-8 nats plus 6e-7 of the value.

    A probability of 0 gives inf. NaN or +inf at the label gives NaN. NaN of another class gives NaN with the
    fused kernel. On the CPU, oneDNN hides it from the loss of the stock kernel, unless there are many
    classes, but that class's gradient is not finite. A logit of -inf masks a class: that changes nothing,
    unless the class is the label. With label smoothing, each class is part of the target, so the loss is inf,
    unless the class has a class weight of 0.

    *Gradients.* The gradient with respect to a sample weight of 0 is 0, where gluon's is the loss; likewise
    with respect to dense targets of 0.

    *Graphs.* A call with arrays runs a compiled graph with static memory, and its outputs are fresh arrays.
    Losses of equal options share their graphs. A loss has up to 16, each with the memory of its largest
    batch, multiplied by the number of calls that are recorded before one backward. ``hybridize()`` frees this
    memory. Deleting the loss frees it, too, but for the graphs of the last losses that were called a few
    times only. ``hybridize(False)`` computes operator by operator, for debugging.
    A subclass with a `hybrid_forward` of its own runs operator by operator unless it calls ``hybridize()``.
    One loss may be called from several threads. The page on semantics says which kernel they use, and which
    arrays they must not share.

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
    Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax functions",
    2021; Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7 (label smoothing); de
    Brebisson and Vincent, "The Z-loss", 2016, and Chowdhery et al., "PaLM", 2022, section 5 (squared
    logsumexp).
    """

    @checks_names
    def __init__(
        self,
        axis: Union[int, Sequence[int]] = -1,
        sparse_label: bool = True,
        from_logits: bool = False,
        weight: Optional[float] = None,
        batch_axis: Union[int, Sequence[int], None] = 0,
        *,
        ignore_label: Optional[int] = None,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        reduction: Reduction = 'mean',
        invalid_label: InvalidLabel = 'nan',
        kernel: Kernel = 'auto',
        **kwargs: Any,
    ) -> None:
        # not through SoftmaxCrossEntropyLoss.__init__, which looks up its own name and may find ours there
        gluon.loss.Loss.__init__(self, weight, batch_axis, **kwargs)
        del self._scope  # which holds this loss, and the memory of its graphs, until a garbage collection
        self._axis, self._sparse_label, self._from_logits = axis, sparse_label, from_logits  # as gluon's
        # as they were given; of gluon's own arguments, the attributes are read, which may be set later
        self._arguments = {name: value for name, value in locals().items() if name in Options._fields}
        self._check_options()
        self.class_weight: Optional[ClassWeight] = None
        if class_weight is not None:
            with self.name_scope():
                self.class_weight = ClassWeight(class_weight)
        self._op_hook: Optional[Tuple[Any, bool]] = None

    def name_scope(self) -> Any:
        """Make gluon's scope for the names of children."""
        scope = gluon.block._BlockScope(self)
        scope._counter = self.__dict__.setdefault('_counter', scope._counter)
        return scope

    def _check_options(self) -> None:
        """Check the options that are final. The `__init__` of a subclass may set gluon's own later."""
        if type(self).__init__ is StableSoftmaxCrossEntropyLoss.__init__:
            self._options  # noqa: B018, which checks them
        else:
            choice.configured(check_loss_options({**self._arguments, **_GLUON_DEFAULTS}))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Gluon's options may be set later and in any order: the next call checks them."""
        super().__setattr__(name, value)
        if name in _GLUON_OPTIONS:
            self.__dict__.pop('_options', None)

    @property
    def _given_options(self) -> Dict[str, Any]:
        """The options as they were given or set."""
        return {**self._arguments, **{name[1:]: getattr(self, name) for name in _GLUON_OPTIONS}}

    @cached_property
    def _options(self) -> Options:
        """The checked options."""
        return choice.configured(check_loss_options(self._given_options))

    def forward(
        self, pred: Array, label: Array, sample_weight: Optional[Array] = None, *others: Array
    ) -> Array:
        """Compute the loss of arrays in a compiled graph; a symbol becomes part of the caller's graph."""
        if array_api.is_symbol(pred) or self._has_own_graph:
            weight = () if sample_weight is None and not others else (sample_weight,)
            return super().forward(pred, label, *weight, *others)
        if others:
            raise TypeError(f'expected pred, label and sample_weight, got {3 + len(others)} inputs')
        options, weights = self._options, self.class_weight
        return self._graphs.compute(options, pred, label, sample_weight, weights, self._op_hook)

    def hybrid_forward(self, F: F, pred: Array, label: Array, sample_weight: Optional[Array] = None) -> Array:
        """Build the loss from symbols, or compute it by single operators if a subclass gives arrays."""
        call, inputs = plan(self._options, pred, label, sample_weight, self.class_weight)
        return loss_of(F, call, *inputs)

    @cached_property
    def _graphs(self) -> graphs.Graphs:
        return graphs.Graphs(loss_of, Fill.LOSS, self)

    def __repr__(self) -> str:
        """Show the options that differ from their defaults, and the kernel of float32 arrays on the CPU."""
        shown = {**self._given_options, 'class_weight': self.class_weight}
        with suppress(TypeError, ValueError):  # attributes that do not fit each other yet
            shown['kernel'] = choice.resolve(self._options)
        parameters = inspect.signature(StableSoftmaxCrossEntropyLoss.__init__).parameters
        changed = [
            f'{name}={shown[name]!r}'
            for name, parameter in parameters.items()
            if name in shown and shown[name] != parameter.default
        ]
        return f'{type(self).__name__}({", ".join(changed)})'

    @property
    def _has_own_graph(self) -> bool:
        """Whether a subclass has its own `hybrid_forward`, which decides what the inputs mean."""
        return type(self).hybrid_forward is not StableSoftmaxCrossEntropyLoss.hybrid_forward

    def hybridize(self, active: bool = True, *args: Any, **kwargs: Any) -> None:
        """Switch compiled graphs on or off, and free the memory of the present ones.

        They have static memory by default.

        Parameters
        ----------
        active : bool, default True
        static_alloc, static_shape, inline_limit, forward_bulk_size, backward_bulk_size : optional
            As in gluon. `static_alloc` is True by default, and `static_shape` defaults to `static_alloc`.
            Outputs are fresh arrays all the same.
        """
        super().hybridize(active, *args, **kwargs)  # for the graph that a subclass has of its own
        given = {name: kwargs[name] for name in _FLAGS if kwargs.get(name) is not None}
        flags = {'static_alloc': True, 'static_shape': given.get('static_alloc', True), **given}
        self._graphs.release()
        # a copy may use the old ones, too
        self._graphs = graphs.Graphs(loss_of, Fill.LOSS, self, tuple(flags.items()) if active else None)

    def register_op_hook(self, callback: Any, monitor_all: bool = False) -> None:
        """Call `callback` with the name and output of each operator, as in gluon. Each call compiles then."""
        super().register_op_hook(callback, monitor_all)
        self._op_hook = (callback, monitor_all) if callback else None

    def export(
        self,
        path: str,
        epoch: int = 0,
        remove_amp_cast: bool = True,
        *,
        sample_weight: bool = False,
        dtype: Optional[Literal['float16', 'float32', 'float64']] = None,
    ) -> Tuple[str, str]:
        """Export the loss as a graph of stock operators, as ``HybridBlock.export`` does, at any time.

        The inputs are ``data0`` (pred) and ``data1`` (label). The files depend only on the options and the
        arguments, and not on earlier calls.

        Parameters
        ----------
        path : str
            The files are ``path-symbol.json`` and ``path-0000.params``.
        epoch : int
            The number in the name of the second file.
        sample_weight : bool, default False
            Whether there is a third input, ``data2``, of a shape that a graph of symbols accepts.
        dtype : 'float16', 'float32' or 'float64', optional
            The dtype of ``pred``. Without it, ``pred`` is float32, or float64 if there are no class weights.

        Returns
        -------
        (str, str)
            The names of the two files.
        """
        if self._has_own_graph:
            return super().export(path, epoch, remove_amp_cast)
        if dtype is not None:
            check_choice('dtype', dtype, ('float16', 'float32', 'float64'))
        np_style = array_api.is_np_array()
        names = INPUTS[: 3 if sample_weight else 2]
        inputs = {name: array_api.variable(f'data{i}', np_style) for i, name in enumerate(names)}
        params = {}
        if self.class_weight is not None:
            value = self.class_weight.value
            inputs['class_weight'] = value.var()
            params[f'arg:{value.name}'] = value.data(mx.cpu())
        classes = self.class_weight and self.class_weight.classes
        call = Call(
            self._options,
            inputs=tuple(inputs),
            np_style=np_style,
            dtype=dtype,
            classes=classes,
            has_many_classes=has_many_classes(classes),
        )
        symbol_file, params_file = f'{path}-symbol.json', f'{path}-{epoch:04d}.params'
        graphs.trace(loss_of, call, inputs).save(symbol_file, remove_amp_cast=remove_amp_cast)
        array_api.save(params_file, params)
        return symbol_file, params_file

    def _collect_params_with_prefix(self, prefix: str = '') -> Dict[str, Any]:
        """List the parameters of a file. One that is being loaded may have class weights or not."""
        params, file = super()._collect_params_with_prefix(prefix), file_in_loading()
        name = f'{prefix}.class_weight.value'.lstrip('.')
        if file is not None and name in file:
            params.setdefault(name, Unused(name))
        elif file is not None:
            params.pop(name, None)
        return params

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
            The number of positions whose label is not `ignore_label`, invalid labels included. It may be 0:
            write ``trainer.step(max(1, loss_fn.valid_count(label)))``.

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
        label = as_dense('label', label)
        if not self._options.sparse_label:
            return label.size // math.prod(label.shape[axis] for axis in self._options.class_axes)
        is_counted = labels.is_counted(mx.nd, Call(self._options), array_api.as_classic(label))
        return label.size if is_counted is None else int(is_counted.sum().asscalar())

    def create_metric(self, **kwargs: Any) -> StableCrossEntropy:
        """Create a `StableCrossEntropy` that reads labels and predictions as they are given to this loss.

        It reports the plain NLL, without weights, label smoothing and `lse_square_scale`. `kwargs` are
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
            axis=options.class_axes,
            pred_type=options.pred_type,
            ignore_label=options.ignore_label,
            sparse_label=options.sparse_label,
            invalid_label='clip' if options.invalid_label == 'clip' else 'raise',
            kernel=self._arguments['kernel'],
            **kwargs,
        )


StableSoftmaxCELoss = StableSoftmaxCrossEntropyLoss
