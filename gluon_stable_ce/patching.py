"""Put the loss and the metrics in place of MXNet's own, in a running process."""

import abc
import copyreg
import functools
import inspect
import threading
import types
import warnings
from collections import Counter
from typing import Any, Callable, List

import mxnet as mx
from mxnet import gluon

from . import array_api, traced_dtypes
from .array_checks import weight_layout
from .loss import StableSoftmaxCrossEntropyLoss
from .metric import StableCrossEntropy, StableLoss, StablePerplexity
from .metric_queue import text_or_error
from .options import METRIC_INVALID_LABELS

# Where each name is found, and the class that takes its place.
PLACES = {
    'SoftmaxCrossEntropyLoss': (gluon.loss, StableSoftmaxCrossEntropyLoss),
    'SoftmaxCELoss': (gluon.loss, StableSoftmaxCrossEntropyLoss),
    'CrossEntropy': (mx.metric, StableCrossEntropy),
    'NegativeLogLikelihood': (mx.metric, StableCrossEntropy),
    'Perplexity': (mx.metric, StablePerplexity),
    'Loss': (mx.metric, StableLoss),
}
STOCK = {name: getattr(module, name) for name, (module, _) in PLACES.items()}

_CROSSED = (
    'sample_weight with fewer axes than pred: each loss is multiplied by the weight of its own sample or '
    'position. gluon broadcasts from the last axis on, (N, 1) * (N,) to (N, N), and so mixes the weights '
    'of several'
)
_NP_BATCH_AXIS = (
    'batch_axis in np mode: the loss has one number for each index of that axis. gluon does not read this '
    'option there, and takes the first axis'
)
_LOCK = threading.RLock()
_ACTIVE: List['Patch'] = []  # the innermost comes last


def patch(**loss_options: Any) -> 'Patch':
    """Put this loss and these metrics in place of MXNet's own, until `unpatch` or the end of a ``with``.

    These names are replaced: ``SoftmaxCrossEntropyLoss`` and ``SoftmaxCELoss`` in `mxnet.gluon.loss`;
    ``CrossEntropy``, ``NegativeLogLikelihood``, ``Perplexity`` and ``Loss`` in `mxnet.metric`; and the names
    by which ``mx.metric.create`` finds these metrics. The replacements are classes. They take the arguments
    of the classes that they replace, by position and by keyword, and the keyword arguments of this package's
    classes. Code that runs later can make subclasses of them. An ``isinstance`` check against a replaced name
    is true for objects of the stock class, too.

    Parameters
    ----------
    **loss_options
        Options of `StableSoftmaxCrossEntropyLoss`, as defaults for each loss that is made. `ignore_label` and
        ``invalid_label='clip'`` also apply to the metrics but ``Loss``. Arguments that the script gives
        itself win over them. A default is left out where the script's own arguments rule it out:
        `ignore_label`, `invalid_label` and `kernel` with ``sparse_label=False``, and `lse_square_scale` and
        `kernel` with ``from_logits=True``.

    Returns
    -------
    Patch
        A context manager that counts the losses and metrics. The names are already replaced when `patch`
        returns.

    Raises
    ------
    TypeError, ValueError
        If `loss_options` are not valid options of the loss. Nothing is replaced then.

    Notes
    -----
    Names that another module imported before (``from mxnet.gluon.loss import SoftmaxCELoss``), and subclasses
    that were made before, stay MXNet's own and work as before. So call `patch` before such modules are
    imported.

    Patches can be nested. The innermost one applies, with its own options only. Each `unpatch` restores
    exactly the objects that were there before the patch that it undoes.

    ``mx.metric.CrossEntropy(eps=...)`` is accepted with a warning, and the epsilon is ignored: the metric has
    none. It is only there as the attribute ``eps``, for subclasses with an ``update`` of their own.

    The loss of float16 and bfloat16 logits has their dtype, as gluon's has. It is computed in float32, which
    this package's class returns. Under AMP the loss is float32.

    A pickled replacement does not need a patch where it is read: there it is an object of this package's
    class. Objects of MXNet's own classes that were pickled without a patch become replacements where a patch
    is active, and have the same state. Objects that were made before the patch stay MXNet's own, also in a
    pickle.

    The names belong to the process, so a patch applies to all threads. Patch before other threads start, and
    undo it when they have ended. Processes that are forked are patched as well, and processes that are
    spawned are not.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import patch
    >>> logits, label = mx.nd.array([[20, 0], [0, 99]]), mx.nd.array([0, -1])
    >>> with patch(ignore_label=-1) as patched:
    ...     loss_fn = mx.gluon.loss.SoftmaxCELoss()
    >>> loss_fn(logits, label).asnumpy().tolist()[1], patched.losses
    (0.0, 1)
    """
    StableSoftmaxCrossEntropyLoss(**loss_options)  # raises the errors of its options
    return Patch(loss_options)


def unpatch() -> None:
    """Undo the last `patch` that is still active.

    Raises
    ------
    RuntimeError
        If no patch is active.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import patch, unpatch
    >>> stock = mx.metric.CrossEntropy
    >>> patched = patch()
    >>> mx.metric.CrossEntropy is stock
    False
    >>> unpatch()
    >>> mx.metric.CrossEntropy is stock
    True
    """
    with _LOCK:
        if not _ACTIVE:
            raise RuntimeError('unpatch: expected a patch() before it, got none that is active')
        for bind, name, before, _ in _ACTIVE.pop()._changes:
            bind(name, before)


class Patch:
    """An active patch, as `patch` returns it.

    Leaving its ``with`` block undoes it, along with the patches that were made after it and are still active.
    If it was undone before, nothing happens.

    Attributes
    ----------
    made : collections.Counter
        How many objects of each replaced name were made, of their subclasses included.
    losses, metrics : int
        How many of them are losses, and how many are metrics.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_stable_ce import patch
    >>> with patch() as patched:
    ...     metric = mx.metric.create(['acc', 'ce'])
    >>> print(patched)
    0 losses and 1 metric were replaced
    """

    def __init__(self, loss_options):
        self.made: Counter = Counter()
        self._options = loss_options
        # `run` sets these: a function that reports a difference, and the end of the error of invalid labels
        self._notify: Callable[[str], None] = lambda message: None
        self._label_hint = ''
        with _LOCK:
            self._changes = _changes(_replacements(self))
            for bind, name, _, after in self._changes:
                bind(name, after)
            _ACTIVE.append(self)

    @property
    def losses(self):
        return self.made['SoftmaxCrossEntropyLoss']

    @property
    def metrics(self):
        return sum(self.made.values()) - self.losses

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with _LOCK:
            while self in _ACTIVE:
                unpatch()

    def __str__(self):
        losses = f'{self.losses} {"loss" if self.losses == 1 else "losses"}'
        metrics = f'{self.metrics} {"metric" if self.metrics == 1 else "metrics"}'
        return f'{losses} and {metrics} were replaced'

    def __repr__(self):
        options = ', '.join(f'{name}={value!r}' for name, value in self._options.items())
        return f'<patch({options}): {self}>'


def _changes(replacements):
    """List the bindings of a patch: (function that binds, name, value before, value after) each."""
    registry = mx.registry._REGISTRY[mx.metric.EvalMetric]
    changes = [
        (functools.partial(setattr, module), name, getattr(module, name), replacements[STOCK[name]])
        for name, (module, _) in PLACES.items()
    ]
    changes += [
        (registry.__setitem__, name, kind, replacements[_stock_of(kind)])
        for name, kind in registry.items()
        if _stock_of(kind) in replacements
    ]
    # Methods of a stock class say `super(SoftmaxCrossEntropyLoss, self)`, and have to find the stock class.
    # They are still in use: by modules that imported the class before, and by subclasses.
    changes += [
        (functools.partial(setattr, stock), name, function, _with_global(function, stock.__name__, stock))
        for stock in replacements
        for name, function in vars(stock).items()
        if isinstance(function, types.FunctionType) and stock.__name__ in function.__code__.co_names
    ]
    block, name = gluon.HybridBlock, '_call_cached_op'
    before = getattr(block, name)
    changes.append((functools.partial(setattr, block), name, before, traced_dtypes.known_to_graphs(before)))
    base = mx.metric.EvalMetric
    changes.append((functools.partial(setattr, base), '__str__', base.__str__, _printable(base.__str__)))
    changes += [
        (
            functools.partial(_set_or_delete, stock),
            '__reduce_ex__',
            vars(stock).get('__reduce_ex__'),
            _reduce_stock,
        )
        for stock in replacements
    ]
    return changes


def _printable(to_text):
    """Let metrics of several metrics be printed, too, where one of them has no value."""

    @functools.wraps(to_text)
    def text(metric):
        return text_or_error(metric.name, functools.partial(to_text, metric))

    return text


def _set_or_delete(kind, name, value):
    if value is None:
        delattr(kind, name)
    else:
        setattr(kind, name, value)


def _with_global(function, name, value):
    """Copy `function`, so that it reads `value` as its global `name`."""
    names = {**function.__globals__, name: value}
    copy = types.FunctionType(function.__code__, names, None, function.__defaults__, function.__closure__)
    return functools.update_wrapper(copy, function)


def _stock_of(kind):
    """Return the stock class that `kind` is a replacement of, or `kind` itself."""
    return vars(kind).get('_in_place_of', kind)


class _ReplacementType(abc.ABCMeta):
    """Type of the replacements: an instance of the replaced class is an instance of the replacement.

    An ABCMeta, so that subclasses may have abstract base classes beside the replacement.
    """

    def __subclasscheck__(cls, other):
        stock = _stock_of(cls)
        if stock is cls or not isinstance(other, type):
            return super().__subclasscheck__(other)
        return any(_stock_of(base) is stock for base in other.__mro__)

    def __instancecheck__(cls, instance):
        return issubclass(type(instance), cls)


class _Replacement(metaclass=_ReplacementType):
    """Mixin of classes that a patch makes, and of which it counts the objects."""

    _patched: Any
    _in_place_of: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with _LOCK:
            self._patched.made[self._in_place_of.__name__] += 1

    # Pickles and copies do not depend on the class, which is gone after `unpatch`.
    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        kind = type(self)
        return reduced if _stock_of(kind) is kind else (_new, (kind.__name__,), *reduced[2:])

    def __setstate__(self, state):
        """Take over a state, of the stock class if the object was pickled without a patch."""
        is_loss = isinstance(self, gluon.loss.Loss)
        if 'class_weight' in state if is_loss else 'sum_metric' not in state:  # it is this package's
            getattr(super(), '__setstate__', self.__dict__.update)(state)
            return
        self.__dict__.update(type(self).__new__(type(self)).__dict__)  # which older protocols do not call
        stock = self._in_place_of
        replacement: Any = next(
            kind for kind in type(self).__mro__ if vars(kind).get('_in_place_of') is stock
        )
        replacement.__init__(self, **_arguments_in(state, stock))
        for name in state.keys() - self.__dict__.keys():  # sums, and attributes of a subclass
            setattr(self, name, state[name])


def _arguments_in(state, stock):
    """Return the arguments that made an object of a stock class, from its attributes."""
    names = [*inspect.signature(stock).parameters, 'prefix']
    keys = {name: f'_{name}' if f'_{name}' in state else name for name in names}
    return {name: state[key] for name, key in keys.items() if key in state and name != 'kwargs'}


def _kind(name):
    """Return the replacement of a name, or this package's class if there is none."""
    module, kind = PLACES[name]
    now = getattr(module, name)
    return kind if _stock_of(now) is now else now


def _new(name):
    """Make an object of `_kind`."""
    kind = _kind(name)
    return kind.__new__(kind)


def _reduce_kind(kind):
    """Reduce a replacement itself for `pickle`, or name a subclass of it."""
    return kind.__qualname__ if _stock_of(kind) is kind else (_kind, (kind.__name__,))


copyreg.pickle(_ReplacementType, _reduce_kind)


def _new_stock(name):
    return STOCK[name].__new__(STOCK[name])


def _reduce_stock(stock_object, protocol):
    """Reduce an object of a stock class for `pickle`, which does not find the class by its name."""
    reduced = object.__reduce_ex__(stock_object, protocol)
    kind = type(stock_object)
    return (_new_stock, (kind.__name__,), *reduced[2:]) if kind in STOCK.values() else reduced


def _replacements(patched):
    """Make a class for each stock class, with its name and arguments, and this package's behaviour."""

    class SoftmaxCrossEntropyLoss(_Replacement, StableSoftmaxCrossEntropyLoss):
        @_with_signature_of('SoftmaxCrossEntropyLoss')
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **_loss_defaults(patched._options, args, kwargs), **kwargs)

        def forward(self, pred, label, sample_weight=None, *others):
            loss = super().forward(pred, label, sample_weight, *others)
            if array_api.is_symbol(pred) or self._has_own_graph:  # by hybrid_forward
                return loss
            self._notify_of_differences(pred, sample_weight)
            return _in_dtype_of(pred, loss)

        def hybrid_forward(self, F, pred, label, sample_weight=None):
            inputs = [
                array if array is None else array_api.without_bfloat16(array, traced_dtypes.dtype_of(array))
                for array in (pred, label, sample_weight)
            ]
            loss = super().hybrid_forward(F, *inputs)
            self._notify_of_differences(pred, sample_weight)
            return _in_dtype_of(pred, loss)

        @property
        def _has_own_graph(self):
            return type(self).hybrid_forward is not own_forward

        def _notify_of_differences(self, pred, sample_weight):
            shape, options = pred.shape if array_api.is_array(pred) else (), self._options
            if shape and sample_weight is not None and _stock_crosses(options, sample_weight.shape, shape):
                patched._notify(_CROSSED)
            is_one_sample = len(shape) == 1
            if array_api.is_np_array() and options.batch_axes != (0,) and not is_one_sample:
                patched._notify(_NP_BATCH_AXIS)

    own_forward = SoftmaxCrossEntropyLoss.hybrid_forward  # a script may replace it

    class Metric(_Replacement, StableCrossEntropy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **_metric_defaults(patched._options, kwargs), **kwargs)

        def _value_of(self, sums):
            try:
                return super()._value_of(sums)
            except ValueError as error:
                if sums.invalid:
                    raise ValueError(f'{error}{patched._label_hint}') from None
                raise

    class CrossEntropy(Metric):
        @_with_signature_of('CrossEntropy')
        def __init__(self, eps=None, name='cross-entropy', output_names=None, label_names=None, **kwargs):
            super().__init__(name=name, output_names=output_names, label_names=label_names, **kwargs)
            _ignore_eps(self, eps)

    class NegativeLogLikelihood(Metric):
        @_with_signature_of('NegativeLogLikelihood')
        def __init__(self, eps=None, name='nll-loss', output_names=None, label_names=None, **kwargs):
            super().__init__(name=name, output_names=output_names, label_names=label_names, **kwargs)
            _ignore_eps(self, eps)

    class Perplexity(Metric, StablePerplexity):
        @_with_signature_of('Perplexity')
        def __init__(
            self, ignore_label=None, axis=-1, name='perplexity', output_names=None, label_names=None, **kwargs
        ):
            names = {'name': name, 'output_names': output_names, 'label_names': label_names}
            if ignore_label is not None:
                kwargs['ignore_label'] = ignore_label
            super().__init__(axis=axis, **names, **kwargs)

    class Loss(_Replacement, StableLoss):
        @_with_signature_of('Loss')
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    kinds: Any = (SoftmaxCrossEntropyLoss, CrossEntropy, NegativeLogLikelihood, Perplexity, Loss)
    for kind in kinds:
        stock = STOCK[kind.__name__]
        kind.__doc__ = PLACES[kind.__name__][1].__doc__
        kind._in_place_of, kind._patched = stock, patched
    return {kind._in_place_of: kind for kind in kinds}


def _with_signature_of(name):
    """Return a decorator: `inspect` and `help` show the arguments of the stock class."""

    def decorate(function):
        function.__signature__ = inspect.signature(STOCK[name].__init__)
        return function

    return decorate


def _ignore_eps(metric, eps):
    default = inspect.signature(metric._in_place_of).parameters['eps'].default
    metric.eps = default if eps is None else eps  # for subclasses that read it
    if metric.eps != default:
        warnings.warn(
            f'eps: {eps} is ignored, as {type(metric).__name__} adds no epsilon after patch()', stacklevel=3
        )


def _loss_defaults(options, args, kwargs):
    """Those of `options` that the arguments of a call leave open and do not rule out."""
    given = {**dict(zip(inspect.signature(StableSoftmaxCrossEntropyLoss).parameters, args)), **kwargs}
    left_out = set(given)
    if not given.get('sparse_label', True):
        left_out |= {'ignore_label', 'invalid_label', 'kernel'}
    if given.get('from_logits', False):
        left_out |= {'lse_square_scale', 'kernel'}
    return {name: value for name, value in options.items() if name not in left_out}


def _metric_defaults(options, given):
    """Those of `options` that metrics have, and that the keyword arguments of a call do not rule out."""
    if not given.get('sparse_label', True):
        return {}
    is_default = {
        'ignore_label': 'ignore_label' in options,
        'invalid_label': options.get('invalid_label') in METRIC_INVALID_LABELS,
    }
    return {name: options[name] for name, known in is_default.items() if known and name not in given}


def _in_dtype_of(pred, loss):
    """Return the loss in the dtype of half precision logits, as gluon does; under AMP, gluon's is float32."""
    dtype = traced_dtypes.dtype_of(pred)
    if dtype is None or dtype not in ('float16', 'bfloat16') or array_api.is_amp_on():
        return loss
    return array_api.as_dtype(loss, dtype)


@functools.lru_cache(maxsize=1024)
def _stock_crosses(options, weight_shape, shape):
    """Whether gluon, which broadcasts from the last axis on, reads these weights as those of other axes."""
    ndim = len(shape)
    try:
        layout = weight_layout(weight_shape, shape, options.class_axes, options.batch_axes)
    except ValueError:  # they are read as gluon reads them
        return False
    class_axes, batch_axes = (
        {axis % ndim for axis in axes} for axes in (options.class_axes, options.batch_axes)
    )
    axes = {'positions': sorted({*range(ndim)} - class_axes), 'batch': sorted(batch_axes)}
    if layout not in axes:  # those of gluon
        return False
    sizes = dict(zip(axes[layout], weight_shape))
    ours = tuple(sizes.get(axis, 1) for axis in range(ndim))
    gluons = (1,) * (ndim - len(weight_shape)) + weight_shape
    losses = (1 if axis in class_axes else size for axis, size in enumerate(shape))
    return gluons != ours and all(1 in pair or len({*pair}) == 1 for pair in zip(gluons, losses))
