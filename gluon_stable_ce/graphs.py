"""Compiled graphs: one for each kind of call, shared by losses and metrics of equal options that are alive.

A graph with static memory keeps that of its largest batch, once for each call that was recorded at the same
time as others. So it goes with the losses and metrics that use it, as gluon's graphs do.
"""

import ctypes
import sys
from collections import deque
from threading import RLock
from typing import Any, Callable, Deque, Dict, Optional, Tuple
from weakref import WeakValueDictionary, finalize

import mxnet as mx

from .array_api import Array, variable
from .call import INPUTS, Call, Fill
from .class_weight import ClassWeight
from .options import Options
from .plan import plan

MAX_GRAPHS = 16  # of one loss or metric, the oldest of which goes first
FEW_CALLS = 4  # a loss with no more of them may have been made for one step only
MAX_KEPT = 4  # graphs of such losses, for the next one
Step = Callable[..., Array]  # step(F, call, *inputs), with None for the inputs that are not given
Flags = Optional[Tuple[Tuple[str, Any], ...]]  # of CachedOp; None: no graph, but operator by operator
STATIC: Flags = (('static_alloc', True), ('static_shape', True))


def trace(step: Step, call: Call, inputs: Dict[str, Array]) -> Array:
    """Trace the graph of a step; `inputs` are symbols by their names in INPUTS."""
    with mx.name.NameManager():  # the names in a graph do not depend on what was traced before
        return step(mx.sym, call, *map(inputs.get, INPUTS))


class Graph:
    """A compiled graph, for any number of threads. Its outputs are fresh arrays."""

    def __init__(
        self, step: Step, call: Call, flags: Flags, op_hook: Optional[Tuple[Any, bool]] = None
    ) -> None:
        symbol = trace(step, call, {name: variable(name, call.np_style) for name in call.inputs})
        self.cached_op = mx.nd.CachedOp(symbol, flags)
        if op_hook:
            self.cached_op._register_op_hook(*op_hook)
            _CALLBACKS.append(self.cached_op._monitor_callback)
        self.calls = 0
        self._order = [INPUTS.index(name) for name in symbol.list_inputs()]
        self._lock = RLock()  # without it, threads that call at the same time were seen to wait for ever

    def __call__(self, *inputs: Optional[Array]) -> Array:
        """Compute; `inputs` in the order of INPUTS."""
        with self._lock:
            self.calls += 1
            return self.cached_op(*[inputs[i] for i in self._order])


Key = Tuple[Step, Call, Flags]
_LOCK = RLock()
_ALIVE: 'WeakValueDictionary[Key, Graph]' = WeakValueDictionary()
# of losses that were deleted after a few calls, for the next such loss; the oldest comes first
_KEPT: Dict[Key, Graph] = {}


# Op hooks of the newest graphs. MXNet calls them in backward, too, when the `Graph` may be gone.
_CALLBACKS: Deque[Any] = deque(maxlen=1024)


class Graphs(dict):
    """The graphs of one loss or metric, its owner, by `Call`. Each is compiled at the first of such calls.

    Without flags, arrays are computed operator by operator.
    """

    def __init__(self, step: Step, fill: Fill, owner: Any = None, flags: Flags = STATIC) -> None:
        super().__init__()
        self._step, self._fill, self._flags = step, fill, flags
        self._calls_before: Dict[Call, int] = {}
        if owner is not None:
            # holds this until the owner is deleted: what the garbage collector finds can't be kept
            finalize(owner, self._drop).atexit = False

    def compute(
        self,
        options: Options,
        pred: Array,
        label: Array,
        sample_weight: Optional[Array] = None,
        class_weight: Optional[ClassWeight] = None,
        op_hook: Optional[Tuple[Any, bool]] = None,
    ) -> Array:
        """Plan the call of these arrays, and compute its step in the graph of such calls."""
        call, inputs = plan(options, pred, label, sample_weight, class_weight, self._fill)
        if call.is_empty or self._flags is None:
            return self._step(mx.nd, call, *inputs)
        graph = Graph(self._step, call, (), op_hook) if op_hook else self[call]
        return graph(*inputs)

    def __missing__(self, call: Call) -> Graph:
        key = (self._step, call, self._flags)
        with _LOCK:
            graph = _ALIVE.get(key)
            if graph is None:
                graph = _ALIVE[key] = Graph(*key)
            if len(self) >= MAX_GRAPHS:
                oldest = next(iter(self))
                del self[oldest]
                self._calls_before.pop(oldest, None)  # another thread may have freed all
                _trim()
            self._calls_before[call] = graph.calls
            self[call] = graph
        return graph

    def __reduce__(self) -> Any:
        """Leave the graphs out of pickles and copies."""
        return type(self), (self._step, self._fill, None, self._flags)

    def release(self) -> None:
        """Free all graphs that no other loss uses, those that are kept for new losses included."""
        if self or _KEPT:
            self.clear()
            self._calls_before.clear()
            _KEPT.clear()
            mx.nd.waitall()  # they are in use until then
            _trim()

    def _drop(self) -> None:
        """Free the graphs, or keep those of a few calls, as of a loss that is made anew at each step."""
        keys = {call: (self._step, call, self._flags) for call in self}
        few = {
            keys[call]: graph
            for call, graph in self.items()
            if graph.calls - self._calls_before.get(call, 0) <= FEW_CALLS
        }
        for key in keys.values():  # an earlier loss may have kept a graph of many calls by now
            _KEPT.pop(key, None)
        is_any_freed = len(few) < len(self) or len(_KEPT) + len(few) > MAX_KEPT
        _KEPT.update(few)
        few.clear()
        self.clear()
        for key in list(_KEPT)[:-MAX_KEPT]:
            _KEPT.pop(key, None)
        if is_any_freed:
            _trim()


def _trim() -> None:
    """Give freed memory back to the system, which glibc does not do with what lies between other memory."""
    if sys.platform == 'linux':
        getattr(ctypes.CDLL(None), 'malloc_trim', int)(0)
