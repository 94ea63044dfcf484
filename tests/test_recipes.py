"""The recipes of the documentation: each block is run, and its values and gradients are compared with a formula in float64."""

import os
import re
import subprocess
import sys

import mxnet as mx
import numpy as np
import pages
import pytest
import tolerances
from mxnet import autograd, gluon, nd
from recipes import RECIPES, recipe
from reference import log_softmax
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures('kernel')

with open(__file__, encoding='utf-8') as file:
    TESTED = set(re.findall(r"recipe\('(.*)'\)", file.read()))


def numeric_gradient(function, array, step=1e-5):
    """The gradient of the sum of `function` by central differences."""
    gradient = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        moved = np.zeros(array.shape)
        moved[index] = step
        gradient[index] = np.sum(function(array + moved) - function(array - moved)) / (2 * step)
    return gradient


def check_values_and_gradients(recipe_of, formula_of, pred, scale=1):
    """Both are functions of one array; the formula computes in float64. `scale` is what multiplies it into logits."""
    array = nd.array(pred)
    array.attach_grad()
    with autograd.record():
        loss = recipe_of(array)
    loss.backward()
    pred = array.asnumpy().astype('float64')
    assert_close(loss.asnumpy(), formula_of(pred))
    assert_close(array.grad.asnumpy() / scale, numeric_gradient(formula_of, pred) / scale)


def nll_of(pred, label):
    """-log p of each label, classes last; a label outside the classes gives what its mask removes."""
    index = np.clip(label, 0, pred.shape[-1] - 1).astype(int)
    return -np.take_along_axis(log_softmax(pred), index[..., None], -1)[..., 0]


def smoothed_nll_of(pred, label, share):
    return (1 - share) * nll_of(pred, label) - share * log_softmax(pred).mean(-1)


def linear_net(weight, ctx=None):
    """A net of one weight, (C, D), that keeps all axes before the last."""
    net = gluon.nn.Dense(len(weight), use_bias=False, flatten=False, in_units=weight.shape[1])
    net.initialize(ctx=ctx)
    net.weight.set_data(nd.array(weight))
    return net, gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.5}, kvstore='device')


def weight_after_a_step(weight, data, label):
    """After the step that the mean over all positions with another label than -1 makes."""
    data, label = data.reshape(-1, data.shape[-1]).astype('float64'), label.reshape(-1)
    pred = data @ weight.astype('float64').T
    gradient = np.exp(log_softmax(pred)) - np.eye(len(weight))[label.astype(int)]
    gradient[label == -1] = 0
    return weight - 0.5 * gradient.T @ data / max(1, (label != -1).sum())


@pytest.fixture
def tokens(rng):
    """Data (5, 4, 3), labels (5, 4) of which a third is -1, and a weight (6, 3)."""
    label = np.where(rng.uniform(size=(5, 4)) < 0.3, -1, rng.randint(0, 6, (5, 4))).astype('float32')
    label[3] = -1
    return (rng.normal(size=(5, 4, 3)).astype('float32'), label, rng.normal(size=(6, 3)).astype('float32'))


def test_every_recipe_has_a_test():
    assert set(RECIPES) == TESTED


def test_average_tokens_with_trainer_step_of_the_batch_size(tokens):
    data, label, weight = tokens
    train_step = recipe('Average tokens with trainer.step(batch_size)')['train_step']
    net, trainer = linear_net(weight)
    loss = train_step(net, trainer, nd.array(data), nd.array(label))
    nll, counted = nll_of(data @ weight.T, label), label != -1
    assert_close(loss.mean().asscalar(), nll[counted].mean())
    expected = weight_after_a_step(weight, data, label)
    assert_close(net.weight.data().asnumpy(), expected, tolerances.TRAINED)


label_dtypes = pytest.mark.parametrize('label_dtype', ['uint8', 'int32', 'int64', 'float16', 'float32'])


@label_dtypes
@pytest.mark.parametrize('smoothing', [0, 0.1], ids=['mean-of-the-length', 'smoothed'])
def test_losses_masked_by_length(rng, smoothing, label_dtype):
    """Padding by valid_length divides by the length, the masked loss of gluon-nlp by that of the padding."""
    if smoothing:
        loss_fn = recipe('The masked loss of gluon-nlp, with label smoothing')['masked_loss']
    else:
        loss_fn = recipe('Padding by valid_length')['loss_fn']
    label, length = rng.randint(0, 5, (3, 4)), np.array([4, 2, 0])
    mask, divisor = np.arange(4) < length[:, None], 4 if smoothing else np.maximum(length, 1)
    check_values_and_gradients(
        lambda pred: loss_fn(pred, nd.array(label, dtype=label_dtype), nd.array(length)),
        lambda pred: (smoothed_nll_of(pred, label, smoothing) * mask).sum(1) / divisor,
        rng.normal(0, 2, (3, 4, 5)),
    )


def test_masked_loss_of_gluon_nlp_is_that_of_dense_smoothed_labels_with_stock(rng):
    masked_loss = recipe('The masked loss of gluon-nlp, with label smoothing')['masked_loss']
    pred, label = nd.array(rng.normal(0, 2, (3, 4, 5))), nd.array(rng.randint(0, 5, (3, 4)))
    length, stock = nd.array([4, 2, 1]), gluon.loss.SoftmaxCELoss(sparse_label=False)
    mask = nd.SequenceMask(nd.ones((3, 4, 1)), length, True, axis=1)
    dense = nd.one_hot(label, 5) * 0.9 + 0.1 / 5
    expected = stock(pred, dense, nd.broadcast_like(mask, pred)).asnumpy()
    assert_close(masked_loss(pred, label, length).asnumpy(), expected)


def test_loss_of_sockeye(rng):
    sockeye_loss = recipe('The loss of sockeye')['sockeye_loss']
    label = np.array([[3, 2, 0, 0], [1, 4, 4, 2], [0, 0, 0, 0]])
    check_values_and_gradients(
        lambda pred: sockeye_loss(pred, nd.array(label)),
        lambda pred: (smoothed_nll_of(pred, label, 0.1) * (label != 0)).sum(keepdims=True)[0] / 6,
        rng.normal(0, 2, (3, 4, 5)),
    )


def test_focal_loss(rng):
    loss_fn = recipe('Focal loss')['loss_fn']
    label = rng.randint(0, 5, (3, 4))

    def formula(pred):
        nll = nll_of(pred, label)
        return (1 - np.exp(-nll)) ** 2 * nll

    check_values_and_gradients(
        lambda pred: loss_fn(pred, nd.array(label)), formula, rng.normal(0, 2, (3, 4, 5))
    )


def test_focal_loss_near_probability_1():
    loss_fn = recipe('Focal loss')['loss_fn']
    pred = np.array([[9.0, 0, 0], [12, 0, 1], [0, 14, 0]])
    loss = loss_fn(nd.array(pred), nd.array([0, 0, 1])).asnumpy()
    nll = nll_of(pred, np.array([0, 0, 1]))
    assert_close(loss, np.expm1(-nll) ** 2 * nll, tolerances.FOCAL)
    assert (loss >= 0).all()


@pytest.mark.parametrize('shape', [(4, 3), (4, 3, 1)])
def test_mixup_of_two_labels(rng, shape):
    mixup_loss = recipe('Mixup of two labels')['mixup_loss']
    label, share, weight = np.array([0, 4, 1, 2]), np.array([0, 0.3, 1, 0.8]), rng.normal(size=(5, 3))
    net = gluon.nn.Dense(5, use_bias=False, in_units=3)  # flattens
    net.initialize()
    net.weight.set_data(nd.array(weight))

    def formula(data):
        data = data.reshape(4, 3)
        pred = (share[:, None] * data + (1 - share[:, None]) * data[::-1]) @ weight.T
        return share * nll_of(pred, label) + (1 - share) * nll_of(pred, label[::-1])

    check_values_and_gradients(
        lambda data: mixup_loss(net, data, nd.array(label), nd.array(share)), formula, rng.normal(size=shape)
    )


def test_mixup_with_a_share_of_0_removes_an_infinite_loss():
    mixup_loss = recipe('Mixup of two labels')['mixup_loss']
    data = nd.array([[0, -np.inf], [0, -np.inf]])
    loss = mixup_loss(lambda mixed: data, nd.zeros((2, 2)), nd.array([1, 0]), nd.array([0, 1]))
    assert (loss.asnumpy() == 0).all()


def test_auxiliary_heads(rng):
    loss_of_heads = recipe('Auxiliary heads')['loss_of_heads']
    label = np.array([[[0, 1], [-1, 2]], [[-1, 1], [-1, 1]]])
    count = np.array([3, 2])

    def formula(preds):  # (heads, N, C, H, W)
        nll = [nll_of(np.moveaxis(pred, 1, -1), label) * (label != -1) for pred in preds]
        return (nll[0] + 0.4 * nll[1]).sum((1, 2)) / count

    check_values_and_gradients(
        lambda preds: loss_of_heads(list(preds), nd.array(label)), formula, rng.normal(size=(2, 2, 3, 2, 2))
    )


def test_distillation_with_a_temperature(rng):
    distillation_loss = recipe('Distillation with a temperature')['distillation_loss']
    teacher, label = rng.normal(0, 4, (4, 5)), rng.randint(0, 5, 4)

    def formula(pred):
        target = np.exp(log_softmax(teacher / 4))
        soft = -(target * log_softmax(pred / 4)).sum(-1)
        return 0.1 * nll_of(pred, label) + 0.9 * 16 * soft

    check_values_and_gradients(
        lambda pred: distillation_loss(pred, nd.array(teacher), nd.array(label)),
        formula,
        rng.normal(0, 4, (4, 5)),
    )


def test_distillation_gives_the_teacher_no_gradient(rng):
    distillation_loss = recipe('Distillation with a temperature')['distillation_loss']
    teacher, student = nd.array(rng.normal(size=(4, 5))), nd.array(rng.normal(size=(4, 5)))
    teacher.attach_grad()
    with autograd.record():
        loss = distillation_loss(student, teacher * 2, nd.zeros(4))
    loss.backward()
    assert (teacher.grad.asnumpy() == 0).all()


def test_the_hardest_examples_of_a_batch(rng):
    ohem_loss = recipe('The hardest examples of a batch (OHEM)')['ohem_loss']
    label = rng.randint(0, 5, (3, 4))
    check_values_and_gradients(
        lambda pred: ohem_loss(pred, nd.array(label)),
        lambda pred: np.sort(nll_of(pred, label), axis=None)[: -3 - 1 : -1],
        rng.normal(0, 2, (3, 4, 5)),
    )


def test_the_hardest_examples_with_an_invalid_label_raise():
    ohem_loss = recipe('The hardest examples of a batch (OHEM)')['ohem_loss']
    with pytest.raises(ValueError, match='label: expected integers'):
        ohem_loss(nd.zeros((4, 3)), nd.array([0, 3, 1, 2]))


@pytest.mark.parametrize('label_dtype', ['int8', 'int32', 'int64', 'float16', 'float32'])
def test_class_loss_of_ssd(rng, label_dtype):
    ssd_class_loss = recipe('The class loss of SSD')['ssd_class_loss']
    label = np.zeros((3, 12))
    label[0, [2, 7]], label[1, [0]], label[1, [3, 4]] = (1, 3), 2, -1  # -1 is ignored

    def formula(pred):
        nll, total = nll_of(pred, label), np.zeros(3)
        for i in range(3):
            is_object = label[i] > 0
            background = np.sort(nll[i][label[i] == 0])[::-1]
            total[i] = nll[i][is_object].sum() + background[: 3 * is_object.sum()].sum()
        return total / 3

    check_values_and_gradients(
        lambda pred: ssd_class_loss(pred, nd.array(label, dtype=label_dtype)),
        formula,
        rng.normal(0, 2, (3, 12, 4)),
    )


def test_class_loss_of_ssd_counts_more_objects_than_uint8_holds(rng):
    ssd_class_loss = recipe('The class loss of SSD')['ssd_class_loss']
    pred, label = rng.normal(0, 2, (1, 300, 4)), np.ones((1, 300))
    check_values_and_gradients(
        lambda pred: ssd_class_loss(pred, nd.array(label, dtype='uint8')),
        lambda pred: nll_of(pred, label).sum(1) / 300,
        pred,
    )


def test_class_loss_of_ssd_without_objects_is_0(rng):
    ssd_class_loss = recipe('The class loss of SSD')['ssd_class_loss']
    assert (ssd_class_loss(nd.array(rng.normal(size=(2, 6, 4))), nd.zeros((2, 6))).asnumpy() == 0).all()


@pytest.mark.parametrize('by', ['embedding', 'weight'])
def test_margin_head_of_insightface(rng, by):
    margin_loss = recipe('The margin head of insightface')['margin_loss']
    label, embedding, weight = np.array([0, 4, 1]), rng.normal(size=(3, 6)), rng.normal(size=(5, 6))

    def formula(embedding, weight):
        embedding = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
        weight = weight / np.linalg.norm(weight, axis=1, keepdims=True)
        cosine = embedding @ weight.T
        rows = np.arange(3)
        cosine[rows, label] = np.cos(np.arccos(cosine[rows, label]) + 0.5)
        return nll_of(64 * cosine, label)

    if by == 'embedding':
        check_values_and_gradients(
            lambda array: margin_loss(array, nd.array(weight), nd.array(label)),
            lambda array: formula(array, weight.astype('float32')),
            embedding,
            scale=64,
        )
    else:
        check_values_and_gradients(
            lambda array: margin_loss(nd.array(embedding), array, nd.array(label)),
            lambda array: formula(embedding.astype('float32'), array),
            weight,
            scale=64,
        )


@pytest.mark.parametrize('is_clipped', [True, False])
def test_margin_head_of_insightface_has_finite_gradients_at_angle_0(rng, is_clipped, monkeypatch):
    """Which the same head without the clip has not."""
    margin_loss = recipe('The margin head of insightface')['margin_loss']
    if not is_clipped:
        monkeypatch.setattr(nd.NDArray, 'clip', lambda self, low, high: self)
    weight = nd.array(rng.normal(size=(5, 6)))
    embedding, label = 3 * weight, nd.arange(5)
    embedding.attach_grad()
    weight.attach_grad()
    with autograd.record():
        loss = margin_loss(embedding, weight, label)
    loss.backward()
    finite = [np.isfinite(array.asnumpy()).all() for array in (loss, embedding.grad, weight.grad)]
    assert all(finite) == is_clipped


@pytest.mark.parametrize('label_dtype', ['int32', 'float32'])
@pytest.mark.parametrize('samples', [5, 4, 2, 1])
def test_several_devices_with_uneven_batches(tokens, samples, label_dtype):
    data, label, weight = tokens
    data, label = data[-samples:], label[-samples:]  # all labels of the last but one are -1
    train_step, contexts = recipe('Several devices with uneven batches')['train_step'], [mx.cpu(0), mx.cpu(1)]
    net, trainer = linear_net(weight, contexts)
    train_step(net, trainer, nd.array(data), nd.array(label, dtype=label_dtype))
    expected = weight_after_a_step(weight, data, label)
    for context in contexts:
        assert_close(net.weight.data(context).asnumpy(), expected, tolerances.TRAINED)


def test_gradient_accumulation(tokens):
    data, label, weight = tokens
    train_step = recipe('Gradient accumulation')['train_step']
    net, trainer = linear_net(weight)
    batches = [(nd.array(data[part]), nd.array(label[part])) for part in (slice(2), slice(2, 4), slice(4, 5))]
    for _ in range(2):  # nothing of one step is in the next
        train_step(net, trainer, batches)
        weight = weight_after_a_step(weight, data, label)
        assert_close(net.weight.data().asnumpy(), weight, tolerances.TRAINED)


@label_dtypes
def test_two_labels_to_ignore(rng, label_dtype):
    loss_of = recipe('Two labels to ignore')['loss_of']
    label = np.array([[0, 1, 255, 4], [3, 2, 2, 1], [0, 255, 0, 0]])
    is_counted = (label != 0) & (label != 255)
    check_values_and_gradients(
        lambda pred: loss_of(pred, nd.array(label, dtype=label_dtype)),
        lambda pred: (nll_of(pred, label) * is_counted).sum(1) / np.maximum(1, is_counted.sum(1)),
        rng.normal(0, 2, (3, 4, 5)),
    )


def test_mean_loss_of_each_class(tokens):
    data, label, weight = tokens
    label[label == 5] = -1  # no label of the last class
    loss_of_classes = recipe('The mean loss of each class')['loss_of_classes']
    net, _ = linear_net(weight)
    batches = [(nd.array(data[part]), nd.array(label[part])) for part in (slice(2), slice(2, 5))]
    nll = nll_of(data @ weight.T, label)
    expected = [nll[label == index].mean() for index in range(5)]
    found = loss_of_classes(net, batches, 6)
    assert_close(found[:5], expected)
    assert np.isnan(found[5])


@pytest.mark.parametrize('samples', [5, 2])
def test_mean_over_the_tokens_of_all_workers_with_one_worker(tokens, samples):
    """tests/test_distributed.py and tests/horovod have several."""
    data, label, weight = tokens
    train_step = recipe('The mean over the tokens of all workers')['train_step']
    net, trainer = linear_net(weight)
    for part in (slice(0, samples), slice(3, 4)):  # the labels of sample 3 are all -1
        train_step(net, trainer, mx.kv.create('local'), nd.array(data[part]), nd.array(label[part]))
        weight = weight_after_a_step(weight, data[part], label[part])
        assert_close(net.weight.data().asnumpy(), weight, tolerances.TRAINED)


def language_model(is_tied, classes=7, units=3):
    """An embedding and a last layer, which share their weight or do not."""
    body = gluon.nn.HybridSequential()
    hidden = gluon.nn.Dense(units, in_units=units, flatten=False, activation='tanh')
    body.add(gluon.nn.Embedding(classes, units), hidden)
    shared = {'params': body[0].params} if is_tied else {}
    last = gluon.nn.Dense(classes, in_units=units, use_bias=not is_tied, **shared)
    mx.random.seed(0)
    for block in (body, last):
        block.initialize(mx.init.Normal(1))
    parameters = {**body.collect_params(), **last.collect_params()}
    return body, last, parameters, gluon.Trainer(parameters, 'sgd', {'learning_rate': 0.5})


@pytest.mark.parametrize('chunk', [1, 3, 20, 100])
@pytest.mark.parametrize('is_tied', [False, True], ids=['', 'tied'])
def test_large_vocabulary_trains_as_with_all_logits(tokens, chunk, is_tied):
    _, label, _ = tokens
    data = nd.array(np.abs(label))
    names = recipe('Large vocabulary without the N x C matrix')
    body, last, parameters, trainer = language_model(is_tied)
    _, _, expected, dense_trainer = dense = language_model(is_tied)
    for _ in range(2):  # nothing of one step is in the next
        with autograd.record():
            logits = dense[1](dense[0](data).reshape((-1, 3)))
            loss = names['loss_fn'](logits, nd.array(label.ravel()))
        loss.backward()
        count = (label != -1).sum()
        dense_trainer.step(count)
        mean = names['train_step'](body, last, trainer, data, nd.array(label), chunk)
        assert_close(mean.asscalar(), loss.sum().asscalar() / count)
        for found, right in zip(parameters.values(), expected.values()):
            assert_close(found.data().asnumpy(), right.data().asnumpy(), tolerances.TRAINED)


PEAK_MEMORY = """
import resource
import mxnet as mx
from mxnet import gluon
from recipes import recipe

body, last = gluon.nn.Dense(8, in_units=8, flatten=False), gluon.nn.Dense(20000, in_units=8)
for block in (body, last):
    block.initialize()
parameters = {**body.collect_params(), **last.collect_params()}
trainer = gluon.Trainer(parameters, 'sgd')
train_step = recipe('Large vocabulary without the N x C matrix')['train_step']
for tokens in (64, 2048):
    data, label = mx.nd.ones((1, tokens, 8)), mx.nd.ones((1, tokens))
    train_step(body, last, trainer, data, label, 64).wait_to_read()
    mx.nd.waitall()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_large_vocabulary_needs_less_memory_than_the_matrix_of_logits():
    path = os.pathsep.join([pages.ROOT, os.path.join(pages.ROOT, 'tests')])
    done = subprocess.run(
        [sys.executable, '-c', PEAK_MEMORY],
        env={**os.environ, 'PYTHONPATH': path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert after - before < 4 * 2048 * 20000 / 2


def test_large_vocabulary_with_only_padding_changes_nothing(tokens):
    body, last, parameters, trainer = language_model(True)
    train_step = recipe('Large vocabulary without the N x C matrix')['train_step']
    before = [parameter.data().asnumpy() for parameter in parameters.values()]
    assert train_step(body, last, trainer, nd.zeros((2, 3)), -nd.ones((2, 3))).asscalar() == 0
    for old, parameter in zip(before, parameters.values()):
        np.testing.assert_array_equal(parameter.data().asnumpy(), old)
