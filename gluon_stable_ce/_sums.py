"""Exact sums: what makes a metric independent of batches, devices and workers, and of when somebody asks."""
import math

import numpy as np

_UNIT = 1126  # every finite float64 is an integer of 53 bits times 2**-1126 or more
_CHUNK = 2 ** 16  # values that a cache holds
_HUGE = 2.0 ** 900  # from here on values are scaled down first, so that nothing overflows


def exact_sum(values):
    """Sum of finite float64 `values`, (N,), without any rounding: an integer, in units of 2**-1126."""
    return sum(_sum_of_chunk(values[start:start + _CHUNK]) for start in range(0, len(values), _CHUNK))


def _sum_of_chunk(rest):
    """The same of a few values. Their leading bits, down to one place, add up in float64 without rounding; then those below, and so on
    (Rump, Ogita and Oishi, "Accurate Floating-Point Summation", 2008).
    """
    total, largest = 0, np.abs(rest).max()
    if largest >= _HUGE:
        huge = np.abs(rest) >= _HUGE
        return (exact_sum(rest[huge] / _HUGE) << 900) + exact_sum(rest[~huge])
    while largest:
        top = 2.0 ** (math.frexp(largest)[1] + len(rest).bit_length() + 1)
        leading = rest + top - top  # multiples of the ulp of top, whose sum is less than it
        mantissa, exponent = math.frexp(leading.sum())
        total += int(math.ldexp(mantissa, 53)) << exponent - 53 + _UNIT
        rest = rest - leading
        largest = np.abs(rest).max()
    return total


class Sums:
    """What a metric knows of the values it has seen: integers only, which add up exactly and in any order.

    Attributes
    ----------
    total : sum of the finite values in units of 2**-1126
    count : how many values, finite or not
    infinite, minus_infinite, nan : how many of them are not finite
    invalid : how many labels had no value
    """

    FIELDS = ('total', 'count', 'infinite', 'minus_infinite', 'nan', 'invalid')
    __slots__ = FIELDS

    def __init__(self, total=0, count=0, infinite=0, minus_infinite=0, nan=0, invalid=0):
        self.total, self.count, self.invalid = total, count, invalid
        self.infinite, self.minus_infinite, self.nan = infinite, minus_infinite, nan

    @classmethod
    def of(cls, values, invalid=0):
        """The sums of float64 `values`, (N,)."""
        finite = np.isfinite(values)
        if finite.all():
            return cls(total=exact_sum(values), count=len(values), invalid=invalid)
        return cls(total=exact_sum(values[finite]), count=len(values), infinite=int((values == np.inf).sum()),
                   minus_infinite=int((values == -np.inf).sum()), nan=int(np.isnan(values).sum()), invalid=invalid)

    def as_dict(self):
        """JSON values by name; the total in hexadecimal, as it is longer than what other readers of JSON take for a number."""
        return {name: f'{value:x}' if name == 'total' else value for name, value in zip(self.FIELDS, self)}

    @classmethod
    def from_dict(cls, fields):
        """The sums that `as_dict` was made of; ValueError if it was not made of any."""
        try:
            fields = {name: int(fields[name], 16) if name == 'total' else fields[name] for name in cls.FIELDS}
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f'state: expected sums with {", ".join(cls.FIELDS)}, got {fields!r}') from error
        if any(isinstance(value, bool) or not isinstance(value, int) for value in fields.values()):
            raise ValueError(f'state: expected sums of integers, got {fields!r}')
        return cls(**fields)

    def __iter__(self):
        return (getattr(self, name) for name in self.FIELDS)

    def __add__(self, other):
        return Sums(*map(int.__add__, self, other))

    def __sub__(self, other):
        return Sums(*map(int.__sub__, self, other))

    def over(self, count):
        """The sum of all values, divided by the integer `count` and rounded once; not finite where the values say so."""
        if self.nan or not count or (self.infinite and self.minus_infinite):
            return float('nan')
        if self.infinite or self.minus_infinite:
            return float('inf') if self.infinite else float('-inf')
        try:
            return self.total / (count << _UNIT)
        except OverflowError:
            return float('inf') if self.total > 0 else float('-inf')
