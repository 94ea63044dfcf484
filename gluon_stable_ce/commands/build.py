"""The command ``python -m gluon_stable_ce build``: compile the fused kernel, and print its path."""

import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from importlib.machinery import PathFinder

from ..kernels import library
from ..kernels.build import BuildError, build

PACKAGE = os.path.dirname(library.HERE)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments of the command ``build``."""
    parser.description = (
        f'{parser.description or ""} It needs MXNet 1.9 and a C++ compiler: $CXX, or else g++.'
        ' Without the fused kernel, the stock kernel is used.'
    )
    parser.epilog = 'Example: CXX=clang++ python -m gluon_stable_ce build --force'
    parser.add_argument('--force', action='store_true', help='compile even if it has been compiled already')


def run(args: Namespace) -> int:
    """Compile the operator and print its path: 0, or 2 if that cannot be done."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a library that is not used: here is a new one, or an error
        try:
            path = build(force=args.force)
            if not library.load():
                raise BuildError(f'{path}: does not load; to rebuild it: {library.HOW_TO_BUILD} --force')
        except (BuildError, OSError) as error:
            print(f'gluon_stable_ce build: {error}', file=sys.stderr)
            return 2
    _name_other_copy()
    print(path)
    return 0


def _name_other_copy() -> None:
    """Say if other folders would import another copy of the package, which does not use this library."""
    installed = PathFinder.find_spec('gluon_stable_ce', sys.path[1:])
    if not installed or not installed.origin:
        return
    other = os.path.dirname(installed.origin)
    if not os.path.samefile(other, PACKAGE):
        print(
            f'gluon_stable_ce build: this is the library of {PACKAGE}. Another copy of the package is in '
            f'{other}. To build for that, run the command in another folder',
            file=sys.stderr,
        )
