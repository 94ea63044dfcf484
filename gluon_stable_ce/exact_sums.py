"""Sums without any rounding: their order, and how they are split, change nothing.

Metrics, the audit and the sums over workers are made of them.
"""

import math
from dataclasses import asdict, astuple, dataclass, replace
from fractions import Fraction
from operator import add

import numpy as np

_UNIT = 1126  # every finite float64 is an integer of 53 bits times 2**-1126 or more
_CHUNK = 2**16  # values that a cache holds
_HUGE = 2.0**900  # from here on values are scaled down first, so that nothing overflows


def exact_sum(values):
    """Sum finite float64 `values`, (N,), without any rounding: an integer, in units of 2**-1126."""
    return sum(_sum_of_chunk(values[start : start + _CHUNK]) for start in range(0, len(values), _CHUNK))


def _sum_of_chunk(rest):
    """Sum a few values.

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
        mantissa, exponent = math.frexp(leading.sum())
        total += int(math.ldexp(mantissa, 53)) << exponent - 53 + _UNIT
        rest = rest - leading
        largest = np.abs(rest).max()
    return total


@dataclass(frozen=True)
class ExactSums:
    """Sums of the values that a metric is the mean of: integers, which add up exactly and in any order."""

    total: int = 0  # of the finite values, in units of 2**-1126
    count: int = 0  # of all values; a float where a subclass of a metric counts by itself
    infinite: int = 0  # how many of them are inf
    minus_infinite: int = 0
    nan: int = 0
    invalid: int = 0  # how many labels had no value

    @classmethod
    def of(cls, values, invalid=0):
        """Sum float64 `values`, (N,)."""
        is_finite = np.isfinite(values)
        others = values[~is_finite]
        return cls(
            total=exact_sum(values[is_finite] if len(others) else values),
            count=len(values),
            infinite=int((others == np.inf).sum()),
            minus_infinite=int((others == -np.inf).sum()),
            nan=int(np.isnan(others).sum()),
            invalid=invalid,
        )

    def with_count(self, count):
        """Return these sums with another count, a float: of 0 values, only the total is left."""
        # a fraction at times: gluoncv's RPNL1LossMetric counts a sum of weights divided by 4
        sums = self if count else ExactSums(self.total)
        return replace(sums, count=int(count) if count.is_integer() else count)

    def with_sum(self, value):
        """Return sums with the same counts of values and of invalid labels, whose sum is a float."""
        return replace(ExactSums.of(np.array([value]), self.invalid), count=self.count)

    def as_dict(self):
        """Return JSON values by name; the total in hexadecimal, as other readers take no such number."""
        return {**asdict(self), 'total': f'{self.total:x}'}

    @classmethod
    def from_dict(cls, state):
        """Return the sums that `as_dict` was made from; ValueError if it was made from none."""
        names = [*cls.__dataclass_fields__]
        try:
            total, *counts = (state[name] for name in names)
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
            raise ValueError(f'state: expected sums with {", ".join(names)}, got {state!r:.200}')
        return sums

    def __add__(self, other):
        return ExactSums(*map(add, astuple(self), astuple(other)))

    def over(self, count):
        """Divide the sum of all values by `count`, with one rounding."""
        if self.nan or not count or (self.infinite and self.minus_infinite):
            return float('nan')
        if self.infinite or self.minus_infinite:
            return float('inf') if self.infinite else float('-inf')
        try:
            return float(self.total / (Fraction(count) * 2**_UNIT))
        except OverflowError:
            return float('inf') if self.total > 0 else float('-inf')
