"""The commands of ``python -m gluon_stable_ce``: each has `add_arguments(parser)` and `run(args)`."""
