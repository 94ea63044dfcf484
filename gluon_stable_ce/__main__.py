"""The command line: ``python -m gluon_stable_ce COMMAND``."""

import argparse
import sys

from . import __version__
from .commands import audit, build, run

COMMANDS = {
    'audit': (
        audit,
        'Compute the exact cross entropy of given predictions, and the error that an epsilon makes.',
    ),
    'build': (build, 'Compile the fused kernel and test it.'),
    'run': (run, "Run a script or a module with this loss and these metrics in place of MXNet's own."),
}


def main(argv=None):
    """Run a command and return its exit code: 0, 1 if a check failed, 2 if the input was bad."""
    parser = argparse.ArgumentParser(
        'python -m gluon_stable_ce',
        description='Cross entropy for MXNet Gluon that is accurate for probabilities near 0 and near 1.',
    )
    parser.add_argument('--version', action='version', version=__version__)
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name, (module, summary) in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(f'unrecognized arguments: {" ".join(unknown)}')
    return args.run(args)


if __name__ == '__main__':
    sys.exit(main())
