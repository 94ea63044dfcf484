"""Compiled graphs: one for each kind of call, shared by all losses and metrics of equal options."""

from functools import lru_cache
from threading import RLock
from typing import Any, Callable, Dict, Optional, Tuple

import mxnet as mx

from .array_api import Array, variable
from .call import INPUTS, Call

MAX_GRAPHS = 64  # those used last stay in memory
Step = Callable[..., Array]  # step(F, call, *inputs), with None for the inputs that are not given
Flags = Tuple[Tuple[str, Any], ...]
STATIC: Flags = (('static_alloc', True), ('static_shape', True))


def trace(step: Step, call: Call, inputs: Dict[str, Array]) -> Array:
    """Trace the graph of a step; `inputs` are symbols by their names in INPUTS."""
    with mx.name.NameManager():  # the names in a graph do not depend on what was traced before
        return step(mx.sym, call, *map(inputs.get, INPUTS))


class Graph:
    """A compiled graph, for any number of threads. Its outputs are fresh arrays."""

    def __init__(self, step: Step, call: Call, flags: Flags) -> None:
        symbol = trace(step, call, {name: variable(name, call.np_style) for name in call.inputs})
        self.cached_op = mx.nd.CachedOp(symbol, flags)
        self._order = [INPUTS.index(name) for name in symbol.list_inputs()]
        self._lock = RLock()  # without it, threads that call at the same time were seen to wait for ever

    def __call__(self, *inputs: Optional[Array]) -> Array:
        """Compute; `inputs` in the order of INPUTS."""
        with self._lock:
            return self.cached_op(*[inputs[i] for i in self._order])


@lru_cache(maxsize=MAX_GRAPHS)
def compiled(step: Step, call: Call, flags: Flags) -> Graph:
    """Return the graph of such calls, compiled at the first of them."""
    return Graph(step, call, flags)
