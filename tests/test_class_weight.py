"""Class weights: what is accepted, and that they are saved, moved and exported with the loss as a constant."""

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


def test_save_and_load_parameters(batch, tmp_path):
    loss_fn, other = StableSoftmaxCELoss(class_weight=WEIGHTS), StableSoftmaxCELoss(class_weight=[7, 7, 7])
    loss_fn.save_parameters(str(tmp_path / 'loss.params'))
    other.load_parameters(str(tmp_path / 'loss.params'))
    np.testing.assert_array_equal(other(*batch).asnumpy(), loss_fn(*batch).asnumpy())


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
