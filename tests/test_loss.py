"""Values and gradients of the loss against float64: every row of the semantics table, however the loss is called."""

import json

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
import reference
import tolerances
from checks import assert_loss_is_reference, every_mode
from digits import WithLoss
from mxnet import autograd, gluon
from tolerances import assert_close, assert_relatively_close

from gluon_stable_ce import StableSoftmaxCELoss, StableSoftmaxCrossEntropyLoss

pytestmark = pytest.mark.usefixtures('kernel')

nd = mx.nd
OPTIONS = {**cases.SPARSE, **cases.DENSE}
MANY = pytest.param(50257, marks=pytest.mark.slow)
every_layout = pytest.mark.parametrize('layout', cases.params(cases.LAYOUTS))
few_layouts = pytest.mark.parametrize(
    'layout', cases.params({name: cases.LAYOUTS[name] for name in cases.FEW_LAYOUTS})
)
every_options = pytest.mark.parametrize('options', cases.params(OPTIONS))
every_weight_shape = pytest.mark.parametrize('shape', cases.params(cases.WEIGHT_SHAPES))
every_reduction = pytest.mark.parametrize('reduction', cases.REDUCTIONS)


def check(kernel, rng, layout, mode=modes.default, **options):
    """The loss and its gradient for a layout are those of the reference."""
    settings = {'axis': layout.axis, 'batch_axis': layout.batch_axis, **options}
    assert_loss_is_reference(settings, *cases.make(rng, layout.shape, **settings), mode=mode, kernel=kernel)


@every_mode
@every_options
def test_options_in_modes(kernel, mode, options, rng, ctx):
    check(kernel, rng, cases.LAYOUTS['image'], mode, **options)


@every_options
@every_layout
def test_options_in_layouts(kernel, options, layout, rng, ctx):
    check(kernel, rng, layout, **options)


@every_mode
@few_layouts
@every_reduction
def test_reductions_in_modes(kernel, mode, layout, reduction, rng, ctx):
    check(kernel, rng, layout, mode, reduction=reduction, **cases.SPARSE['all'])


@every_layout
@every_reduction
@pytest.mark.parametrize('options', [{'ignore_label': -1}, {'sparse_label': False}], ids=['sparse', 'dense'])
def test_reductions_in_layouts(kernel, layout, reduction, options, rng, ctx):
    check(kernel, rng, layout, reduction=reduction, **options)


def weighted_arrays(rng, shape, **settings):
    """A problem of the layout 'image', and weights of a shape, one of which is 0."""
    weight = rng.uniform(0, 2, shape).astype('float32')
    weight.flat[0] = 0
    return (*cases.make(rng, (3, 5, 2, 4), **settings), weight)


@every_reduction
@every_weight_shape
def test_sample_weight_shapes_and_reductions(kernel, reduction, shape, rng, ctx):
    settings = {'axis': 1, 'ignore_label': -1, 'reduction': reduction}
    assert_loss_is_reference(settings, *weighted_arrays(rng, shape, **settings), kernel=kernel)


@every_mode
@every_weight_shape
def test_sample_weight_shapes_in_modes(kernel, mode, shape, rng, ctx):
    settings = {'axis': 1, 'ignore_label': -1}
    arrays = weighted_arrays(rng, shape, **settings)
    if mode in [*modes.SYMBOLIC, modes.exported_alone] and shape in cases.NOT_IN_GRAPHS:
        with pytest.raises(mx.MXNetError):
            mode(StableSoftmaxCELoss(**settings), *arrays)
        return
    assert_loss_is_reference(settings, *arrays, mode=mode, kernel=kernel)


@every_mode
@pytest.mark.parametrize('shape', [(3, 1, 2, 4), (1, 1, 2, 1)], ids=str)
def test_sample_weight_of_another_batch_axis(kernel, mode, shape, rng, ctx):
    settings = {'axis': 1, 'batch_axis': -1, 'ignore_label': -1}
    arrays = weighted_arrays(rng, shape, **settings)
    assert_loss_is_reference(settings, *arrays, mode=mode, kernel=kernel)


def assert_equals_gluons(arguments, *arrays):
    """Both losses, with these positional arguments, give the same value and gradient."""
    ours, gluons = StableSoftmaxCELoss(*arguments), gluon.loss.SoftmaxCrossEntropyLoss(*arguments)
    for got, expected in zip(modes.default(ours, *arrays), modes.default(gluons, *arrays)):
        assert got.dtype == expected.dtype
        assert_close(got, expected)


@every_layout
@pytest.mark.parametrize('weighted', [False, True], ids=['', 'sample-weight'])
def test_without_options_it_is_gluons_loss(layout, weighted, rng, ctx):
    arrays = list(cases.make(rng, layout.shape, layout.axis, invalid=False))
    axis, batch_axes = reference.normalised(layout.axis, layout.batch_axis, len(layout.shape))
    if weighted:
        shape = [size if i in batch_axes else 1 for i, size in enumerate(layout.shape)]
        arrays.append(rng.uniform(0, 2, shape).astype('float32'))
    assert_equals_gluons((axis, True, False, 0.5, layout.batch_axis), *arrays)


def test_it_is_a_gluon_loss(kernel):
    loss_fn = StableSoftmaxCrossEntropyLoss(prefix='ce_')
    assert isinstance(loss_fn, gluon.loss.SoftmaxCrossEntropyLoss)
    assert StableSoftmaxCELoss is StableSoftmaxCrossEntropyLoss
    assert loss_fn.name == 'ce'
    assert repr(loss_fn) == f'StableSoftmaxCrossEntropyLoss(kernel={kernel!r})'
    weighted = StableSoftmaxCELoss(axis=1, class_weight=[1, 2], batch_axis=[0, 2])
    assert (
        repr(weighted)
        == f'StableSoftmaxCrossEntropyLoss(axis=1, batch_axis=[0, 2], class_weight=<2 weights>, kernel={kernel!r})'
    )


def test_positional_arguments_are_gluons(rng):
    arguments = (1, False, True, 0.5, 2)
    pred = np.moveaxis(reference.log_softmax(rng.normal(0, 1, (2, 4, 3))), -1, 1).astype('float32')
    label = np.moveaxis(rng.dirichlet(np.ones(3), (2, 4)), -1, 1).astype('float32')
    assert_equals_gluons(arguments, pred, label)


@pytest.mark.parametrize(
    ('name', 'value'), [('_weight', 5.0), ('_axis', 1), ('_batch_axis', 1), ('_from_logits', True)]
)
def test_gluons_options_may_be_set_later(name, value, rng):
    """As in the __init__ of a subclass, after super().__init__()."""
    pred, label = nd.log_softmax(nd.array(rng.normal(0, 1, (4, 4, 4)))), nd.array(rng.randint(0, 4, (4, 4)))
    ours, gluons = StableSoftmaxCELoss(), gluon.loss.SoftmaxCELoss()
    for loss_fn in (ours, gluons):
        setattr(loss_fn, name, value)
    assert_close(ours(pred, label).asnumpy(), gluons(pred, label).asnumpy())


def loss_and_gradient(loss_fn, pred, *others):
    """Of arrays in any storage."""
    pred = pred.copy()
    pred.attach_grad()
    with autograd.record():
        loss = loss_fn(pred, *others)
    loss.backward()
    return loss.asnumpy(), pred.grad.asnumpy()


@pytest.fixture
def accepted(rng):
    """Arrays in forms that gluon's loss accepts, too: arguments of the loss, and its inputs, by name."""
    pred, text = nd.array(rng.normal(0, 1, (4, 3))), nd.array(rng.normal(0, 1, (2, 5, 3)))
    label, text_label = nd.array([0, 1, 2, 0]), nd.array(rng.randint(0, 3, (2, 5)))
    target, dense = nd.softmax(nd.array(rng.normal(0, 1, (2, 5, 3)))), {'sparse_label': False}
    return {
        'csr': ({}, pred.tostype('csr'), label),
        'row-sparse': ({'batch_axis': None}, pred.tostype('row_sparse'), label),
        'csr-weight': ({}, pred, label, nd.array([[1], [0], [2], [3]]).tostype('csr')),
        'one-axis': ({}, pred[0], label[:1]),
        'one-axis-first': ({'axis': 0}, pred[0], label[:1], nd.array([2])),
        'one-axis-dense': (dense, pred[0], target[0, 0]),
        'dense-merged': (dense, text, target.reshape((2, 15))),
        'dense-rows': (dense, text, target.reshape((10, 3))),
        'dense-flat': (dense, text, target.reshape((-1,)), nd.array([[2], [3]]).reshape((2, 1, 1))),
        'dense-kept-axis': (dense, text, target.reshape((2, 5, 1, 3))),
        'weight-of-times': ({}, text, text_label, nd.array([[1], [2], [3], [0], [5]])),
        'weight-of-times-dense': (dense, text, target, nd.array([[1], [2], [3], [0], [5]])),
        'weight-of-classes-dense': (dense, text, target, nd.array([1, 2, 3])),
        'weight-of-the-last-axis': ({'axis': 1}, text, nd.zeros((2, 3)), nd.array([1, 2, 3])),
        'weight-true': ({'weight': True}, pred, label),
        'from-logits-none': ({'from_logits': None}, pred, label),
        'sparse-label-none': ({'sparse_label': None}, text, target),
        'another-cpu': ({}, pred.as_in_context(mx.cpu(1)), label),
    }


@pytest.mark.parametrize('name', [
    'csr', 'row-sparse', 'csr-weight', 'one-axis', 'one-axis-first', 'one-axis-dense', 'dense-merged', 'dense-rows',
    'dense-flat', 'dense-kept-axis', 'weight-of-times', 'weight-of-times-dense', 'weight-of-classes-dense',
    'weight-of-the-last-axis', 'weight-true', 'from-logits-none', 'sparse-label-none', 'another-cpu',
])  # fmt: skip
def test_calls_that_gluon_accepts(name, accepted):
    options, *arrays = accepted[name]
    expected = loss_and_gradient(gluon.loss.SoftmaxCELoss(**options), *arrays)
    for got, wanted in zip(loss_and_gradient(StableSoftmaxCELoss(**options), *arrays), expected):
        assert got.shape == wanted.shape
        assert_close(got, wanted)


@pytest.mark.parametrize(
    'name', ['csr-weight', 'one-axis', 'one-axis-dense', 'from-logits-none', 'sparse-label-none']
)
def test_calls_that_gluon_accepts_in_a_graph(name, accepted):
    options, *arrays = accepted[name]
    expected = loss_and_gradient(gluon.loss.SoftmaxCELoss(**options), *arrays)
    net = modes.WithLoss(modes.Identity(), StableSoftmaxCELoss(kernel='stock', **options))
    net.hybridize()
    for got, wanted in zip(loss_and_gradient(net, *arrays), expected):
        assert got.shape == wanted.shape
        assert_close(got, wanted)


@every_mode
@few_layouts
@pytest.mark.parametrize('batch_axis', [None, 'class', (0, 'class')], ids=str)
@pytest.mark.parametrize('sparse_label', [True, False], ids=['sparse', 'dense'])
def test_batch_axes_that_gluon_accepts(mode, layout, batch_axis, sparse_label, rng, ctx):
    """None: one mean of all. The class axis, which has length 1 in the losses, is one more axis of the result."""
    axis = layout.axis % len(layout.shape)
    batch_axis = {'class': axis, (0, 'class'): (0, axis)}.get(batch_axis)
    options = {'axis': layout.axis, 'batch_axis': batch_axis, 'sparse_label': sparse_label}
    arrays = cases.make(rng, layout.shape, axis, sparse_label, invalid=False)
    expected = modes.eager(gluon.loss.SoftmaxCELoss(**options), *arrays)
    for got, wanted in zip(mode(StableSoftmaxCELoss(**options), *arrays), expected):
        assert got.shape == wanted.shape
        assert_close(got, wanted)


@pytest.mark.parametrize('dtype', ['int32', 'int64', 'uint8'])
def test_integer_predictions_are_refused(dtype):
    with pytest.raises(TypeError, match=f'^pred: expected one of the dtypes float16, .*, got {dtype}$'):
        StableSoftmaxCELoss()(nd.zeros((4, 3), dtype=dtype), nd.zeros(4))


def test_a_fourth_input_is_an_error():
    with pytest.raises(TypeError, match='^expected pred, label and sample_weight, got 4 inputs$'):
        StableSoftmaxCELoss()(nd.zeros((4, 3)), nd.zeros(4), nd.ones(4), nd.ones(4))


@every_mode
@pytest.mark.parametrize(
    'options', [{}, {'ignore_label': -1}, {'class_weight': [1, 2, 3, 4]}, {'label_smoothing': 0.1}], ids=str
)
def test_nan_logit_at_the_label_is_nan(mode, options, ctx):
    pred = np.array([[0, np.nan, 1, 2], [0, 1, 2, 3]], 'float32')
    loss, _ = mode(StableSoftmaxCELoss(**options), pred, np.array([1, 1], 'float32'))
    assert np.isnan(loss[0])
    assert np.isfinite(loss[1])


@every_mode
@pytest.mark.usefixtures('kernel')
def test_no_finite_loss_hides_an_infinite_logit_of_another_class(mode, kernel):
    loss, _ = mode(
        StableSoftmaxCELoss(), np.array([[np.inf, 1, 2], [0, 1, 2]], 'float32'), np.array([1, 1], 'float32')
    )
    is_fused = kernel == 'fused' and mode is not modes.exported_alone
    assert loss[0] == np.inf or (not is_fused and np.isnan(loss[0]))
    assert np.isfinite(loss[1])


EMPTY = {
    'no samples': ((0, 5), -1, 0),
    'no samples of several positions': ((0, 3, 5), -1, 0),
    'samples without positions': ((2, 0, 5), -1, 0),
    'neither': ((0, 0, 5), -1, 0),
    'images without height': ((2, 5, 0, 3), 1, 0),
    'images without width': ((2, 5, 3, 0), 1, 0),
    'no images': ((0, 5, 3, 2), 1, 0),
    'several batch axes': ((2, 5, 0, 3), 1, (-1, 0)),
    'a batch axis of size 0 that is not the first': ((3, 0, 5), -1, 1),
}


@pytest.mark.parametrize('options', [{'ignore_label': -1}, {'sparse_label': False}], ids=str)
@pytest.mark.parametrize('reduction', ['mean', 'valid', 'sum', 'none'])
@pytest.mark.parametrize(('shape', 'axis', 'batch_axis'), EMPTY.values(), ids=EMPTY)
def test_samples_without_positions_have_a_loss_of_0(shape, axis, batch_axis, reduction, options):
    loss_fn = StableSoftmaxCELoss(axis=axis, batch_axis=batch_axis, reduction=reduction, **options)
    positions = tuple(np.delete(shape, axis))
    kept = tuple(np.array(shape)[sorted(np.arange(len(shape))[np.atleast_1d(batch_axis)])])
    with modes.numpy_semantics():
        pred, label = mx.np.zeros(shape), mx.np.zeros(shape if 'sparse_label' in options else positions)
        pred.attach_grad()
        for weights in ([], [mx.np.ones(kept)], [mx.np.ones(shape)], [mx.np.ones(positions)]):
            with autograd.record():
                loss = loss_fn(pred, label, *weights)
            loss.backward()
            expected = np.zeros(positions if reduction == 'none' else kept)
            np.testing.assert_array_equal(loss.asnumpy(), expected)
            mx.nd.waitall()


@pytest.mark.parametrize('shape', [(4, 5), (4, 5, 3)], ids=str)
@pytest.mark.parametrize('options', cases.params({name: cases.SPARSE[name] for name in ('plain', 'all')}))
def test_gradient_of_labels_is_zero(shape, options, rng, ctx):
    """As in gluon, where scripts and Modules ask for the gradient of all inputs."""
    pred, label = nd.array(rng.normal(0, 1, shape)), nd.array(rng.randint(0, 5, (4, *shape[2:])))
    for array in (pred, label):
        array.attach_grad()
    label.grad[:] = 7
    with autograd.record():
        loss = StableSoftmaxCELoss(axis=1, **options)(pred, label)
    loss.backward()
    np.testing.assert_array_equal(label.grad.asnumpy(), 0)
    _, expected = reference.loss_and_gradient(pred.asnumpy(), label.asnumpy(), axis=1, **options)
    assert_close(pred.grad.asnumpy(), expected)


def gradient_of(array, loss_fn, *inputs):
    """The gradient of the loss with respect to one of its inputs, `array`."""
    array.attach_grad()
    with autograd.record():
        loss = loss_fn(*inputs)
    loss.backward()
    return array.grad.asnumpy()


def test_gradient_of_sample_weights_is_the_loss(rng, ctx):
    """Where the weight is 0, so is its gradient: also that of an infinite loss and of a NaN."""
    pred, label = rng.normal(0, 1, (6, 5)), nd.array([0, 1, 2, 3, 0, 7])
    pred[4, 0] = -np.inf
    pred, weight = nd.array(pred), nd.array([1, 2, 0.5, 0, 0, 0])
    expected = np.where(weight.asnumpy() == 0, 0, StableSoftmaxCELoss()(pred, label).asnumpy())
    gradient = gradient_of(weight, StableSoftmaxCELoss(), pred, label, weight)
    assert_close(gradient, expected)


@pytest.mark.parametrize('from_logits', [False, True])
@pytest.mark.parametrize('class_weight', [None, [1, 2, 0, 4]], ids=['', 'class-weight'])
def test_gradient_of_dense_labels_is_the_nll_of_each_class(from_logits, class_weight, ctx):
    """Where the label is 0, so is its gradient: exactly, and also at a logit of minus infinity."""
    logits = np.array([[3, 0, 1, -np.inf], [0, 1, 2, 30]], 'float32')
    label = nd.array([[0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    log_p = reference.log_softmax(logits)
    expected = np.where(label.asnumpy() == 0, 0, -log_p * (class_weight or [1] * 4))
    pred = nd.array(log_p if from_logits else logits)
    loss_fn = StableSoftmaxCELoss(sparse_label=False, from_logits=from_logits, class_weight=class_weight)
    gradient = gradient_of(label, loss_fn, pred, label)
    assert_close(gradient, expected, tolerances.NLL)
    np.testing.assert_array_equal(gradient[label.asnumpy() == 0], 0)


@pytest.mark.parametrize('classes', [10, 252, 507, MANY])
def test_float16_is_computed_in_float32(kernel, classes, rng, ctx):
    """Off by whole nats in stock; here the error is that of the float32 computation on the same rounded logits."""
    pred = rng.normal(0, 3, (16, classes)).astype('float16')
    label = rng.randint(0, classes, 16).astype('float32')
    loss, gradient = modes.default(StableSoftmaxCELoss(), pred, label)
    expected, expected_gradient = reference.loss_and_gradient(pred, label)
    assert (loss.dtype, gradient.dtype) == (np.float32, np.float16)
    assert_close(loss, expected, tolerances.stated(kernel, 'float32'))
    assert_close(gradient, expected_gradient, tolerances.FLOAT16_GRADIENT)


def test_float16_is_cast_inside_a_net(ctx):
    """A net's own parameters tell the dtype of its output, so a nested loss casts too."""
    scale = gluon.nn.PReLU()
    scale.initialize()
    scale.cast('float16')
    net = WithLoss(scale, StableSoftmaxCELoss())
    net.hybridize()
    loss = net(nd.zeros((2, 5000), dtype='float16'), nd.array([4999, 4999.5]))
    assert loss.dtype == np.float32
    assert_close(loss.asnumpy(), [np.log(5000), np.nan], tolerances.ROUNDED_FLOAT32)


def test_gradients_of_higher_order(rng):
    """First order with `create_graph` needs single operators, as in gluon; second order has none."""
    pred, label = nd.array(rng.normal(0, 1, (4, 3))), nd.array([0, 1, 2, 0])
    _, expected = reference.loss_and_gradient(pred.asnumpy(), label.asnumpy())
    pred.attach_grad()
    loss_fn = StableSoftmaxCELoss()
    with autograd.record():
        loss = loss_fn(pred, label)
        with pytest.raises(mx.MXNetError, match='create_graph=True please do not use hybridize'):
            autograd.grad(loss, [pred], create_graph=True, retain_graph=True)
    loss_fn.hybridize(False)
    with autograd.record():
        (gradient,) = autograd.grad(loss_fn(pred, label), [pred], create_graph=True, retain_graph=True)
        square = (gradient * gradient).sum()
    assert_close(gradient.asnumpy(), expected)
    with pytest.raises(mx.MXNetError, match='non-differentiable'):
        square.backward()


@pytest.mark.parametrize('classes', [2, 252, 1000, MANY])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('confidence', ['none', 'little', 'some', 'nearly-all', 'all'])
def test_stated_bounds(kernel, classes, dtype, confidence, rng, ctx):
    """Of the docstring's Numerics: over logits that leave from none to all of the probability to the label."""
    scale, lead, offset = {  # of the logits, of the label's logit, of all logits
        'none': (1, -185, 92),
        'little': (1, 0, 0),
        'some': (3, np.log(classes), 0),
        'nearly-all': (1, 12 + np.log(classes), 0),
        'all': (1, 95, 0),
    }[confidence]
    pred = rng.normal(offset, scale, (min(2000, max(20, 300_000 // classes)), classes)).astype('float32')
    label = rng.randint(0, classes, len(pred))
    pred[np.arange(len(pred)), label] += np.float32(lead)
    expected, expected_gradient = reference.loss_and_gradient(pred, label)
    loss, gradient = modes.default(StableSoftmaxCELoss(), pred.astype(dtype), label)
    tolerance = tolerances.stated(kernel, dtype)
    assert_relatively_close(loss, expected, tolerance)
    assert_relatively_close(gradient, expected_gradient, tolerance)


TEN_CLASSES = {'class_weight': np.arange(10), 'label_smoothing': 0.1}


class HalvedLoss(StableSoftmaxCELoss):
    """A subclass with a graph of its own, of the same inputs."""

    def hybrid_forward(self, F, pred, label, sample_weight=None):
        return super().hybrid_forward(F, pred, label, sample_weight) / 2


class TestSubclasses:
    """What clients do: override forward with weights of gluon's shape, or hybrid_forward, both with every option."""

    LENGTH = np.array([4, 2, 0], 'float32')

    @pytest.fixture
    def batch(self, rng):
        """Logits of ten classes and labels, (batch, len)."""
        return rng.normal(0, 1, (3, 4, 10)).astype('float32'), rng.randint(0, 10, (3, 4)).astype('float32')

    def masked(self, batch):
        mask = (np.arange(4) < self.LENGTH[:, None]).astype('float32')
        return reference.loss_and_gradient(*batch, mask, **TEN_CLASSES)[0]

    def test_forward_with_a_mask(self, batch, ctx):
        """As D2L's."""

        class MaskedLoss(StableSoftmaxCELoss):
            def forward(self, pred, label, valid_length):
                weights = mx.np.expand_dims(mx.np.ones_like(label), axis=-1)
                return super().forward(pred, label, mx.npx.sequence_mask(weights, valid_length, True, axis=1))

        with modes.numpy_semantics():
            loss = MaskedLoss(**TEN_CLASSES)(*map(mx.np.array, (*batch, self.LENGTH)))
            assert_close(loss.asnumpy(), self.masked(batch))

    # SequenceMask is a classic operator
    @modes.parametrize([m for m in modes.ALL if m not in (modes.np_mode, modes.np_mode_nested)])
    def test_hybrid_forward_with_a_mask(self, mode, batch, ctx):
        """As gluon-nlp's: the third input is no weight."""

        class SequenceLoss(StableSoftmaxCELoss):
            def hybrid_forward(self, F, pred, label, valid_length):
                weights = F.SequenceMask(
                    F.expand_dims(F.ones_like(label), axis=-1), valid_length, use_sequence_length=True, axis=1
                )
                return super().hybrid_forward(F, pred, label, weights)

        loss, _ = mode(SequenceLoss(**TEN_CLASSES), *batch, self.LENGTH)
        assert_close(loss, self.masked(batch))

    @every_mode
    def test_hybrid_forward_with_an_auxiliary_output(self, mode, batch, ctx):
        """As gluon-cv's: the second input is no label."""

        class LossWithAux(StableSoftmaxCELoss):
            def hybrid_forward(self, F, pred, other, label):
                return super().hybrid_forward(F, pred, label) + 0.5 * super().hybrid_forward(F, other, label)

        pred, label = batch
        loss, _ = mode(LossWithAux(**TEN_CLASSES), pred, pred, label)
        expected, _ = reference.loss_and_gradient(pred, label, **TEN_CLASSES)
        assert_close(loss, 1.5 * expected)

    @every_mode
    def test_hybrid_forward_of_the_same_inputs(self, mode, batch, ctx):
        loss, gradient = mode(HalvedLoss(**TEN_CLASSES), *batch)
        expected, expected_gradient = reference.loss_and_gradient(*batch, **TEN_CLASSES)
        assert_close(loss, expected / 2)
        assert_close(gradient, expected_gradient / 2)

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'class_weight': [1, 2]}, '^class_weight: expected one weight'),
            ({'invalid_label': 'raise'}, '^label: '),
        ],
        ids=str,
    )
    def test_a_subclass_checks_what_the_loss_checks(self, options, message):
        with pytest.raises(ValueError, match=message):
            HalvedLoss(**options)(nd.zeros((4, 3)), nd.array([7, 0, 0, 0]))

    def test_hybrid_forward_runs_eagerly_unless_hybridized(self, batch, ctx):
        """It may read shapes and wait for values, as code for `mx.nd` does."""

        class EagerLoss(StableSoftmaxCELoss):
            def hybrid_forward(self, F, pred, label, scale):
                assert pred.shape == (3, 4, 10)
                return super().hybrid_forward(F, pred, label) * (scale / label.max().asscalar())

        pred, label = map(nd.array, batch)
        loss = EagerLoss()(pred, label, 2.0)
        expected = StableSoftmaxCELoss()(pred, label).asnumpy() * 2 / label.asnumpy().max()
        assert_close(loss.asnumpy(), expected)


SEVERAL_CLASS_AXES = {'axis': (1, 2), 'sparse_label': False, 'from_logits': True}


@pytest.fixture
def joint(rng):
    """Log-probabilities and targets over two axes at once."""
    pred = reference.log_softmax(rng.normal(0, 1, (2, 12))).reshape(2, 3, 4).astype('float32')
    return pred, rng.dirichlet(np.ones(12), 2).reshape(2, 3, 4).astype('float32')


@every_mode
@pytest.mark.parametrize('shape', [None, (2, 3, 4), (2, 1, 4), (2, 3, 1), (2, 1, 1), (1, 1, 1)], ids=str)
def test_several_class_axes_are_gluons(mode, shape, joint, rng, ctx):
    """They are summed over; of a weight per class, the mean counts."""
    arrays = joint if shape is None else (*joint, rng.uniform(0, 2, shape).astype('float32'))
    expected = modes.eager(gluon.loss.SoftmaxCELoss(**SEVERAL_CLASS_AXES), *arrays)
    for got, value in zip(mode(StableSoftmaxCELoss(**SEVERAL_CLASS_AXES), *arrays), expected):
        assert_close(got, value, tolerances.ROUNDED_FLOAT32)


@pytest.mark.parametrize('axis', [(0, 1), (0, -1), (2, 1), (-3, -2), (1,), -1], ids=str)
@pytest.mark.parametrize('weighted', [None, 'batch', 'positions', 'pred'])
def test_class_axes_in_the_metric_and_in_weights(axis, weighted, rng):
    """The metric is the mean loss, the count that of the positions, and a weight of 2 doubles the loss in each layout."""
    shape, axes = (2, 3, 4), {one % 3 for one in np.atleast_1d(axis)}
    batch_axis = min({0, 1, 2} - axes)
    pred, target = (nd.array(rng.uniform(-1, 0, shape)) for _ in range(2))
    loss_fn = StableSoftmaxCELoss(axis=axis, batch_axis=batch_axis, sparse_label=False, from_logits=True)
    metric = loss_fn.create_metric()
    metric.update(target, pred)
    positions = tuple(size for i, size in enumerate(shape) if i not in axes)
    assert metric.num_inst == loss_fn.valid_count(target) == np.prod(positions)
    weights = {'batch': shape[batch_axis], 'positions': positions, 'pred': shape}
    factor = [nd.full(weights[weighted], 2)] if weighted else []
    loss = loss_fn(pred, target, *factor).mean().asscalar()
    assert loss == tolerances.ROUNDED_FLOAT32.approx(metric.get()[1] * (2 if weighted else 1))


def test_several_class_axes_in_the_metric_and_the_count(joint, ctx):
    loss_fn = StableSoftmaxCELoss(**SEVERAL_CLASS_AXES)
    pred, target = map(nd.array, joint)
    metric = loss_fn.create_metric()
    metric.update(target, pred)
    assert metric.get()[1] == tolerances.ROUNDED_FLOAT32.approx(loss_fn(pred, target).mean().asscalar())
    assert metric.num_inst == loss_fn.valid_count(target) == 2
    resumed = loss_fn.create_metric()
    resumed.load_state_dict(json.loads(json.dumps(metric.state_dict())))
    assert resumed.get() == metric.get()


def test_options_are_checked_by_the_call_if_they_are_set_one_after_the_other():
    loss_fn = StableSoftmaxCELoss()
    loss_fn._axis = (0, 1)  # which sparse labels do not have
    assert repr(loss_fn) == 'StableSoftmaxCrossEntropyLoss(axis=(0, 1))'
    with pytest.raises(ValueError, match='^axis: expected one class axis for sparse labels'):
        loss_fn(nd.zeros((3, 4)), nd.zeros(4))
    loss_fn._axis = 0
    loss_fn._batch_axis = 1
    assert loss_fn(nd.zeros((3, 4)), nd.zeros(4)).shape == (4,)


class MaskedLoss(StableSoftmaxCELoss):
    """As public code has it: the arguments of `Loss` are given to a loss that has others in front."""

    def __init__(self, axis=-1, sparse_label=True, from_logits=False, weight=None, batch_axis=0, **kwargs):
        super().__init__(weight, batch_axis, **kwargs)
        self._axis = axis
        self._sparse_label, self._from_logits = sparse_label, from_logits
        self._weight, self._batch_axis = weight, batch_axis


@every_mode
@pytest.mark.parametrize('options', [
    {}, {'weight': 0.5}, {'weight': 2, 'batch_axis': 1}, {'axis': 1, 'batch_axis': [0, 2]}, {'sparse_label': False},
], ids=str)  # fmt: skip
def test_options_that_a_subclass_sets_after_the_constructor(mode, options, rng, ctx):
    axis = options.get('axis', -1)
    arrays = cases.make(rng, (5, 5, 5), axis, options.get('sparse_label', True), invalid=False)
    expected = modes.default(gluon.loss.SoftmaxCELoss(**options), *arrays)
    for got, wanted in zip(mode(MaskedLoss(**options), *arrays), expected):
        assert_close(got, wanted)


def test_options_that_a_subclass_sets_wrongly_are_errors_of_the_call():
    loss_fn = MaskedLoss(axis=None)
    assert repr(loss_fn) == 'MaskedLoss(axis=None)'
    with pytest.raises(TypeError, match='^axis: expected an integer, got None$'):
        loss_fn(nd.zeros((3, 4)), nd.zeros(3))


@pytest.mark.parametrize(
    'options', [{'reduction': 'avg'}, {'label_smoothing': 2}, {'kernel': 'fast'}], ids=str
)
def test_other_options_of_a_subclass_are_checked_by_the_constructor(options):
    with pytest.raises(ValueError, match=f'^{next(iter(options))}: expected '):
        MaskedLoss(**options)


@every_mode
@pytest.mark.parametrize('sparse_label', [True, False], ids=['sparse', 'dense'])
@pytest.mark.parametrize('label_smoothing', [0, 1])
@pytest.mark.parametrize(('log_p', 'loss'), [(3, -3), (0.01, -0.01), (5e-4, 0), (-2, 2)])
def test_only_roundings_of_log_probabilities_are_raised_to_0(
    log_p, loss, label_smoothing, sparse_label, mode
):
    """Logits in their place have a negative loss, as in gluon, which is an alarm; the gradient is gluon's."""
    loss_fn = StableSoftmaxCELoss(
        from_logits=True, sparse_label=sparse_label, label_smoothing=label_smoothing
    )
    label = np.array([0, 0]) if sparse_label else np.eye(2)[[0, 0]]
    losses, gradient = mode(loss_fn, np.full((2, 2), log_p, 'float32'), label.astype('float32'))
    assert_close(losses, [loss, loss], tolerances.PLAIN)
    assert_close(gradient.sum(-1), [-1, -1], tolerances.PLAIN)
