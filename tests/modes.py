"""The ways in which people call a loss.

Each is a function of a loss and NumPy arrays. It returns the loss and the gradient of its sum, or of sum(head * loss), where `head` is a
list of numbers that is repeated to the shape of the loss.
"""

import contextlib
import os
import tempfile
import warnings

import mxnet as mx
import numpy as np
import pytest
from digits import WithLoss
from mxnet import autograd, gluon
from mxnet.gluon.contrib.nn import Identity


def eager(loss_fn, *arrays, head=None):
    loss_fn.hybridize(False)
    return _run(loss_fn, *arrays, head=head)


def default(loss_fn, *arrays, head=None):
    return _run(loss_fn, *arrays, head=head)


def hybridized(loss_fn, *arrays, head=None):
    loss_fn.hybridize(static_alloc=False)
    return _run(loss_fn, *arrays, head=head)


def static_alloc(loss_fn, *arrays, head=None):
    loss_fn.hybridize(static_alloc=True, static_shape=False)
    return _run(loss_fn, *arrays, head=head)


def nested(loss_fn, *arrays, head=None):
    net = WithLoss(Identity(), loss_fn)
    net.hybridize()
    return _run(net, *arrays, head=head)


def nested_eager(loss_fn, *arrays, head=None):
    return _run(WithLoss(Identity(), loss_fn), *arrays, head=head)


def exported(loss_fn, *arrays, head=None):
    net = WithLoss(Identity(), loss_fn)
    net.hybridize()
    return _run(_export_and_load(net, *arrays), *arrays, head=head)


def exported_alone(loss_fn, *arrays, head=None):
    loss_fn.hybridize()  # as a subclass with a graph of its own needs
    options = {'sample_weight': len(arrays) > 2, 'dtype': arrays[0].dtype.name}
    return _run(_export_and_load(loss_fn, *arrays, **options), *arrays, head=head)


def np_mode(loss_fn, *arrays, head=None):
    with numpy_semantics():
        return _run(loss_fn, *arrays, array=mx.np.array, head=head)


def np_mode_nested(loss_fn, *arrays, head=None):
    with numpy_semantics():
        net = WithLoss(Identity(), loss_fn)
        net.hybridize()
        return _run(net, *arrays, array=mx.np.array, head=head)


VERSION = tuple(map(int, mx.__version__.split('.')[:2]))
ONEDNN = VERSION >= (1, 8)  # whether log_softmax is oneDNN's
ALL = [
    eager, default, hybridized, static_alloc, nested, nested_eager, exported, exported_alone, np_mode,
    np_mode_nested,
]  # fmt: skip
SYMBOLIC = [nested, exported, np_mode_nested]


def parametrize(modes):
    """Mark a test to run in each of some modes, its argument `mode`."""
    return pytest.mark.parametrize('mode', modes, ids=[mode.__name__ for mode in modes])


@contextlib.contextmanager
def numpy_semantics():
    """Np mode, for a while."""
    mx.npx.set_np()
    try:
        yield
    finally:
        mx.npx.reset_np()


def _run(block, pred, *others, head=None, array=mx.nd.array):
    pred = array(pred, dtype=pred.dtype)
    others = [array(other, dtype=other.dtype) for other in others]
    pred.attach_grad()
    with autograd.record():
        loss = block(pred, *others)
    assert type(loss) is type(pred)
    if head is None:
        loss.backward()
    else:
        loss.backward(array(np.resize(head, loss.shape), dtype=loss.dtype))
    return loss.asnumpy(), pred.grad.asnumpy()


def _export_and_load(block, *arrays, **options):
    block(*[mx.nd.array(array, dtype=array.dtype) for array in arrays])
    return load_exported(block, len(arrays), **options)


def load_exported(block, inputs, **options):
    """Export a block and load the graph of so many inputs."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that a saved graph does not tell the dtype of its inputs
        path = os.path.join(folder, 'net')
        block.export(path, **options)
        names = [f'data{i}' for i in range(inputs)]
        return gluon.SymbolBlock.imports(f'{path}-symbol.json', names, f'{path}-0000.params')
