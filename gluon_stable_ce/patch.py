"""Run a training script with this loss and these metrics in the place of MXNet's own.

`patch` replaces the names in a running process. ``python -m gluon_stable_ce run script.py`` does it for a
script that stays as it is.
"""

import abc
import argparse
import os
import runpy
import sys
import textwrap
import threading
import types
import warnings
from typing import Any, List

import mxnet as mx
from mxnet import gluon

from .loss import StableSoftmaxCrossEntropyLoss
from .metric import StableCrossEntropy, StableLoss, StablePerplexity

__all__ = ['Patch', 'patch', 'unpatch']

# Where each name is found, and the class that takes its place.
_PLACES = {
    'SoftmaxCrossEntropyLoss': (gluon.loss, StableSoftmaxCrossEntropyLoss),
    'SoftmaxCELoss': (gluon.loss, StableSoftmaxCrossEntropyLoss),
    'CrossEntropy': (mx.metric, StableCrossEntropy),
    'Perplexity': (mx.metric, StablePerplexity),
    'Loss': (mx.metric, StableLoss),
}
_STOCK = {name: getattr(module, name) for name, (module, _) in _PLACES.items()}
_POSITIONAL = ('axis', 'sparse_label', 'from_logits', 'weight', 'batch_axis')  # of the loss, in gluon's order
_STOCK_EPS = 1e-12  # of mx.metric.CrossEntropy

_EXAMPLE = """\
examples:
  python -m gluon_stable_ce run train.py --epochs 3
  python -m gluon_stable_ce run --ignore-label -1 --label-smoothing 0.1 train.py --epochs 3
  python -m gluon_stable_ce run -m package.train --epochs 3

exit code:
  2 if the options are not valid or there is no such file; otherwise that of the script
"""

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
    >>> from gluon_stable_ce.patch import patch
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
    >>> from gluon_stable_ce.patch import patch, unpatch
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
        _ACTIVE.pop()._restore()
        if not _ACTIVE:
            _let_stock_read_its_own_names(False)


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
    >>> from gluon_stable_ce.patch import patch
    >>> with patch() as patched:
    ...     metric = mx.metric.create(['acc', 'ce'])
    >>> patched.losses, patched.metrics
    (0, 1)
    """

    def __init__(self, loss_options):
        self.losses = self.metrics = 0
        self._options = loss_options
        replacements = _replacements(self)
        with _LOCK:
            if not _ACTIVE:
                _let_stock_read_its_own_names(True)
            self._before = _replace(replacements)
            _ACTIVE.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with _LOCK:
            while self in _ACTIVE:
                unpatch()

    def __repr__(self):
        options = ', '.join(f'{name}={value!r}' for name, value in self._options.items())
        return f'<patch({options}): {_counted(self)}>'

    def _restore(self):
        for namespace, name, value in self._before:
            namespace[name] = value

    def _count(self, kind):
        with _LOCK:
            setattr(self, kind, getattr(self, kind) + 1)


def _replace(replacements):
    """Bind the names to the replacements. Return what was there, as (namespace, name, value) each."""
    registry = mx.registry._REGISTRY[mx.metric.EvalMetric]
    targets = [(vars(module), name) for name, (module, _) in _PLACES.items()]
    targets += [(registry, name) for name, kind in registry.items() if _stock_of(kind) in replacements]
    before = [(namespace, name, namespace[name]) for namespace, name in targets]
    for name, (module, _) in _PLACES.items():
        setattr(module, name, replacements[_STOCK[name]])
    for namespace, name, value in before:
        if namespace is registry:
            registry[name] = replacements[_stock_of(value)]
    return before


def _stock_of(kind):
    """The stock class that `kind` is a replacement of, or `kind` itself."""
    return vars(kind).get('_in_place_of', kind)


def _let_stock_read_its_own_names(fixed):
    """Let the methods of the stock classes find these classes under their own names, or undo that.

    The stock classes say ``super(SoftmaxCrossEntropyLoss, self).__init__``. They are still in use while the
    names are replaced: by modules that imported them before, and as base classes.
    """
    for stock in set(_STOCK.values()):
        for name, function in list(vars(stock).items()):
            if not fixed and hasattr(function, '_stock_function'):
                setattr(stock, name, function._stock_function)
            elif (
                fixed
                and isinstance(function, types.FunctionType)
                and stock.__name__ in function.__code__.co_names
            ):
                setattr(stock, name, _with_global(function, stock.__name__, stock))


def _with_global(function, name, value):
    """A copy of `function` that reads `value` as its global `name`."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__, copy.__doc__, copy.__qualname__ = (
        function.__kwdefaults__,
        function.__doc__,
        function.__qualname__,
    )
    copy._stock_function = function  # type: ignore[attr-defined]
    return copy


# The replacements


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


class _Replacement:
    """Mixin: pickles and copies do not depend on the class, which is gone after `unpatch`."""

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        kind = type(self)
        return reduced if _stock_of(kind) is kind else (_new, (kind.__name__,), *reduced[2:])


def _new(name):
    """Make an object of the replacement of a name, or of this package's class if there is none."""
    module, kind = _PLACES[name]
    if _stock_of(getattr(module, name)) is not getattr(module, name):
        kind = getattr(module, name)
    return kind.__new__(kind)  # type: ignore[call-overload]


def _replacements(counts):
    """Make a class for each stock class, with its name and arguments, and this package's behaviour."""

    class SoftmaxCrossEntropyLoss(_Replacement, StableSoftmaxCrossEntropyLoss, metaclass=_ReplacementType):
        __doc__ = StableSoftmaxCrossEntropyLoss.__doc__
        _in_place_of = _STOCK['SoftmaxCrossEntropyLoss']

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **_defaults(counts._options, args, kwargs), **kwargs)  # type: ignore[misc]
            counts._count('losses')

    class CrossEntropy(_Replacement, StableCrossEntropy, metaclass=_ReplacementType):
        __doc__ = StableCrossEntropy.__doc__
        _in_place_of = _STOCK['CrossEntropy']

        def __init__(self, eps=None, name='cross-entropy', output_names=None, label_names=None, **kwargs):
            kwargs.setdefault('ignore_label', counts._options.get('ignore_label'))
            super().__init__(name=name, output_names=output_names, label_names=label_names, **kwargs)
            self.eps = _STOCK_EPS if eps is None else eps
            if eps is not None:
                warnings.warn(
                    f'eps: {eps} is ignored, as StableCrossEntropy takes the place of mx.metric.CrossEntropy '
                    'and adds no epsilon',
                    stacklevel=2,
                )
            counts._count('metrics')

    class Perplexity(_Replacement, StablePerplexity, metaclass=_ReplacementType):
        __doc__ = StablePerplexity.__doc__
        _in_place_of = _STOCK['Perplexity']

        def __init__(
            self, ignore_label=None, axis=-1, name='perplexity', output_names=None, label_names=None, **kwargs
        ):
            names = {'name': name, 'output_names': output_names, 'label_names': label_names}
            ignore_label = counts._options.get('ignore_label') if ignore_label is None else ignore_label
            super().__init__(ignore_label=ignore_label, axis=axis, **names, **kwargs)
            counts._count('metrics')

    class Loss(_Replacement, StableLoss, metaclass=_ReplacementType):
        __doc__ = StableLoss.__doc__
        _in_place_of = _STOCK['Loss']

        def __init__(self, name='loss', output_names=None, label_names=None):
            super().__init__(name=name, output_names=output_names, label_names=label_names)
            counts._count('metrics')

    return {kind._in_place_of: kind for kind in (SoftmaxCrossEntropyLoss, CrossEntropy, Perplexity, Loss)}


def _defaults(options, args, kwargs):
    """Those of `options` that the arguments of a call leave open and do not rule out."""
    given = {**dict(zip(_POSITIONAL, args)), **kwargs}
    left_out = set(given)
    if not given.get('sparse_label', True):
        left_out |= {'ignore_label', 'invalid_label', 'kernel'}
    if given.get('from_logits', False):
        left_out |= {'lse_square_scale', 'kernel'}
    return {name: value for name, value in options.items() if name not in left_out}


# The command ``run``


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command ``run``."""
    parser.allow_abbrev = False  # an option of the script is no abbreviation of these
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = textwrap.fill(
        'Run a Python script, unmodified, with the loss and the metrics of this package in the place of '
        "mxnet.gluon.loss.SoftmaxCrossEntropyLoss and mxnet.metric's CrossEntropy, Perplexity and Loss. "
        'The options are defaults for the losses that the script makes, and --ignore-label for its metrics. '
        'What follows the script belongs to it.',
        width=100,
    )
    parser.add_argument(
        '--ignore-label', type=int, metavar='LABEL', help='label of positions that do not count'
    )
    parser.add_argument('--class-weight', type=_numbers, metavar='W,W,...', help='one weight for each class')
    parser.add_argument(
        '--label-smoothing', type=float, metavar='A', help='how much of the target is spread over all classes'
    )
    parser.add_argument('--lse-square-scale', type=float, metavar='S', help='factor of the squared logsumexp')
    parser.add_argument('--reduction', help="'mean', 'valid', 'sum' or 'none'")
    parser.add_argument(
        '--invalid-label', help="'nan', 'raise' or 'clip': how to treat labels outside [0, C)"
    )
    parser.add_argument(
        '-m', '--module', action='store_true', help='what follows is the name of a module, not a file'
    )
    # REMAINDER would need a positional of its own before it, and that takes away a '--' which belongs to the
    # script.
    parser.add_argument(
        'script', nargs=argparse.PARSER, help='a Python file or, after -m, a module; and its arguments'
    )


def run(args: argparse.Namespace) -> int:
    """Run the script or module of `args` as Python does, patched.

    Exceptions of the script pass through, SystemExit among them. Two lines on stderr say what was replaced,
    and how many losses and metrics were made of it.

    Parameters
    ----------
    args : argparse.Namespace
        What a parser with `add_arguments` returns.

    Returns
    -------
    int
        0, or 2 if the options are not valid or there is no such file.

    Notes
    -----
    MXNet is imported before the script starts. So environment variables that MXNet reads when it is imported
    have to be set outside the script.
    """
    script, *rest = args.script[1:] if args.script[0] == '--' else args.script
    if not args.module and not os.path.exists(script):
        return _refuse(f'script: expected a file, got {script!r}')
    names = (
        'ignore_label',
        'class_weight',
        'label_smoothing',
        'lse_square_scale',
        'reduction',
        'invalid_label',
    )
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        patched = patch(**options)
    except (TypeError, ValueError) as error:
        return _refuse(str(error))
    argv, path, process = sys.argv, sys.path[:], os.getpid()
    with patched:
        _report(f'{_replaced()}{f" with {options}" if options else ""}')
        try:
            sys.argv = [script, *rest]
            _execute(script, args.module)
        finally:
            if os.getpid() == process:  # and not a child that the script forked
                _report(_counted(patched))
            sys.argv, sys.path[:] = argv, path
    return 0


def _execute(script, is_module):
    """Run the script, and wait for its threads before the names are restored."""
    try:
        if is_module:
            runpy.run_module(script, run_name='__main__', alter_sys=True)
        else:
            _set_first_path(script)
            runpy.run_path(script, run_name='__main__')
    except SystemExit:
        _join_threads()
        raise
    _join_threads()  # not after an exception, whose traceback should not wait


def _set_first_path(script):
    """Put the script's folder, or the script if it is a folder, at the start of sys.path, as Python does."""
    if not (sys.flags.isolated or getattr(sys.flags, 'safe_path', False)):
        path = os.path.realpath(script)
        sys.path[0] = path if os.path.isdir(path) else os.path.dirname(path)


def _join_threads():
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def _numbers(text):
    return [float(number) for number in text.split(',')]


def _replaced():
    return f'replaced {", ".join(f"{module.__name__}.{name}" for name, (module, _) in _PLACES.items())}'


def _counted(patched):
    def plural(count, word, words):
        return f'{count} {word if count == 1 else words}'

    losses, metrics = plural(patched.losses, 'loss', 'losses'), plural(patched.metrics, 'metric', 'metrics')
    return f'{losses} and {metrics} were replaced'


def _report(text):
    print(f'gluon_stable_ce: {text}', file=sys.stderr, flush=True)


def _refuse(message):
    _report(message)
    return 2
