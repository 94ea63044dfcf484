"""Values and gradients of the loss, against float64, however it is called."""

import itertools

import modes
import mxnet as mx
import numpy as np
import pytest
import reference
from digits import WithLoss
from mxnet import gluon

from gluon_stable_ce import StableSoftmaxCELoss, StableSoftmaxCrossEntropyLoss

# float32 through oneDNN's log_softmax, whose logarithm is off by up to 5e-6; sums of a few such terms, weighted with up to 3
CLOSE = {'rtol': 5e-6, 'atol': 2e-5}

SPARSE = [
    {},
    {'weight': 0.5},
    {'ignore_label': -1},
    {'ignore_label': 2, 'reduction': 'sum'},
    {'class_weight': [1, 2, 0, 0.5, 3]},
    {'label_smoothing': 0.1},
    {'lse_square_scale': 1e-2},
    {'from_logits': True},
    {'from_logits': True, 'label_smoothing': 0.2, 'class_weight': [1, 2, 0, 0.5, 3], 'ignore_label': -1},
    {'invalid_label': 'clip'},
    {
        'ignore_label': -1,
        'class_weight': [1, 2, 0, 0.5, 3],
        'label_smoothing': 0.1,
        'lse_square_scale': 1e-2,
        'weight': 2.0,
    },
]
DENSE = [
    {},
    {'weight': 0.5, 'from_logits': True},
    {'class_weight': [1, 2, 0, 0.5, 3], 'label_smoothing': 0.1},
    {'lse_square_scale': 1e-2},
]
LAYOUTS = [
    ((6, 5), -1, 0),
    ((5, 6), 0, 1),
    ((3, 4, 5), -1, 0),
    ((3, 4, 5), 2, 1),
    ((3, 5, 2, 4), 1, 0),
    ((3, 5, 2, 4), -3, -1),
]


def make(rng, shape, axis, sparse_label=True, from_logits=False, ignore_label=None, invalid=True, **_):
    """Predictions and labels that try everything the options allow."""
    pred = rng.normal(0, 3, shape)
    if from_logits:
        pred = np.moveaxis(reference.log_softmax(np.moveaxis(pred, axis, -1)), -1, axis)
    classes = shape[axis]
    positions = tuple(np.delete(shape, axis))
    if sparse_label:
        label = rng.randint(0, classes, positions).astype('float32')
        flat = label.reshape(-1)
        if ignore_label is not None:
            flat[::3] = ignore_label
        if invalid:
            flat[1::7] = classes + 3
    else:
        label = np.moveaxis(rng.dirichlet(np.ones(classes), positions), -1, axis).astype('float32')
        label[label < 0.1] = 0
    return pred.astype('float32'), label


@pytest.mark.parametrize('mode', modes.ALL, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(
    ('sparse_label', 'options'), [(True, o) for o in SPARSE] + [(False, o) for o in DENSE], ids=str
)
def test_every_option_in_every_mode(mode, sparse_label, options, rng, ctx):
    for (shape, axis, batch_axis), reduction in itertools.product(LAYOUTS, ('mean', 'sum', 'none')):
        if mode is not modes.default and (shape, reduction) not in (
            ((6, 5), 'mean'),
            ((3, 5, 2, 4), 'mean'),
            ((3, 4, 5), 'none'),
        ):
            continue  # the layouts are tried in full once, and in every mode with a rank, a move of the class axis and a shape kept
        settings = {
            'axis': axis,
            'batch_axis': batch_axis,
            'sparse_label': sparse_label,
            'reduction': reduction,
            **options,
        }
        arrays = make(rng, shape, **settings)
        loss, gradient = mode(StableSoftmaxCrossEntropyLoss(**settings), *arrays)
        expected, expected_gradient = reference.loss_and_gradient(*arrays, **settings)
        assert loss.shape == expected.shape
        np.testing.assert_allclose(loss, expected, **CLOSE)
        np.testing.assert_allclose(gradient, expected_gradient, **CLOSE)


@pytest.mark.parametrize('mode', modes.ALL, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize('shape_of', ['kept', 'kept and broadcast', 'label', 'batch'])
def test_sample_weight_in_its_shapes(mode, shape_of, rng, ctx):
    if mode in modes.SYMBOLIC and not shape_of.startswith('kept'):
        pytest.skip("a graph does not know which shape it is given: there gluon's own is the only one")
    pred, label = make(rng, (3, 5, 2, 4), axis=1, ignore_label=-1)
    shape = {'kept': (3, 1, 2, 4), 'kept and broadcast': (3, 1, 1, 1), 'label': (3, 2, 4), 'batch': (3,)}[
        shape_of
    ]
    weight = rng.uniform(0, 2, shape).astype('float32')
    weight.flat[0] = 0
    for reduction in ('mean', 'sum', 'none'):
        settings = {'axis': 1, 'ignore_label': -1, 'reduction': reduction}
        loss, gradient = mode(StableSoftmaxCELoss(**settings), pred, label, weight)
        expected, expected_gradient = reference.loss_and_gradient(pred, label, weight, **settings)
        np.testing.assert_allclose(loss, expected, **CLOSE)
        np.testing.assert_allclose(gradient, expected_gradient, **CLOSE)


def test_where_nothing_special_is_asked_for_it_is_gluons_loss(rng, ctx):
    for (shape, axis, batch_axis), weighted in itertools.product(LAYOUTS, (False, True)):
        arrays = list(make(rng, shape, axis, invalid=False))
        if weighted:
            arrays.append(
                rng.uniform(
                    0, 2, [n if i == batch_axis % len(shape) else 1 for i, n in enumerate(shape)]
                ).astype('float32')
            )
        ours, theirs = (
            cls(axis=axis, batch_axis=batch_axis, weight=0.5)
            for cls in (StableSoftmaxCELoss, gluon.loss.SoftmaxCrossEntropyLoss)
        )
        for got, expected in zip(modes.default(ours, *arrays), modes.default(theirs, *arrays)):
            assert got.dtype == expected.dtype
            np.testing.assert_allclose(got, expected, **CLOSE)


def test_it_is_a_gluon_loss():
    loss_fn = StableSoftmaxCrossEntropyLoss(prefix='ce_')
    assert isinstance(loss_fn, gluon.loss.SoftmaxCrossEntropyLoss)
    assert StableSoftmaxCELoss is StableSoftmaxCrossEntropyLoss
    assert loss_fn.name == 'ce'
    assert repr(loss_fn) == "StableSoftmaxCrossEntropyLoss(kernel='stock')"
    weighted = StableSoftmaxCELoss(axis=1, class_weight=[1, 2], batch_axis=[0, 2])
    assert (
        repr(weighted)
        == "StableSoftmaxCrossEntropyLoss(axis=1, batch_axis=[0, 2], class_weight=<2 weights>, kernel='stock')"
    )


@pytest.mark.parametrize('gap', [0, 0.5, 1, 3, 5, 8, 20, 87, 99, 104, 1000, 1e30])
def test_both_tails_of_two_logits(gap, ctx):
    """The truth is log(1 + e^-gap) for the likely class, and that plus gap for the other one."""
    pred = mx.nd.array([[gap, 0], [gap, 0]])
    loss = StableSoftmaxCELoss()(pred, mx.nd.array([0, 1])).asnumpy()
    likely, unlikely = (float(reference.nll([np.float32(gap), 0], label)) for label in (0, 1))
    assert loss[0] >= 0
    # where p is nearly 1, what is left after its own measured error is float32's: 2**-23
    np.testing.assert_allclose(loss[0], likely, rtol=0, atol=2e-7 if likely < 0.02 else 6e-6)
    np.testing.assert_allclose(loss[1], unlikely, rtol=2**-23, atol=6e-6)


def test_a_zero_probability_is_infinite_and_a_masked_class_harmless(ctx):
    pred = np.array([[-np.inf, 1, 2], [-np.inf, 1, 2]], 'float32')
    for mode in modes.ALL:
        loss, gradient = mode(StableSoftmaxCELoss(), pred, np.array([0, 2], 'float32'))
        p = np.exp([0, 1]) / np.exp([0, 1]).sum()
        np.testing.assert_array_equal(loss[0], np.inf)
        np.testing.assert_allclose(loss[1], -np.log(p[1]), **CLOSE)
        np.testing.assert_allclose(gradient, [[-1, *p], [0, p[0], p[1] - 1]], **CLOSE)


def test_dense_labels_of_zero_ask_nothing_of_an_impossible_class(ctx):
    pred = np.array([[-np.inf, 1, 2]], 'float32')
    for mode in modes.ALL:
        loss, gradient = mode(
            StableSoftmaxCELoss(sparse_label=False), pred, np.array([[0, 0.5, 0.5]], 'float32')
        )
        np.testing.assert_allclose(loss, [np.log(1 + np.e) - 0.5], **CLOSE)
        np.testing.assert_allclose(gradient[0, 0], 0)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'ignore_label': -1},
        {'class_weight': [1, 2, 3, 4]},
        {'label_smoothing': 0.1},
        {'reduction': 'sum'},
    ],
    ids=str,
)
def test_nan_at_the_label_is_nan_and_not_hidden(options, ctx):
    pred = np.array([[0, np.nan, 1, 2], [0, 1, 2, 3]], 'float32')
    for mode in modes.ALL:
        loss, _ = mode(StableSoftmaxCELoss(**options), pred, np.array([1, 1], 'float32'))
        assert np.isnan(loss[0])
        assert np.isfinite(loss[1])


@pytest.mark.parametrize(
    'options', [{}, {'class_weight': [1, 2, 3]}, {'label_smoothing': 0.1}, {'lse_square_scale': 0.1}], ids=str
)
@pytest.mark.parametrize('mode', modes.ALL, ids=lambda mode: mode.__name__)
def test_ignored_and_invalid_positions_have_a_gradient_of_exactly_zero(mode, options, rng, ctx):
    pred = rng.normal(0, 30, (6, 3)).astype('float32')
    pred[1, 0] = -np.inf
    label = np.array([-1, -1, 3, -2, 1.5, np.nan], 'float32')
    loss, gradient = mode(StableSoftmaxCELoss(ignore_label=-1, **options), pred, label)
    np.testing.assert_array_equal(loss, [0, 0, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('mode', modes.ALL, ids=lambda mode: mode.__name__)
def test_where_all_is_ignored_the_loss_is_zero(mode, rng, ctx):
    pred = rng.normal(0, 3, (2, 4, 5)).astype('float32')
    for label in (np.array([[-1] * 4, [0, 1, -1, 2]], 'float32'), np.full((2, 4), -1, 'float32')):
        loss, gradient = mode(StableSoftmaxCELoss(ignore_label=-1), pred, label)
        assert loss[0] == 0
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.isfinite(loss).all()


@pytest.mark.parametrize('classes', [10, 252, 507, 50257])
def test_float16_is_computed_in_float32(classes, rng, ctx):
    """Off by whole nats in stock; here the error is that of the float32 computation on the same rounded logits."""
    pred = rng.normal(0, 3, (16, classes)).astype('float16')
    label = rng.randint(0, classes, 16).astype('float32')
    loss, gradient = modes.default(StableSoftmaxCELoss(), pred, label)
    expected, expected_gradient = reference.loss_and_gradient(pred, label)
    assert (loss.dtype, gradient.dtype) == (np.float32, np.float16)
    np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=1e-4)  # a float32 sum of as many terms
    np.testing.assert_allclose(
        gradient, expected_gradient, rtol=2**-10, atol=2**-24
    )  # float16's own rounding and least number


def test_float16_is_seen_inside_a_net(ctx):
    """A net's own parameters tell the dtype of its output, so a nested loss casts too."""
    scale = gluon.nn.PReLU()
    scale.initialize()
    scale.cast('float16')
    net = WithLoss(scale, StableSoftmaxCELoss())
    net.hybridize()
    loss = net(mx.nd.zeros((2, 5000), dtype='float16'), mx.nd.array([4999, 4999.5]))
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss.asnumpy(), [np.log(5000), np.nan], rtol=1e-6)


def test_float64_stays_float64(rng, ctx):
    pred, label = rng.normal(0, 3, (8, 5)), rng.randint(0, 5, 8).astype('float32')
    for mode in (
        modes.eager,
        modes.default,
        modes.hybridized,
        modes.exported_alone,
        modes.np_mode,
    ):  # symbols: float32 if they don't say
        settings = {'class_weight': [0.5, 2, 3, 4, 5], 'label_smoothing': 0.1}
        loss, gradient = mode(StableSoftmaxCELoss(**settings), pred, label)
        expected, expected_gradient = reference.loss_and_gradient(pred, label, **settings)
        assert loss.dtype == np.float64
        np.testing.assert_allclose(loss, expected, rtol=1e-14)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


def test_gradients_by_central_differences(rng, ctx):
    """Per class, since an error that is the same for all classes hides in the loss's shift invariance."""
    pred, label = rng.normal(0, 2, (3, 4)), np.array([0, 3, -1.0])
    settings = {
        'ignore_label': -1,
        'class_weight': [1, 2, 3, 4],
        'label_smoothing': 0.1,
        'lse_square_scale': 0.1,
        'reduction': 'sum',
    }
    loss_fn = StableSoftmaxCELoss(**settings)
    _, gradient = modes.default(loss_fn, pred, label)
    step = 1e-6
    for index in np.ndindex(pred.shape):
        around = []
        for sign in (1, -1):
            moved = pred.copy()
            moved[index] += sign * step
            around.append(loss_fn(mx.nd.array(moved, dtype='float64'), mx.nd.array(label)).asnumpy().sum())
        np.testing.assert_allclose(
            gradient[index], (around[0] - around[1]) / (2 * step), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize(
    ('classes', 'bound'),
    [
        (2, 6e-6),
        (10, 8e-6),
        (252, 8e-6),
        (507, 8e-6),
        (1000, 8e-6),
        pytest.param(50257, 6e-5, marks=pytest.mark.slow),
    ],
)
def test_the_stated_bounds(classes, bound, rng, ctx):
    """Of the docstring's Numerics: over logits that leave little, some and nearly all of the probability to the label."""
    if not modes.ONEDNN:
        bound *= 4  # MXNet's own kernel adds up the classes one by one
    for scale, lead in ((1, 0), (3, np.log(classes)), (1, 12 + np.log(classes))):
        pred = rng.normal(0, scale, (2000 if classes < 2000 else 50, classes)).astype('float32')
        label = rng.randint(0, classes, len(pred))
        pred[np.arange(len(pred)), label] += np.float32(lead)
        for dtype, allowed in (('float32', bound), ('float64', 1e-12)):
            loss, _ = modes.default(StableSoftmaxCELoss(), pred.astype(dtype), label)
            truth, _ = reference.loss_and_gradient(pred, label)
            np.testing.assert_allclose(loss, truth, rtol=0, atol=allowed)
            sure = truth < 0.02
            if classes <= 10 and modes.ONEDNN:
                np.testing.assert_allclose(loss[sure], truth[sure], rtol=0, atol=3e-7)
