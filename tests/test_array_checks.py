"""Which inputs are accepted, in which shapes, dtypes and contexts, and which errors name what is wrong."""

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
import tolerances
from checks import assert_loss_is_reference, every_mode
from mxnet.gluon.contrib.nn import Identity
from tolerances import assert_close

from gluon_stable_ce import StableSoftmaxCELoss
from gluon_stable_ce.array_checks import check_shapes, on_context

pytestmark = pytest.mark.usefixtures('kernel')

nd = mx.nd
LABEL_DTYPES = pytest.mark.parametrize('dtype', cases.LABEL_DTYPES)
COMPILED = pytest.mark.parametrize('is_compiled', [True, False], ids=['compiled', 'eager'])


def nested(loss_fn, *arrays):
    net = modes.WithLoss(Identity(), loss_fn)
    net.hybridize()
    return net(*arrays).asnumpy()


def exported(loss_fn, *arrays):
    """A graph that was exported before any call."""
    options = {'sample_weight': True} if len(arrays) > 2 else {}
    return modes.load_exported(loss_fn, len(arrays), **options)(*arrays).asnumpy()


IN_GRAPHS = pytest.mark.parametrize('in_graph', [nested, exported], ids=['nested', 'exported'])


@pytest.mark.parametrize(
    ('options', 'pred', 'label', 'message'),
    [
        pytest.param(
            {}, (4, 3), (4, 3),
            r'^label: expected shape \(4,\) for pred of shape \(4, 3\) with the classes on axis 1, got \(4, 3\); .* need sparse_label=False$',
            id='one-hot',
        ),
        pytest.param(
            {}, (4, 3), (5,),
            r'^label: expected shape \(4,\) for pred of shape \(4, 3\) with the classes on axis 1, got \(5,\)$',
            id='other-batch',
        ),
        pytest.param({}, (4, 3), (1, 4), r'^label: expected shape \(4,\)', id='row'),
        pytest.param({}, (4, 3), (2, 2), r'^label: expected shape \(4,\)', id='same-size'),
        pytest.param({'axis': 1}, (4, 3, 2), (4, 3), r'^label: expected shape \(4, 2\)', id='other-axis'),
        pytest.param({'axis': 1}, (2, 3, 4, 5), (2, 5, 4), r'^label: expected shape \(2, 4, 5\)', id='transposed'),
        pytest.param(
            {'sparse_label': False}, (4, 3), (4,),
            r'^label: expected shape \(4, 3\) like pred .*, got \(4,\); class indices need sparse_label=True$',
            id='dense-indices',
        ),
        pytest.param(
            {'sparse_label': False}, (4, 3), (5,),
            r'^label: expected shape \(4, 3\) like pred with sparse_label=False, got \(5,\)$',
            id='dense-other-batch',
        ),
        pytest.param(
            {'sparse_label': False}, (4, 3), (3, 4),
            r'^label: expected shape \(4, 3\) like pred .*, got \(3, 4\); gluon.s loss would read its numbers one',
            id='dense-transposed',
        ),
        pytest.param(
            {'sparse_label': False}, (2, 6), (4, 3), r'^label: .* gluon.s loss would read', id='dense-rows-broken',
        ),
        pytest.param(
            {}, (4,), (4,), r'^pred: expected at least 2 axes, with the classes on axis -1, got shape \(4,\)$', id='one-axis',
        ),
        pytest.param(
            {'axis': 2}, (4, 3), (4,),
            r'^pred: expected at least 2 axes, with the classes on axis 2, got shape \(4, 3\)$',
            id='no-such-axis',
        ),
        pytest.param(
            {'axis': 1}, (4,), (1,), r'^pred: .* with the classes on axis 1, got shape \(4,\)$', id='no-such-axis-of-one-sample',
        ),
        pytest.param(
            {'batch_axis': 2}, (4, 3), (4,), r'^batch_axis: expected different axes of pred, of shape \(4, 3\), got 2$',
            id='no-such-batch-axis',
        ),
        pytest.param(
            {'class_weight': [1, 2]}, (4, 3), (4,),
            '^class_weight: expected one weight for each of the 3 classes of pred, got 2$',
            id='class-weight',
        ),
    ],
)  # fmt: skip
def test_shape_errors_name_argument_and_shapes(options, pred, label, message):
    with pytest.raises(ValueError, match=message):
        StableSoftmaxCELoss(**options)(nd.zeros(pred), nd.zeros(label))


@pytest.mark.parametrize(
    ('dtype', 'classes'), [('float16', 2**11), ('float32', 2**24), ('float64', 2**53), ('int64', 2**53)]
)
def test_label_dtypes_that_can_name_all_classes(dtype, classes):
    assert check_shapes((4, classes), (4,), dtype, -1, True) == (4,)
    message = f'^label: expected a dtype that can name {classes + 1} classes, got {dtype}, exact up to {classes} only$'
    with pytest.raises(TypeError, match=message):
        check_shapes((4, classes + 1), (4,), dtype, -1, True)


def test_bools_are_no_labels():
    with modes.numpy_semantics(), pytest.raises(TypeError, match='^label: expected one of .*, got bool$'):
        StableSoftmaxCELoss()(mx.np.zeros((4, 3)), mx.np.zeros(4, dtype='bool'))


def test_there_is_a_class():
    with modes.numpy_semantics(), pytest.raises(ValueError, match=r'^pred: expected .* got shape \(4, 0\)$'):
        StableSoftmaxCELoss()(mx.np.zeros((4, 0)), mx.np.zeros(4))
    joint = StableSoftmaxCELoss(axis=(1, 2), from_logits=True, sparse_label=False)
    with modes.numpy_semantics(), pytest.raises(ValueError, match=r'^pred: .* got shape \(4, 3, 0\)$'):
        joint(mx.np.zeros((4, 3, 0)), mx.np.zeros((4, 3, 0)))


def test_shape_error_beside_a_weight_without_axes():
    with modes.numpy_semantics(), pytest.raises(ValueError, match='^pred: expected at least 2 axes'):
        StableSoftmaxCELoss(axis=1)(mx.np.zeros(4), mx.np.zeros(4), mx.np.ones(()))


@pytest.mark.parametrize('shape', [(3,), (2, 1), (4, 3), (5, 4), (4, 5, 2), (1, 4, 5, 1)], ids=str)
def test_sample_weight_shape_error_names_the_layouts(shape):
    message = (
        r'^sample_weight: expected one weight per sample \(4,\), one per label \(4, 5\), or a shape that '
        r'broadcasts to \(4, 5, 1\), or to \(4, 5, 3\) for the mean over the classes, got '
    )
    with pytest.raises(ValueError, match=message):
        StableSoftmaxCELoss()(nd.zeros((4, 5, 3)), nd.zeros((4, 5)), nd.ones(shape))


@pytest.mark.parametrize(
    ('axis', 'pred', 'weight', 'is_of_classes'),
    [(-1, (4, 5, 3), 3, True), (-1, (4, 5, 3), 5, False), (1, (4, 3, 5), 3, False)],
)
def test_weights_of_classes_are_named(axis, pred, weight, is_of_classes):
    positions = tuple(np.delete(pred, axis).tolist())
    with pytest.raises(ValueError, match='^sample_weight: expected') as error:
        StableSoftmaxCELoss(axis=axis)(nd.zeros(pred), nd.zeros(positions), nd.ones(weight))
    assert str(error.value).endswith('; for a weight of each class, use class_weight') == is_of_classes


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        pytest.param(
            (np.zeros((4, 3)), nd.zeros(4)), '^pred: expected an MXNet array, got numpy.ndarray$', id='pred'
        ),
        pytest.param(
            (nd.zeros((4, 3)), [0, 1, 2, 0]), '^label: expected an MXNet array, got list$', id='label'
        ),
        pytest.param(
            (nd.zeros((4, 3)), nd.zeros(4), 1.0),
            '^sample_weight: expected an MXNet array, got float$',
            id='weight',
        ),
        pytest.param(
            (nd.zeros((4, 3), dtype='int32'), nd.zeros(4)),
            '^pred: expected one of the dtypes float16, bfloat16, float32, float64, got int32$',
            id='integers',
        ),
    ],
)
def test_type_errors_name_argument_and_type(args, message):
    with pytest.raises(TypeError, match=message):
        StableSoftmaxCELoss()(*args)


@pytest.mark.parametrize('sparse_label', [True, False], ids=['sparse', 'dense'])
def test_weights_of_classes_are_no_sample_weights(sparse_label):
    """Gluon's loss multiplies by their mean. With dense labels that is accepted, as any weights of `pred`'s shape are."""
    loss_fn, pred = StableSoftmaxCELoss(sparse_label=sparse_label), nd.array([[1, 2, 3], [0, 0, 0]])
    label, weight = (nd.array([0, 1]) if sparse_label else nd.ones((2, 3))), nd.array([1, 2, 6])
    if sparse_label:
        with pytest.raises(
            ValueError,
            match=r'would broadcast \(2, 1\) \* \(3,\) to \(2, 3\); for a weight of each class, use class_weight$',
        ):
            loss_fn(pred, label, weight)
    else:
        assert_close(loss_fn(pred, label, weight).asnumpy(), 3 * loss_fn(pred, label).asnumpy())


@pytest.mark.parametrize(('pred', 'label', 'weight', 'hint'), [
    ((4, 3), (4,), (4, 4), r"; gluon's loss would broadcast \(4, 1\) \* \(4, 4\) to \(4, 4\)"),
    ((2, 5, 3), (2, 5), (5,), r"; gluon's loss would broadcast \(2, 5, 1\) \* \(5,\) to \(2, 5, 5\)"),
    ((8, 6, 3), (8, 6), (8, 1, 1, 6), r"; gluon's loss would broadcast .* to \(8, 8, 6, 6\)"),
    ((4, 2, 3), (4, 2), (5, 1), r'got \(5, 1\)'),
], ids=str)  # fmt: skip
def test_weights_that_gluon_broadcasts_further(pred, label, weight, hint):
    with pytest.raises(ValueError, match=f'^sample_weight: expected .*{hint}$'):
        StableSoftmaxCELoss()(*map(nd.ones, (pred, label, weight)))


def test_arrays_on_another_device_are_an_error():
    with pytest.raises(
        ValueError, match=r'^label: expected an array on gpu\(1\) like pred, got one on cpu\(0\); move '
    ):
        on_context('label', nd.zeros(4), mx.gpu(1))


@pytest.mark.parametrize('context', ['cpu_shared(0)', 'cpu_pinned(0)', 'cpu(1)'])
@COMPILED
@pytest.mark.parametrize('invalid_label', ['nan', 'raise', 'clip'])
def test_all_memory_of_the_cpu_is_one_place(context, is_compiled, invalid_label):
    """DataLoader's workers hand over batches in shared memory; gluon reads labels on any CPU."""
    pred, label, weight = nd.array([[1, 2, 3]] * 4), nd.array([0, 1, 2, 0]), nd.array([1, 2, 3, 4])
    loss_fn = StableSoftmaxCELoss(class_weight=[1, 2, 3], invalid_label=invalid_label)
    loss_fn.hybridize(is_compiled)
    expected = loss_fn(pred, label, weight).asnumpy()
    kind, index = context[:-1].split('(')
    place = mx.Context(kind, int(index))
    loss = loss_fn(pred, label.as_in_context(place), weight.as_in_context(place))
    assert loss.context == pred.context
    np.testing.assert_array_equal(loss.asnumpy(), expected)


@every_mode
@LABEL_DTYPES
def test_label_dtypes(mode, dtype, ctx):
    pred = np.arange(30, dtype='float32').reshape(5, 6) % 7
    label = np.array([0, 5, 2, 6, 100]).astype(dtype)
    assert_loss_is_reference({'ignore_label': 2}, pred, label, mode=mode)


INVALID = {
    'int64': [2**32 + 1, -(2**40), 2**53],
    'int32': [2**31 - 1, -1],
    'int8': [-1, 127],
    'float64': [1 + 1e-9, np.inf, -np.inf, np.nan, 2.0**32 + 1],
    'float32': [0.5, 1e30, -1e-30, np.nan],
    'float16': [0.5, np.nan, np.inf],
}


@pytest.mark.parametrize('dtype', INVALID)
def test_invalid_labels_of_each_dtype_are_nan(dtype, ctx):
    label = nd.array(INVALID[dtype], dtype=dtype)
    np.testing.assert_array_equal(StableSoftmaxCELoss()(nd.zeros((len(label), 3)), label).asnumpy(), np.nan)


@every_mode
@pytest.mark.parametrize('reduction', cases.REDUCTIONS)
def test_label_may_keep_the_class_axis(mode, reduction, rng, ctx):
    pred = rng.normal(0, 1, (3, 5, 4)).astype('float32')
    label = rng.randint(0, 5, (3, 1, 4)).astype('float32')
    assert_loss_is_reference({'axis': 1, 'reduction': reduction}, pred, label, mode=mode)


@IN_GRAPHS
@pytest.mark.parametrize(
    ('axis', 'pred', 'label'),
    [
        (-1, (4, 3), (2, 2)),
        (-1, (4, 3), (5,)),
        (-1, (4, 3), (1,)),
        (-1, (4, 3), (1, 4)),
        (-1, (4, 3), (4, 3)),
        (1, (2, 3, 4, 5), (2, 5, 4)),
        (1, (2, 3, 4, 5), (2, 20)),
        (1, (2, 3, 4, 5), (2, 4, 1, 5)),
    ],
    ids=str,
)
def test_graph_refuses_labels_of_other_shapes(in_graph, axis, pred, label):
    with pytest.raises(mx.MXNetError, match='[Ss]hape|Incompatible attr'):
        in_graph(StableSoftmaxCELoss(axis=axis), nd.zeros(pred), nd.zeros(label))


@IN_GRAPHS
@pytest.mark.parametrize(
    ('axis', 'pred', 'label'),
    [(-1, (4, 3), (4, 1)), (1, (2, 3, 4, 5), (2, 4, 5)), (1, (2, 3, 4, 5), (2, 1, 4, 5))],
    ids=str,
)
def test_graph_accepts_labels_of_both_shapes(in_graph, axis, pred, label, rng):
    pred, label = nd.array(rng.normal(0, 1, pred)), nd.array(rng.randint(0, 3, label))
    loss_fn = StableSoftmaxCELoss(axis=axis, kernel='stock')
    assert_close(in_graph(loss_fn, pred, label), loss_fn(pred, label).asnumpy(), tolerances.NLL)


@IN_GRAPHS
@pytest.mark.parametrize('label', [(3, 4), (4, 4), (5, 3), (4,)], ids=str)
def test_graph_refuses_distributions_of_other_shapes(in_graph, label):
    with pytest.raises(mx.MXNetError):
        in_graph(StableSoftmaxCELoss(sparse_label=False), nd.zeros((4, 3)), nd.zeros(label))


@IN_GRAPHS
@pytest.mark.parametrize('shape', [(4,), (1,), (4, 1, 1), (4, 5, 1), (1, 1, 1), (4, 5, 3)], ids=str)
def test_graph_accepts_sample_weights_from_the_batch_axis_on(in_graph, shape, rng):
    pred, label = nd.array(rng.normal(0, 1, (4, 5, 3))), nd.array(rng.randint(0, 3, (4, 5)))
    weight, loss_fn = nd.array(rng.uniform(0, 2, shape)), StableSoftmaxCELoss()
    expected = loss_fn(pred, label, weight).asnumpy()
    assert_close(in_graph(StableSoftmaxCELoss(), pred, label, weight), expected)


@IN_GRAPHS
@pytest.mark.parametrize('shape', [(3,), (5,), (5, 4), (2, 1), (4, 5, 1, 1)], ids=str)
def test_graph_refuses_sample_weights_of_other_shapes(in_graph, shape):
    with pytest.raises(mx.MXNetError, match='[Ss]hape|Incompatible attr'):
        in_graph(StableSoftmaxCELoss(), nd.zeros((4, 5, 3)), nd.zeros((4, 5)), nd.ones(shape))


@IN_GRAPHS
@pytest.mark.parametrize('shape', [(4, 5, 7), (1, 1, 7)], ids=str)
def test_graph_refuses_sample_weights_with_another_number_of_classes(in_graph, shape):
    with pytest.raises(mx.MXNetError):
        in_graph(StableSoftmaxCELoss(), nd.zeros((4, 5, 3)), nd.zeros((4, 5)), nd.ones(shape))


@IN_GRAPHS
@pytest.mark.parametrize('shape', [(2, 4, 4), (2, 4)], ids=str)
def test_graph_never_reads_sample_weights_on_other_axes(in_graph, shape, rng):
    """It may compute what the loss computes of arrays, or refuse."""
    pred, label = nd.array(rng.normal(0, 1, (2, 3, 4, 4))), nd.array(rng.randint(0, 3, (2, 4, 4)))
    weight, loss_fn = nd.array(rng.uniform(0, 2, shape)), StableSoftmaxCELoss(axis=1)
    try:
        loss = in_graph(loss_fn, pred, label, weight)
    except mx.MXNetError:
        return
    assert_close(loss, loss_fn(pred, label, weight).asnumpy())
