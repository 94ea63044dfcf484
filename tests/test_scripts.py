"""Training loops as people write them, run with gluon's loss and with ours: nothing but the loss's name differs, and nothing but rounding comes of it."""

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn, rnn
from sklearn.datasets import load_digits

from gluon_stable_ce import StableSoftmaxCrossEntropyLoss

STEPS = 50
# Gradients differ by no more than float32 rounding, a few 1e-7, which 50 steps at the learning rates below do not let grow beyond this.
CLOSE = {'rtol': 0, 'atol': 1e-5}

TEXT = """\
'Twas brillig, and the slithy toves
Did gyre and gimble in the wabe:
All mimsy were the borogoves,
And the mome raths outgrabe.
Beware the Jabberwock, my son!
The jaws that bite, the claws that catch!
Beware the Jubjub bird, and shun
The frumious Bandersnatch!
"""
PAD, BPTT = 0, 10
VOCABULARY = ['<pad>', *sorted(set(TEXT))]


def values(net):
    """All parameters in the order of the layers, NumPy."""
    return [value.data().asnumpy() for value in net.collect_params().values()]


def assert_same_training(ours, stock):
    """That two runs, each (parameters before, parameters after, losses), came to the same; and came somewhere."""
    assert len(ours[2]) == len(stock[2]) == STEPS
    for start, a, b in zip(stock[0], ours[1], stock[1]):
        np.testing.assert_allclose(a, b, **CLOSE)
        assert np.abs(b - start).max() > 1000 * CLOSE['atol']
    assert np.mean(stock[2][-5:]) < 0.9 * stock[2][0]
    np.testing.assert_allclose(
        ours[2], stock[2], rtol=0, atol=1e-5
    )  # oneDNN's log_softmax is off by 5e-6 at times, and gluon shows it


# Image classification


def train_on_digits(loss_fn, ctx):
    mx.random.seed(1)
    np.random.seed(1)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape((-1, 1, 8, 8)).astype('float32')
    train_data = gluon.data.DataLoader(
        gluon.data.ArrayDataset(images, labels.astype('float32')), batch_size=32, shuffle=True
    )

    net = nn.HybridSequential()
    net.add(
        nn.Conv2D(8, kernel_size=3, activation='relu', in_channels=1),
        nn.MaxPool2D(),
        nn.Flatten(),
        nn.Dense(10, in_units=72),
    )
    net.initialize(mx.init.Xavier(), ctx=ctx)
    net.hybridize()
    start = values(net)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})

    losses = []
    for _, (data, label) in zip(range(STEPS), train_data):
        data, label = data.as_in_context(ctx), label.as_in_context(ctx)
        with autograd.record():
            loss = loss_fn(net(data), label)
        loss.backward()
        trainer.step(data.shape[0])
        losses.append(loss.mean().asscalar())
    return start, values(net), losses


def test_image_classification(ctx):
    ours = train_on_digits(StableSoftmaxCrossEntropyLoss(), ctx)
    stock = train_on_digits(gluon.loss.SoftmaxCrossEntropyLoss(), ctx)
    assert_same_training(ours, stock)


# Language model


class CharModel(gluon.Block):
    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.embedding = nn.Embedding(len(VOCABULARY), 16)
            self.lstm = rnn.LSTM(24, layout='NTC', input_size=16)
            self.decoder = nn.Dense(len(VOCABULARY), flatten=False, in_units=24)

    def forward(self, chars, state):
        output, state = self.lstm(self.embedding(chars), state)
        return self.decoder(output), state


def train_language_model(loss_fn, rows, ctx):
    """Truncated backpropagation through time: states go on from segment to segment, gradients do not."""
    mx.random.seed(1)
    net = CharModel()
    net.initialize(mx.init.Xavier(), ctx=ctx)
    start = values(net)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1.0})
    rows = mx.nd.array(rows, ctx=ctx)

    losses = []
    while len(losses) < STEPS:
        state = net.lstm.begin_state(batch_size=rows.shape[0], ctx=ctx)
        for i in range(0, rows.shape[1] - 1, BPTT):
            if len(losses) == STEPS:
                break
            chars, following = rows[:, i : i + BPTT], rows[:, i + 1 : i + 1 + BPTT]
            chars = chars[:, : following.shape[1]]
            state = [part.detach() for part in state]
            with autograd.record():
                pred, state = net(chars, state)
                loss = loss_fn(pred, following)
            loss.backward()
            gluon.utils.clip_global_norm(
                [value.grad(ctx) for value in net.collect_params().values()], rows.shape[0]
            )
            trainer.step(rows.shape[0])
            losses.append(loss.mean().asscalar())
    return start, values(net), losses


def one_text():
    """The text as 6 rows of equal length, nothing padded."""
    chars = [VOCABULARY.index(char) for char in TEXT]
    return np.array(chars[: len(chars) // 6 * 6]).reshape(6, -1)


def one_line_a_row():
    """Rows padded to the longest line: the last segments of some of them are all padding."""
    lines = TEXT.splitlines(True)
    rows = np.full((len(lines), max(map(len, lines))), PAD)
    for row, line in zip(rows, lines):
        row[: len(line)] = [VOCABULARY.index(char) for char in line]
    return rows


def test_language_model(ctx):
    ours = train_language_model(StableSoftmaxCrossEntropyLoss(), one_text(), ctx)
    stock = train_language_model(gluon.loss.SoftmaxCrossEntropyLoss(), one_text(), ctx)
    assert_same_training(ours, stock)


def test_language_model_with_padding(ctx):
    """What ignore_label does in a word, gluon's loss does with a mask that takes each row's length out of the mean over time again."""
    stock_loss = gluon.loss.SoftmaxCrossEntropyLoss()

    def masked(pred, label):
        mask = label != PAD
        share = mask.mean(axis=1, keepdims=True)
        return stock_loss(
            pred, label, mx.nd.expand_dims(mask / mx.nd.maximum(share, 1 / label.shape[1]), axis=-1)
        )

    rows = one_line_a_row()
    assert (rows[:, 1 + BPTT * 3 :] == PAD).all(axis=1).any()
    ours = train_language_model(StableSoftmaxCrossEntropyLoss(ignore_label=PAD), rows, ctx)
    assert_same_training(ours, train_language_model(masked, rows, ctx))
    learns_padding = train_language_model(stock_loss, rows, ctx)
    assert max(np.abs(a - b).max() for a, b in zip(ours[1], learns_padding[1])) > 0.1
