"""The key of a call's arrays: equal for calls that are planned alike, and only for those."""

import mxnet as mx
import pytest
from mxnet import autograd, gluon

from gluon_stable_ce.kernels import library
from gluon_stable_ce.kernels.signature import needs_guard, signature_of
from gluon_stable_ce.options import Options
from gluon_stable_ce.plan import plan

FUSED = Options(kernel='fused')


@pytest.fixture(params=['compiled', 'by Python'])
def form(request, monkeypatch):
    """Who describes the arrays."""
    if request.param == 'by Python':
        monkeypatch.setattr(library, 'compiled', None)
    elif not library.load():
        pytest.skip('the fused kernel is not compiled')
    return request.param


def arrays(pred=(4, 5, 3), label=(4, 5), weight=(4, 1, 1), dtypes=('float32',) * 3, context=None):
    shapes = (pred, label, weight)
    return [mx.nd.zeros(shape, dtype=dtype, ctx=context) for shape, dtype in zip(shapes, dtypes)]


@pytest.mark.parametrize(
    'other',
    [
        arrays(pred=(4, 3, 5)),
        arrays(pred=(4, 5, 3, 1)),
        arrays(label=(4, 5, 1)),
        arrays(weight=(4,)),
        arrays(dtypes=('float64', 'float32', 'float32')),
        arrays(dtypes=('float32', 'int32', 'float32')),
        arrays(dtypes=('float32', 'float32', 'float16')),
        arrays(context=mx.cpu(1)),
        [*arrays()[:2], arrays(context=mx.cpu(1))[2]],
        arrays()[:2],
        [array.as_np_ndarray() for array in arrays()],
        [array.tostype('row_sparse') for array in arrays(pred=(4, 3))[:1]] + arrays()[1:],
    ],
    ids=[
        *('pred', 'rank', 'label', 'weight', 'pred dtype', 'label dtype', 'weight dtype'),
        *('context', 'context of one', 'without a weight', 'np', 'sparse'),
    ],
)
def test_each_fact_makes_another_key(other, form):
    assert signature_of(*arrays()) == signature_of(*arrays())
    assert signature_of(*other) != signature_of(*arrays())
    assert signature_of(*other) == signature_of(*other)


class Reads(gluon.HybridBlock):
    def hybrid_forward(self, F, x):
        return x * 2


def test_needs_guard_of_operators_and_compiled_graphs():
    if not library.load():
        pytest.skip('the fused kernel is not compiled')
    x, label = mx.nd.ones((2, 3)), mx.nd.zeros(2)
    x.attach_grad()
    dense, static = gluon.nn.Dense(3), Reads()
    dense.initialize()
    static.hybridize(static_alloc=True)
    with autograd.record():
        cases = {
            'in no graph': (mx.nd.ones(3), False),
            'leaf': (x, True),
            'identity': (mx.nd.identity(x), False),
            'operator without attributes': (mx.nd.softmax(x), True),
            'elemwise_add': (mx.nd.elemwise_add(x, x), True),
            'x + x, which is broadcast_add': (x + x, False),
            'add_n': (mx.nd.add_n(x, x, x), True),
            'Dense': (dense(x), False),
            'scalar': (x * 1, False),
            'reshape': (x.reshape((3, 2)), False),
            'compiled graph': (static(x), False),
        }
        for name, (pred, expected) in cases.items():
            assert needs_guard(signature_of(pred, label)) == expected, name
        assert plan(FUSED, x, label)[0].needs_guard
    assert not needs_guard(signature_of(x, label))  # nothing is recorded
    assert not plan(FUSED, x, label)[0].needs_guard
