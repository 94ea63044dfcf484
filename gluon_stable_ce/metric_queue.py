"""What all metrics share: the mean of values that the device may still be computing."""

import copy
import inspect
import math
from threading import RLock
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple, Type, TypeVar

import numpy as np

from . import array_api, device_errors, distributed
from .array_api import Array, MXNetError
from .exact_sums import ExactSums

_AHEAD = 2  # updates that the device may be behind
_AT_ONCE = 32  # arrays that are read together
_WINDOWS = ('local', 'global')
_Metric = TypeVar('_Metric', bound='RunningMean')
# How a property of a window is read and replaced in ExactSums, by the field that it shows.
_READ = {'count': lambda sums: sums.count, 'total': lambda sums: sums.over(1)}
_REPLACED = {'count': ExactSums.with_count, 'total': ExactSums.with_sum}


class Queued(NamedTuple):
    """An array of values that the device may still be computing."""

    array: Array
    classes: int = 0  # how many the predictions have


class Held(NamedTuple):
    """What a metric holds."""

    sums: Dict[str, ExactSums]  # by window
    computed: Tuple[Queued, ...] = ()  # arrays that are not added up yet
    queue: Tuple[Queued, ...] = ()  # arrays that may be in computation, the oldest first
    # lists and arrays that a subclass set in the place of numbers: ((window, field of ExactSums), value) each
    own: Tuple[Tuple[Tuple[str, str], Any], ...] = ()
    recent: ExactSums = ExactSums()  # of arrays since the last reading, which come into `sums` at the next
    errors: float = math.inf  # how many had been reported before the first of these arrays


def _window_property(window: str, field: str, doc: str) -> Any:
    """Make a property of the sums of a window. Subclasses that add up by themselves set it."""

    def get_value(metric):
        sums = metric._window(window)
        return dict(metric._held.own).get((window, field), _READ[field](sums))

    def set_value(metric, value):
        with metric._lock:
            sums, own = metric._window(window), dict(metric._held.own)
            own.pop((window, field), None)
            try:
                number = float(value.asnumpy() if array_api.is_array(value) else value)
                sums = _REPLACED[field](sums, number)
            except (TypeError, ValueError):  # several numbers
                own[window, field] = value
            metric._held = Held({**metric._held.sums, window: sums}, own=tuple(own.items()))

    return property(get_value, set_value, doc=doc)


class RunningMean:
    """Mixin for an EvalMetric: the mean of values that the device may still be computing.

    `_push` queues arrays of one value per position, and only waits for those of `_AHEAD` updates ago, so that
    neither work nor memory pile up. Sums are exact, so the result does not depend on when the queue is read.
    Updates may come from several threads.

    An interrupt (Ctrl-C) may come between any two lines. So all that the metric holds changes in one
    assignment, of `_held`.
    """

    name: str  # EvalMetric's
    _has_global_stats: bool  # EvalMetric's, True; MXNet's users set it to False
    _kwargs: Dict[str, Any]  # EvalMetric's: the options
    get_config: Any  # EvalMetric's
    _lock: Any
    _held: Held
    _kind: Any  # the class of this package that a class is, or extends

    def __init_subclass__(cls, is_kind: bool = False, **kwargs: Any) -> None:
        """Let `help` show the arguments of ``__init__``. Those of ``__new__`` have no names."""
        super().__init_subclass__(**kwargs)
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        if is_kind:
            cls._kind = cls

    def __new__(cls: Type[_Metric], *args: Any, **kwargs: Any) -> _Metric:
        """Make a metric that holds nothing, whatever the `reset` of a subclass does."""
        metric = super().__new__(cls)
        metric._lock = RLock()
        RunningMean.reset(metric)
        return metric

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held = Held({window: ExactSums() for window in _WINDOWS})

    def reset_local(self) -> None:
        """Begin a new window for `get`; `get_global` goes on."""
        with self._lock:
            sums = {'local': ExactSums(), 'global': self._window('global')}
            own = tuple(item for item in self._held.own if item[0][0] == 'global')
            self._held = Held(sums, own=own)

    def get(self) -> Tuple[str, float]:
        """Return (name, value) of all since the last `reset` or `reset_local`; NaN if there is nothing."""
        return self.name, self._value('local')

    def get_global(self) -> Tuple[str, float]:
        """Return (name, value) of all since the last `reset`; NaN if there is nothing."""
        return self.name, self._value('global' if self._has_global_stats else 'local')

    num_inst = _window_property('local', 'count', 'The number of values that `get` averages.')
    sum_metric = _window_property(
        'local', 'total', 'The sum of the values that `get` averages, rounded once.'
    )
    global_num_inst = _window_property('global', 'count', 'The number of values that `get_global` averages.')
    global_sum_metric = _window_property(
        'global', 'total', 'The sum of the values that `get_global` averages, rounded once.'
    )

    @property
    def num_infinite(self) -> int:
        """The number of infinite values among those that `get` averages."""
        return self._window('local').infinite

    def merge(self, other: Any) -> None:
        """Add the values of another metric of this kind, as if its updates had come after this metric's.

        Raises
        ------
        TypeError, ValueError
            If `other` is another kind of metric, or has other options.
        """
        if getattr(other, '_kind', None) is not self._kind:
            raise TypeError(f'other: expected a {self._kind.__name__}, got {type(other).__name__}')
        if other._identity() != self._identity():
            raise ValueError(f'other: expected a metric with {self._identity()}, got {other._identity()}')
        theirs = other._plain_sums()
        with self._lock:
            ours = self._plain_sums()
            self._held = Held({window: ours[window] + theirs[window] for window in _WINDOWS})

    def state_dict(self) -> Dict[str, Any]:
        """Return the sums and options as plain JSON values, which can go into a checkpoint.

        Raises
        ------
        ValueError
            If a subclass has set `sum_metric` or `num_inst` to a list or an array.
        """
        sums = self._plain_sums()
        return {**self._identity(), **{window: sums[window].as_dict() for window in _WINDOWS}}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a `state_dict`. The values that the metric held before are lost.

        Raises
        ------
        ValueError
            If `state` is no state of such a metric; nothing is changed then.
        """
        try:
            got = {name: state[name] for name in self._identity()}
            sums = {window: ExactSums.from_dict(state[window]) for window in _WINDOWS}
        except (TypeError, KeyError) as error:
            raise ValueError(f'state: expected what state_dict() returns, got {state!r:.200}') from error
        if got != self._identity():
            raise ValueError(f'state: expected the state of a metric with {self._identity()}, got {got}')
        with self._lock:
            self._held = Held(sums)

    def all_reduce(self, store: Any) -> Any:
        """Return a metric of the values of all workers; this one does not change.

        All workers must call this, with data or without. The result's `get` and `get_global` are exactly what
        one process would report that had received all updates.

        Parameters
        ----------
        store : mxnet.kvstore.KVStore, the module horovod.mxnet, or a store with their methods
            See `gluon_stable_ce.distributed.all_reduce`.

        Raises
        ------
        ValueError
            If a subclass has set a count that is no whole number, or a list or an array.
        """
        local = [number for sums in self._plain_sums().values() for number in sums]
        if not all(isinstance(number, int) for number in local):
            raise ValueError(f'num_inst: expected a whole number to add up over workers, got {self.num_inst}')
        numbers = distributed.all_reduce(store, local)
        half = len(numbers) // 2
        whole = copy.copy(self)
        whole._held = Held({'local': ExactSums(*numbers[:half]), 'global': ExactSums(*numbers[half:])})
        return whole

    def _identity(self) -> Dict[str, Any]:
        """Return what metrics have in common that may be merged, or take each other's state."""
        options = {name: value for name, value in self._kwargs.items() if name != 'kernel'}
        return {'metric': self._kind.__name__, 'options': options}

    def _plain_sums(self) -> Dict[str, ExactSums]:
        """Return the sums of both windows; ValueError if a subclass holds something else."""
        with self._lock:
            sums = {window: self._window(window) for window in _WINDOWS}
            for _, value in self._held.own:
                raise ValueError(f'sum_metric, num_inst: expected a number each, got {value!r:.80}')
            return sums

    def _push(self, queued: List[Queued], errors: int) -> None:
        """Queue the arrays of an update, once those of `_AHEAD` updates ago are computed.

        `errors` is how many errors of devices had been reported when the update began.
        """
        if not queued:
            return
        with self._lock:
            while len(self._held.queue) > (_AHEAD - 1) * len(queued):
                self._wait_for_oldest()
            held = self._held
            self._held = held._replace(queue=(*held.queue, *queued), errors=min(held.errors, errors))

    def _wait_for_oldest(self) -> None:
        """Wait for the oldest array of the queue; raise an error of the device that it met."""
        computed, queue = self._held.computed, self._held.queue
        queue[0].array.wait_to_read()
        self._held = self._held._replace(computed=(*computed, queue[0]), queue=queue[1:])
        if len(self._held.computed) >= _AT_ONCE:
            self._add_up()

    def _add_up(self) -> None:
        """Add up the computed arrays."""
        values = [(item.classes, item.array.asnumpy()) for item in self._held.computed]
        self._held = self._held._replace(computed=(), recent=self._held.recent + self._sums_of(values))

    def _window(self, window: str) -> ExactSums:
        with self._lock:
            while self._held.queue:
                self._wait_for_oldest()
            if self._held.computed:
                self._add_up()
            if self._held.errors < math.inf:
                self._take_in_recent()
            return self._held.sums[window]

    def _take_in_recent(self) -> None:
        """Take the recent arrays into the sums. After an error they may hold anything."""
        held = self._held
        recent = held.recent if device_errors.count_all() == held.errors else ExactSums(unknown=1)
        self._held = Held({window: sums + recent for window, sums in held.sums.items()}, own=held.own)

    def _value(self, window: str) -> Any:
        sums = self._window(window)
        own = {field: value for (of, field), value in self._held.own if of == window}
        if not own:
            return self._value_of(sums)
        count, total = own.get('count', sums.count), own.get('total', sums.over(1))
        return float('nan') if count == 0 else total / count  # as mx.metric.EvalMetric has it

    def _value_of(self, sums: ExactSums) -> float:
        if sums.unknown:
            raise MXNetError(
                'After an error on the device, some of the given values are unknown. So the mean is unknown, '
                'too. reset() clears them'
            )
        return sums.over(sums.count)

    def _sums_of(self, arrays: Sequence[Tuple[int, np.ndarray]]) -> ExactSums:
        """Sum the values of some arrays, each with its number of classes."""
        values = np.concatenate([array.ravel() for _, array in arrays])
        return ExactSums.of(values.astype('float64', copy=False))

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        config, parameters = self.get_config(), inspect.signature(self._kind).parameters.items()
        changed = [
            f'{name}={config[name]!r}'
            for name, parameter in parameters
            if name in config and config[name] != parameter.default
        ]
        return f'{type(self).__name__}({", ".join(changed)})'

    def __str__(self) -> str:
        """Show the value as `EvalMetric` does, or why there is none."""
        return text_or_error(self.name, super().__str__)

    def __getstate__(self) -> Dict[str, Any]:
        """Return what a copy needs: the sums, without arrays on a device and without the lock."""
        with self._lock:
            self._window('local')
            state = dict(self.__dict__)
        del state['_lock']
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=RLock())


def text_or_error(name: str, to_text: Callable[[], str]) -> str:
    """Return the text of a metric, or why it has no value."""
    try:
        return to_text()
    except (ValueError, MXNetError) as error:
        return f'EvalMetric: {name}: {error}'
