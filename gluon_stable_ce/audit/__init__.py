"""Compare the exact NLL of given predictions with what MXNet's own metrics report."""

from .command import add_arguments, run
from .compute import audit
from .report import Audit, Worst

__all__ = ['Audit', 'Worst', 'add_arguments', 'audit', 'run']
