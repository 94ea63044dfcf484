"""Checks of options, and the values that they may have."""

from numbers import Integral, Real
from typing import Any, Sequence

INTEGERS = 2**53  # up to which float64, in which labels are compared, holds every integer
FLOAT32_MAX = 3.4028234663852886e38  # MXNet reads larger numbers as others

REDUCTIONS = ('mean', 'sum', 'none')
INVALID_LABELS = ('nan', 'raise', 'clip')
PRED_TYPES = ('probs', 'logits', 'log_probs')


def check_number(
    name: str,
    value: Any,
    kind: Any = Real,
    low: float = float('-inf'),
    high: float = float('inf'),
    optional: bool = False,
) -> None:
    """Raise TypeError or ValueError unless `value` is such a number, or None if `optional`."""
    if value is None and optional:
        return
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f'{name}: expected {"an integer" if kind is Integral else "a number"}, got {value!r}')
    if not low <= value <= high:
        raise ValueError(f'{name}: expected a number from {low} to {high}, got {value}')


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless the option `name` is one of `choices`."""
    if value not in choices:
        raise ValueError(f'{name}: expected one of {", ".join(map(repr, choices))}, got {value!r}')


def check_ignore_label(ignore_label: Any, sparse_label: bool) -> None:
    """Raise TypeError or ValueError unless labels can be compared with `ignore_label`."""
    check_number('ignore_label', ignore_label, Integral, low=-INTEGERS, high=INTEGERS, optional=True)
    if not sparse_label and ignore_label is not None:
        raise ValueError(
            'ignore_label: expected None with sparse_label=False, as a distribution has no label to compare '
            f'with {ignore_label}; a sample_weight of 0 removes a position'
        )
