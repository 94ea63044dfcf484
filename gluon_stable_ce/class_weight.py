"""Class weights as a constant of the loss's graph, on every device without being initialised."""

import json
import sys
import warnings
from threading import RLock
from types import FrameType
from typing import Any, List, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import array_api
from .array_api import Array
from .options import FLOAT32_MAX, as_numbers

_LOCK = RLock()  # a constant is put on a device by the first call there, in whatever thread


class ClassWeight(gluon.HybridBlock):
    """The weights of a loss's classes as a constant of its graph, (C,) float32.

    They are saved and exported with the loss, but never loaded.
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
        return array_api.unshared(weights)


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
    """A Constant that is on whatever context asks for it, from the start, in np mode or not.

    It is always what the script says: nothing casts it or loads another value into it.
    """

    def __init__(self, name: str, value: Array) -> None:
        # not through Constant.__init__, which registers an initializer that keeps the value for ever
        initializer = json.dumps(['constant', {'value': value.asnumpy().tolist()}])  # for a Module
        gluon.Parameter.__init__(
            self, name, grad_req='null', shape=value.shape, dtype=value.dtype, init=initializer
        )
        self.value = value
        self.lr_mult = self.wd_mult = 0  # for a Module that goes on training an exported graph
        self.reset_ctx(mx.cpu())

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.value)

    def initialize(self, init: Any = None, ctx: Any = None, *args: Any, **kwargs: Any) -> None:
        self.reset_ctx(ctx)

    def reset_ctx(self, ctx: Any) -> None:
        contexts = ctx if isinstance(ctx, (list, tuple)) else [ctx or mx.current_context()]
        with array_api.classic_mode():  # its value is a classic array
            self._init_impl(self.value, contexts)
        self._copies = dict(zip(contexts, self._data))

    def data(self, ctx: Any = None) -> Array:
        ctx = ctx or mx.current_context()
        array = self._copies.get(ctx)
        if array is None:
            with _LOCK:
                array = self._copies.setdefault(ctx, self.value.copyto(ctx))
        return array_api.in_mode(array)

    def list_ctx(self) -> List[Any]:
        """List the contexts of the net that is trained with it, which a Trainer compares."""
        others = [other for other in getattr(self._trainer, '_params', ()) if type(other) is not type(self)]
        return others[0].list_ctx() if others else super().list_ctx()

    def list_data(self) -> List[Array]:
        return [self.data(context) for context in self.list_ctx()]

    def cast(self, dtype: Any) -> None:
        """Stay in float32, as 0.1 would become 0.09998 in float16; the graph casts to what it computes in."""

    def _reduce(self) -> Array:
        return array_api.in_mode(self.value)

    def _load_init(self, data: Array, ctx: Any, *args: Any, **kwargs: Any) -> None:
        if not np.array_equal(data.asnumpy(), self.value.asnumpy()):
            warnings.warn(
                f'{self.name}: the file has other class weights; those of the script are used',
                RuntimeWarning,
                stacklevel=3,
            )
        if ctx is not None:
            self.reset_ctx(ctx)


class Unused:
    """Stands for the class weights of a file whose net has a loss without them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _load_init(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            f'{self.name}: the file has class weights; the script has none, so none are used',
            RuntimeWarning,
            stacklevel=3,
        )


def file_in_loading() -> Any:
    """Return what ``load_parameters`` has read, by name, or None if it is not running.

    It asks each block of a net for its parameters, and refuses a file that lacks one or has others.
    """
    frame: Optional[FrameType] = sys._getframe()
    while frame and frame.f_code is not gluon.Block.load_parameters.__code__:
        frame = frame.f_back
    return frame and frame.f_locals.get('loaded')
