"""What all metrics share: a mean of values that the device may still be computing, its windows, its state, and its way to other workers."""
from collections import deque
from typing import Any, Deque, Dict, Tuple

import numpy as np

from ._sums import Sums
from .kvstore import all_reduce

_AHEAD = 4  # updates that the device may be behind
_AT_ONCE = 32  # arrays that are worth a look together


class DeferredMean:
    """Mixin for an EvalMetric: the mean of values that are still being computed.

    `update` queues arrays of one value per position, and only waits for what it queued `_AHEAD` updates ago, so that neither work nor
    memory pile up. Sums are exact, so the result does not depend on when the queue is read.
    """

    name: str  # EvalMetric's

    def reset(self) -> None:
        """Forget everything."""
        self._pending: Deque[Any] = deque()
        self._own = {'local': Sums(), 'global': Sums()}  # seen here
        self._others = {'local': Sums(), 'global': Sums()}  # and by other workers, as of the last all_reduce

    def reset_local(self) -> None:
        """Begin a new window for `get`; `get_global` goes on."""
        self._settle()
        self._own['local'] = self._others['local'] = Sums()

    def get(self) -> Tuple[str, float]:
        """(name, value) of all that came since the last `reset` or `reset_local`; NaN if nothing did."""
        return self.name, self._value_of(self._window('local'))

    def get_global(self) -> Tuple[str, float]:
        """(name, value) of all that came since the last `reset`; NaN if nothing did."""
        return self.name, self._value_of(self._window('global'))

    @property
    def num_inst(self) -> int:
        """How many values `get` is the mean of."""
        return self._window('local').count

    @property
    def sum_metric(self) -> float:
        """The sum of the values that `get` is the mean of, rounded once."""
        return self._window('local').over(1)

    @property
    def global_num_inst(self) -> int:
        """How many values `get_global` is the mean of."""
        return self._window('global').count

    @property
    def global_sum_metric(self) -> float:
        """The sum of the values that `get_global` is the mean of, rounded once."""
        return self._window('global').over(1)

    @property
    def num_infinite(self) -> int:
        """How many of the values that `get` is the mean of are infinite."""
        return self._window('local').infinite

    def merge(self, other: Any) -> None:
        """Take in what another metric of this kind has seen, as if its updates had come here, after ours.

        Raises
        ------
        TypeError
            If `other` is not the same class of metric.
        """
        if type(other) is not type(self):
            raise TypeError(f'other: expected a {type(self).__name__}, got {type(other).__name__}')
        self._settle()
        other._settle()
        for mine, theirs in ((self._own, other._own), (self._others, other._others)):
            for window in mine:
                mine[window] = mine[window] + theirs[window]

    def state_dict(self) -> Dict[str, Any]:
        """All that was seen, as plain JSON values: what a run that may be killed has to save."""
        self._settle()
        return {part: {window: sums.as_dict() for window, sums in getattr(self, '_' + part).items()} for part in ('own', 'others')}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a `state_dict`, in the place of what was seen here.

        Raises
        ------
        ValueError
            If `state` is something else; nothing is changed then.
        """
        try:
            own, others = ({window: Sums.from_dict(state[part][window]) for window in ('local', 'global')} for part in ('own', 'others'))
        except (TypeError, KeyError) as error:
            raise ValueError(f'state: expected what state_dict() returns, got {state!r}') from error
        self._pending.clear()
        self._own, self._others = own, others

    def all_reduce(self, kvstore: Any) -> None:
        """Let every worker's result be the result of the whole. All workers must call this, with data or without.

        Afterwards `get` and `get_global` of each worker are exactly what one process would report that had seen all the data. Updates
        go on as before, and a later call takes them in; a second call without any changes nothing.

        Parameters
        ----------
        kvstore : mxnet.kvstore.KVStore, or anything with its ``rank``, ``num_workers`` and ``pushpull``
            See `gluon_stable_ce.kvstore.all_reduce`.
        """
        self._settle()
        windows = ('local', 'global')
        numbers = all_reduce(kvstore, [number for window in windows for number in self._own[window]])
        for window, start in zip(windows, (0, len(Sums.FIELDS))):
            self._others[window] = Sums(*numbers[start:start + len(Sums.FIELDS)]) - self._own[window]

    def _window(self, window):
        self._settle()
        return self._own[window] + self._others[window]

    def _value_of(self, sums):
        return sums.over(sums.count)

    def _push(self, arrays):
        self._pending.extend(arrays)
        if len(self._pending) > _AHEAD:
            self._pending[-_AHEAD - 1].wait_to_read()
        if len(self._pending) > _AT_ONCE + _AHEAD:
            self._settle(_AHEAD)

    def _settle(self, ahead=0):
        """Take all but the last `ahead` arrays of the queue into the sums."""
        arrays = [self._pending.popleft() for _ in range(len(self._pending) - ahead)]
        if arrays:
            sums = self._sums_of(np.concatenate([array.asnumpy().ravel() for array in arrays]).astype('float64', copy=False))
            self._own = {window: before + sums for window, before in self._own.items()}

    def _sums_of(self, values):
        return Sums.of(values)

    def __getstate__(self):
        self._settle()
        return self.__dict__.copy()
