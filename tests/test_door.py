"""What the loss accepts and refuses, and how one loss object serves calls of every kind."""

import modes
import mxnet as mx
import numpy as np
import pytest
import reference
from mxnet import autograd, gluon

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss
from gluon_stable_ce._graphs import compiled
from gluon_stable_ce.functional import read_labels

nd = mx.nd


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'axis': 1.0}, TypeError, r'^axis: expected an integer, got 1\.0$'),
        ({'axis': 0}, ValueError, '^batch_axis: expected another axis than the class axis, got 0 for both$'),
        ({'weight': 'much'}, TypeError, "^weight: expected a number, got 'much'$"),
        ({'ignore_label': -1.5}, TypeError, r'^ignore_label: expected an integer, got -1\.5$'),
        ({'label_smoothing': 1.5}, ValueError, r'^label_smoothing: expected a number from 0 to 1, got 1\.5$'),
        (
            {'label_smoothing': float('nan')},
            ValueError,
            '^label_smoothing: expected a number from 0 to 1, got nan$',
        ),
        (
            {'lse_square_scale': -1},
            ValueError,
            r'^lse_square_scale: expected a number from 0 to 3.4028234663852886e\+38, got -1$',
        ),
        (
            {'reduction': 'average'},
            ValueError,
            "^reduction: expected one of 'mean', 'valid', 'sum', 'none', got 'average'$",
        ),
        (
            {'invalid_label': 'ignore'},
            ValueError,
            "^invalid_label: expected one of 'nan', 'raise', 'clip', got 'ignore'$",
        ),
        (
            {'class_weight': [[1, 2]]},
            ValueError,
            r'^class_weight: expected one finite weight >= 0 per class, .*got .* of shape \(1, 2\)$',
        ),
        ({'class_weight': [1, -2]}, ValueError, '^class_weight: expected one finite weight >= 0 per class'),
        (
            {'class_weight': [1, float('nan')]},
            ValueError,
            '^class_weight: expected one finite weight >= 0 per class',
        ),
        (
            {'from_logits': True, 'lse_square_scale': 0.1},
            ValueError,
            '^lse_square_scale: expected 0 with from_logits=True, as ',
        ),
        (
            {'sparse_label': False, 'ignore_label': -1},
            ValueError,
            '^ignore_label: expected None with sparse_label=False, as .* sample_weight',
        ),
        (
            {'sparse_label': False, 'invalid_label': 'raise'},
            ValueError,
            "^invalid_label: expected 'nan' with sparse_label=False, as ",
        ),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        StableSoftmaxCELoss(**options)


@pytest.mark.parametrize(
    ('options', 'pred', 'label', 'error', 'message'),
    [
        (
            {},
            (4, 3),
            (4, 3),
            ValueError,
            r'^label: expected shape \(4,\) for pred of shape \(4, 3\) with the classes on axis 1, got \(4, 3\); .* need sparse_label=False$',
        ),
        (
            {},
            (4, 3),
            (5,),
            ValueError,
            r'^label: expected shape \(4,\) for pred of shape \(4, 3\) with the classes on axis 1, got \(5,\)$',
        ),
        ({}, (4, 3), (1, 4), ValueError, r'^label: expected shape \(4,\)'),
        ({'axis': 1}, (4, 3, 2), (4, 3), ValueError, r'^label: expected shape \(4, 2\)'),
        (
            {'sparse_label': False},
            (4, 3),
            (4,),
            ValueError,
            r'^label: expected shape \(4, 3\) like pred .*, got \(4,\); class indices need sparse_label=True$',
        ),
        (
            {'sparse_label': False},
            (4, 3),
            (3, 4),
            ValueError,
            r'^label: expected shape \(4, 3\) like pred with sparse_label=False, got \(3, 4\)$',
        ),
        (
            {},
            (4,),
            (4,),
            ValueError,
            r'^pred: expected at least 2 axes, with the classes on axis -1, got shape \(4,\)$',
        ),
        (
            {'axis': 2},
            (4, 3),
            (4,),
            ValueError,
            r'^pred: expected at least 2 axes, with the classes on axis 2, got shape \(4, 3\)$',
        ),
        (
            {'class_weight': [1, 2]},
            (4, 3),
            (4,),
            ValueError,
            '^class_weight: expected one weight for each of the 3 classes of pred, got 2$',
        ),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(options, pred, label, error, message):
    with pytest.raises(error, match=message):
        StableSoftmaxCELoss(**options)(nd.zeros(pred), nd.zeros(label))


def test_a_sample_weight_that_does_not_fit_is_refused():
    loss_fn = StableSoftmaxCELoss()
    for shape in ((3,), (2, 1), (4, 3), (5, 4), (4, 5, 2), (1, 4, 5, 1)):
        with pytest.raises(
            ValueError,
            match=r'^sample_weight: expected one weight per sample \(4,\), one per label \(4, 5\), or a shape that '
            r'broadcasts to \(4, 5, 1\), or to \(4, 5, 3\) for the mean over the classes, got ',
        ):
            loss_fn(nd.zeros((4, 5, 3)), nd.zeros((4, 5)), nd.ones(shape))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((np.zeros((4, 3)), nd.zeros(4)), '^pred: expected an MXNet array, got ndarray$'),
        ((nd.zeros((4, 3)), [0, 1, 2, 0]), '^label: expected an MXNet array, got list$'),
        ((nd.zeros((4, 3)), nd.zeros(4), 1.0), '^sample_weight: expected an MXNet array, got float$'),
        (
            (nd.zeros((4, 2049)), nd.zeros(4, dtype='float16')),
            '^label: expected a dtype that can name 2049 classes, got float16, exact up to 2048 only$',
        ),
    ],
)
def test_wrong_types_are_refused(args, message):
    with pytest.raises(TypeError, match=message):
        StableSoftmaxCELoss()(*args)


def test_arrays_on_several_contexts_are_refused():
    for loss_fn in (StableSoftmaxCELoss(), StableSoftmaxCELoss(class_weight=[1, 2, 3])):
        pred, label, weight = nd.zeros((4, 3)), nd.zeros(4), nd.ones(4)
        for _ in range(2):  # without a graph and with one
            with pytest.raises(
                ValueError, match=r'^label: expected an array on cpu\(0\) like pred, got one on cpu\(1\)$'
            ):
                loss_fn(pred, label.as_in_context(mx.cpu(1)))
            with pytest.raises(
                ValueError,
                match=r'^sample_weight: expected an array on cpu\(0\) like pred, got one on cpu\(1\)$',
            ):
                loss_fn(pred, label, weight.as_in_context(mx.cpu(1)))
            assert loss_fn(pred, label).shape == loss_fn(pred, label, weight).shape == (4,)


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64'])
def test_every_label_dtype(dtype, ctx):
    for mode in modes.ALL:
        pred = np.arange(30, dtype='float32').reshape(5, 6) % 7
        label = np.array([0, 5, 2, 6, 100]).astype(dtype)
        loss, gradient = mode(StableSoftmaxCELoss(ignore_label=2), pred, label)
        expected, expected_gradient = reference.loss_and_gradient(pred, label, ignore_label=2)
        np.testing.assert_allclose(loss, expected, rtol=5e-6, atol=5e-6)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize(
    ('dtype', 'values'),
    [
        ('int64', [2**32 + 1, -(2**40), 2**53]),
        ('int32', [2**31 - 1, -1]),
        ('int8', [-1, 127]),
        ('float64', [1 + 1e-9, np.inf, -np.inf, np.nan, 2.0**32 + 1]),
        ('float32', [0.5, 1e30, -1e-30, np.nan]),
        ('float16', [0.5, np.nan, np.inf]),
    ],
)
def test_labels_that_name_no_class_are_nan_and_never_another_class(dtype, values, ctx):
    pred, label = nd.zeros((len(values), 3)), nd.array(values, dtype=dtype)
    np.testing.assert_array_equal(StableSoftmaxCELoss()(pred, label).asnumpy(), np.nan)
    for few_classes in (False, True) if dtype in ('int8', 'float32', 'float16') else (False,):
        known = {'few_classes': few_classes, 'label_dtype': 'float32' if few_classes else 'float64'}
        labels = read_labels(nd, label, pred, **known)
        assert not labels.is_valid.asnumpy().any()
        assert np.isin(labels.index.asnumpy(), [0, 1, 2]).all()
        assert read_labels(nd, nd.array([0, 1, 2], dtype=dtype), pred, **known).is_valid.asnumpy().all()


@pytest.mark.parametrize('dtype', ['int32', 'int64', 'float64'])
def test_more_classes_than_float32_can_count(dtype, ctx):
    classes = 2**24 + 2
    label = nd.array([0, classes - 1, classes], dtype=dtype)
    labels = read_labels(nd, label, nd.zeros((1, classes)))
    np.testing.assert_array_equal(labels.is_valid.asnumpy(), [1, 1, 0])
    assert labels.index.asnumpy()[1] == classes - 1


def test_invalid_label_raise_counts_and_clip_is_stock(ctx):
    pred, label = nd.array([[1, 2, 3]] * 4), nd.array([0, -1, 7, -2])
    with pytest.raises(ValueError, match=r'^label: expected integers in \[0, 3\), got 3 others among 4$'):
        StableSoftmaxCELoss(invalid_label='raise')(pred, label)
    with pytest.raises(ValueError, match='got 2 others among 4'):
        StableSoftmaxCELoss(invalid_label='raise', ignore_label=-1)(pred, label)
    StableSoftmaxCELoss(invalid_label='raise')(pred, nd.array([0, 1, 2, 2]))
    stock = gluon.loss.SoftmaxCrossEntropyLoss()(pred, label).asnumpy()
    np.testing.assert_allclose(
        StableSoftmaxCELoss(invalid_label='clip')(pred, label).asnumpy(), stock, rtol=5e-6
    )


def test_a_label_may_keep_the_class_axis(rng, ctx):
    for mode in modes.ALL:
        for reduction in ('mean', 'none'):
            pred, label = (
                rng.normal(0, 1, (3, 5, 4)).astype('float32'),
                rng.randint(0, 5, (3, 1, 4)).astype('float32'),
            )
            settings = {'axis': 1, 'reduction': reduction}
            loss, gradient = mode(StableSoftmaxCELoss(**settings), pred, label)
            expected, expected_gradient = reference.loss_and_gradient(pred, label, **settings)
            assert loss.shape == (label.shape if reduction == 'none' else (3,))
            np.testing.assert_allclose(loss.ravel(), expected.ravel(), rtol=5e-6, atol=5e-6)
            np.testing.assert_allclose(gradient, expected_gradient, rtol=5e-6, atol=5e-6)


def test_one_loss_serves_calls_of_every_kind(rng, ctx):
    """Gluon's own refuses the second kind: "The argument structure of HybridBlock does not match"."""
    loss_fn = StableSoftmaxCELoss(ignore_label=-1)
    for _ in range(2):
        for shape in ((4, 3), (7, 3), (2, 5, 3), (2, 5, 2, 3)):
            for dtype in ('float32', 'float16', 'float64'):
                for weighted in (False, True):
                    arrays = [
                        rng.normal(0, 1, shape).astype(dtype),
                        rng.randint(-1, 3, shape[:-1]).astype('int32'),
                    ]
                    if weighted:
                        arrays.append(rng.uniform(0, 1, shape[0]).astype('float32'))
                    for mode in (modes.default, modes.np_mode):
                        np.testing.assert_allclose(
                            mode(loss_fn, *arrays)[0],
                            reference.loss_and_gradient(*arrays, ignore_label=-1)[0],
                            rtol=2e-5,
                            atol=5e-6,
                        )


def test_any_number_of_classes_with_few_graphs(rng, ctx):
    """Candidates to rank come in all numbers, and each graph keeps its memory."""
    loss_fn, metric = StableSoftmaxCELoss(ignore_label=-1), StableCrossEntropy(ignore_label=-1)
    seen, before = [], compiled.cache_info().currsize
    for classes in [*range(1, 40), *range(1, 40)]:
        pred, label = (
            rng.normal(0, 1, (5, classes)).astype('float32'),
            rng.randint(-1, classes, 5).astype('float32'),
        )
        expected = reference.loss_and_gradient(pred, label, ignore_label=-1)[0]
        np.testing.assert_allclose(
            loss_fn(nd.array(pred), nd.array(label)).asnumpy(), expected, rtol=2e-5, atol=5e-6
        )
        metric.update(nd.array(label), nd.softmax(nd.array(pred)))
        seen.append(expected[label != -1])
    np.testing.assert_allclose(metric.get()[1], np.concatenate(seen).mean(), rtol=1e-6)
    assert compiled.cache_info().currsize - before <= 2


def test_an_exported_loss_serves_any_number_of_classes(rng, tmp_path):
    loss_fn = StableSoftmaxCELoss()
    loss_fn(nd.zeros((4, 3)), nd.zeros(4))
    loss_fn.export(str(tmp_path / 'loss'))
    loaded = gluon.SymbolBlock.imports(str(tmp_path / 'loss-symbol.json'), ['data0', 'data1'])
    for classes in (2, 3, 50):
        pred, label = nd.array(rng.normal(0, 1, (4, classes))), nd.array([0, classes - 1, classes, 1])
        np.testing.assert_array_equal(loaded(pred, label).asnumpy(), loss_fn(pred, label).asnumpy())
        np.testing.assert_array_equal(np.isnan(loaded(pred, label).asnumpy()), [False, False, True, False])


def test_hybridize_false_computes_operator_by_operator():
    loss_fn, batch = StableSoftmaxCELoss(axis=-1, weight=1.25), (nd.zeros((4, 3)), nd.zeros(4))
    loss_fn(*batch)
    before = compiled.cache_info()
    loss_fn.hybridize(False)
    loss_fn(*batch)
    assert compiled.cache_info() == before
    loss_fn.hybridize()
    loss_fn(*batch)
    assert compiled.cache_info().hits == before.hits + 1


def test_outputs_are_fresh_and_many_losses_live_in_one_record(rng, ctx):
    """Static memory must not show: no later call, of the same shape or another, changes an earlier result or its gradient."""
    loss_fn = StableSoftmaxCELoss()
    batches = [(nd.array(rng.normal(0, 3, (n, 5))), nd.array(rng.randint(0, 5, n))) for n in (8, 8, 3, 8, 5)]
    for pred, _ in batches:
        pred.attach_grad()
    with autograd.record():
        losses = [loss_fn(*batch) for batch in batches]
    autograd.backward(losses)
    for (pred, label), loss in zip(batches, losses):
        expected, expected_gradient = reference.loss_and_gradient(pred.asnumpy(), label.asnumpy())
        np.testing.assert_allclose(loss.asnumpy(), expected, rtol=5e-6, atol=5e-6)
        np.testing.assert_allclose(pred.grad.asnumpy(), expected_gradient, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'class_weight': [1, 2, 3, 4, 5], 'ignore_label': 2, 'label_smoothing': 0.1, 'lse_square_scale': 0.1},
    ],
)
def test_labels_that_want_a_gradient_get_zero(options, rng, ctx):
    """As in gluon, where scripts and Modules ask for the gradient of all inputs."""
    for shape in ((4, 5), (4, 5, 3)):
        pred, label = nd.array(rng.normal(0, 1, shape)), nd.array(rng.randint(0, 5, (4, *shape[2:])))
        for array in (pred, label):
            array.attach_grad()
        label.grad[:] = 7
        with autograd.record():
            loss = StableSoftmaxCELoss(axis=1, **options)(pred, label)
        loss.backward()
        np.testing.assert_array_equal(label.grad.asnumpy(), 0)
        np.testing.assert_allclose(
            pred.grad.asnumpy(),
            reference.loss_and_gradient(pred.asnumpy(), label.asnumpy(), axis=1, **options)[1],
            rtol=1e-5,
            atol=1e-5,
        )


def test_gradients_add_up(rng, ctx):
    pred, label = nd.array(rng.normal(0, 3, (8, 5))), nd.array(rng.randint(0, 5, 8))
    pred.attach_grad('add')
    for _ in range(3):
        with autograd.record():
            loss = StableSoftmaxCELoss()(pred, label)
        loss.backward()
    np.testing.assert_allclose(
        pred.grad.asnumpy(),
        3 * reference.loss_and_gradient(pred.asnumpy(), label.asnumpy())[1],
        rtol=5e-6,
        atol=2e-5,
    )


def test_several_contexts_with_class_weights_that_nobody_initialised(rng):
    loss_fn = StableSoftmaxCELoss(class_weight=[1, 2, 3])
    for context in (mx.cpu(0), mx.cpu(1), mx.cpu(0)):
        pred, label = rng.normal(0, 1, (4, 3)).astype('float32'), rng.randint(0, 3, 4)
        loss = loss_fn(nd.array(pred, ctx=context), nd.array(label, ctx=context))
        assert loss.context == context
        np.testing.assert_allclose(
            loss.asnumpy(),
            reference.loss_and_gradient(pred, label, class_weight=[1, 2, 3])[0],
            rtol=5e-6,
            atol=1e-5,
        )


def test_class_weights_travel(rng, tmp_path):
    """They are a constant of the block: collected, saved, loaded, unharmed by cast, and ignored by the Trainer."""
    weights = [0.1, 2, 3]
    pred, label = nd.array(rng.normal(0, 1, (4, 3))), nd.array([0, 1, 2, 0])
    loss_fn = StableSoftmaxCELoss(class_weight=weights, prefix='loss_')
    expected = loss_fn(pred, label).asnumpy()
    assert [(name, value.shape) for name, value in loss_fn.collect_params().items()] == [
        ('loss_classweight0_value', (3,))
    ]
    loss_fn.save_parameters(str(tmp_path / 'loss.params'))
    other = StableSoftmaxCELoss(class_weight=[7, 7, 7])
    other.load_parameters(str(tmp_path / 'loss.params'))
    np.testing.assert_array_equal(other(pred, label).asnumpy(), expected)
    loss_fn.cast('float16')
    np.testing.assert_array_equal(loss_fn(pred, label).asnumpy(), expected)
    loss_fn.initialize()
    loss_fn.collect_params().reset_ctx(mx.cpu(0))
    np.testing.assert_array_equal(loss_fn(pred, label).asnumpy(), expected)
    gluon.Trainer(loss_fn.collect_params(), 'sgd').step(1)
    np.testing.assert_array_equal(loss_fn(pred, label).asnumpy(), expected)


def test_hooks_on_operators_are_called():
    loss_fn, seen = StableSoftmaxCELoss(), []
    loss_fn.hybridize(static_alloc=False)  # with static memory MXNet calls them for some operators only
    batch = nd.zeros((4, 3)), nd.zeros(4)
    loss_fn(*batch)
    loss_fn.register_op_hook(lambda name, op, array: seen.append(op))
    loss_fn(*batch).wait_to_read()
    assert b'pick' in seen


def test_people_subclass_it(rng, ctx):
    """By forward with weights of gluon's keepdims shape (as D2L's masked loss), or by hybrid_forward; both with every option."""

    class MaskedLoss(StableSoftmaxCELoss):
        def forward(self, pred, label, valid_length):
            weights = mx.np.expand_dims(mx.np.ones_like(label), axis=-1)
            return super().forward(pred, label, mx.npx.sequence_mask(weights, valid_length, True, axis=1))

    class HalvedLoss(StableSoftmaxCELoss):
        def hybrid_forward(self, F, pred, label, sample_weight=None):
            return super().hybrid_forward(F, pred, label, sample_weight) / 2

    class SequenceLoss(StableSoftmaxCELoss):  # as gluon-nlp's: the third input is no weight
        def hybrid_forward(self, F, pred, label, valid_length):
            weights = F.SequenceMask(
                F.expand_dims(F.ones_like(label), axis=-1), valid_length, use_sequence_length=True, axis=1
            )
            return super().hybrid_forward(F, pred, label, weights)

    class LossWithAux(StableSoftmaxCELoss):  # as gluon-cv's: the second input is no label
        def hybrid_forward(self, F, pred, other, label):
            return super().hybrid_forward(F, pred, label) + 0.5 * super().hybrid_forward(F, other, label)

    pred, label = rng.normal(0, 1, (3, 4, 10)).astype('float32'), rng.randint(0, 10, (3, 4)).astype('float32')
    options = {'class_weight': np.arange(10), 'label_smoothing': 0.1}
    mask = (np.arange(4) < np.array([4, 2, 0])[:, None]).astype('float32')
    expected, _ = reference.loss_and_gradient(pred, label, mask, **options)
    with modes.numpy_semantics():
        loss = MaskedLoss(**options)(mx.np.array(pred), mx.np.array(label), mx.np.array([4, 2, 0]))
        np.testing.assert_allclose(loss.asnumpy(), expected, rtol=5e-6, atol=5e-6)
    length = np.array([4, 2, 0], 'float32')
    for mode in (
        mode for mode in modes.ALL if mode not in (modes.np_mode, modes.np_mode_nested)
    ):  # SequenceMask is a classic operator
        np.testing.assert_allclose(
            mode(SequenceLoss(**options), pred, label, length)[0], expected, rtol=5e-6, atol=5e-6
        )
    expected, expected_gradient = reference.loss_and_gradient(pred, label, **options)
    for mode in modes.ALL:
        np.testing.assert_allclose(
            mode(LossWithAux(**options), pred, pred, label)[0], 1.5 * expected, rtol=5e-6, atol=5e-6
        )
        loss, gradient = mode(HalvedLoss(**options), pred, label)
        np.testing.assert_allclose(loss, expected / 2, rtol=5e-6, atol=5e-6)
        np.testing.assert_allclose(gradient, expected_gradient / 2, rtol=5e-6, atol=5e-6)


def test_a_step_over_valid_labels_is_the_step_of_the_whole_batch():
    """Uneven batches on two contexts, summed and divided by what counts, against the mean over one concatenated batch."""
    rng = np.random.RandomState(0)
    data, label = rng.normal(0, 1, (10, 6, 8)).astype('float32'), rng.randint(0, 5, (10, 6)).astype('float32')
    for sample, length in enumerate(rng.randint(0, 7, 10)):
        label[sample, length:] = -1

    def weights_after_one_step(batches):
        net = gluon.nn.Dense(5, flatten=False, in_units=8)
        net.initialize(mx.init.Constant(0.1), ctx=[mx.cpu(0), mx.cpu(1)])
        trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1}, update_on_kvstore=False)
        loss_fn = StableSoftmaxCELoss(ignore_label=-1, reduction='sum')
        with autograd.record():
            losses = [loss_fn(net(x), y) for x, y in batches]
        autograd.backward(losses)
        trainer.step(loss_fn.valid_count([y for _, y in batches]))
        return net.weight.data(mx.cpu(0)).asnumpy()

    def split(sizes):
        edges = np.cumsum([0] + sizes)
        return [
            (nd.array(data[a:b], ctx=mx.cpu(i)), nd.array(label[a:b], ctx=mx.cpu(i)))
            for i, (a, b) in enumerate(zip(edges, edges[1:]))
        ]

    whole = [
        (nd.array(data), nd.array(label)),
        (nd.zeros((1, 1, 8), ctx=mx.cpu(1)), nd.full((1, 1), -1, ctx=mx.cpu(1))),
    ]
    np.testing.assert_allclose(
        weights_after_one_step(split([7, 3])), weights_after_one_step(whole), rtol=0, atol=1e-6
    )
    assert (
        StableSoftmaxCELoss(ignore_label=-1).valid_count([nd.array(label), nd.array([-1, 2])])
        == int((label != -1).sum()) + 1
    )
    assert StableSoftmaxCELoss().valid_count(nd.array(label)) == label.size
