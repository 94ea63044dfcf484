"""Compare the exact NLL of given predictions with what MXNet's own metrics report."""

from .computation import audit
from .report import Audit, Worst

__all__ = ['Audit', 'Worst', 'audit']
