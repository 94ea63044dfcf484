"""The command ``python -m gluon_stable_ce run``: a script, with `patch`."""

import argparse
import os
import runpy
import sys
import textwrap
import threading
from typing import Any, Dict, Optional, Tuple

from ..patching import PLACES, patch


def _numbers(text):
    return [float(number) for number in text.split(',')]


# of the loss: type, what stands for the value, help
_OPTIONS: Dict[str, Tuple[Any, Optional[str], str]] = {
    'ignore_label': (int, 'LABEL', 'label of positions that do not count'),
    'class_weight': (_numbers, 'W,W,...', 'one weight for each class'),
    'label_smoothing': (float, 'A', 'how much of the target is spread over all classes'),
    'lse_square_scale': (float, 'S', 'factor of the squared logsumexp'),
    'reduction': (str, None, "'mean', 'valid', 'sum' or 'none'"),
    'invalid_label': (str, None, "'nan', 'raise' or 'clip': how to treat labels outside [0, C)"),
}
_DESCRIPTION = textwrap.fill(
    'Run a Python script, unmodified, with the loss and the metrics of this package in the place of '
    "mxnet.gluon.loss.SoftmaxCrossEntropyLoss and mxnet.metric's CrossEntropy, Perplexity and Loss. "
    'The options are defaults for the losses that the script makes, and --ignore-label for its metrics. '
    'What follows the script belongs to it. MXNet is imported before the script starts, so environment '
    'variables that MXNet reads have to be set outside the script.',
    width=100,
)
_EPILOG = """\
examples:
  python -m gluon_stable_ce run train.py --epochs 3
  python -m gluon_stable_ce run --ignore-label -1 --label-smoothing 0.1 train.py --epochs 3
  python -m gluon_stable_ce run -m package.train --epochs 3

exit code:
  2 if the options are not valid or there is no such file; otherwise that of the script
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command ``run``."""
    parser.allow_abbrev = False  # an option of the script is no abbreviation of these
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, (kind, metavar, text) in _OPTIONS.items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=kind, metavar=metavar, help=text)
    parser.add_argument(
        '-m', '--module', action='store_true', help='what follows is the name of a module, not a file'
    )
    # REMAINDER would need a positional of its own before it, and that takes away a '--' which belongs to the
    # script.
    parser.add_argument(
        'script', nargs=argparse.PARSER, help='a Python file or, after -m, a module; and its arguments'
    )


def run(args: argparse.Namespace) -> int:
    """Run the script or module of `args` as Python does, patched, and return 0; or 2 if that cannot be.

    Exceptions of the script pass through, SystemExit among them. Two lines on stderr say what was replaced,
    and how many losses and metrics were made of it.
    """
    script, *rest = args.script[1:] if args.script[0] == '--' else args.script
    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    try:
        if not args.module and not os.path.exists(script):
            raise ValueError(f'script: expected a file, got {script!r}')
        patched = patch(**options)
    except (TypeError, ValueError) as error:
        _report(error)
        return 2
    argv, path, process = sys.argv, sys.path[:], os.getpid()
    with patched:
        names = ', '.join(f'{module.__name__}.{name}' for name, (module, _) in PLACES.items())
        _report(f'replaced {names}{f" with {options}" if options else ""}')
        try:
            sys.argv = [script, *rest]
            _execute(script, args.module)
        finally:
            if os.getpid() == process:  # and not a child that the script forked
                _report(patched)
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


def _report(message):
    print(f'gluon_stable_ce: {message}', file=sys.stderr, flush=True)
