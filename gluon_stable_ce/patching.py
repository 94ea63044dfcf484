"""Put the loss and the metrics in the place of MXNet's own, in a running process."""

import abc
import functools
import inspect
import threading
import types
import warnings
from typing import Any, List

import mxnet as mx
from mxnet import gluon

from .loss import StableSoftmaxCrossEntropyLoss
from .metric import StableCrossEntropy, StableLoss, StablePerplexity

# Where each name is found, and the class that takes its place.
PLACES = {
    'SoftmaxCrossEntropyLoss': (gluon.loss, StableSoftmaxCrossEntropyLoss),
    'SoftmaxCELoss': (gluon.loss, StableSoftmaxCrossEntropyLoss),
    'CrossEntropy': (mx.metric, StableCrossEntropy),
    'Perplexity': (mx.metric, StablePerplexity),
    'Loss': (mx.metric, StableLoss),
}
_STOCK = {name: getattr(module, name) for name, (module, _) in PLACES.items()}

_LOCK = threading.RLock()
_ACTIVE: List['Patch'] = []  # the innermost comes last


def patch(**loss_options: Any) -> 'Patch':
    """Put this loss and these metrics in the place of MXNet's own, until `unpatch` or the end of a ``with``.

    These names are replaced: ``SoftmaxCrossEntropyLoss`` and ``SoftmaxCELoss`` in `mxnet.gluon.loss`;
    ``CrossEntropy``, ``Perplexity`` and ``Loss`` in `mxnet.metric`; and the names by which
    ``mx.metric.create`` finds these three metrics. The replacements are classes. They take the arguments of
    the classes that they replace, by position and by keyword, and the keyword arguments of this package's
    classes. Code that runs later can make subclasses of them. An ``isinstance`` check against a replaced name
    is true for objects of the stock class, too.

    Parameters
    ----------
    **loss_options
        Options of `StableSoftmaxCrossEntropyLoss`, as defaults for each loss that is made. `ignore_label` is
        that of ``CrossEntropy`` and ``Perplexity``, too. Arguments that the script gives itself win over
        them. A default is left out where the script's own arguments rule it out:
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

    A pickled replacement does not need a patch where it is read: there it is an object of this package's
    class.

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
    StableSoftmaxCrossEntropyLoss(**loss_options)  # raises what is to be raised
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
    losses, metrics : int
        How many of the replacements were made, objects of their subclasses included.

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
        self.losses = self.metrics = 0
        self._options = loss_options
        with _LOCK:
            self._changes = _changes(_replacements(self))
            for bind, name, _, after in self._changes:
                bind(name, after)
            _ACTIVE.append(self)

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
    """List what a patch binds, as (function that binds, name, value before, value after) each."""
    registry = mx.registry._REGISTRY[mx.metric.EvalMetric]
    changes = [
        (functools.partial(setattr, module), name, getattr(module, name), replacements[_STOCK[name]])
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
    return changes


def _with_global(function, name, value):
    """Copy `function`, so that it reads `value` as its global `name`."""
    names = {**function.__globals__, name: value}
    copy = types.FunctionType(function.__code__, names, None, function.__defaults__, function.__closure__)
    return functools.update_wrapper(copy, function)


def _stock_of(kind):
    """Return the stock class that `kind` is a replacement of, or `kind` itself."""
    return vars(kind).get('_in_place_of', kind)


class _ReplacementType(abc.ABCMeta):
    """Type of the replacements: what is an instance of the replaced class is an instance of the replacement.

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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        made = 'losses' if isinstance(self, gluon.loss.Loss) else 'metrics'
        with _LOCK:
            setattr(self._patched, made, getattr(self._patched, made) + 1)

    # Pickles and copies do not depend on the class, which is gone after `unpatch`.
    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        kind = type(self)
        return reduced if _stock_of(kind) is kind else (_new, (kind.__name__,), *reduced[2:])


def _new(name):
    """Make an object of the replacement of a name, or of this package's class if there is none."""
    module, kind = PLACES[name]
    if _stock_of(getattr(module, name)) is not getattr(module, name):
        kind = getattr(module, name)
    return kind.__new__(kind)  # type: ignore[call-overload]


def _replacements(patched):
    """Make a class for each stock class, with its name and arguments, and this package's behaviour."""
    default = patched._options.get('ignore_label')  # of CrossEntropy and Perplexity

    class SoftmaxCrossEntropyLoss(_Replacement, StableSoftmaxCrossEntropyLoss):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **_defaults(patched._options, args, kwargs), **kwargs)

    class CrossEntropy(_Replacement, StableCrossEntropy):
        def __init__(self, eps=None, name='cross-entropy', output_names=None, label_names=None, **kwargs):
            kwargs.setdefault('ignore_label', default)
            super().__init__(name=name, output_names=output_names, label_names=label_names, **kwargs)
            self.eps = 1e-12 if eps is None else eps  # as that of mx.metric.CrossEntropy
            if eps is not None:
                warnings.warn(
                    f'eps: {eps} is ignored, as StableCrossEntropy takes the place of mx.metric.CrossEntropy '
                    'and adds no epsilon',
                    stacklevel=2,
                )

    class Perplexity(_Replacement, StablePerplexity):
        def __init__(self, ignore_label=None, *args, **kwargs):
            super().__init__(default if ignore_label is None else ignore_label, *args, **kwargs)

    class Loss(_Replacement, StableLoss):
        pass

    kinds: Any = (SoftmaxCrossEntropyLoss, CrossEntropy, Perplexity, Loss)
    for kind in kinds:
        kind.__doc__ = PLACES[kind.__name__][1].__doc__
        kind._in_place_of, kind._patched = _STOCK[kind.__name__], patched
    return {kind._in_place_of: kind for kind in kinds}


def _defaults(options, args, kwargs):
    """Those of `options` that the arguments of a call leave open and do not rule out."""
    given = {**dict(zip(inspect.signature(StableSoftmaxCrossEntropyLoss).parameters, args)), **kwargs}
    left_out = set(given)
    if not given.get('sparse_label', True):
        left_out |= {'ignore_label', 'invalid_label', 'kernel'}
    if given.get('from_logits', False):
        left_out |= {'lse_square_scale', 'kernel'}
    return {name: value for name, value in options.items() if name not in left_out}
