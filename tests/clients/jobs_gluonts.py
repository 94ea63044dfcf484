"""WaveNet, the model of gluonts that uses gluon's loss, and its Trainer with MXNet's metric, on made series."""

import numpy as np
import runner
from gluonts.dataset.common import ListDataset
from gluonts.mx import SimpleFeedForwardEstimator
from gluonts.mx.model.wavenet import WaveNetEstimator
from gluonts.mx.model.wavenet._network import WaveNet
from gluonts.mx.trainer import Trainer
from gluonts.mx.trainer.callback import TrainingHistory
from mxnet import gluon


def dataset(missing=0.0):
    time = np.arange(200)
    series = []
    for k in range(4):
        target = 5 + np.sin(time / 3 + k) + np.random.normal(0, 0.1, 200)
        target[np.random.uniform(size=200) < missing] = np.nan
        series.append({'start': '2020-01-01', 'target': target.astype('float32')})
    return ListDataset(series, freq='D')


def train_wavenet(hybridize, missing):
    history = TrainingHistory()
    trainer = Trainer(epochs=3, num_batches_per_epoch=5, hybridize=hybridize, callbacks=[history])
    options = {'num_bins': 32, 'n_residue': 8, 'n_skip': 8, 'dilation_depth': 3, 'batch_size': 8}
    estimator = WaveNetEstimator(freq='D', prediction_length=6, trainer=trainer, **options)
    output = estimator.train_model(dataset(missing))
    return {'losses': history.loss_history, 'net': output.trained_net}


def wavenet():
    """As gluonts has it: weights of shape (batch, 1, 1, time) for logits of shape (batch, time, classes)."""
    return train_wavenet(hybridize=False, missing=0)


def wavenet_hybridized():
    return train_wavenet(hybridize=True, missing=0)


class LossOfEachPosition(gluon.loss.SoftmaxCrossEntropyLoss):
    """Brings the weights to the shape that gluon's loss documents, (batch, time, 1)."""

    def hybrid_forward(self, F, pred, label, weight):
        return super().hybrid_forward(F, pred, label, F.expand_dims(F.reshape(weight, (0, -1)), axis=-1))


def with_weights_of_positions(hybridize):
    made = WaveNet.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.cross_entropy_loss = LossOfEachPosition()

    WaveNet.__init__ = init
    try:
        return train_wavenet(hybridize, missing=0.1)
    finally:
        WaveNet.__init__ = made


def wavenet_with_weights_of_positions():
    return with_weights_of_positions(hybridize=False)


def wavenet_with_weights_of_positions_hybridized():
    return with_weights_of_positions(hybridize=True)


def feed_forward():
    """The losses of gluonts itself. The Trainer adds them up in an mx.metric.Loss, and stops by its value."""
    history = TrainingHistory()
    trainer = Trainer(epochs=3, num_batches_per_epoch=5, callbacks=[history])
    options = {'num_hidden_dimensions': [8], 'context_length': 12, 'batch_size': 8}
    estimator = SimpleFeedForwardEstimator(prediction_length=6, trainer=trainer, **options)
    output = estimator.train_model(dataset(), validation_data=dataset())
    losses = history.loss_history, history.validation_loss_history
    return {'training': losses[0], 'validation': losses[1], 'net': output.trained_net}


runner.main(
    wavenet,
    wavenet_hybridized,
    wavenet_with_weights_of_positions,
    wavenet_with_weights_of_positions_hybridized,
    feed_forward,
)
