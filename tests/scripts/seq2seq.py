# ruff: noqa: UP008, UP031
"""Train an encoder and decoder with masks: they learn to write a sequence of digits backwards."""

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn, rnn

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 13
NUM_STEPS = 9


def make_data(count, seed):
    rng = np.random.RandomState(seed)
    source = np.full((count, NUM_STEPS), PAD, 'float32')
    target = np.full((count, NUM_STEPS), PAD, 'float32')
    valid = rng.randint(3, NUM_STEPS, count)
    for s, t, length in zip(source, target, valid):
        digits = rng.randint(3, VOCABULARY, length)
        s[:length], s[length] = digits, EOS
        t[:length], t[length] = digits[::-1], EOS
    return gluon.data.ArrayDataset(
        source, (valid + 1).astype('float32'), target, (valid + 1).astype('float32')
    )


class Encoder(gluon.Block):
    def __init__(self, **kwargs):
        super(Encoder, self).__init__(**kwargs)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.rnn = rnn.GRU(32)

    def forward(self, source, valid_len):
        embedded = self.embedding(source).swapaxes(0, 1)
        _, state = self.rnn(embedded, self.rnn.begin_state(batch_size=embedded.shape[1]))
        return state


class Decoder(gluon.Block):
    def __init__(self, **kwargs):
        super(Decoder, self).__init__(**kwargs)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.rnn = rnn.GRU(32)
        self.dense = nn.Dense(VOCABULARY, flatten=False)

    def forward(self, target, state):
        embedded = self.embedding(target).swapaxes(0, 1)
        context = mx.nd.broadcast_axis(state[0][-1].expand_dims(0), axis=0, size=embedded.shape[0])
        output, state = self.rnn(mx.nd.concat(embedded, context, dim=2), state)
        return self.dense(output).swapaxes(0, 1), state


class MaskedSoftmaxCELoss(gluon.loss.SoftmaxCELoss):
    """The softmax cross entropy loss with masks, whose forward takes lengths."""

    def forward(self, pred, label, valid_len):
        weights = mx.nd.ones_like(label).expand_dims(axis=-1)
        weights = mx.nd.SequenceMask(weights, valid_len, True, axis=1)
        return super(MaskedSoftmaxCELoss, self).forward(pred, label, weights)


class NormalisedMaskedLoss(gluon.loss.SoftmaxCrossEntropyLoss):
    """The same in a hybrid_forward, divided by the lengths."""

    def __init__(self, axis=-1, **kwargs):
        super(NormalisedMaskedLoss, self).__init__(axis, True, False, None, 0, **kwargs)

    def hybrid_forward(self, F, pred, label, valid_len):
        weights = F.expand_dims(F.ones_like(label), axis=-1)
        weights = F.SequenceMask(weights, sequence_length=valid_len, use_sequence_length=True, axis=1)
        loss = super(NormalisedMaskedLoss, self).hybrid_forward(F, pred, label, weights)
        return loss * NUM_STEPS / valid_len


def grad_clipping(params, theta):
    norm = sum((p.grad() ** 2).sum() for p in params).sqrt().asscalar()
    if norm > theta:
        for p in params:
            p.grad()[:] *= theta / norm


mx.random.seed(4)
np.random.seed(4)
train_data = gluon.data.DataLoader(make_data(256, seed=0), batch_size=32, shuffle=True)
val_data = gluon.data.DataLoader(make_data(64, seed=1), batch_size=32)

encoder, decoder = Encoder(prefix='encoder_'), Decoder(prefix='decoder_')
params = gluon.ParameterDict()
for block in (encoder, decoder):
    block.initialize(mx.init.Xavier())
    params.update(block.collect_params())
trainer = gluon.Trainer(params, 'adam', {'learning_rate': 0.005})
loss = MaskedSoftmaxCELoss()
normalised = NormalisedMaskedLoss()
normalised.hybridize()
assert isinstance(loss, gluon.loss.SoftmaxCrossEntropyLoss)


def forward(source, source_len, target):
    bos = mx.nd.full((target.shape[0], 1), BOS)
    decoder_input = mx.nd.concat(bos, target[:, :-1], dim=1)  # teacher forcing
    return decoder(decoder_input, encoder(source, source_len))[0]


perplexity = mx.metric.Perplexity(PAD)
val_loss = mx.metric.Loss('masked loss')
for epoch in range(8):
    total, tokens = 0.0, 0.0
    for source, source_len, target, target_len in train_data:
        with autograd.record():
            L = loss(forward(source, source_len, target), target, target_len)
        L.backward()
        grad_clipping([p for p in params.values() if p.grad_req != 'null'], 1)
        trainer.step(target_len.sum().asscalar())
        total += (L.sum() * NUM_STEPS).asscalar()
        tokens += target_len.sum().asscalar()
    print('epoch %d loss per token %.8f' % (epoch, total / tokens))
    perplexity.reset()
    val_loss.reset()
    for source, source_len, target, target_len in val_data:
        logits = forward(source, source_len, target)
        perplexity.update(target, mx.nd.softmax(logits))
        val_loss.update(None, [normalised(logits, target, target_len)])
    for metric in (perplexity, val_loss):
        print('epoch %d val %s %.8f' % (epoch, *metric.get()))
