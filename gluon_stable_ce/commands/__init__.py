"""The commands of ``python -m gluon_stable_ce``, each with `add_arguments(parser)` and `run(args)`."""
