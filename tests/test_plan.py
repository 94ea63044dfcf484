"""What is decided of a call before anything is computed."""

import json

import modes
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_stable_ce import StableSoftmaxCELoss, array_api
from gluon_stable_ce import plan as plan_module
from gluon_stable_ce.call import INPUTS, Call, Fill
from gluon_stable_ce.class_weight import ClassWeight
from gluon_stable_ce.options import Options
from gluon_stable_ce.plan import plan

nd = mx.nd
STOCK = Options(kernel='stock')
MANY_ABOVE = 1000 if modes.ONEDNN else 100  # classes, as the page on accuracy says


def call_of(pred, label, sample_weight=None, **options):
    """The call that is planned for these inputs."""
    return plan(STOCK._replace(**options), pred, label, sample_weight)[0]


def test_plan_of_arrays():
    call = call_of(nd.zeros((4, 5, 3), dtype='float16'), nd.zeros((4, 5), dtype='int32'), nd.ones(4))
    assert call == Call(
        options=STOCK,
        fill=Fill.LOSS,
        inputs=('pred', 'label', 'sample_weight'),
        np_style=False,
        dtype='float16',
        ndim=3,
        label_dtype='int32',
        label_ndim=2,
        weight_layout='batch',
        has_few_classes=False,
        is_empty=False,
        kernel='stock',
        needs_guard=True,
    )
    assert hash(call) == hash(Call(*call))
    assert (call.compute_dtype, call.label_compare_dtype) == ('float32', 'float64')


@pytest.mark.parametrize(('classes', 'are_many'), [(5, False), (MANY_ABOVE, False), (MANY_ABOVE + 1, True)])
def test_plan_of_many_classes(classes, are_many):
    assert call_of(nd.zeros((1, classes)), nd.zeros(1)).has_many_classes is are_many
    pred = mx.sym.FullyConnected(mx.sym.var('x'), num_hidden=classes)  # a dense layer has its classes
    assert call_of(pred, mx.sym.var('label')) == Call(STOCK, classes=classes, has_many_classes=are_many)


@pytest.mark.parametrize(
    ('facts', 'expected'),
    [
        ({}, 'float64'),
        ({'dtype': 'float32', 'has_few_classes': True}, 'float32'),
        ({'dtype': 'float64', 'has_few_classes': True}, 'float64'),
    ],
    ids=str,
)
def test_label_compare_dtype(facts, expected):
    assert Call(**facts).label_compare_dtype == expected


def test_plan_of_symbols_knows_little():
    label = mx.sym.var('label')
    for pred in (mx.sym.var('pred'), mx.sym.var('pred', dtype='float16')):
        assert call_of(pred, label) == Call(STOCK, has_many_classes=True)


@pytest.mark.skipif(modes.VERSION < (1, 7), reason='MXNet has bfloat16 since 1.7')
def test_symbols_of_bfloat16_are_cast():
    """NumPy and some operators lack it; MXNet names it by a record."""
    dtype = np.dtype([('bfloat16', np.uint16)])
    _, inputs = plan(STOCK, *(mx.sym.var(name, dtype=dtype) for name in INPUTS[:3]))
    assert all(json.loads(symbol.tojson())['nodes'][1]['op'] == 'Cast' for symbol in inputs[:3])


@pytest.mark.parametrize('axis', [-1, 1])
def test_a_graph_has_as_many_classes_as_there_are_class_weights(axis):
    call, _ = plan(
        STOCK._replace(axis=axis), *map(mx.sym.var, ('pred', 'label')), None, ClassWeight([1] * 70_000)
    )
    assert (call.classes, call.has_many_classes) == (70_000, True)


def test_plan_of_np_arrays():
    with modes.numpy_semantics():
        assert call_of(mx.np.zeros((4, 3)), mx.np.zeros(4)).np_style


def test_plan_does_not_depend_on_sizes():
    """So one graph serves all of them."""
    assert call_of(nd.zeros((4, 3)), nd.zeros(4)) == call_of(nd.zeros((7, 2)), nd.zeros(7))


def test_calls_that_look_like_one_before_are_planned_once(monkeypatch):
    monkeypatch.setattr(plan_module, '_CALLS', {})
    monkeypatch.setattr(plan_module, 'MOST_CALLS', 2)
    for size in (4, 5, 6):
        first = call_of(nd.zeros((size, 3)), nd.zeros(size))
        assert call_of(nd.ones((size, 3)), nd.ones(size)) is first
        assert call_of(nd.ones((size, 3)), nd.ones(size), ignore_label=1) is not first
        assert len(plan_module._CALLS) <= 2


def test_inputs_in_another_form_are_converted_at_each_call():
    """A dense label whose axes are merged."""
    pred, label = nd.zeros((2, 3, 4)), nd.ones((6, 4))
    for _ in range(2):
        _, inputs = plan(STOCK._replace(sparse_label=False), pred, label)
        assert inputs[1].shape == pred.shape


def test_class_axes_are_different():
    with pytest.raises(ValueError, match='^axis: expected different axes of pred, of shape .* got 1, -2$'):
        call_of(nd.zeros((2, 3, 4)), nd.zeros((2, 3, 4)), axis=1, summed_axes=(-2,), sparse_label=False)


@pytest.mark.parametrize(
    ('dtype', 'label_dtype', 'classes', 'ignore_label', 'expected'),
    [
        ('float32', 'float32', 2048, None, True),
        ('float32', 'float32', 2049, None, False),
        ('float32', 'int8', 10, -1, True),
        ('float32', 'uint8', 10, None, True),
        ('float32', 'float16', 10, None, True),
        ('float32', 'int32', 10, None, False),
        ('float32', 'float32', 10, 2**24, True),
        ('float32', 'float32', 10, 2**24 + 1, False),
        ('float16', 'float32', 10, None, False),
        ('float64', 'float64', 10, None, True),
        ('float32', 'float64', 10, None, False),
    ],
)
def test_plan_has_few_classes(dtype, label_dtype, classes, ignore_label, expected):
    """Only if comparing labels in the dtype of pred tells all of them apart."""
    pred, label = nd.zeros((4, classes), dtype=dtype), nd.zeros(4, dtype=label_dtype)
    assert call_of(pred, label, ignore_label=ignore_label).has_few_classes is expected


@pytest.mark.parametrize(
    ('shape', 'layout'),
    [
        ((3,), 'batch'),
        ((1,), 'batch'),
        ((3, 2, 4), 'positions'),
        ((3, 1, 2, 4), 'keepdims'),
        ((1, 1, 1, 4), 'keepdims'),
        ((3, 5, 2, 4), 'pred'),
        ((1, 5, 1, 1), 'pred'),
    ],
    ids=str,
)
def test_plan_weight_layout(shape, layout):
    pred, label = nd.zeros((3, 5, 2, 4)), nd.zeros((3, 2, 4))
    assert call_of(pred, label, nd.ones(shape), axis=1).weight_layout == layout


def test_plan_weight_layout_of_several_batch_axes():
    pred, label = nd.zeros((3, 5, 2, 4)), nd.zeros((3, 2, 4))
    call = call_of(pred, label, nd.ones((3, 4)), axis=1, batch_axes=(-1, 0))
    assert call.weight_layout == 'batch'


def test_gradient_of_a_label_is_written_beside_other_threads(monkeypatch):
    """A progress bar or a DataLoader has threads, too."""
    label = mx.nd.array([0, 1])
    label.attach_grad()
    label.grad[:] = 7
    monkeypatch.setattr(array_api, 'active_count', lambda: 2)
    with autograd.record():
        StableSoftmaxCELoss()(mx.nd.zeros((2, 3)), label).backward()
    assert (label.grad.asnumpy() == 0).all()


@pytest.mark.parametrize('threads', [1, 2])
def test_threads_share_no_handle_of_a_label(threads, monkeypatch):
    """Autograd marks the handles of what it records."""
    monkeypatch.setattr(array_api, 'active_count', lambda: threads)
    pred, label = nd.zeros((2, 3)), nd.zeros(2)
    assert (plan(STOCK, pred, label)[1][1] is label) == (threads == 1)
