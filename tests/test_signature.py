"""What is inferred of a call, which inputs are accepted, and which errors name what is wrong."""

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
from checks import assert_loss_is_reference, every_mode
from mxnet.gluon.contrib.nn import Identity

from gluon_stable_ce import StableSoftmaxCELoss
from gluon_stable_ce._signature import Signature, infer_signature
from gluon_stable_ce.functional import read_labels

pytestmark = pytest.mark.usefixtures('kernel')

nd = mx.nd
LABEL_DTYPES = pytest.mark.parametrize('dtype', cases.LABEL_DTYPES)
HOST = pytest.mark.parametrize('kind', ['cpu_shared', 'cpu_pinned'])
CLASS_WEIGHT = pytest.mark.parametrize('class_weight', [None, [1, 2, 3]], ids=['plain', 'class-weight'])
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


def test_infer_signature_of_arrays():
    signature = infer_signature(
        nd.zeros((4, 5, 3), dtype='float16'), nd.zeros((4, 5), dtype='int32'), nd.ones(4)
    )
    assert signature == Signature(
        np_style=False,
        dtype='float16',
        ndim=3,
        label_dtype='int32',
        label_ndim=2,
        weight_layout='batch',
        few_classes=False,
        kernel='stock',
    )
    assert hash(signature) == hash(Signature(*signature))
    assert (signature.compute_dtype, signature.label_compare_dtype) == ('float32', 'float64')


def test_infer_signature_of_symbols_is_empty():
    assert infer_signature(mx.sym.var('pred'), mx.sym.var('label')) == Signature()
    pred = mx.sym.var('pred', dtype='float16')
    assert infer_signature(pred, mx.sym.var('label')) == Signature(dtype='float16')


def test_infer_signature_of_np_arrays():
    with modes.numpy_semantics():
        assert infer_signature(mx.np.zeros((4, 3)), mx.np.zeros(4)).np_style


def test_infer_signature_does_not_depend_on_sizes():
    """So one graph serves all of them."""
    assert infer_signature(nd.zeros((4, 3)), nd.zeros(4)) == infer_signature(nd.zeros((7, 2)), nd.zeros(7))


@pytest.mark.parametrize(
    ('dtype', 'label_dtype', 'classes', 'expected'),
    [
        ('float32', 'float32', 2048, True),
        ('float32', 'float32', 2049, False),
        ('float32', 'int8', 10, True),
        ('float32', 'int32', 10, False),
        ('float16', 'float32', 10, False),
        ('float64', 'float64', 10, True),
        ('float32', 'float64', 10, False),
    ],
)
def test_infer_signature_few_classes(dtype, label_dtype, classes, expected):
    """Only if comparing labels in the dtype of pred tells all of them apart."""
    pred, label = nd.zeros((4, classes), dtype=dtype), nd.zeros(4, dtype=label_dtype)
    assert infer_signature(pred, label).few_classes is expected


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
def test_infer_signature_weight_layout(shape, layout):
    pred, label = nd.zeros((3, 5, 2, 4)), nd.zeros((3, 2, 4))
    assert infer_signature(pred, label, nd.ones(shape), axis=1).weight_layout == layout


def test_infer_signature_weight_layout_of_several_batch_axes():
    pred, label = nd.zeros((3, 5, 2, 4)), nd.zeros((3, 2, 4))
    signature = infer_signature(pred, label, nd.ones((3, 4)), axis=1, batch_axes=(-1, 0))
    assert signature.weight_layout == 'batch'


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
            {'sparse_label': False}, (4, 3), (3, 4),
            r'^label: expected shape \(4, 3\) like pred with sparse_label=False, got \(3, 4\)$',
            id='dense-transposed',
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
            {'class_weight': [1, 2]}, (4, 3), (4,),
            '^class_weight: expected one weight for each of the 3 classes of pred, got 2$',
            id='class-weight',
        ),
    ],
)  # fmt: skip
def test_shape_errors_name_argument_and_shapes(options, pred, label, message):
    with pytest.raises(ValueError, match=message):
        StableSoftmaxCELoss(**options)(nd.zeros(pred), nd.zeros(label))


@pytest.mark.parametrize('shape', [(3,), (2, 1), (4, 3), (5, 4), (4, 5, 2), (1, 4, 5, 1)], ids=str)
def test_sample_weight_shape_error_names_the_layouts(shape):
    message = (
        r'^sample_weight: expected one weight per sample \(4,\), one per label \(4, 5\), or a shape that '
        r'broadcasts to \(4, 5, 1\), or to \(4, 5, 3\) for the mean over the classes, got '
    )
    with pytest.raises(ValueError, match=message):
        StableSoftmaxCELoss()(nd.zeros((4, 5, 3)), nd.zeros((4, 5)), nd.ones(shape))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        pytest.param(
            (np.zeros((4, 3)), nd.zeros(4)), '^pred: expected an MXNet array, got ndarray$', id='pred'
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
            (nd.zeros((4, 3)).tostype('csr'), nd.zeros(4)),
            '^pred: expected a dense array, got CSRNDArray$',
            id='sparse-array',
        ),
        pytest.param(
            (nd.zeros((4, 3), dtype='int32'), nd.zeros(4)),
            '^pred: expected one of the dtypes float16, bfloat16, float32, float64, got int32$',
            id='integers',
        ),
        pytest.param(
            (nd.zeros((4, 2049)), nd.zeros(4, dtype='float16')),
            '^label: expected a dtype that can name 2049 classes, got float16, exact up to 2048 only$',
            id='label-dtype',
        ),
    ],
)
def test_type_errors_name_argument_and_type(args, message):
    with pytest.raises(TypeError, match=message):
        StableSoftmaxCELoss()(*args)


@CLASS_WEIGHT
@pytest.mark.parametrize('moved', ['label', 'sample_weight'])
def test_arrays_on_two_devices_are_an_error_and_harm_no_later_call(class_weight, moved):
    loss_fn = StableSoftmaxCELoss(class_weight=class_weight)
    inputs = {'pred': nd.zeros((4, 3)), 'label': nd.zeros(4), 'sample_weight': nd.ones(4)}
    elsewhere = {**inputs, moved: inputs[moved].as_in_context(mx.cpu(1))}
    for _ in range(2):  # without a graph and with one
        message = rf'^{moved}: expected an array on cpu\(0\) like pred, got one on cpu\(1\)$'
        with pytest.raises(ValueError, match=message):
            loss_fn(*elsewhere.values())
        assert loss_fn(*inputs.values()).shape == (4,)


@HOST
@COMPILED
@pytest.mark.parametrize('invalid_label', ['nan', 'raise', 'clip'])
def test_labels_and_weights_in_pinned_and_shared_memory_are_accepted(kind, is_compiled, invalid_label):
    """DataLoader's workers hand over batches there."""
    pred, label, weight = nd.array([[1, 2, 3]] * 4), nd.array([0, 1, 2, 0]), nd.array([1, 2, 3, 4])
    loss_fn = StableSoftmaxCELoss(class_weight=[1, 2, 3], invalid_label=invalid_label)
    loss_fn.hybridize(is_compiled)
    expected = loss_fn(pred, label, weight).asnumpy()
    place = mx.Context(kind, 0)
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


@pytest.mark.parametrize('dtype', ['int32', 'int64', 'float64'])
def test_labels_above_what_float32_counts(dtype, ctx):
    classes = 2**24 + 2
    label = nd.array([0, classes - 1, classes], dtype=dtype)
    labels = read_labels(nd, label, nd.zeros((1, classes)))
    np.testing.assert_array_equal(labels.is_valid.asnumpy(), [1, 1, 0])
    assert labels.index.asnumpy()[1] == classes - 1


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
    np.testing.assert_array_equal(in_graph(loss_fn, pred, label), loss_fn(pred, label).asnumpy())


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
    np.testing.assert_allclose(in_graph(StableSoftmaxCELoss(), pred, label, weight), expected, **cases.CLOSE)


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
    np.testing.assert_allclose(loss, loss_fn(pred, label, weight).asnumpy(), **cases.CLOSE)
