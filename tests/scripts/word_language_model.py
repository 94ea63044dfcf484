# ruff: noqa: SIM905, UP008, UP031
"""Train a word language model on a made text, with truncated backpropagation through time."""

import argparse
import math

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn, rnn

parser = argparse.ArgumentParser(description='Word language model on a made text.')
parser.add_argument('--epochs', type=int, default=6)
parser.add_argument('--lr', type=float, default=1.0)
parser.add_argument('--clip', type=float, default=0.25)
parser.add_argument('--bptt', type=int, default=12)
parser.add_argument('--batch-size', type=int, default=8)
args = parser.parse_args()

SUBJECTS = 'the old man|a young girl|my neighbour|the grey cat|every child|the baker'.split('|')
VERBS = 'sees|likes|never finds|often calls|waits for|sings to'.split('|')
OBJECTS = 'the moon|an apple|the river|some friends|the long road|nobody'.split('|')


def make_text(sentences):
    rng = np.random.RandomState(11)
    words = []
    for _ in range(sentences):
        subject = rng.randint(len(SUBJECTS))
        verb = (subject + rng.randint(2)) % len(VERBS)
        words += f'{SUBJECTS[subject]} {VERBS[verb]} {OBJECTS[rng.randint(len(OBJECTS))]} <eos>'.split()
    return words


class RNNModel(gluon.Block):
    def __init__(self, vocab_size, embed_size, hidden_size, **kwargs):
        super(RNNModel, self).__init__(**kwargs)
        with self.name_scope():
            self.encoder = nn.Embedding(vocab_size, embed_size)
            self.rnn = rnn.LSTM(hidden_size, input_size=embed_size)
            self.decoder = nn.Dense(vocab_size, in_units=hidden_size)
        self.hidden_size = hidden_size

    def forward(self, inputs, hidden):
        output, hidden = self.rnn(self.encoder(inputs), hidden)
        return self.decoder(output.reshape((-1, self.hidden_size))), hidden


def batchify(data, batch_size):
    nbatch = data.shape[0] // batch_size
    return data[: nbatch * batch_size].reshape((batch_size, nbatch)).T


def get_batch(source, i):
    seq_len = min(args.bptt, source.shape[0] - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].reshape((-1,))


def detach(hidden):
    return [h.detach() for h in hidden]


mx.random.seed(7)
words = make_text(300)
vocabulary = sorted(set(words))
ids = mx.nd.array([vocabulary.index(word) for word in words])
split = ids.shape[0] * 4 // 5
train_data, val_data = batchify(ids[:split], args.batch_size), batchify(ids[split:], args.batch_size)

model = RNNModel(len(vocabulary), 24, 32)
model.initialize(mx.init.Xavier())
trainer = gluon.Trainer(model.collect_params(), 'sgd', {'learning_rate': args.lr, 'momentum': 0, 'wd': 0})
loss = gluon.loss.SoftmaxCrossEntropyLoss()


def evaluate(data_source):
    total, count = 0.0, 0
    metric = mx.metric.Perplexity(None)
    hidden = model.rnn.begin_state(batch_size=args.batch_size)
    for i in range(0, data_source.shape[0] - 1, args.bptt):
        data, target = get_batch(data_source, i)
        output, hidden = model(data, hidden)
        L = loss(output, target)
        total += mx.nd.sum(L).asscalar()
        count += L.size
        metric.update([target], [mx.nd.softmax(output)])
    return total / count, metric.get()[1]


for epoch in range(args.epochs):
    total, count = 0.0, 0
    hidden = model.rnn.begin_state(func=mx.nd.zeros, batch_size=args.batch_size)
    for i in range(0, train_data.shape[0] - 1, args.bptt):
        data, target = get_batch(train_data, i)
        hidden = detach(hidden)
        with autograd.record():
            output, hidden = model(data, hidden)
            L = loss(output, target)
            L.backward()
        grads = [p.grad() for p in model.collect_params().values()]
        gluon.utils.clip_global_norm(grads, args.clip * args.bptt * args.batch_size)
        trainer.step(args.bptt * args.batch_size)
        total += mx.nd.sum(L).asscalar()
        count += L.size
    print('epoch %d train loss %.8f' % (epoch, total / count))
    val_loss, val_perplexity = evaluate(val_data)
    print('epoch %d val loss %.8f' % (epoch, val_loss))
    print('epoch %d exp of val loss %.8f' % (epoch, math.exp(val_loss)))
    print('epoch %d val perplexity %.8f' % (epoch, val_perplexity))
print('norm of decoder weight %.8f' % model.decoder.weight.data().norm().asscalar())
