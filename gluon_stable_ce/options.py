"""The options of losses and metrics, the values that they may have, and their checks."""

from numbers import Integral, Real
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import numpy as np

INTEGERS = 2**53 - 1  # float64, in which labels are compared, tells this one from its neighbours
FLOAT32_MAX = 3.4028234663852886e38  # MXNet reads larger numbers as others

REDUCTIONS = ('mean', 'valid', 'sum', 'none')
INVALID_LABELS = ('nan', 'raise', 'clip')
KERNELS = ('auto', 'stock', 'fused')
PRED_TYPES = ('probs', 'logits', 'log_probs')


class Options(NamedTuple):
    """The options of a loss. Those that a metric does not have are at their defaults."""

    axis: int = -1
    summed_axes: Tuple[int, ...] = ()  # further class axes of dense log-probabilities, over which is summed
    batch_axes: Tuple[int, ...] = (0,)
    sparse_label: bool = True
    pred_type: str = 'logits'
    weight: Optional[float] = None
    ignore_label: Optional[int] = None
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    reduction: str = 'mean'
    invalid_label: str = 'nan'
    kernel: str = 'auto'


def check_number(
    name: str,
    value: Any,
    kind: Any = Real,
    low: float = float('-inf'),
    high: float = float('inf'),
    optional: bool = False,
) -> Any:
    """Return `value` as an int or a float, or an optional None.

    Raises
    ------
    TypeError, ValueError
        If it is no such number.
    """
    if value is None and optional:
        return None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f'{name}: expected {"an integer" if kind is Integral else "a number"}, got {value!r}')
    if not low <= value <= high:
        raise ValueError(f'{name}: expected a number from {low} to {high}, got {value}')
    return int(value) if kind is Integral else float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; TypeError unless it is one, or 0 or 1."""
    if not isinstance(value, (bool, np.bool_, Integral)) or value not in (0, 1):
        raise TypeError(f'{name}: expected True or False, got {value!r:.80}')
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value`; ValueError unless it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f'{name}: expected one of {", ".join(map(repr, choices))}, got {value!r:.80}')
    return value


def check_ignore_label(ignore_label: Any, sparse_label: bool) -> Optional[int]:
    """Return `ignore_label`; TypeError or ValueError unless labels can be compared with it."""
    ignore_label = check_number('ignore_label', ignore_label, Integral, -INTEGERS, INTEGERS, optional=True)
    if not sparse_label and ignore_label is not None:
        raise ValueError(
            'ignore_label: expected None with sparse_label=False, as a distribution has no label to compare '
            f'with {ignore_label}; a sample_weight of 0 removes a position'
        )
    return ignore_label


def as_numbers(name: str, values: Any) -> np.ndarray:
    """Return a NumPy array or a list of numbers as float64; TypeError if it is something else."""
    array = np.asarray(values) if isinstance(values, (np.ndarray, list, tuple)) else np.asarray(None)
    if array.dtype.kind not in 'iuf':
        raise TypeError(f'{name}: expected an array or a list of numbers, got {values!r:.80}')
    return array.astype('float64')
