"""What labels mean, as plain data, for each dtype, bad value and option."""

from typing import Optional, Union

import numpy as np

CLASSES = 5
DTYPES = ('int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64')
INVALID, IGNORED = 'invalid', 'ignored'

NUMBERS = (
    *(0, 1, CLASSES - 1),
    *(-1, CLASSES, 2**24, 2**24 + 1, 2**31 - 1, 2**32 + 1, 2**53 - 1, 2**53 + 1, 2**62),
    *(2.5, -0.5, CLASSES - 0.5, -0.0, float('nan'), float('inf'), -float('inf')),
)
# None, a bad label, a class, and the limits of what a label can be compared with
IGNORE_LABELS = (None, -1, 1, CLASSES, 2**24 + 1, 2**53 - 1, 1 - 2**53)


def labels_of(dtype: str) -> np.ndarray:
    """Those of NUMBERS that the dtype holds exactly."""
    limits = np.iinfo(dtype) if dtype.lstrip('u').startswith('int') else np.finfo(dtype)
    labels = []
    for number in NUMBERS:
        is_finite = abs(number) < float('inf')
        if is_finite and limits.min <= number <= limits.max:
            label = np.dtype(dtype).type(number)
            if label.item() == number:  # Python compares integers with floats exactly
                labels.append(label)
        elif not is_finite and dtype.startswith('float'):
            labels.append(np.dtype(dtype).type(number))
    return np.array(labels, dtype)


def class_of(label: np.generic, ignore_label: Optional[int], clip: bool) -> Union[int, str]:
    """The class that a label names, or INVALID or IGNORED."""
    number = label.item()
    if ignore_label is not None and number == ignore_label:
        return IGNORED
    if clip:
        return 0 if number != number else int(min(max(number, 0), CLASSES - 1))
    return int(number) if 0 <= number < CLASSES and number == int(number) else INVALID
