# ruff: noqa: UP031
"""Train a language model with Module.fit and buckets of sentences, once with SoftmaxOutput and once with a gluon loss."""

import logging

import mxnet as mx
import numpy as np
from mxnet import gluon

logging.getLogger().setLevel(logging.ERROR)

PAD = 0
BUCKETS = [6, 10]
BATCH_SIZE = 16
HIDDEN = 24


def make_sentences(count, seed):
    """Sentences of numbers that count up in steps of one or two."""
    rng = np.random.RandomState(seed)
    sentences = []
    for _ in range(count):
        start, step, length = rng.randint(1, 15), rng.randint(1, 3), rng.randint(4, 11)
        sentences.append([1 + (start + i * step) % 15 for i in range(length)])
    return sentences


VOCABULARY = 16


def logits_of(seq_len):
    data = mx.sym.Variable('data')
    embed = mx.sym.Embedding(data, input_dim=VOCABULARY, output_dim=12, name='embed')
    cell = mx.rnn.LSTMCell(num_hidden=HIDDEN, prefix='lstm_')
    outputs, _ = cell.unroll(seq_len, inputs=embed, merge_outputs=True)
    pred = mx.sym.Reshape(outputs, shape=(-1, HIDDEN))
    return mx.sym.FullyConnected(pred, num_hidden=VOCABULARY, name='pred')


def softmax_output(seq_len):
    label = mx.sym.Reshape(mx.sym.Variable('softmax_label'), shape=(-1,))
    pred = mx.sym.SoftmaxOutput(
        logits_of(seq_len), label, name='softmax', use_ignore=True, ignore_label=PAD, normalization='valid'
    )
    return pred, ('data',), ('softmax_label',)


loss_fn = gluon.loss.SoftmaxCrossEntropyLoss()


def gluon_loss(seq_len):
    label = mx.sym.Reshape(mx.sym.Variable('softmax_label'), shape=(-1,))
    logits = logits_of(seq_len)
    loss = mx.sym.MakeLoss(loss_fn(logits, label), normalization='batch', name='loss')
    return (
        mx.sym.Group([loss, mx.sym.BlockGrad(mx.sym.softmax(logits), name='probs')]),
        ('data',),
        ('softmax_label',),
    )


def iterator(seed):
    np.random.seed(seed)
    import random

    random.seed(seed)
    return mx.rnn.BucketSentenceIter(
        make_sentences(200, seed), BATCH_SIZE, buckets=BUCKETS, invalid_label=PAD
    )


def train(sym_gen, metrics):
    mx.random.seed(9)
    train_data, val_data = iterator(1), iterator(2)
    module = mx.mod.BucketingModule(
        sym_gen, default_bucket_key=train_data.default_bucket_key, context=mx.cpu()
    )
    module.fit(
        train_data=train_data,
        eval_data=val_data,
        eval_metric=metrics,
        optimizer='adam',
        optimizer_params={'learning_rate': 0.01},
        initializer=mx.init.Xavier(factor_type='in', magnitude=2.34),
        num_epoch=4,
    )
    return module.score(val_data, metrics)


for name, value in train(softmax_output, mx.metric.Perplexity(PAD)):
    print('SoftmaxOutput %s %.8f' % (name, value))

metrics = mx.metric.CompositeEvalMetric()
metrics.add(mx.metric.Loss(output_names=['loss_output'], label_names=[]))
metrics.add(mx.metric.Perplexity(None, output_names=['probs_output'], label_names=['softmax_label']))
for name, value in train(gluon_loss, metrics):
    print('gluon loss %s %.8f' % (name, value))
