"""Class weights: what is accepted, and that they are saved, moved and exported with the loss as a constant."""

import modes
import mxnet as mx
import numpy as np
import pytest
import reference
from mxnet import gluon
from tolerances import assert_close

from gluon_stable_ce import StableSoftmaxCELoss
from gluon_stable_ce.class_weight import as_weights

pytestmark = pytest.mark.usefixtures('kernel')

nd = mx.nd
WEIGHTS = [0.1, 2, 3]
SMOOTHING = pytest.mark.parametrize('label_smoothing', [0, 0.1], ids=['plain', 'smoothing'])
SPARSE_LABEL = pytest.mark.parametrize('sparse_label', [True, False], ids=['sparse', 'dense'])


@pytest.fixture
def batch(rng):
    """Logits and labels of three classes."""
    return nd.array(rng.normal(0, 1, (4, 3))), nd.array([0, 1, 2, 0])


@pytest.mark.parametrize('kind', [list, tuple, np.array, nd.array], ids=['list', 'tuple', 'numpy', 'mxnet'])
def test_as_weights_accepts_lists_and_arrays(kind):
    weights = as_weights(kind([1, 2, 0.5]))
    assert weights.dtype == np.float64
    np.testing.assert_array_equal(weights, [1, 2, 0.5])


def test_collect_params_has_the_weights(batch):
    loss_fn = StableSoftmaxCELoss(class_weight=WEIGHTS, prefix='loss_')
    for _ in range(2):  # before and after use
        shapes = {name: value.shape for name, value in loss_fn.collect_params().items()}
        assert shapes == {'loss_classweight0_value': (3,)}
        loss_fn(*batch)


def net_with(class_weight):
    """A net with a loss in it, whose parameters do not depend on the loss."""
    net = modes.WithLoss(gluon.nn.Dense(3, in_units=2), StableSoftmaxCELoss(class_weight=class_weight))
    net.initialize(mx.init.One())
    return net


@pytest.mark.parametrize('before', [None, [1, 2, 3], WEIGHTS], ids=['plain', 'others', 'same'])
@pytest.mark.parametrize('after', [None, WEIGHTS], ids=['plain', 'weighted'])
@pytest.mark.parametrize('is_used', [False, True], ids=['before-use', 'after-use'])
def test_the_weights_of_the_script_win_over_those_of_a_file(before, after, is_used, tmp_path, recwarn):
    inputs = nd.ones((4, 2)), nd.array([0, 1, 2, 0])
    saved, loaded = net_with(before), net_with(after)
    expected = loaded(*inputs).asnumpy() if is_used else net_with(after)(*inputs).asnumpy()
    saved.save_parameters(str(tmp_path / 'net.params'))
    loaded.load_parameters(str(tmp_path / 'net.params'))
    np.testing.assert_array_equal(loaded(*inputs).asnumpy(), expected)
    warnings = [warning for warning in recwarn if 'the file has' in str(warning.message)]
    assert len(warnings) == (before not in (None, after))
    saved.load_parameters(str(tmp_path / 'net.params'))


def test_what_else_a_file_has_is_an_error(tmp_path):
    net = net_with(None)
    net.save_parameters(str(tmp_path / 'net.params'))
    nd.save(
        str(tmp_path / 'more.params'), {**nd.load(str(tmp_path / 'net.params')), 'extra.value': nd.ones(3)}
    )
    with pytest.raises(ValueError, match=r'^Parameter .extra\.value. loaded from file'):
        net.load_parameters(str(tmp_path / 'more.params'))


@pytest.mark.parametrize('is_other', [False, True], ids=['same', 'other'])
def test_a_file_with_other_class_weights_is_a_warning(is_other, batch, tmp_path, recwarn):
    """`collect_params` has them, as a graph needs them."""
    saved = StableSoftmaxCELoss(class_weight=[1, 2, 3] if is_other else WEIGHTS, prefix='loss_')
    loaded = StableSoftmaxCELoss(class_weight=WEIGHTS, prefix='loss_')
    expected = loaded(*batch).asnumpy()
    saved.collect_params().save(str(tmp_path / 'loss.params'))
    loaded.collect_params().load(str(tmp_path / 'loss.params'), ctx=mx.cpu(0))
    np.testing.assert_array_equal(loaded(*batch).asnumpy(), expected)
    messages = [str(warning.message) for warning in recwarn if 'class weights' in str(warning.message)]
    assert len(messages) == is_other


@pytest.mark.parametrize('prefix', ['a_', 'z_'])  # a Trainer sorts parameters by name
@pytest.mark.parametrize('is_used', [False, True], ids=['before-use', 'after-use'])
def test_a_trainer_takes_them_together_with_a_net_on_two_contexts(prefix, is_used, batch):
    contexts = [mx.cpu(0), mx.cpu(1)]
    net, loss_fn = gluon.nn.Dense(3, prefix='net_'), StableSoftmaxCELoss(class_weight=WEIGHTS, prefix=prefix)
    net.initialize(ctx=contexts)
    if is_used:
        loss_fn(*batch)
    params = net.collect_params()
    params.update(loss_fn.collect_params())
    trainer = gluon.Trainer(params, 'sgd', {'learning_rate': 0.1})
    parts = [[array.as_in_context(context) for array in batch] for context in contexts]
    with mx.autograd.record():
        losses = [loss_fn(net(pred), label) for pred, label in parts]
    before = net.weight.list_data()[0].asnumpy() if net.weight._data else None
    mx.autograd.backward(losses)
    trainer.step(8)
    weights = [array.asnumpy() for array in net.weight.list_data()]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert before is not None
    assert np.abs(weights[0] - before).max() > 0
    np.testing.assert_array_equal(loss_fn.class_weight.value.data().asnumpy(), np.float32(WEIGHTS))


@pytest.mark.parametrize('change', [
    lambda params: params.reset_ctx([mx.cpu(0), mx.cpu(1)]),
    lambda params: [param.data() for param in params.values()],
    lambda params: [param.cast('float16') for param in params.values()],
    lambda params: gluon.Trainer(params, 'sgd'),
], ids=['reset_ctx', 'data', 'cast', 'trainer'])  # fmt: skip
def test_no_initialisation_is_needed(change, batch):
    loss_fn = StableSoftmaxCELoss(class_weight=WEIGHTS)
    change(loss_fn.collect_params())
    np.testing.assert_array_equal(
        loss_fn(*batch).asnumpy(), StableSoftmaxCELoss(class_weight=WEIGHTS)(*batch).asnumpy()
    )


def test_a_module_initialises_them():
    """From the graph alone, without the values that an export writes."""
    data, label = mx.sym.var('data'), mx.sym.var('label')
    loss = StableSoftmaxCELoss(class_weight=WEIGHTS, prefix='loss_', kernel='stock')(data, label)
    module = mx.mod.Module(mx.sym.MakeLoss(loss), ['data'], ['label'])
    module.bind([('data', (4, 3))], [('label', (4,))])
    module.init_params(mx.init.Zero())
    weights = module.get_params()[0]['loss_classweight0_value']
    np.testing.assert_array_equal(weights.asnumpy(), np.float32(WEIGHTS))


def test_a_deleted_loss_leaves_nothing_in_a_registry():
    """A Constant registers an initializer, which keeps its value for ever."""
    registry = mx.registry._REGISTRY[mx.init.Initializer]
    before = len(registry)
    StableSoftmaxCELoss(class_weight=WEIGHTS)
    assert len(registry) == before


@pytest.mark.parametrize('change', [
    lambda loss_fn: loss_fn.cast('float16'),
    lambda loss_fn: loss_fn.initialize(),
    lambda loss_fn: loss_fn.initialize(ctx=[mx.cpu(0), mx.cpu(1)], force_reinit=True),
    lambda loss_fn: loss_fn.collect_params().reset_ctx(mx.cpu(0)),
    lambda loss_fn: gluon.Trainer(loss_fn.collect_params(), 'sgd').step(1),
], ids=['cast', 'initialize', 'initialize-on-two', 'reset_ctx', 'trainer-step'])  # fmt: skip
def test_values_do_not_change(change, batch):
    loss_fn = StableSoftmaxCELoss(class_weight=WEIGHTS)
    expected = loss_fn(*batch).asnumpy()
    change(loss_fn)
    np.testing.assert_array_equal(loss_fn(*batch).asnumpy(), expected)


@pytest.mark.parametrize('is_compiled', [True, False], ids=['compiled', 'eager'])
def test_every_context_has_them_without_initialize(is_compiled, rng):
    loss_fn = StableSoftmaxCELoss(class_weight=WEIGHTS)
    loss_fn.hybridize(is_compiled)
    for context in (mx.cpu(0), mx.cpu(1), mx.cpu(0)):
        pred, label = rng.normal(0, 1, (4, 3)).astype('float32'), rng.randint(0, 3, 4)
        loss = loss_fn(nd.array(pred, ctx=context), nd.array(label, ctx=context))
        assert loss.context == context
        expected, _ = reference.loss_and_gradient(pred, label, class_weight=WEIGHTS)
        assert_close(loss.asnumpy(), expected)


@pytest.mark.parametrize('count', [2, 4])
@SMOOTHING
@SPARSE_LABEL
def test_call_with_another_number_of_classes_is_an_error(count, label_smoothing, sparse_label):
    label = nd.zeros(4) if sparse_label else nd.zeros((4, 3))
    loss_fn = StableSoftmaxCELoss(
        class_weight=[1] * count, label_smoothing=label_smoothing, sparse_label=sparse_label
    )
    message = f'^class_weight: expected one weight for each of the 3 classes of pred, got {count}$'
    with pytest.raises(ValueError, match=message):
        loss_fn(nd.zeros((4, 3)), label)
