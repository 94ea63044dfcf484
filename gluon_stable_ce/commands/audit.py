"""The command ``python -m gluon_stable_ce audit``."""

import argparse
import json
import sys
from typing import Any

from ..auditing import audit
from ..auditing.files import read_files
from ..auditing.report import check_plot
from ..options import PRED_TYPES, check_number

_EXPECTED = (OSError, ValueError, TypeError, ImportError, MemoryError)
_EPILOG = """\
example:
  python -c "import numpy; numpy.savez('predictions.npz', pred=[[1e-43, 1], [.5, .5]], label=[0, 1])"
  python -m gluon_stable_ce audit predictions.npz --max-error 0.01

memory:
  .npy files are memory-mapped and read in chunks of about a million predictions. A chunk has at least one row
  of all classes. If the classes are not on the last axis, it has at least all predictions of one index of the
  first axis, or of the second if the classes are on the first. An .npz file is read whole. 4 bytes for each
  sample stay in memory, for the picture.

exit code:
  1 if mx.metric.CrossEntropy is off by more than --max-error, or cannot be compared with the exact value; one
    line on stderr says why
  2 if files or arguments are bad, or if no label is both valid and not ignored; one line on stderr says why
  0 otherwise
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command ``audit``."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        'files',
        nargs='+',
        metavar='FILE',
        help='one .npz with the keys pred and label; or two .npy, predictions, then labels',
    )
    add('--pred-type', default='probs', choices=PRED_TYPES, help='the kind of the predictions')
    add('--axis', type=int, default=-1, help='class axis of the predictions')
    add('--ignore-label', type=int, help='label that does not count')
    add('--eps', type=float, default=1e-12, help='the eps of mx.metric.CrossEntropy')
    add('--plot', metavar='FILE', help="draw each sample's NLL, stock and exact; needs matplotlib")
    add(
        '--json',
        action='store_true',
        help="print JSON; infinities and NaN are the strings 'inf', '-inf' and 'nan'",
    )
    add(
        '--max-error',
        type=float,
        metavar='R',
        help='exit 1 if the relative error of the stock metric is above R',
    )


def run(args: Any) -> int:
    """Run the command and return its exit code, which the epilog of the help explains."""
    try:
        return _run(args)
    except _EXPECTED as error:
        message = str(error) or type(error).__name__
    except Exception as error:  # Python would exit with 1, which is the code of a comparison that failed
        message = f'unexpected {type(error).__name__}: {error}'
    print('audit:', ' '.join(message.split()), file=sys.stderr)
    return 2


def _run(args):
    check_number('--max-error', args.max_error, low=0, optional=True)
    if args.plot:
        check_plot(args.plot)  # before a long computation, not after it
    options = {name: getattr(args, name) for name in ('pred_type', 'axis', 'ignore_label', 'eps')}
    found = audit(*read_files(args.files), **options, progress=True)
    if not found.samples:  # all values are NaN then: a wrong file or a wrong option, not a result
        counts = f'{found.invalid} invalid and {found.ignored} ignored'
        raise ValueError(f'label: expected at least one that is valid and not ignored, got {counts}')
    print(json.dumps(found.as_dict(), allow_nan=False) if args.json else found.table())
    if args.plot:
        found.plot(args.plot)
    if args.max_error is None or found.error <= args.max_error:
        return 0
    reason = f'mx.metric.CrossEntropy is {found.verdict}, and --max-error is {args.max_error:g}'
    print(f'audit: exit code 1: {reason}', file=sys.stderr)
    return 1
