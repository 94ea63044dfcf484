"""What all metrics share: a mean with exact sums, of values that the device may still be computing."""

import copy
import inspect
import math
import re
from collections import deque
from fractions import Fraction
from itertools import zip_longest
from threading import RLock
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from .array_api import Array, MXNetError

_AHEAD = 2  # updates that the device may be behind
_AT_ONCE = 32  # arrays that are read together
_WINDOWS = ('local', 'global')

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


class ExactSums:
    """Sums of the values that a metric is the mean of: integers only, which add up exactly and in any order.

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
        """Sum float64 `values`, (N,)."""
        finite = np.isfinite(values)
        if finite.all():
            return cls(total=exact_sum(values), count=len(values), invalid=invalid)
        return cls(
            total=exact_sum(values[finite]),
            count=len(values),
            infinite=int((values == np.inf).sum()),
            minus_infinite=int((values == -np.inf).sum()),
            nan=int(np.isnan(values).sum()),
            invalid=invalid,
        )

    def as_dict(self):
        """Return JSON values by name; the total in hexadecimal, as other readers take no such number."""
        return {name: f'{value:x}' if name == 'total' else value for name, value in zip(self.FIELDS, self)}

    @classmethod
    def from_dict(cls, fields):
        """Return the sums that `as_dict` was made from; ValueError if it was made from none."""
        try:
            total, *counts = (fields[name] for name in cls.FIELDS)
            is_sums = (
                isinstance(total, str)
                and re.fullmatch('-?[0-9a-f]+', total)
                and all(type(count) is int and count >= 0 for count in counts)
                and sum(counts[1:4]) <= counts[0]  # of the values, as many are not finite
                and (counts[0] or not int(total, 16))
            )
        except (TypeError, KeyError):
            is_sums = False
        if not is_sums:
            raise ValueError(f'state: expected sums with {", ".join(cls.FIELDS)}, got {fields!r:.200}')
        return cls(int(total, 16), *counts)

    def __iter__(self):
        return (getattr(self, name) for name in self.FIELDS)

    def __add__(self, other):
        return ExactSums(*map(int.__add__, self, other))

    def over(self, count):
        """Divide the sum of all values by the integer `count`, with one rounding."""
        if self.nan or not count or (self.infinite and self.minus_infinite):
            return float('nan')
        if self.infinite or self.minus_infinite:
            return float('inf') if self.infinite else float('-inf')
        try:
            if isinstance(count, float):  # of a subclass that counts by itself
                return float(Fraction(self.total, 2**_UNIT) / Fraction(count))
            return self.total / (count << _UNIT)
        except OverflowError:
            return float('inf') if self.total > 0 else float('-inf')


def _count_property(window: str, doc: str) -> Any:
    """Make a property of how many values there are. Subclasses that count by themselves set it."""

    def set_count(metric, value):
        value = float(value)
        with metric._lock:
            sums = copy.copy(metric._window(window)) if value else ExactSums(metric._window(window).total)
            sums.count = int(value) if value.is_integer() else value
            metric._sums[window] = sums

    return property(lambda metric: metric._window(window).count, set_count, doc=doc)


def _sum_property(window: str, doc: str) -> Any:
    """Make a property of the sum of all values. Subclasses that add up by themselves set it."""

    def set_sum(metric, value):
        with metric._lock:
            before = metric._window(window)
            sums = ExactSums.of(np.array([float(value)]), before.invalid)
            sums.count = before.count
            metric._sums[window] = sums

    return property(lambda metric: metric._window(window).over(1), set_sum, doc=doc)


class RunningMean:
    """Mixin for an EvalMetric: the mean of values that the device may still be computing.

    `_push` queues arrays of one value per position, and only waits for those of `_AHEAD` updates ago, so that
    neither work nor memory pile up. Sums are exact, so the result does not depend on when the queue is read.
    Updates may come from several threads.
    """

    name: str  # EvalMetric's
    _kwargs: Dict[str, Any]  # EvalMetric's: the options
    _lock: Any
    _computing: Deque[Tuple[Array, Optional[Callable[[], Array]]]]  # the last updates
    _computed: Deque[Array]  # those before
    _sums: Dict[str, ExactSums]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `help` show the arguments of ``__init__``, and not those of ``__new__``, which takes any."""
        super().__init_subclass__(**kwargs)
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a metric that holds nothing, before any `reset`, which a subclass may replace."""
        metric = super().__new__(cls)
        metric._lock = RLock()
        metric._computing, metric._computed = deque(), deque()
        metric._sums = {window: ExactSums() for window in _WINDOWS}
        return metric

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._computing.clear()
            self._computed.clear()
            self._sums = {window: ExactSums() for window in _WINDOWS}

    def reset_local(self) -> None:
        """Begin a new window for `get`; `get_global` goes on."""
        with self._lock:
            self._drain()
            self._sums['local'] = ExactSums()

    def get(self) -> Tuple[str, float]:
        """Return (name, value) of all since the last `reset` or `reset_local`; NaN if there is nothing."""
        return self.name, self._value_of(self._window('local'))

    def get_global(self) -> Tuple[str, float]:
        """Return (name, value) of all since the last `reset`; NaN if there is nothing."""
        return self.name, self._value_of(self._window('global'))

    num_inst = _count_property('local', 'How many values `get` is the mean of.')
    sum_metric = _sum_property('local', 'The sum of the values that `get` is the mean of, rounded once.')
    global_num_inst = _count_property('global', 'How many values `get_global` is the mean of.')
    global_sum_metric = _sum_property(
        'global', 'The sum of the values that `get_global` is the mean of, rounded once.'
    )

    @property
    def num_infinite(self) -> int:
        """How many of the values that `get` is the mean of are infinite."""
        return self._window('local').infinite

    def merge(self, other: Any) -> None:
        """Take in what another metric of this kind holds, as if its updates had come after this metric's.

        Raises
        ------
        TypeError, ValueError
            If `other` is not the same class of metric, or has other options.
        """
        if type(other) is not type(self):
            raise TypeError(f'other: expected a {type(self).__name__}, got {type(other).__name__}')
        if other._identity() != self._identity():
            raise ValueError(f'other: expected a metric with {self._identity()}, got {other._identity()}')
        theirs = {window: other._window(window) for window in _WINDOWS}
        with self._lock:
            self._drain()
            self._sums = {window: self._sums[window] + theirs[window] for window in _WINDOWS}

    def state_dict(self) -> Dict[str, Any]:
        """Return all that the metric holds as plain JSON values, which can go into a checkpoint."""
        return {**self._identity(), **{window: self._window(window).as_dict() for window in _WINDOWS}}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a `state_dict`, in the place of what the metric holds.

        Raises
        ------
        ValueError
            If `state` is something else; nothing is changed then.
        """
        try:
            got = {name: state[name] for name in self._identity()}
            sums = {window: ExactSums.from_dict(state[window]) for window in _WINDOWS}
        except (TypeError, KeyError) as error:
            raise ValueError(f'state: expected what state_dict() returns, got {state!r:.200}') from error
        if got != self._identity():
            raise ValueError(f'state: expected that of a metric with {self._identity()}, got {got}')
        with self._lock:
            self._computing.clear()
            self._computed.clear()
            self._sums = sums

    def all_reduce(self, store: Any) -> Any:
        """Return a metric of what all workers hold; this one stays as it is.

        All workers must call this, with data or without.

        The result's `get` and `get_global` are exactly what one process would report that had received all
        updates.

        Parameters
        ----------
        store : mxnet.kvstore.KVStore, the module horovod.mxnet, or a store with their methods
            See `gluon_stable_ce.distributed.all_reduce`.
        """
        from .distributed import all_reduce  # only metrics of many workers need it

        local = [self._window(window) for window in _WINDOWS]
        numbers = all_reduce(store, [number for sums in local for number in sums])
        size = len(ExactSums.FIELDS)
        whole = copy.copy(self)
        whole._sums = {
            window: ExactSums(*numbers[i * size : (i + 1) * size]) for i, window in enumerate(_WINDOWS)
        }
        return whole

    def _identity(self) -> Dict[str, Any]:
        """Return what metrics have in common that may be merged, or take each other's state."""
        options = {name: value for name, value in self._kwargs.items() if name != 'kernel'}
        return {'metric': type(self).__name__, 'options': options}

    def _push(self, arrays: List[Array], again: Sequence[Callable[[], Array]] = ()) -> None:
        """Queue arrays that the device may still be computing, and what computes them `again`."""
        with self._lock:
            self._computing.extend(zip_longest(arrays, again))
            while len(self._computing) > _AHEAD * max(1, len(arrays)):
                array, _ = self._computing.popleft()
                try:
                    array.wait_to_read()
                except MXNetError:
                    self._compute_again()
                    raise
                self._computed.append(array)
            if len(self._computed) > _AT_ONCE:
                self._read(self._computed)

    def _drain(self) -> None:
        """Take all that is queued into the sums. Raise an error of the device once all else is counted."""
        failed = None
        while self._computing:
            array, _ = self._computing.popleft()
            try:
                array.wait_to_read()
                self._computed.append(array)
            except MXNetError as error:
                failed = error
                self._compute_again()
        self._read(self._computed)
        if failed is not None:
            raise failed

    def _compute_again(self) -> None:
        """Compute what was queued behind an error again: MXNet may have skipped it silently."""
        self._computing = deque((again() if again else array, again) for array, again in self._computing)

    def _read(self, arrays: Deque[Array]) -> None:
        """Take computed arrays into the sums."""
        if arrays:
            values = np.concatenate([array.asnumpy().ravel() for array in arrays])
            arrays.clear()
            sums = self._sums_of(values.astype('float64', copy=False))
            self._sums = {window: before + sums for window, before in self._sums.items()}

    def _window(self, window: str) -> ExactSums:
        with self._lock:
            self._drain()
            return self._sums[window]

    def _value_of(self, sums: ExactSums) -> float:
        return sums.over(sums.count)

    def _sums_of(self, values: np.ndarray) -> ExactSums:
        return ExactSums.of(values)

    def __getstate__(self) -> Dict[str, Any]:
        """Return what a copy needs: the sums, without arrays on a device and without the lock."""
        with self._lock:
            self._drain()
            state = dict(self.__dict__, _sums=dict(self._sums), _computing=deque(), _computed=deque())
        del state['_lock']
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=RLock())
