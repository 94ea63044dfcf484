"""The command ``python -m gluon_stable_ce run``: a script, with `patch`."""

import argparse
import atexit
import builtins
import functools
import io
import os
import pkgutil
import runpy
import sys
import textwrap
import types
from collections import Counter
from importlib.machinery import SourceFileLoader
from multiprocessing import spawn
from typing import Any, Dict, Optional, Tuple

import mxnet as mx

from ..kernels import choice
from ..loss import StableSoftmaxCrossEntropyLoss
from ..patching import PLACES, STOCK, patch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# operators with a cross entropy of their own
NOT_REPLACED = ('SoftmaxOutput', 'Softmax', 'softmax_cross_entropy')


def _numbers(text):
    return [float(number) for number in text.split(',')]


# of the loss: type, name of the value, help
_OPTIONS: Dict[str, Tuple[Any, Optional[str], str]] = {
    'ignore_label': (int, 'LABEL', 'label of positions that do not count'),
    'class_weight': (_numbers, 'W,W,...', 'one weight for each class'),
    'label_smoothing': (float, 'A', 'share of the target, spread over all classes'),
    'lse_square_scale': (float, 'S', 'factor of the squared logsumexp'),
    'reduction': (str, None, "'mean', 'valid', 'sum' or 'none'"),
    'invalid_label': (str, None, "'nan', 'raise' or 'clip': treatment of labels outside [0, C)"),
    'kernel': (str, None, "'auto', 'stock' or 'fused': the code that reduces the class axis"),
}
_LABEL_HINT = (
    '. Options of run, before the script: --ignore-label -1, if -1 is the label of padding; '
    '--invalid-label clip, to count them as the nearest class, as mx.metric.Perplexity does'
)
_DESCRIPTION = textwrap.fill(
    'Run a Python script, unmodified, with the loss and the metrics of this package in place of '
    "mxnet.gluon.loss.SoftmaxCrossEntropyLoss and mxnet.metric's CrossEntropy, NegativeLogLikelihood, "
    'Perplexity and Loss. The options are defaults for the losses that the script makes; --ignore-label and '
    '--invalid-label clip also apply to its metrics. '
    'Arguments after the script belong to it. MXNet is imported before the script starts, so environment '
    'variables that MXNet reads have to be set outside the script.',
    width=100,
)
_EPILOG = """\
examples:
  python -m gluon_stable_ce run train.py --epochs 3
  python -m gluon_stable_ce run --ignore-label -1 --label-smoothing 0.1 train.py --epochs 3
  python -m gluon_stable_ce run -m package.train --epochs 3

exit code:
  2 if the options are not valid or there is no such file; otherwise the exit code of the script
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command ``run``."""
    parser.allow_abbrev = False  # an option of the script is no abbreviation of these
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, (kind, metavar, text) in _OPTIONS.items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=kind, metavar=metavar, help=text)
    parser.add_argument(
        '-m', '--module', action='store_true', help='run a module by its name, and not a file'
    )
    # REMAINDER would need a positional of its own before it, and that takes away a '--' which belongs to the
    # script.
    parser.add_argument(
        'script', nargs=argparse.PARSER, help='a Python file or, after -m, a module; and its arguments'
    )


def run(args: argparse.Namespace) -> int:
    """Run the script or module of `args` as Python does, patched until the process ends, and return 0.

    Exceptions of the script pass through, SystemExit among them. A line on stderr lists the replaced names,
    the options and the kernel. Others at exit say how often each name was made.
    """
    script, *rest = args.script[1:] if args.script[0] == '--' else args.script
    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    try:
        if not args.module:
            _check_script(script)
        patched = start(options)
    except (TypeError, ValueError) as error:
        args.parser.error(str(error))
    _announce(patched, options)
    sys.argv = [script, *rest]
    _execute(script, args.module)
    return 0


def _check_script(script):
    if not os.path.exists(script):
        raise ValueError(f'script: expected a file, got {script!r}')
    if os.path.realpath(script).lower().endswith('.ipynb'):
        raise ValueError(
            f'script: expected Python, got a notebook. Convert it: jupyter nbconvert --to script {script}; '
            'or call gluon_stable_ce.patch() in its first cell'
        )


def start(options: Dict[str, Any]) -> Any:
    """Patch this process, and the processes that it will spawn."""
    patched = patch(**options)
    stock = spawn.get_preparation_data

    def get_preparation_data(name):
        return {**stock(name), 'gluon_stable_ce': _Start(options)}

    spawn.get_preparation_data = get_preparation_data
    return patched


class _Start:
    """Calls `start` in the process that unpickles it, where the package may not be on sys.path yet."""

    def __init__(self, options):
        self.options = options

    def __reduce__(self):
        code = (
            'import sys; sys.path.append(root); from gluon_stable_ce.commands import run; run.start(options)'
        )
        return exec, (code, {'root': ROOT, 'options': self.options})


def _announce(patched, options):
    """List the replaced names, and have the counts reported at the end, when all threads have ended."""
    names = ', '.join(f'{module.__name__}.{name}' for name, (module, _) in PLACES.items())
    kernel = choice.resolve(StableSoftmaxCrossEntropyLoss(**options)._options)
    _report(f'replaced {names}{f" with {options}" if options else ""}; kernel: {kernel}')
    patched._notify = functools.lru_cache(None)(_report)  # each message once
    patched._label_hint = _LABEL_HINT
    atexit.register(_report_counts, os.getpid(), patched, _count_calls())


def _count_calls():
    """Count, from now on, the calls of such operators, and objects of the stock classes, imported before."""
    calls: Counter = Counter()

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for module in (mx.nd, mx.sym):
        for name in NOT_REPLACED:
            if hasattr(module, name):
                setattr(module, name, counted(name, getattr(module, name)))
    for stock in {*STOCK.values()}:
        stock.__init__ = counted(f'{stock.__module__}.{stock.__name__}', stock.__init__)
    return calls


def _report_counts(process, patched, calls):
    if os.getpid() != process:  # a child that the script forked
        return
    _report(f'{patched}{_listed(patched.made)}')
    if patched.made['Loss'] and patched._options.get('ignore_label') is not None:
        _report('mxnet.metric.Loss averages the losses of all samples, with the zeros of ignored ones')
    if calls:
        _report(f"not replaced, MXNet's own{_listed(calls)}")


def _listed(counts):
    return ''.join(f'{", " if i else ": "}{name} {count}' for i, (name, count) in enumerate(counts.items()))


def _execute(script, is_module):
    """Run the script in a new module ``__main__``, which stays: its threads and processes look there."""
    main: Any = types.ModuleType('__main__')
    main.__builtins__ = builtins  # exec would set a dict
    sys.modules['__main__'] = sys.modules['__mp_main__'] = main  # multiprocessing set the second one, to ours
    if is_module:
        runpy._run_module_as_main(script)  # type: ignore[attr-defined]
        return
    path = os.path.abspath(script)
    is_folder = pkgutil.get_importer(path) is not None  # or a zip file
    _set_first_path(path if is_folder else os.path.dirname(os.path.realpath(script)), is_folder)
    if is_folder:
        runpy._run_module_as_main('__main__', alter_argv=False)  # type: ignore[attr-defined]
    else:
        main.__file__, main.__cached__ = path, None
        main.__loader__ = SourceFileLoader('__main__', path)
        exec(_code_of(path), main.__dict__)


def _set_first_path(folder, always):
    """Put a folder at the start of sys.path, in the place of the one that Python put there for ``-m``."""
    is_safe = sys.flags.isolated or getattr(sys.flags, 'safe_path', False)
    if not is_safe:
        del sys.path[0]
    if always or not is_safe:
        sys.path.insert(0, folder)


def _code_of(path):
    """Read and compile a file once, as it may be a pipe; or load a .pyc file."""
    with io.open_code(path) as file:
        source = file.read()
    return pkgutil.read_code(io.BytesIO(source)) or compile(source, path, 'exec', dont_inherit=True)


def _report(message):
    print(f'gluon_stable_ce: {message}', file=sys.stderr, flush=True)
