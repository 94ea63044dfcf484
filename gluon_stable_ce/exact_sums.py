"""Sums without any rounding: their order, and how they are split, change nothing.

Metrics, the audit and the sums over workers are made of them.
"""

import math
from fractions import Fraction
from operator import add
from typing import NamedTuple

import numpy as np

_UNIT = 1126  # every finite float64 is an integer of 53 bits times 2**-1126 or more
_FEW = 256  # values for which a list is faster than NumPy
_CHUNK = 2**16  # values that a cache holds
_HUGE = 2.0**900  # from here on values are scaled down first, so that nothing overflows


def exact_sum(values):
    """Sum finite float64 `values`, (N,), without any rounding: an integer, in units of 2**-1126."""
    if len(values) <= _FEW:
        return _sum_of_few(values.tolist())
    return sum(_sum_of_chunk(values[start : start + _CHUNK]) for start in range(0, len(values), _CHUNK))


def _sum_of_few(rest):
    """Sum a list of values: round the sum, and go on with what was rounded off."""
    total = 0
    try:
        while True:
            rounded = math.fsum(rest)
            if not rounded:
                return total
            total += _in_units(rounded)
            rest.append(-rounded)
    except OverflowError:  # of huge values
        return total + sum(map(_in_units, rest))


def _in_units(value):
    mantissa, exponent = math.frexp(value)
    return int(math.ldexp(mantissa, 53)) << exponent - 53 + _UNIT


def _sum_of_chunk(rest):
    """Sum values that a cache holds.

    Their leading bits, down to one place, add up in float64 without rounding; then those below, and so on.
    See Rump, Ogita and Oishi, "Accurate Floating-Point Summation", 2008.
    """
    total, largest = 0, np.abs(rest).max()
    if largest >= _HUGE:
        huge = np.abs(rest) >= _HUGE
        return (exact_sum(rest[huge] / _HUGE) << 900) + exact_sum(rest[~huge])
    while largest:
        top = 2.0 ** (math.frexp(largest)[1] + len(rest).bit_length() + 1)
        leading = rest + top - top  # multiples of the ulp of top, whose sum is less than it
        total += _in_units(leading.sum())
        rest = rest - leading
        largest = np.abs(rest).max()
    return total


class ExactSums(NamedTuple):
    """Sums of the values that a metric is the mean of: integers, which add up exactly and in any order."""

    total: int = 0  # of the finite values, in units of 2**-1126
    count: int = 0  # type: ignore[assignment]  # of all values; a float where a subclass of a metric counts by itself
    infinite: int = 0  # how many of them are inf
    minus_infinite: int = 0
    nan: int = 0
    invalid: int = 0  # how many labels had no value
    impossible: int = 0  # how many predictions had none, as no distribution has them
    unknown: int = 0  # how often arrays were read that may hold anything, after an error

    @classmethod
    def of(cls, values, **others):
        """Sum float64 `values`, (N,); `others` are further counts."""
        is_finite = np.isfinite(values)
        if is_finite.all():
            return cls(exact_sum(values), len(values), **others)
        special = values[~is_finite]
        return cls(
            total=exact_sum(values[is_finite]),
            count=len(values),
            infinite=int((special == np.inf).sum()),
            minus_infinite=int((special == -np.inf).sum()),
            nan=int(np.isnan(special).sum()),
            **others,
        )

    def with_count(self, count):
        """Return these sums with another count, a float: of 0 values, only the total is left."""
        # a fraction at times: gluoncv's RPNL1LossMetric counts a sum of weights divided by 4
        sums = self if count else ExactSums(self.total)
        return sums._replace(count=int(count) if count.is_integer() else count)

    def with_sum(self, value):
        """Return sums with the same counts, but of infinite values and NaN, whose sum is a float."""
        sums = ExactSums.of(np.array([value]))
        return sums._replace(**{name: getattr(self, name) for name in ('count', *self._fields[5:])})

    def as_dict(self):
        """Return JSON values by name; the total in hexadecimal, as other readers take no such number."""
        return {**self._asdict(), 'total': f'{self.total:x}'}

    @classmethod
    def from_dict(cls, state):
        """Return the sums that `as_dict` was made from; ValueError if it was made from none."""
        try:
            total, *counts = (state[name] for name in cls._fields)
            sums = cls(int(total, 16), *counts)
            is_right = (
                sums.as_dict()['total'] == total
                and (type(sums.count) is int or 0 < math.modf(sums.count)[0] < 1)  # if a subclass counts
                and all(type(count) is int for count in counts[1:])
                and all(count >= 0 for count in counts)
                and sums.infinite + sums.minus_infinite + sums.nan <= sums.count
                and (sums.count or not sums.total)
            )
        except (TypeError, KeyError, ValueError):
            is_right = False
        if not is_right:
            raise ValueError(f'state: expected sums with {", ".join(cls._fields)}, got {state!r:.200}')
        return sums

    def __add__(self, other):
        return ExactSums(*map(add, self, other))

    def over(self, count):
        """Divide the sum of all values by `count`, with one rounding."""
        if self.nan or not count or (self.infinite and self.minus_infinite):
            return float('nan')
        if self.infinite or self.minus_infinite:
            return float('inf') if self.infinite else float('-inf')
        try:
            if isinstance(count, int):
                return self.total / (count << _UNIT)  # which rounds once
            return float(self.total / (Fraction(count) * 2**_UNIT))
        except OverflowError:
            return float('inf') if self.total > 0 else float('-inf')
