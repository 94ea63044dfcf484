"""Shapes in a graph of symbols, which knows no ranks.

Wrong ones are MXNet's shape errors, and never numbers. Those that are not all known are no error.
"""

from functools import partial

import cases
import modes
import mxnet as mx
import numpy as np
import pytest

from gluon_stable_ce import StableSoftmaxCELoss

pytestmark = pytest.mark.usefixtures('kernel')


def exported(loss_fn, *arrays):
    """Call a graph that was exported before any call."""
    return modes.load_exported(loss_fn, len(arrays))(*map(mx.nd.array, arrays)).asnumpy()


IN_GRAPHS = modes.parametrize([modes.nested, exported])


def zeros(*shapes):
    return [np.zeros(shape, 'float32') for shape in shapes]


@IN_GRAPHS
@pytest.mark.parametrize(('options', 'pred', 'label'), [
    ({}, (4, 6, 5), (6, 4)),
    ({'axis': -3}, (2, 3, 4, 5), (2, 5, 4)),
    ({'axis': 1, 'sparse_label': False}, (2, 3, 4, 5), (2, 3, 5, 4)),
    ({'sparse_label': False}, (2, 3, 4), (3, 2, 4)),
], ids=str)  # fmt: skip
def test_a_label_of_the_same_size(mode, options, pred, label):
    with pytest.raises(mx.MXNetError):
        mode(StableSoftmaxCELoss(**options), *zeros(pred, label))


@IN_GRAPHS
@pytest.mark.parametrize('count', [1, 2, 4, 9])
@pytest.mark.parametrize(('options', 'pred', 'label'), [
    ({}, (4, 3), 4),
    ({'axis': 1, 'label_smoothing': 0.1}, (2, 3, 3, 3), (2, 3, 3)),
    ({'sparse_label': False}, (4, 3), (4, 3)),
    ({'sparse_label': False, 'label_smoothing': 0.1}, (4, 3), (4, 3)),
], ids=str)  # fmt: skip
def test_class_weights_of_another_number(mode, count, options, pred, label):
    loss_fn = StableSoftmaxCELoss(class_weight=[1] * count, **options)
    with pytest.raises(mx.MXNetError, match='expected'):
        mode(loss_fn, *zeros(pred, label))


@pytest.mark.parametrize(('options', 'pred', 'weight'), [
    ({'axis': 1}, (2, 5, 3, 3), (2, 3, 3)),
    ({'axis': 1}, (2, 3, 3, 3), (2, 3, 3)),
    ({}, (4, 5), (4, 7)),
    ({}, (4, 6, 5), (4, 6, 2)),
    ({'batch_axis': 1}, (4, 4, 5), (4,)),
], ids=str)  # fmt: skip
def test_a_sample_weight_of_another_layout(options, pred, weight):
    positions = np.delete(pred, options.get('axis', -1))
    with pytest.raises(mx.MXNetError):
        modes.nested(StableSoftmaxCELoss(**options), *zeros(pred, positions, weight))


@pytest.mark.parametrize('options', cases.params({**cases.SPARSE, **cases.DENSE}))
@pytest.mark.parametrize('axis', [-1, 1])
@pytest.mark.parametrize(
    'layer', [mx.sym.identity, partial(mx.sym.FullyConnected, num_hidden=5)], ids=['', 'dense']
)
def test_print_summary_reads_a_second_axis_of_each_array(options, axis, layer, capsys):
    shape = (4, 5)
    shapes = {
        'data': shape,
        'label': shape if options.get('sparse_label') is False else (4,),
        'weight': (4, 1),
    }
    for names, reduction in [
        (['label'], 'none'),
        *((['label', 'weight'], each) for each in cases.REDUCTIONS),
    ]:
        loss_fn = StableSoftmaxCELoss(kernel='stock', axis=axis, reduction=reduction, **options)
        graph = loss_fn(layer(mx.sym.var('data'), name='layer'), *map(mx.sym.var, names))
        mx.viz.print_summary(graph, {name: shapes[name] for name in ['data', *names]})
        assert 'layer(' in capsys.readouterr().out


@pytest.mark.parametrize('weighted', [False, True], ids=['', 'sample-weight'])
@pytest.mark.parametrize('options', [
    {}, {'weight': 2}, {'from_logits': True}, {'ignore_label': -1}, {'class_weight': [1, 2, 3]},
    {'reduction': 'valid', 'ignore_label': -1}, {'label_smoothing': 0.1}, {'sparse_label': False},
], ids=str)  # fmt: skip
def test_shapes_that_are_not_all_known(options, weighted):
    names = ['data', 'label', 'weight'][: 3 if weighted else 2]
    graph = StableSoftmaxCELoss(kernel='stock', **options)(*map(mx.sym.var, names))
    for shape in ((0, 3), (0, 5, 3)):
        shapes, _, _ = graph.infer_shape_partial(data=shape)
        assert shapes[:2] == [shape, shape[:-1] if options.get('sparse_label', True) else ()]
    with pytest.warns(UserWarning, match='Cannot decide shape'):
        assert graph.infer_shape() == (None, None, None)
