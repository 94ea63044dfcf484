"""The masked loss, label smoothing, language models and translation model of gluonnlp, on made data."""

import gluonnlp as nlp
import mxnet as mx
import numpy as np
import runner
from gluonnlp.loss import (
    ActivationRegularizationLoss,
    LabelSmoothing,
    MaskedSoftmaxCELoss,
    TemporalActivationRegularizationLoss,
)
from gluonnlp.model.transformer import get_transformer_encoder_decoder
from gluonnlp.model.translation import NMTModel
from mxnet import autograd, gluon


def batch():
    pred = mx.nd.random.normal(0, 2, (3, 5, 7))
    return pred, mx.nd.array(np.random.randint(0, 7, (3, 5))), mx.nd.array([5, 2, 1])


def masked_loss():
    results = {}
    pred, label, lengths = batch()
    for hybridize in (False, True):
        loss_fn = MaskedSoftmaxCELoss(weight=0.5)
        loss_fn.hybridize(hybridize)
        results[f'loss {hybridize}'], results[f'gradient {hybridize}'] = runner.with_gradient(
            loss_fn, pred, label, lengths
        )
    return results


def masked_loss_of_log_probabilities():
    pred, label, lengths = batch()
    loss, gradient = runner.with_gradient(
        MaskedSoftmaxCELoss(from_logits=True), mx.nd.log_softmax(pred), label, lengths
    )
    return {'loss': loss, 'gradient': gradient}


def masked_loss_with_label_smoothing():
    """As gluonnlp's script for the transformer has it: dense labels, and weights of pred's shape."""
    results = {}
    pred, label, lengths = batch()
    for hybridize in (False, True):
        smooth, loss_fn = LabelSmoothing(epsilon=0.1, units=7), MaskedSoftmaxCELoss(sparse_label=False)
        for block in (smooth, loss_fn):
            block.hybridize(hybridize)
        loss, gradient = runner.with_gradient(loss_fn, pred, smooth(label), lengths)
        results.update({f'loss {hybridize}': loss, f'gradient {hybridize}': gradient})
    return results


def language_model():
    """AWDRNN with the activation regularizers, as gluonnlp's script trains it."""
    mx.random.seed(2)
    net = nlp.model.train.AWDRNN('lstm', 20, 8, 12, 2, False, 0.1, 0.1, 0.1, 0.1, 0.1)
    net.initialize(mx.init.Xavier())
    net.hybridize()
    loss_fn = gluon.loss.SoftmaxCrossEntropyLoss()
    ar_loss, tar_loss = ActivationRegularizationLoss(2), TemporalActivationRegularizationLoss(1)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1})
    text = mx.nd.array((np.arange(4 * 121).reshape(4, 121).T * 7 + np.random.randint(0, 2, (121, 4))) % 20)
    hidden, losses = net.begin_state(batch_size=4), []
    for i in range(0, 120, 12):
        hidden = [[state.detach() for state in layer] for layer in hidden]
        with autograd.record():
            output, hidden, encoded_raw, encoded_dropped = net(text[i : i + 12], hidden)
            loss = loss_fn(output.reshape(-3, -1), text[i + 1 : i + 13].reshape(-1))
            total = loss.mean() + ar_loss(*encoded_dropped) + tar_loss(*encoded_raw)
        total.backward()
        gluon.utils.clip_global_norm([p.grad() for p in net.collect_params().values()], 0.25)
        trainer.step(1)
        losses.append(total.asscalar())
    return {'losses': losses, 'net': net}


def sampled_softmax():
    """Importance sampled Dense block: pred and the new labels go into the loss."""
    decoder = nlp.model.ISDense(30, 8, 6)
    decoder.initialize(mx.init.Normal(0.5))
    decoder.hybridize()
    x, label = mx.nd.random.normal(0, 1, (10, 6)), mx.nd.arange(10)
    samples = [mx.nd.arange(5, 13), mx.nd.full((8,), 0.3), mx.nd.full((10,), 0.2)]
    loss_fn = gluon.loss.SoftmaxCrossEntropyLoss()
    x.attach_grad()
    with autograd.record():
        loss = loss_fn(*decoder(x, samples, label))
    loss.backward()
    return {'loss': loss, 'gradient': x.grad}


def masked_words_of_bert():
    """Masked words and the next sentence, as gluonnlp's script for pretraining has them."""
    encoder = nlp.model.BERTEncoder(num_layers=1, units=16, hidden_size=32, max_length=10, num_heads=2)
    net = nlp.model.BERTModel(encoder, vocab_size=30, token_type_vocab_size=2, units=16, embed_size=16)
    net.initialize(mx.init.Normal(0.1))
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.01})
    nsp_loss, mlm_loss = gluon.loss.SoftmaxCELoss(), gluon.loss.SoftmaxCELoss()
    nsp_loss.hybridize(static_alloc=True)
    mlm_loss.hybridize(static_alloc=True)
    words, types = mx.nd.array(np.random.randint(0, 30, (4, 10))), mx.nd.zeros((4, 10))
    lengths, positions = mx.nd.array([10, 8, 6, 10]), mx.nd.array(np.random.randint(0, 6, (4, 3)))
    masked, weight = (
        mx.nd.array(np.random.randint(0, 30, (4, 3))),
        mx.nd.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),
    )
    follows, losses = mx.nd.array([0, 1, 1, 0]), []
    for _ in range(8):
        with autograd.record():
            *_, classified, decoded = net(words, types, lengths, positions)
            decoded = decoded.reshape((-1, 30))
            loss1 = mlm_loss(decoded, masked.reshape((-1,)), weight.reshape((-1, 1))).sum() / (
                weight.sum() + 1e-8
            )
            loss2 = nsp_loss(classified, follows).mean()
            loss = loss1 + loss2
        loss.backward()
        trainer.step(1)
        losses += [loss1.asscalar(), loss2.asscalar()]
    return {'losses': losses, 'net': net}


def translation():
    """A small transformer, with dense smoothed labels and the masked loss."""
    vocab = nlp.Vocab(nlp.data.count_tokens([str(i) for i in range(10)]))
    options = {'num_layers': 1, 'num_heads': 2, 'units': 16, 'hidden_size': 32}
    encoder, decoder, one_step = get_transformer_encoder_decoder(**options)
    net = NMTModel(
        vocab, vocab, encoder, decoder, one_step, share_embed=True, embed_size=16, tie_weights=True
    )
    net.initialize(mx.init.Xavier(magnitude=1))
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.003})
    smooth, loss_fn = LabelSmoothing(epsilon=0.1, units=len(vocab)), MaskedSoftmaxCELoss(sparse_label=False)
    plain = MaskedSoftmaxCELoss()
    source = mx.nd.array(np.random.randint(4, len(vocab), (8, 6)))
    target, lengths, losses = source[:, ::-1], mx.nd.array([6, 5, 4, 6, 3, 6, 2, 6]), []
    for _ in range(8):
        with autograd.record():
            output, _ = net(source, target[:, :-1], lengths, lengths - 1)
            loss = loss_fn(output, smooth(target[:, 1:]), lengths - 1)
            loss = loss * (target.shape[1] - 1) / (lengths - 1)
        loss.backward()
        trainer.step(8)
        losses += [loss.mean().asscalar(), plain(output, target[:, 1:], lengths - 1).mean().asscalar()]
    return {'losses': losses, 'net': net}


runner.main(
    masked_loss,
    masked_loss_of_log_probabilities,
    masked_loss_with_label_smoothing,
    language_model,
    sampled_softmax,
    masked_words_of_bert,
    translation,
)
