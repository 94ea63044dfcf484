"""The command line: ``python -m gluon_stable_ce {demo,audit}``."""
import argparse
import sys
from importlib import import_module

from . import __version__


def main(argv=None):
    """Run a command and return its exit code: 0, 1 if a check failed, 2 if the input was bad."""
    parser = argparse.ArgumentParser('python -m gluon_stable_ce', description='Cross entropy that tells the truth in both tails.')
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name in ('demo', 'audit'):
        module = import_module(f'.{name}', __package__)  # gluon_stable_ce.audit is also the name of a function
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == '__main__':
    sys.exit(main())
