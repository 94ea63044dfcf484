"""Class weights as a constant of the loss's graph, on every device without being initialised."""

from threading import RLock, active_count
from typing import Any, List

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import array_api
from .array_api import Array
from .options import FLOAT32_MAX, as_numbers

_LOCK = RLock()  # a constant is put on a device by the first call there, in whatever thread


class ClassWeight(gluon.HybridBlock):
    """The weights of a loss's classes as a constant of its graph, (C,) float32.

    They are saved and exported with the loss.
    """

    def __init__(self, weights: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        weights = as_weights(weights)
        self.classes = len(weights)
        self.value = _Everywhere(self.prefix + 'value', mx.nd.array(weights, dtype='float32'))
        self.params.update({self.value.name: self.value})

    def __repr__(self) -> str:
        return f'<{self.classes} weights>'

    def beside(self, pred: Array) -> Array:
        """Return the weights on the device of an array, or as part of the graph of a symbol."""
        if array_api.is_symbol(pred):
            return self.value.var()
        weights = self.value.data(pred.context)
        return weights.detach() if active_count() > 1 else weights  # threads may share no recorded handle

    def cast(self, dtype: Any) -> None:
        """Stay in float32, as 0.1 would become 0.09998 in float16; the graph casts to what it computes in."""


def as_weights(weights: Any) -> np.ndarray:
    """Check class weights and return them as float64, (C,)."""
    given = weights.asnumpy() if array_api.is_array(weights) else weights
    values = as_numbers('class_weight', given)
    if values.ndim != 1 or not values.size or not np.all((values >= 0) & (values <= FLOAT32_MAX)):
        raise ValueError(
            f'class_weight: expected one finite weight >= 0 per class, up to {FLOAT32_MAX:.3g}, '
            f'got {given!r:.80} of shape {values.shape}'
        )
    return values


class _Everywhere(gluon.Constant):
    """A Constant that is on whatever context asks for it, initialised or not, in np mode or not."""

    def __init__(self, name: str, value: Array) -> None:
        super().__init__(name, value)
        self.lr_mult = self.wd_mult = 0  # for a Module that goes on training an exported graph

    def __reduce__(self) -> Any:  # gluon's own holds a class that can't be pickled
        return type(self), (self.name, self.value)

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        with array_api.classic_mode():  # its value is a classic array
            super().initialize(*args, **kwargs)

    def reset_ctx(self, ctx: Any) -> None:
        with array_api.classic_mode():
            super().reset_ctx(ctx)

    def data(self, ctx: Any = None) -> Array:
        ctx = ctx or mx.current_context()
        if ctx not in self._contexts():
            with _LOCK:
                self._add(ctx)
        return array_api.in_mode(super().data(ctx))

    def list_data(self) -> List[Array]:
        if not self._contexts():
            self.data()
        return [array_api.in_mode(array) for array in super().list_data()]

    def _add(self, ctx: Any) -> None:
        known = self._contexts()
        if not known:
            self.initialize(ctx=ctx)
        elif ctx not in known:
            with known[0]:  # where gluon looks for the value
                self.reset_ctx([*known, ctx])

    def _contexts(self) -> List[Any]:
        try:
            return self.list_ctx()
        except RuntimeError:  # not initialised
            return []
