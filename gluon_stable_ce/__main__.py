"""The command line: ``python -m gluon_stable_ce COMMAND``."""

import argparse
import sys
from importlib import import_module

from . import __version__

# name: (the module with its `add_arguments(parser)` and `run(args)`, summary)
COMMANDS = {
    'audit': (
        'gluon_stable_ce.audit',
        'Compute the exact cross entropy of given predictions, and how far an epsilon changes it.',
    ),
    'build': (
        'gluon_stable_ce.kernels.fused',
        'Compile the fused kernel, test it, and print its speed on this machine.',
    ),
    'run': (
        'gluon_stable_ce.patch',
        "Run a script or a module with this loss and these metrics in the place of MXNet's own.",
    ),
}


def main(argv=None):
    """Run a command and return its exit code: 0, 1 if a check failed, 2 if the input was bad."""
    parser = argparse.ArgumentParser(
        'python -m gluon_stable_ce',
        description='Cross entropy for MXNet Gluon that is accurate for probabilities near 0 and near 1.',
    )
    parser.add_argument('--version', action='version', version=__version__)
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name, (module_name, summary) in COMMANDS.items():
        module = import_module(module_name)  # not `from . import`: `gluon_stable_ce.audit` is also a function
        command = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == '__main__':
    sys.exit(main())
