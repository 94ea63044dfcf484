"""Sockeye 2's model, losses and metrics on made sentences, and the same model with gluon's loss and a mask."""

import mxnet as mx
import numpy as np
import runner
from mxnet import autograd, gluon
from sockeye import constants as C
from sockeye import loss as sockeye_loss
from sockeye.data_io import DataConfig
from sockeye.encoder import EmbeddingConfig
from sockeye.model import ModelConfig, SockeyeModel
from sockeye.parallel import Parallel
from sockeye.training import ParallelModel
from sockeye.transformer import TransformerConfig

VOCABULARY, LENGTH = 12, 7


def make_model():
    transformer = TransformerConfig(
        model_size=16,
        attention_heads=2,
        feed_forward_num_hidden=32,
        act_type='relu',
        num_layers=1,
        dropout_attention=0,
        dropout_act=0,
        dropout_prepost=0,
        positional_embedding_type='fixed',
        preprocess_sequence='n',
        postprocess_sequence='dr',
        max_seq_len_source=LENGTH,
        max_seq_len_target=LENGTH,
    )
    embedding = EmbeddingConfig(vocab_size=VOCABULARY, num_embed=16, dropout=0)
    data = DataConfig(None, LENGTH, LENGTH, 1, 1)
    config = ModelConfig(data, VOCABULARY, VOCABULARY, embedding, embedding, transformer, transformer)
    model = SockeyeModel(config)
    model.initialize(mx.init.Xavier(magnitude=1))
    model.hybridize()
    return model


def batch():
    lengths = np.random.randint(2, LENGTH, 16)
    source = np.random.randint(4, VOCABULARY, (16, LENGTH)) * (np.arange(LENGTH) < lengths[:, None])
    target = np.where(np.arange(LENGTH) == lengths[:, None], C.EOS_ID, source)
    inputs = np.concatenate([np.full((16, 1), C.BOS_ID), source[:, :-1]], axis=1)
    arrays = source[:, :, None], lengths, inputs[:, :, None], lengths + 1
    return [mx.nd.array(array) for array in arrays], mx.nd.array(target)


def train(loss_fn):
    """By sockeye's own ParallelModel. sockeye's metric is updated as sockeye's trainer does it."""
    model, losses = make_model(), []
    trainer = gluon.Trainer(model.collect_params(), 'adam', {'learning_rate': 0.01})
    parallel = Parallel(0, ParallelModel(model, [loss_fn], trainer))
    for _ in range(10):
        inputs, target = batch()
        parallel.put((inputs, {C.TARGET_LABEL_NAME: target}))
        ((value, count),) = parallel.get()
        trainer.step(1)
        loss_fn.metric.update(value.asscalar(), count.asscalar())
        losses.append(value.asscalar())
    return {'losses': losses, 'perplexity': loss_fn.metric.get(), 'model': model}


class MaskedLoss(sockeye_loss.Loss):
    """Sockeye's interface around gluon's loss."""

    def __init__(self):
        super().__init__(C.CROSS_ENTROPY, C.LOGITS_NAME, C.TARGET_LABEL_NAME)
        self.loss = gluon.loss.SoftmaxCELoss()

    def hybrid_forward(self, F, logits, labels):
        mask = labels != C.PAD_ID
        loss = self.loss(logits, labels, F.expand_dims(mask, axis=-1))
        return F.sum(loss) * LENGTH / F.sum(mask), F.ones((1,))

    def create_metric(self):
        return sockeye_loss.PerplexityMetric()


def with_gluons_loss():
    loss_fn = MaskedLoss()
    loss_fn.hybridize()
    results = train(loss_fn)
    plain = train(sockeye_loss.CrossEntropyLossWithoutSoftmaxOutput())
    results.update({f'{name} of sockeye': value for name, value in plain.items()})
    return results


def perplexity_metric():
    """mx.metric.Perplexity of padded sentences beside sockeye's."""
    model, metric = make_model(), mx.metric.Perplexity(C.PAD_ID)
    own = sockeye_loss.CrossEntropyLoss()
    for _ in range(3):
        inputs, target = batch()
        with autograd.pause():
            outputs = model(*inputs)
            value, count = own(outputs, {C.TARGET_LABEL_NAME: target})
        own.metric.update(value.asscalar(), count.asscalar())
        metric.update([target], [mx.nd.softmax(outputs[C.LOGITS_NAME]).reshape((-1, VOCABULARY))])
    return {'mxnet': metric.get()[1], 'sockeye': own.metric.get()}


runner.main(with_gluons_loss, perplexity_metric)
