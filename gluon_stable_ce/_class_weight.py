"""Class weights as a constant of the loss's graph: saved and exported with it, and there on every device without being initialised."""
import mxnet as mx
import numpy as np
from mxnet import gluon

from . import _ops


class ClassWeight(gluon.HybridBlock):
    """The weights of a loss's classes as a constant of its graph, (C,) float32. Called with anything on the context in question."""

    def __init__(self, weights, **kwargs):
        super().__init__(**kwargs)
        weights = np.asarray(weights.asnumpy() if _ops.is_array(weights) else weights, dtype='float64')
        if weights.ndim != 1 or not np.all(np.isfinite(weights)) or np.any(weights < 0):
            raise ValueError(f'class_weight: expected one finite weight >= 0 per class, got {weights} of shape {weights.shape}')
        self.classes = len(weights)
        self.value = _Everywhere(self.prefix + 'value', mx.nd.array(weights, dtype='float32'))
        self.value.lr_mult = self.value.wd_mult = 0  # for a Module that goes on training an exported graph
        self.params.update({self.value.name: self.value})

    def cast(self, dtype):
        """Stay in float32: the graph casts to what it computes in, and a weight of 0.1 is not to become 0.09998 on the way."""

    def hybrid_forward(self, F, like, value):
        return value


class _Everywhere(gluon.Constant):
    """A Constant that is there on whatever context asks for it, initialised or not, in np mode or not."""

    def initialize(self, *args, **kwargs):
        with mx.util.np_array(False):  # its value is a classic array
            super().initialize(*args, **kwargs)

    def reset_ctx(self, ctx):
        with mx.util.np_array(False):
            super().reset_ctx(ctx)

    def data(self, ctx=None):
        ctx = ctx or mx.current_context()
        known = self._known()
        if not known:
            self.initialize(ctx=ctx)
        elif ctx not in known:
            with known[0]:  # where gluon will look for the value
                self.reset_ctx(known + [ctx])
        return _ops.in_mode(super().data(ctx))

    def list_data(self):
        if not self._known():
            self.data()
        return [_ops.in_mode(array) for array in super().list_data()]

    def _known(self):
        try:
            return self.list_ctx()
        except RuntimeError:  # not initialised
            return []
