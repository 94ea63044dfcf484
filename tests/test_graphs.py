"""Compiled graphs: one for each kind of call, shared by losses of equal options; no call affects the next."""

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
import reference
import thread_worker
import tolerances
from checks import assert_loss_is_reference
from mxnet import autograd, gluon
from tolerances import assert_close

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss, array_api
from gluon_stable_ce import graphs as graphs_module
from gluon_stable_ce.graphs import compiled

pytestmark = pytest.mark.usefixtures('kernel')

nd = mx.nd
HERE = os.path.dirname(os.path.abspath(__file__))
CLASS_WEIGHT = pytest.mark.parametrize('class_weight', [None, [1, 2, 3]], ids=['plain', 'class-weight'])


@pytest.fixture
def graphs():
    """The cache of compiled graphs, empty."""
    compiled.cache_clear()
    yield compiled.cache_info
    compiled.cache_clear()


@pytest.fixture
def batch(rng):
    """Logits and labels of three classes."""
    return nd.array(rng.normal(0, 1, (4, 3))), nd.array([0, 1, 2, 0])


def test_one_graph_for_all_sizes(graphs):
    loss_fn = StableSoftmaxCELoss()
    for rows, classes in ((4, 3), (4, 3), (7, 2), (1, 1)):
        loss_fn(nd.zeros((rows, classes)), nd.zeros(rows))
    assert graphs().misses == graphs().currsize == 1


def test_one_graph_for_each_kind_of_call(graphs):
    loss_fn, label = StableSoftmaxCELoss(), nd.zeros(4)
    for _ in range(2):
        loss_fn(nd.zeros((4, 3)), label)
        loss_fn(nd.zeros((4, 3), dtype='float16'), label)
        loss_fn(nd.zeros((4, 3)), label.astype('int32'))
        loss_fn(nd.zeros((4, 3)), label, nd.ones(4))
        loss_fn(nd.zeros((4, 3)), label, nd.ones((4, 1)))
        loss_fn(nd.zeros((4, 5, 3)), nd.zeros((4, 5)))
    assert (graphs().misses, graphs().hits) == (6, 6)


def test_losses_and_metrics_of_equal_options_share_graphs(graphs, batch):
    for _ in range(3):
        StableSoftmaxCELoss(label_smoothing=0.1)(*batch)
        StableSoftmaxCELoss(class_weight=[1, 2, 3])(*batch)
        StableCrossEntropy(pred_type='logits').update(batch[1], batch[0])
    assert (graphs().misses, graphs().hits) == (3, 6)


def test_losses_that_share_a_graph_have_their_own_class_weights(batch):
    for class_weight in ([1, 2, 3], [3, 2, 0]):
        assert_loss_is_reference({'class_weight': class_weight}, *(array.asnumpy() for array in batch))


def test_other_options_are_other_graphs(graphs, batch):
    for options in ({}, {'axis': 1}, {'weight': 0.5}, {'ignore_label': -1}, {'reduction': 'sum'}):
        StableSoftmaxCELoss(**options)(*batch)
    assert graphs().misses == 5


@pytest.mark.slow
def test_number_of_graphs_is_bounded(graphs, batch):
    for ignore_label in range(graphs_module.MAX_GRAPHS + 10):
        StableSoftmaxCELoss(ignore_label=-ignore_label - 1)(*batch)
    assert graphs().currsize == graphs().maxsize == graphs_module.MAX_GRAPHS


def test_number_of_graphs_does_not_grow_with_the_number_of_classes(graphs, rng, ctx):
    """Candidates to rank come in all numbers, and each graph keeps its memory."""
    loss_fn, metric = StableSoftmaxCELoss(ignore_label=-1), StableCrossEntropy(ignore_label=-1)
    losses = []
    for classes in [*range(1, 40), *range(1, 40)]:
        pred = rng.normal(0, 1, (5, classes)).astype('float32')
        label = rng.randint(-1, classes, 5).astype('float32')
        expected, _ = reference.loss_and_gradient(pred, label, ignore_label=-1)
        loss = loss_fn(nd.array(pred), nd.array(label))
        assert_close(loss.asnumpy(), expected)
        metric.update(nd.array(label), nd.softmax(nd.array(pred)))
        losses.append(expected[label != -1])
    assert_close(metric.get()[1], np.concatenate(losses).mean(), tolerances.ROUNDED_FLOAT32)
    assert graphs().currsize == 2


def test_calls_of_every_kind_interleaved(rng, ctx):
    """Gluon's own refuses the second kind: "The argument structure of HybridBlock does not match"."""
    loss_fn = StableSoftmaxCELoss(ignore_label=-1)
    calls = []
    for shape in ((4, 3), (7, 3), (2, 5, 3), (2, 5, 2, 3)):
        for dtype in ('float32', 'float16', 'float64'):
            pred = rng.normal(0, 1, shape).astype(dtype)
            label = rng.randint(-1, 3, shape[:-1]).astype('int32')
            calls += [(pred, label), (pred, label, rng.uniform(0, 1, shape[0]).astype('float32'))]
    for arrays in calls + calls[::-1]:
        for mode in (modes.default, modes.np_mode):
            expected, _ = reference.loss_and_gradient(*arrays, ignore_label=-1)
            assert_close(mode(loss_fn, *arrays)[0], expected)


@pytest.mark.parametrize('is_recorded', [False, True], ids=['', 'recorded'])
def test_results_are_not_written_over(is_recorded, rng, ctx):
    """Static memory must not show: no later call, of the same shape or another, changes an earlier result."""
    loss_fn = StableSoftmaxCELoss()
    batches = [(nd.array(rng.normal(0, 3, (n, 5))), nd.array(rng.randint(0, 5, n))) for n in (8, 8, 3, 8, 5)]
    for pred, _ in batches:
        pred.attach_grad()
    with autograd.record() if is_recorded else contextlib.nullcontext():
        losses = [loss_fn(*batch) for batch in batches]
    if is_recorded:
        autograd.backward(losses)
    for (pred, label), loss in zip(batches, losses):
        expected, gradient = reference.loss_and_gradient(pred.asnumpy(), label.asnumpy())
        assert_close(loss.asnumpy(), expected)
        assert_close(pred.grad.asnumpy(), gradient * is_recorded)


def test_hybridize_false_compiles_nothing(graphs, batch):
    loss_fn = StableSoftmaxCELoss(class_weight=[1, 2, 3])
    expected = loss_fn(*batch).asnumpy()
    before = graphs()
    loss_fn.hybridize(False)
    assert_close(loss_fn(*batch).asnumpy(), expected)
    assert graphs() == before
    loss_fn.hybridize()
    loss_fn(*batch)
    assert graphs().hits == before.hits + 1


@pytest.mark.parametrize(('flags', 'expected'), [
    ({}, {'static_alloc': True, 'static_shape': True}),
    ({'static_alloc': False}, {'static_alloc': False, 'static_shape': False}),
    ({'static_alloc': True, 'static_shape': False}, {'static_alloc': True, 'static_shape': False}),
    ({'inline_limit': 3}, {'static_alloc': True, 'static_shape': True, 'inline_limit': 3}),
], ids=str)  # fmt: skip
def test_hybridize_flags_reach_the_graph(flags, expected, batch, monkeypatch):
    given = []
    make = mx.nd.CachedOp
    monkeypatch.setattr(
        mx.nd, 'CachedOp', lambda symbol, flags: given.append(dict(flags)) or make(symbol, flags)
    )
    compiled.cache_clear()
    loss_fn = StableSoftmaxCELoss()
    loss_fn.hybridize(**flags)
    loss_fn(*batch)
    assert given == [expected]


def test_parent_hybridizes_the_loss_with_its_flags(graphs, batch):
    parent = gluon.nn.Sequential()
    loss_fn = StableSoftmaxCELoss()
    parent.add(loss_fn)
    parent.hybridize(False)
    loss_fn(*batch)
    assert graphs().currsize == 0
    parent.hybridize(static_alloc=True)
    loss_fn(*batch)
    assert graphs().currsize == 1


@pytest.mark.skipif(modes.VERSION < (1, 7), reason='register_op_hook came with MXNet 1.7')
@pytest.mark.parametrize('is_used', [False, True], ids=['before-use', 'after-use'])
def test_op_hooks_are_called_until_removed(is_used, batch):
    loss_fn, names = StableSoftmaxCELoss(kernel='stock'), []
    if is_used:
        loss_fn(*batch)
    loss_fn.register_op_hook(lambda name, op, array: names.append(op))
    loss_fn(*batch).wait_to_read()
    assert b'pick' in names
    other = StableSoftmaxCELoss(kernel='stock')  # shares no graph with a hook
    names.clear()
    other(*batch).wait_to_read()
    assert not names


@pytest.mark.parametrize('make_copy', [
    copy.copy, copy.deepcopy, lambda loss_fn: pickle.loads(pickle.dumps(loss_fn)),
], ids=['copy', 'deepcopy', 'pickle'])  # fmt: skip
@CLASS_WEIGHT
@pytest.mark.parametrize('is_used', [False, True], ids=['before-use', 'after-use'])
def test_copies_compute_the_same(make_copy, class_weight, is_used, batch):
    loss_fn = StableSoftmaxCELoss(class_weight=class_weight, label_smoothing=0.1)
    expected = StableSoftmaxCELoss(class_weight=class_weight, label_smoothing=0.1)(*batch).asnumpy()
    if is_used:
        loss_fn(*batch)
        loss_fn(*batch, nd.ones(4))
    other = make_copy(loss_fn)
    for one in (other, loss_fn):
        np.testing.assert_array_equal(one(*batch).asnumpy(), expected)
        one.hybridize(False)
        assert_close(one(*batch).asnumpy(), expected)


@CLASS_WEIGHT
def test_a_pickle_holds_no_graphs(class_weight, batch):
    loss_fn = StableSoftmaxCELoss(class_weight=class_weight)
    before = len(pickle.dumps(loss_fn))
    loss_fn(*batch)
    assert len(pickle.dumps(loss_fn)) < before + 2000


def exported_files(loss_fn, path, **options):
    """(graph, values) of an export, but for the name that gluon gives to each Constant's initializer."""
    loss_fn.export(str(path), **options)
    values = nd.load(f'{path}-0000.params')
    graph = json.loads((path.parent / f'{path.name}-symbol.json').read_text())
    for node in graph['nodes']:
        node.get('attrs', {}).pop('__init__', None)
    return graph, [value.asnumpy().tolist() for value in dict(values or {}).values()]


@CLASS_WEIGHT
@pytest.mark.parametrize('weighted', [False, True], ids=['', 'sample-weight'])
def test_export_before_any_call(class_weight, weighted, batch, tmp_path):
    loss_fn = StableSoftmaxCELoss(class_weight=class_weight, ignore_label=0)
    inputs = (*batch, nd.array([1, 2, 3, 4])) if weighted else batch
    loaded = modes.load_exported(loss_fn, len(inputs), **({'sample_weight': True} if weighted else {}))
    assert_close(loaded(*inputs).asnumpy(), loss_fn(*inputs).asnumpy())


@CLASS_WEIGHT
@pytest.mark.parametrize('sample_weight', [False, True], ids=['', 'sample-weight'])
def test_export_does_not_depend_on_the_order_of_calls(class_weight, sample_weight, batch, tmp_path):
    calls = [batch, (*batch, nd.ones(4)), (nd.zeros((2, 4, 3)), nd.zeros((2, 4)))]
    files = []
    for order in ([], [0, 1, 2], [2, 1, 0], [1, 0, 2, 1]):
        loss_fn = StableSoftmaxCELoss(class_weight=class_weight, prefix='loss_')
        for i in order:
            loss_fn(*calls[i])
        files.append(exported_files(loss_fn, tmp_path / 'loss', sample_weight=sample_weight))
    assert files == files[:1] * 4


def test_export_of_a_dtype(tmp_path, rng):
    """A graph with class weights, which are float32, has to know that pred is float64."""
    loss_fn = StableSoftmaxCELoss(class_weight=[1, 2, 3], kernel='stock')
    pred, label = nd.array(rng.normal(0, 1, (4, 3)), dtype='float64'), nd.array([0, 1, 2, 0])
    loaded = modes.load_exported(loss_fn, 2, dtype='float64')
    loss = loaded(pred, label)
    assert loss.dtype == np.float64
    assert_close(loss.asnumpy(), loss_fn(pred, label).asnumpy(), tolerances.FLOAT64)
    with pytest.raises(TypeError, match='^dtype: expected one of the dtypes .*, got int8$'):
        loss_fn.export(str(tmp_path / 'loss'), dtype='int8')


def test_exported_graph_serves_any_number_of_classes(rng):
    loss_fn = StableSoftmaxCELoss(kernel='stock')
    loss_fn(nd.zeros((4, 3)), nd.zeros(4))
    loaded = modes.load_exported(loss_fn, 2)
    for classes in (2, 3, 50):
        pred, label = nd.array(rng.normal(0, 1, (4, classes))), nd.array([0, classes - 1, classes, 1])
        np.testing.assert_array_equal(loaded(pred, label).asnumpy(), loss_fn(pred, label).asnumpy())
        np.testing.assert_array_equal(np.isnan(loaded(pred, label).asnumpy()), [False, False, True, False])


GIVEN = {
    **cases.SPARSE, **cases.DENSE, 'smoothing-only-dense': {'sparse_label': False, 'label_smoothing': 1},
}  # fmt: skip


@pytest.mark.parametrize('options', cases.params(GIVEN))
@pytest.mark.parametrize(('axis', 'batch_axis'), [(-1, 0), (1, 0), (-2, -1), (0, (1,)), (1, None)], ids=str)
@pytest.mark.parametrize('weighted', [False, True], ids=['', 'sample-weight'])
@pytest.mark.parametrize('np_style', [False, True], ids=['classic', 'np'])
def test_graphs_list_their_inputs_as_gluons_do(options, axis, batch_axis, weighted, np_style, rng):
    """People bind graphs by position: pred, label, sample_weight; then what gluon's has not, the class weights."""
    names = ['x', 'y', 'w'] if weighted else ['x', 'y']
    for reduction in cases.REDUCTIONS:
        loss_fn = StableSoftmaxCELoss(axis=axis, batch_axis=batch_axis, reduction=reduction, **options)
        graph = loss_fn(*[array_api.variable(name, np_style) for name in names])
        assert graph.list_arguments()[: len(names)] == names
        assert len(graph.list_arguments()) == len(names) + ('class_weight' in options)


@pytest.mark.parametrize('sparse_label', [True, False], ids=['sparse', 'dense'])
@pytest.mark.parametrize('weighted', [False, True], ids=['', 'sample-weight'])
def test_nested_and_exported_graphs_list_their_inputs_as_gluons_do(sparse_label, weighted, tmp_path):
    files = []
    for name, kind in (('ours', StableSoftmaxCELoss), ('gluons', gluon.loss.SoftmaxCELoss)):
        net = modes.WithLoss(gluon.nn.Dense(3, prefix='dense_'), kind(sparse_label=sparse_label))
        net.initialize()
        net.hybridize()
        label = nd.zeros(4) if sparse_label else nd.zeros((4, 3))
        net(nd.zeros((4, 5)), label, *([nd.ones((4, 1))] * weighted))
        net.export(str(tmp_path / name))
        files.append(mx.sym.load(str(tmp_path / f'{name}-symbol.json')).list_arguments())
    assert files[0] == files[1]


def test_a_graph_infers_the_shape_of_the_label():
    data, label = mx.sym.var('data'), mx.sym.var('label')
    graph = StableSoftmaxCELoss(kernel='stock')(mx.sym.FullyConnected(data, num_hidden=3), label)
    shapes, outputs, _ = graph.infer_shape(data=(4, 5))
    assert (shapes[0], shapes[-1], outputs) == ((4, 5), (4,), [(4,)])


@pytest.mark.slow
@pytest.mark.parametrize('engine', ['ThreadedEnginePerDevice', 'NaiveEngine'])
def test_four_threads_with_four_kinds_of_call(kernel, engine):
    done = subprocess.run(
        [sys.executable, thread_worker.__file__, '2500'],
        env={
            **os.environ,
            'MXNET_ENGINE_TYPE': engine,
            'GLUON_STABLE_CE_KERNEL': 'auto' if kernel == 'fused' else kernel,  # in the main thread
            'PYTHONPATH': os.pathsep.join([os.path.dirname(HERE), os.environ.get('PYTHONPATH', '')]),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['errors'] == []
    assert result['differing'] == [0, 0, 0, 0]
    assert result['count'] == result['expected_count']
