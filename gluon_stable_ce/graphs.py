"""One compiled graph for each signature, shared by all losses and metrics of equal options."""

from functools import lru_cache
from threading import RLock
from typing import Any, Callable, Dict, Tuple

import mxnet as mx

from ._signature import Signature
from .array_api import Array, variable

MAX_GRAPHS = 64  # those used last stay in memory
Flags = Tuple[Tuple[str, Any], ...]
STATIC: Flags = (('static_alloc', True), ('static_shape', True))
INPUTS = ('pred', 'label', 'sample_weight', 'class_weight')


def trace(
    compose: Callable[..., Array], options: Any, signature: Signature, inputs: Dict[str, Array]
) -> Array:
    """Compose the graph for calls of one signature; `inputs` are symbols by their names in INPUTS."""
    with mx.name.NameManager():  # the names in a graph do not depend on what was traced before
        return compose(mx.sym, options, signature, *(inputs.get(name) for name in INPUTS))


class Graph:
    """A compiled graph of some of INPUTS, for any number of threads. Its outputs are fresh arrays."""

    def __init__(
        self,
        compose: Callable[..., Array],
        options: Any,
        signature: Signature,
        names: Tuple[str, ...],
        flags: Flags,
    ) -> None:
        inputs = {name: variable(name, signature.np_style) for name in names}
        symbol = trace(compose, options, signature, inputs)
        self.cached_op = mx.nd.CachedOp(symbol, flags)
        self._order = [names.index(name) for name in symbol.list_inputs()]
        self._lock = RLock()  # without it, threads that call at the same time were seen to wait for ever

    def __call__(self, *inputs: Array) -> Array:
        """Compute; `inputs` in the order of `names`."""
        with self._lock:
            return self.cached_op(*[inputs[i] for i in self._order])


@lru_cache(maxsize=MAX_GRAPHS)
def compiled(
    compose: Callable[..., Array], options: Any, signature: Signature, names: Tuple[str, ...], flags: Flags
) -> Graph:
    """Return the graph of such calls, compiled at the first of them."""
    return Graph(compose, options, signature, names, flags)
