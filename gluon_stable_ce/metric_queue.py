"""What all metrics share: the mean of values that the device may still be computing."""

import copy
import inspect
from collections import deque
from dataclasses import astuple
from itertools import zip_longest
from threading import RLock
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple, Type, TypeVar

import numpy as np

from . import distributed
from .array_api import Array, MXNetError
from .exact_sums import ExactSums

_AHEAD = 2  # updates that the device may be behind
_AT_ONCE = 32  # arrays that are read together
_WINDOWS = ('local', 'global')
_Metric = TypeVar('_Metric', bound='RunningMean')
# How a property is read and replaced in ExactSums.
_COUNT = (lambda sums: sums.count, ExactSums.with_count)
_SUM = (lambda sums: sums.over(1), ExactSums.with_sum)


def _window_property(window: str, read: Callable, replaced: Callable, doc: str) -> Any:
    """Make a property of the sums of a window. Subclasses that add up by themselves set it."""

    def set_value(metric, value):
        with metric._lock:
            metric._sums[window] = replaced(metric._window(window), float(value))

    return property(lambda metric: read(metric._window(window)), set_value, doc=doc)


class RunningMean:
    """Mixin for an EvalMetric: the mean of values that the device may still be computing.

    `_push` queues arrays of one value per position, and only waits for those of `_AHEAD` updates ago, so that
    neither work nor memory pile up. Sums are exact, so the result does not depend on when the queue is read.
    Updates may come from several threads.
    """

    name: str  # EvalMetric's
    _kwargs: Dict[str, Any]  # EvalMetric's: the options
    _lock: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `help` show the arguments of ``__init__``, and not those of ``__new__``, which takes any."""
        super().__init_subclass__(**kwargs)
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def __new__(cls: Type[_Metric], *args: Any, **kwargs: Any) -> _Metric:
        """Make a metric that holds nothing, whatever the `reset` of a subclass does."""
        metric = super().__new__(cls)
        metric._lock = RLock()
        RunningMean.reset(metric)
        return metric

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            # the last updates, and their inputs
            self._computing: Deque[Tuple[Array, Optional[Tuple[Any, ...]]]] = deque()
            self._computed: Deque[Array] = deque()  # those before
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

    num_inst = _window_property('local', *_COUNT, 'How many values `get` is the mean of.')
    sum_metric = _window_property(
        'local', *_SUM, 'The sum of the values that `get` is the mean of, rounded once.'
    )
    global_num_inst = _window_property('global', *_COUNT, 'How many values `get_global` is the mean of.')
    global_sum_metric = _window_property(
        'global', *_SUM, 'The sum of the values that `get_global` is the mean of, rounded once.'
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
            self._sums = {window: self._window(window) + theirs[window] for window in _WINDOWS}

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
            RunningMean.reset(self)
            self._sums = sums

    def all_reduce(self, store: Any) -> Any:
        """Return a metric of what all workers hold; this one stays as it is.

        All workers must call this, with data or without. The result's `get` and `get_global` are exactly what
        one process would report that had received all updates.

        Parameters
        ----------
        store : mxnet.kvstore.KVStore, the module horovod.mxnet, or a store with their methods
            See `gluon_stable_ce.distributed.all_reduce`.

        Raises
        ------
        ValueError
            If a subclass has set a count that is no whole number.
        """
        local = [number for window in _WINDOWS for number in astuple(self._window(window))]
        if not all(isinstance(number, int) for number in local):
            raise ValueError(f'num_inst: expected a whole number to add up over workers, got {self.num_inst}')
        numbers = distributed.all_reduce(store, local)
        half = len(numbers) // 2
        whole = copy.copy(self)
        whole._sums = {'local': ExactSums(*numbers[:half]), 'global': ExactSums(*numbers[half:])}
        return whole

    def _identity(self) -> Dict[str, Any]:
        """Return what metrics have in common that may be merged, or take each other's state."""
        options = {name: value for name, value in self._kwargs.items() if name != 'kernel'}
        return {'metric': type(self).__name__, 'options': options}

    def _compute(self, *inputs: Any) -> Array:
        """Compute the values of an update from what was queued with them."""
        raise NotImplementedError

    def _push(self, arrays: List[Array], inputs: Sequence[Tuple[Any, ...]] = ()) -> None:
        """Queue arrays that the device may still be computing, and the `inputs` to compute them again."""
        with self._lock:
            self._computing.extend(zip_longest(arrays, inputs))
            while len(self._computing) > _AHEAD * max(1, len(arrays)):
                self._wait_for_oldest()
            if len(self._computed) > _AT_ONCE:
                self._read()

    def _drain(self) -> None:
        """Take all that is queued into the sums. Raise an error of the device once all else is counted."""
        try:
            while self._computing:
                self._wait_for_oldest()
        except MXNetError:
            self._drain()
            raise
        self._read()

    def _wait_for_oldest(self) -> None:
        """Wait for the oldest array that may be in computation. An error of the device drops it."""
        try:
            self._computing[0][0].wait_to_read()  # it stays in the queue if this is interrupted
        except MXNetError:  # what was queued behind it may have been skipped silently
            self._computing.popleft()
            self._computing = deque(
                (self._compute(*inputs) if inputs else array, inputs) for array, inputs in self._computing
            )
            raise
        self._computed.append(self._computing.popleft()[0])

    def _read(self) -> None:
        """Take the computed arrays into the sums."""
        if self._computed:
            values = np.concatenate([array.asnumpy().ravel() for array in self._computed])
            sums = self._sums_of(values.astype('float64', copy=False))
            self._sums = {window: before + sums for window, before in self._sums.items()}
            self._computed.clear()

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
