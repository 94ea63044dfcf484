"""Compiled graphs: one for each kind of call, shared by losses of equal options; no call affects the next."""

import contextlib
import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref

import cases
import memory_worker
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

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss, array_api, graphs

pytestmark = pytest.mark.usefixtures('kernel')

nd = mx.nd
HERE = os.path.dirname(os.path.abspath(__file__))
CLASS_WEIGHT = pytest.mark.parametrize('class_weight', [None, [1, 2, 3]], ids=['plain', 'class-weight'])


@pytest.fixture
def no_graphs_of_other_tests():
    gc.collect()
    graphs._KEPT.clear()


@pytest.fixture
def compiled(monkeypatch):
    """The calls for which graphs are compiled, one after the other. None is shared with other tests."""
    calls, make = [], graphs.Graph

    def compile_and_note(step, call, flags):
        calls.append(call)
        return make(step, call, flags)

    monkeypatch.setattr(graphs, 'Graph', compile_and_note)
    monkeypatch.setattr(graphs, '_ALIVE', weakref.WeakValueDictionary())
    monkeypatch.setattr(graphs, '_KEPT', {})
    return calls


@pytest.fixture
def batch(rng):
    """Logits and labels of three classes."""
    return nd.array(rng.normal(0, 1, (4, 3))), nd.array([0, 1, 2, 0])


def test_one_graph_for_all_sizes(compiled):
    loss_fn = StableSoftmaxCELoss()
    for rows, classes in ((4, 3), (4, 3), (7, 2), (1, 1)):
        loss_fn(nd.zeros((rows, classes)), nd.zeros(rows))
    assert len(compiled) == 1


def test_one_graph_for_each_kind_of_call(compiled):
    loss_fn, label = StableSoftmaxCELoss(), nd.zeros(4)
    for _ in range(2):
        loss_fn(nd.zeros((4, 3)), label)
        loss_fn(nd.zeros((4, 3), dtype='float16'), label)
        loss_fn(nd.zeros((4, 3)), label.astype('int32'))
        loss_fn(nd.zeros((4, 3)), label, nd.ones(4))
        loss_fn(nd.zeros((4, 3)), label, nd.ones((4, 1)))
        loss_fn(nd.zeros((4, 5, 3)), nd.zeros((4, 5)))
    assert len(compiled) == len(set(compiled)) == 6


def test_losses_and_metrics_of_equal_options_share_graphs(compiled, batch):
    alive = []
    for _ in range(3):
        alive += [StableSoftmaxCELoss(label_smoothing=0.1), StableSoftmaxCELoss(class_weight=[1, 2, 3])]
        for loss_fn in alive[-2:]:
            loss_fn(*batch)
        alive.append(StableCrossEntropy(pred_type='logits'))
        alive[-1].update(batch[1], batch[0])
    assert len(compiled) == 3


def test_losses_made_anew_at_each_step_compile_once(compiled, batch):
    for _ in range(5):
        for options in ({}, {'ignore_label': 0}, {'reduction': 'sum'}, {'axis': 1}):
            StableSoftmaxCELoss(**options)(*batch)
    assert len(compiled) == 4


def test_losses_that_share_a_graph_have_their_own_class_weights(batch):
    for class_weight in ([1, 2, 3], [3, 2, 0]):
        assert_loss_is_reference({'class_weight': class_weight}, *(array.asnumpy() for array in batch))


def test_other_options_are_other_graphs(compiled, batch):
    for options in ({}, {'axis': 1}, {'weight': 0.5}, {'ignore_label': -1}, {'reduction': 'sum'}):
        StableSoftmaxCELoss(**options)(*batch)
    assert len(compiled) == 5


def count_graphs():
    gc.collect()
    return sum(type(item) is graphs.Graph for item in gc.get_objects())


def test_graphs_go_with_the_losses_that_use_them(batch, no_graphs_of_other_tests):
    first, second = StableSoftmaxCELoss(ignore_label=7), StableSoftmaxCELoss(ignore_label=7)
    for loss_fn in (first, second):
        for _ in range(graphs.FEW_CALLS + 1):
            loss_fn(*batch)
    before = count_graphs()
    del first, loss_fn
    assert count_graphs() == before
    del second
    assert count_graphs() == before - 1


def test_a_loss_is_deleted_without_a_garbage_collection(batch):
    loss_fn = StableSoftmaxCELoss(class_weight=[1] * batch[0].shape[1])
    loss_fn(*batch)
    is_deleted = weakref.ref(loss_fn)
    gc.disable()
    del loss_fn
    gc.enable()
    assert is_deleted() is None


def test_children_of_a_loss_have_names_of_their_own():
    loss_fn = StableSoftmaxCELoss(class_weight=[1, 2], prefix='loss_')
    for name in 'first', 'second':
        with loss_fn.name_scope():
            setattr(loss_fn, name, gluon.nn.Dense(1))
    assert [child.prefix for child in loss_fn._children.values()] == [
        'loss_classweight0_', 'loss_dense0_', 'loss_dense1_'
    ]  # fmt: skip
    assert not gluon.nn.Dense(1).prefix.startswith('loss_')


def test_number_of_graphs_of_deleted_losses_is_bounded(batch, no_graphs_of_other_tests):
    before = count_graphs() - len(graphs._KEPT)
    for ignore_label in range(10, 30):
        StableSoftmaxCELoss(ignore_label=ignore_label)(*batch)
    assert count_graphs() == before + graphs.MAX_KEPT


def test_number_of_graphs_of_one_loss_is_bounded(rng):
    """With many classes, the stock kernel has a graph for each number of them, and each graph has memory."""
    loss_fn = StableSoftmaxCELoss(kernel='stock')
    for classes in range(300, 300 + graphs.MAX_GRAPHS + 5):
        pred, label = rng.normal(0, 1, (2, classes)).astype('float32'), np.array([0, classes - 1], 'float32')
        expected, _ = reference.loss_and_gradient(pred, label)
        assert_close(loss_fn(nd.array(pred), nd.array(label)).asnumpy(), expected)
    assert len(loss_fn._graphs) == len(loss_fn._graphs._calls_before) == graphs.MAX_GRAPHS


def test_recorded_calls_outlive_their_losses_and_graphs(rng):
    batches = [(nd.array(rng.normal(0, 3, (8, 5))), nd.array(rng.randint(0, 5, 8))) for _ in range(12)]
    losses = []
    for i, (pred, label) in enumerate(batches):
        pred.attach_grad()
        with autograd.record():
            losses.append(StableSoftmaxCELoss(ignore_label=100 + i)(pred, label))
    gc.collect()
    autograd.backward(losses)
    for pred, label in batches:
        _, expected = reference.loss_and_gradient(pred.asnumpy(), label.asnumpy())
        assert_close(pred.grad.asnumpy(), expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads the resident memory of Linux')
@pytest.mark.parametrize('free', ['del loss_fn', 'loss_fn.hybridize()'])
def test_memory_of_recorded_calls_is_freed(free, kernel):
    """20 calls of 8 MB, recorded at the same time; and losses that were deleted after one call."""
    done = subprocess.run(
        [sys.executable, memory_worker.__file__, free],
        env={
            **os.environ,
            'PYTHONPATH': os.pathsep.join([os.path.dirname(HERE), os.environ.get('PYTHONPATH', '')]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    one, used, freed, deleted = map(float, done.stdout.split())  # MB more than before
    assert used < 35 * max(one, 16)  # the memory of 20 calls, and what lies between
    assert freed < used / 5
    assert deleted < used / 3


def test_number_of_graphs_does_not_grow_with_the_number_of_classes(compiled, rng, ctx):
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
    assert len(compiled) == 2


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


def test_hybridize_false_compiles_nothing(compiled, batch):
    loss_fn = StableSoftmaxCELoss(class_weight=[1, 2, 3])
    expected = loss_fn(*batch).asnumpy()
    loss_fn.hybridize(False)
    assert_close(loss_fn(*batch).asnumpy(), expected)
    assert len(compiled) == 1
    loss_fn.hybridize()
    loss_fn(*batch)
    assert len(compiled) == 2


@pytest.mark.parametrize(('flags', 'expected'), [
    ({}, {'static_alloc': True, 'static_shape': True}),
    ({'static_alloc': False}, {'static_alloc': False, 'static_shape': False}),
    ({'static_alloc': True, 'static_shape': False}, {'static_alloc': True, 'static_shape': False}),
    ({'inline_limit': 3}, {'static_alloc': True, 'static_shape': True, 'inline_limit': 3}),
], ids=str)  # fmt: skip
def test_hybridize_flags_reach_the_graph(flags, expected, compiled, batch, monkeypatch):
    given = []
    make = mx.nd.CachedOp
    monkeypatch.setattr(
        mx.nd, 'CachedOp', lambda symbol, flags: given.append(dict(flags)) or make(symbol, flags)
    )
    loss_fn = StableSoftmaxCELoss()
    loss_fn.hybridize(**flags)
    loss_fn(*batch)
    assert given == [expected]


def test_parent_hybridizes_the_loss_with_its_flags(compiled, batch):
    parent = gluon.nn.Sequential()
    loss_fn = StableSoftmaxCELoss()
    parent.add(loss_fn)
    parent.hybridize(False)
    loss_fn(*batch)
    assert not compiled
    parent.hybridize(static_alloc=True)
    loss_fn(*batch)
    assert len(compiled) == 1


@pytest.mark.skipif(modes.VERSION < (1, 7), reason='register_op_hook came with MXNet 1.7')
@pytest.mark.parametrize('is_used', [False, True], ids=['before-use', 'after-use'])
def test_op_hooks_are_called_until_removed(is_used, batch):
    loss_fn, names = StableSoftmaxCELoss(kernel='stock'), []
    if is_used:
        loss_fn(*batch)
    loss_fn.register_op_hook(lambda name, op, array: names.append(op))
    loss_fn(*batch).wait_to_read()
    assert b'pick' in names
    pred, label = batch
    pred.attach_grad()
    with autograd.record():
        loss = loss_fn(pred, label)
    del loss_fn
    gc.collect()
    loss.backward()
    mx.nd.waitall()
    assert b'_backward_pick' in names
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


@pytest.mark.parametrize('make_copy', [copy.copy, copy.deepcopy], ids=['copy', 'deepcopy'])
def test_what_is_set_on_a_copy_is_not_set_on_the_loss(make_copy, compiled, batch, tmp_path):
    loss_fn = StableSoftmaxCELoss(class_weight=[1, 2, 3], prefix='loss_')
    expected, files = loss_fn(*batch).asnumpy(), exported_files(loss_fn, tmp_path / 'loss')
    other = make_copy(loss_fn)
    other._weight = 2
    other.hybridize(static_alloc=False)
    assert_close(other(*batch).asnumpy(), 2 * expected)
    np.testing.assert_array_equal(loss_fn(*batch).asnumpy(), expected)
    assert loss_fn._graphs._flags == graphs.STATIC
    assert exported_files(loss_fn, tmp_path / 'loss') == files


@CLASS_WEIGHT
def test_a_pickle_holds_no_graphs(class_weight, batch):
    loss_fn = StableSoftmaxCELoss(class_weight=class_weight)
    before = len(pickle.dumps(loss_fn))
    loss_fn(*batch)
    assert len(pickle.dumps(loss_fn)) < before + 2000


@pytest.mark.parametrize(
    'make_copy', [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=['deepcopy', 'pickle']
)
def test_a_copy_of_a_loss_shares_its_graphs(make_copy, compiled, batch):
    loss_fn = StableSoftmaxCELoss()
    loss_fn(*batch)
    make_copy(loss_fn)(*batch)
    assert len(compiled) == 1


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
    with pytest.raises(
        ValueError, match="^dtype: expected one of 'float16', 'float32', 'float64', got 'int8'$"
    ):
        loss_fn.export(str(tmp_path / 'loss'), dtype='int8')


def test_exported_graph_serves_any_number_of_classes(rng):
    loss_fn = StableSoftmaxCELoss(kernel='stock')
    loss_fn(nd.zeros((4, 3)), nd.zeros(4))
    loaded = modes.load_exported(loss_fn, 2)
    for classes in (2, 3, 50):
        pred, label = nd.array(rng.normal(0, 1, (4, classes))), nd.array([0, classes - 1, classes, 1])
        got, expected = (loss(pred, label).asnumpy() for loss in (loaded, loss_fn))
        assert_close(got, expected, tolerances.stated('stock', 'float32'))
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


class Loop(gluon.HybridBlock):
    """A loss in the body of a loop."""

    def __init__(self, loss_fn):
        super().__init__()
        self.loss_fn = loss_fn

    def hybrid_forward(self, F, data, label):
        def step(inputs, states):
            return self.loss_fn(*inputs), states

        return F.contrib.foreach(step, [data, label], F.zeros((1,)))[0]


@pytest.mark.parametrize('is_hybrid', [False, True], ids=['eager', 'hybridized'])
def test_in_a_foreach_loop(is_hybrid, rng):
    data, label = nd.array(rng.normal(0, 1, (5, 4, 3))), nd.array(rng.randint(0, 3, (5, 4)))
    results = []
    for kind in (StableSoftmaxCELoss, gluon.loss.SoftmaxCELoss):
        net = Loop(kind())
        net.hybridize(is_hybrid)
        data.attach_grad()
        with autograd.record():
            loss = net(data, label)
        loss.backward()
        results.append((loss.asnumpy(), data.grad.asnumpy()))
    for got, expected in zip(*results):
        assert got.shape == expected.shape
        assert_close(got, expected)


@pytest.fixture
def net_and_loss():
    """A graph of a layer and the loss, of which all weights are 1 where it runs: so each loss is log 3."""
    layer = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=3, name='layer')
    return mx.sym.MakeLoss(StableSoftmaxCELoss()(layer, mx.sym.var('label')))


def test_in_a_symbol_block(net_and_loss):
    block = gluon.SymbolBlock(net_and_loss, [mx.sym.var('data'), mx.sym.var('label')])
    block.initialize(mx.init.One())
    for is_hybrid in (False, True):
        block.hybridize(is_hybrid)
        assert_close(block(nd.ones((4, 5)), nd.zeros(4)).asnumpy(), np.full(4, np.log(3)))


def test_monitor_sees_the_layers(net_and_loss):
    module = mx.mod.Module(net_and_loss, ['data'], ['label'])
    module.bind([('data', (4, 5))], [('label', (4,))])
    module.init_params(mx.init.One())
    monitor = mx.mon.Monitor(1)
    module.install_monitor(monitor)
    monitor.tic()
    module.forward(mx.io.DataBatch([nd.ones((4, 5))], [nd.zeros(4)]))
    assert 'layer_output' in [name for _, name, _ in monitor.toc()]


def test_equal_nets_have_equal_graphs(kernel):
    graphs_of = [
        StableSoftmaxCELoss(kernel=kernel, prefix='l_')(mx.sym.var('x') * 2, mx.sym.var('y'))
        for _ in range(2)
    ]
    texts = []
    for graph in graphs_of:
        nodes = json.loads(graph.tojson())['nodes']
        texts.append([(node['op'], node.get('attrs'), node['inputs']) for node in nodes])
    assert texts[0] == texts[1]


@pytest.mark.parametrize('classes', [3, 300])
@pytest.mark.parametrize('positions', [(6,), (2, 3)])
@pytest.mark.parametrize('invalid_label', ['nan', 'clip'])
def test_a_graph_knows_the_classes_of_a_dense_layer(classes, positions, invalid_label, rng):
    """Then a one-hot array of all classes lowers the label's logit, and the loss is the same."""
    loss_fn, label = StableSoftmaxCELoss(invalid_label=invalid_label, kernel='stock'), mx.sym.var('label')
    dense = gluon.nn.Dense(classes, in_units=classes, use_bias=False, flatten=False)
    data, logits = mx.sym.var('data'), nd.array(rng.normal(0, 3, (*positions, classes)))
    inputs = {
        'data': logits,
        dense.weight.name: nd.array(np.eye(classes)),
        'label': nd.array([0, 1, classes - 1, classes, -0.5, np.nan]).reshape(positions),
    }
    losses, is_known = [], []
    for pred in (dense(data), mx.sym.slice_axis(dense(data), axis=0, begin=0, end=None)):
        graph = loss_fn(pred, label)
        is_known.append(f'"depth": "{classes}"' in graph.tojson())
        losses.append(graph.eval(**inputs)[0].asnumpy())
    assert is_known == [True, False]
    expected = loss_fn(logits, inputs['label']).asnumpy()
    for loss in losses:
        assert_close(loss, expected, tolerances.stated('stock', 'float32'))


DATA = mx.sym.var('data')
DENSE = mx.sym.FullyConnected(DATA, num_hidden=3)


@pytest.mark.parametrize(
    ('symbol', 'length'),
    [
        (DATA, None),
        (DENSE, 3),
        (DENSE * 2 - 1, 3),
        (DATA / -DENSE, 3),
        ((1 - DENSE.as_np_ndarray() * 2) / 3 - 1 + 1, 3),
        (mx.sym.Dropout(mx.sym.tanh(DENSE)), 3),
        (mx.sym.reshape(DATA, shape=(-1, 5)), 5),
        (mx.sym.reshape(DATA, shape=5), 5),
        (mx.sym.reshape(DENSE, shape=(0, -1)), None),
        (mx.sym.reshape_like(DENSE, DATA), None),
        (mx.sym.broadcast_add(DENSE, DATA), None),
        (mx.sym.slice_axis(DENSE, axis=-1, begin=0, end=2), None),
        (mx.sym.relu(DATA, attr={'num_hidden': '2'}), None),
    ],
    ids=str,
)
def test_length_of_the_last_axis_of_a_symbol(symbol, length):
    assert array_api.last_axis_of(symbol) == length


def test_a_graph_infers_the_shape_of_the_label():
    data, label = mx.sym.var('data'), mx.sym.var('label')
    graph = StableSoftmaxCELoss(kernel='stock')(mx.sym.FullyConnected(data, num_hidden=3), label)
    shapes, outputs, _ = graph.infer_shape(data=(4, 5))
    assert (shapes[0], shapes[-1], outputs) == ((4, 5), (4,), [(4,)])


@pytest.mark.slow
@pytest.mark.parametrize('engine', ['ThreadedEnginePerDevice', 'NaiveEngine'])
def test_four_threads_with_four_kinds_of_call(kernel, engine):
    done = subprocess.run(
        [sys.executable, thread_worker.__file__, '300'],
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


def test_what_is_set_is_seen_by_the_next_call(kernel):
    loss_fn, pred, label = StableSoftmaxCELoss(kernel=kernel), nd.zeros((2, 3)), nd.array([0, 2])

    def assert_losses_are(weight):
        for _ in range(2):
            assert_close(loss_fn(pred, label).asnumpy(), np.full(2, weight * np.log(3)))

    assert_losses_are(1)
    loss_fn._weight = 2
    assert_losses_are(2)
    loss_fn.hybridize()
    assert_losses_are(2)
    with pytest.raises(TypeError, match='got 4 inputs'):
        loss_fn(pred, label, None, label)
    loss_fn.hybridize(False)
    loss_fn._weight = 3
    assert_losses_are(3)
    pred = pred.as_in_context(mx.cpu(1))  # the label is moved
    loss_fn.hybridize()
    assert_losses_are(3)


def test_labels_are_checked_at_each_call(kernel):
    loss_fn = StableSoftmaxCELoss(kernel=kernel, invalid_label='raise')
    loss_fn(nd.zeros((2, 3)), nd.array([0, 2]))
    for _ in range(2):
        with pytest.raises(ValueError, match='label'):
            loss_fn(nd.zeros((2, 3)), nd.array([0, 5]))


@pytest.mark.parametrize('changed', [0, 1])
def test_what_is_set_on_a_copy_or_its_original_is_not_set_on_the_other(changed, kernel):
    """A copy shares the graphs of its original until one of them is hybridized."""
    loss_fn, pred, label = StableSoftmaxCELoss(kernel=kernel), nd.zeros((2, 3)), nd.array([0, 2])
    loss = loss_fn(pred, label).asnumpy()
    both, names = [loss_fn, copy.copy(loss_fn)], []
    both[changed]._weight = 2
    for _ in range(2):
        assert_close(both[changed](pred, label).asnumpy(), 2 * loss)
        assert_close(both[1 - changed](pred, label).asnumpy(), loss)
    if modes.VERSION < (1, 7):  # register_op_hook came with MXNet 1.7
        return
    both[changed].register_op_hook(lambda *args: names.append(args))
    for _ in range(2):
        names.clear()
        both[1 - changed](pred, label).wait_to_read()
        assert not names
        both[changed](pred, label).wait_to_read()
        assert names
