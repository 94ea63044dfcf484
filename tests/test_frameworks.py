"""Loss and metrics inside MXNet's own training loops: Estimator, Module, their callbacks and checkpoints; DataLoader."""

import contextlib
import logging
import math
import os
import re

import modes
import mxnet as mx
import numpy as np
import pytest
import reference
import tolerances
from mxnet import gluon
from mxnet.gluon.contrib import estimator
from tolerances import NLL, assert_close

from gluon_stable_ce import StableCrossEntropy, StableLoss, StablePerplexity, StableSoftmaxCELoss

HERE = os.path.dirname(os.path.abspath(__file__))
CLASSES, SAMPLES, BATCH = 3, 40, 8


def blobs(seed, shift=0):
    """Points around three corners, and which corner, NumPy."""
    rng = np.random.RandomState(seed)
    label = rng.randint(0, CLASSES, SAMPLES)
    return (2 * np.eye(CLASSES)[label] + rng.normal(0, 1, (SAMPLES, CLASSES))).astype('float32'), (
        (label + shift) % CLASSES
    ).astype('float32')


def mean_nll(pred, label):
    """Of logits, in float64."""
    return reference.loss_and_gradient(pred, label, reduction='none')[0].mean()


def mean_nll_of_probs(probs, label):
    return -np.log(probs.astype('float64')[np.arange(len(label)), label.astype(int)]).mean()


# Estimator


class Recorder(estimator.BatchEnd, estimator.EpochBegin):
    """Keep what the training batches of the last epoch were and gave, NumPy."""

    def epoch_begin(self, *args, **kwargs):
        self.labels, self.preds, self.losses = [], [], []

    def batch_end(self, *args, label, pred, loss, **kwargs):
        for kept, parts in ((self.labels, label), (self.preds, pred), (self.losses, loss)):
            kept.extend(part.asnumpy() for part in parts)


class ValuesPerEpoch(estimator.EpochEnd):
    """Keep what `metric` says at the end of each epoch."""

    def __init__(self, metric):
        self.watched, self.values = [metric], []

    def epoch_end(self, *args, **kwargs):
        self.values.append(self.watched[0].get()[1])


def loader(data, label, array):
    return gluon.data.DataLoader(gluon.data.ArrayDataset(array(data), array(label)), BATCH)


def make_estimator(context, loss_fn, **metrics):
    mx.random.seed(0)
    net = gluon.nn.Dense(CLASSES, in_units=CLASSES)
    net.initialize(mx.init.Normal(0.1), ctx=context)
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    return estimator.Estimator(net=net, loss=loss_fn, trainer=trainer, context=context, **metrics)


@pytest.mark.parametrize('np_mode', [False, True], ids=['nd', 'np'])
@pytest.mark.parametrize('devices', [1, 2])
def test_estimator_with_train_validation_and_loss_metrics(np_mode, devices, ctx):
    context = [ctx] if devices == 1 else [mx.cpu(0), mx.cpu(1)]
    train, test = blobs(0), blobs(1)
    options = {'class_weight': [1, 2, 0.5], 'label_smoothing': 0.1}
    logits_metrics = StableCrossEntropy(pred_type='logits'), StablePerplexity(pred_type='logits')
    with modes.numpy_semantics() if np_mode else contextlib.nullcontext():
        array, recorder = mx.np.array if np_mode else mx.nd.array, Recorder()
        job = make_estimator(
            context, StableSoftmaxCELoss(**options), train_metrics=[*logits_metrics, StableLoss()]
        )
        job.fit(loader(*train, array), loader(*test, array), epochs=2, event_handlers=[recorder])
        logits = job.net(array(test[0]).as_in_context(context[0])).asnumpy()
    recorded = np.concatenate(recorder.preds), np.concatenate(recorder.labels)
    assert_values('training', job.train_metrics, *recorded, np.concatenate(recorder.losses))
    losses = reference.loss_and_gradient(logits, test[1], **options)[0]
    assert_values('validation', job.val_metrics, logits, test[1], losses)


def assert_values(kind, metrics, pred, label, losses):
    """The three metrics of an estimator have these predictions, labels and losses."""
    expected = mean_nll(pred, label)
    values = {'cross-entropy': expected, 'perplexity': math.exp(expected), 'loss': losses.mean()}
    assert [metric.get() for metric in metrics] == [
        (f'{kind} {name}', NLL.approx(value)) for name, value in values.items()
    ]


def test_estimator_takes_our_loss_for_gluons(ctx):
    """It chooses accuracy and a metric of the loss by itself."""
    job = make_estimator([ctx], StableSoftmaxCELoss())
    job.fit(loader(*blobs(0), mx.nd.array), epochs=1)
    accuracy, loss = job.train_metrics
    assert type(accuracy) is mx.metric.Accuracy
    assert loss.name == 'training stablesoftmaxcrossentropyloss'
    assert 0 < loss.get()[1] < 5


def test_estimator_checkpoints_and_stops_by_our_metric(ctx, tmp_path):
    """Validation labels are all wrong, so the first epoch is the best, and the second one the last but for our patience of 2."""
    metric = StableCrossEntropy(pred_type='logits')
    job = make_estimator(
        [ctx],
        StableSoftmaxCELoss(),
        train_metrics=[StableCrossEntropy(pred_type='logits')],
        val_metrics=[metric],
    )
    watch = ValuesPerEpoch(metric)
    stop = estimator.EarlyStoppingHandler(metric, patience=2, mode='min')
    data, label = blobs(1, shift=1)
    job.fit(
        loader(*blobs(0), mx.nd.array),
        loader(data, label, mx.nd.array),
        epochs=9,
        event_handlers=[
            estimator.CheckpointHandler(str(tmp_path), monitor=metric, save_best=True, mode='min'),
            stop,
            watch,
        ],
    )
    assert stop.stopped_epoch == 2
    assert watch.values == sorted(watch.values)
    assert len(watch.values) == 3
    for name, value in (('model-best', watch.values[0]), ('model-epoch2batch15', watch.values[2])):
        net = gluon.nn.Dense(CLASSES, in_units=CLASSES)
        net.load_parameters(str(tmp_path / f'{name}.params'), ctx=ctx)
        assert value == NLL.approx(mean_nll(net(mx.nd.array(data)).asnumpy(), label))


# Module


class Kept(mx.metric.EvalMetric):
    """What a Module gives to metrics since the last reset_local, NumPy."""

    def __init__(self, **kwargs):
        super().__init__('keepdims', **kwargs)

    def reset(self):
        self.all, self.window = [], []

    def reset_local(self):
        self.window = []

    def update(self, labels, preds):
        self.all.append((labels[0].asnumpy(), preds[0].asnumpy()))
        self.window.append(self.all[-1])

    def get(self):
        return self.name, self.nll(self.window)

    def get_global(self):
        return self.name, self.nll(self.all)

    @staticmethod
    def nll(batches):
        return mean_nll_of_probs(
            np.concatenate([probs for _, probs in batches]), np.concatenate([label for label, _ in batches])
        )


def logits_symbol():
    return mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=CLASSES, name='fc')


def softmax_module(ctx):
    return mx.mod.Module(mx.sym.SoftmaxOutput(logits_symbol(), name='softmax'), context=ctx)


def our_module(ctx):
    """Our loss, called on symbols, next to probabilities for the metrics."""
    logits = logits_symbol()
    loss = mx.sym.MakeLoss(StableSoftmaxCELoss()(logits, mx.sym.var('softmax_label')), name='loss')
    return mx.mod.Module(
        mx.sym.Group([loss, mx.sym.BlockGrad(mx.sym.softmax(logits), name='probs')]), context=ctx
    )


def iterate(seed=0):
    data, label = blobs(seed)
    return mx.io.NDArrayIter(data, label, BATCH)


def initial():
    rng = np.random.RandomState(7)
    return {'fc_weight': mx.nd.array(rng.normal(0, 0.1, (CLASSES, CLASSES))), 'fc_bias': mx.nd.zeros(CLASSES)}


def fit(module, metric, **kwargs):
    module.fit(
        iterate(0),
        iterate(1),
        eval_metric=metric,
        num_epoch=2,
        arg_params=initial(),
        optimizer_params={'learning_rate': 0.5},
        **kwargs,
    )
    return {name: value.asnumpy() for name, value in module.get_params()[0].items()}


def test_module_score_by_name_has_no_floor(ctx):
    """The first sample has a probability of 4e-31, which stock reports as 27.6 nats."""
    module = softmax_module(ctx)
    module.bind([('data', (2, CLASSES))], [('softmax_label', (2,))])
    module.set_params({'fc_weight': mx.nd.array(np.eye(CLASSES)), 'fc_bias': mx.nd.zeros(CLASSES)}, {})
    batches = mx.io.NDArrayIter(np.array([[0, 70, 0], [0, 0, 0]], 'float32'), np.array([0, 1], 'float32'), 2)
    expected = (70 + math.log(3)) / 2
    close = tolerances.ROUNDED_FLOAT32  # as the softmax in front is
    assert module.score(batches, 'stable_cross_entropy') == [('cross-entropy', close.approx(expected))]
    assert module.score(batches, mx.metric.create('stable_perplexity', ignore_label=1)) == [
        ('perplexity', close.approx(math.exp(70)))
    ]
    names = ['acc', 'stable_bits_per_token']
    assert module.score(batches, names)[1] == ('bits-per-token', close.approx(expected / math.log(2)))
    assert module.score(batches, 'ce')[0][1] < 15


def test_module_trains_with_our_loss_on_symbols(ctx):
    """The same steps as with SoftmaxOutput; metrics choose their output by name."""
    outputs = {'output_names': ['probs_output'], 'label_names': ['softmax_label']}
    nll, kept = StableCrossEntropy(**outputs), Kept(**outputs)
    loss = StableLoss(output_names=['loss_output'], label_names=[])
    module = our_module(ctx)
    ours, stock = fit(module, [nll, loss, kept]), fit(softmax_module(ctx), 'stable_cross_entropy')
    for name, value in stock.items():
        assert_close(ours[name], value, tolerances.TRAINED)
        assert np.abs(value - initial()[name].asnumpy()).max() > 0.1
    scores = dict(module.score(iterate(1), [nll, loss, kept]))
    assert scores['cross-entropy'] == tolerances.FLOAT64.approx(scores['keepdims'])
    assert scores['loss'] == NLL.approx(scores['keepdims'])


def test_speedometer_and_log_validation(ctx, caplog):
    """Speedometer opens a new window after each line; the epoch's last line is about the whole epoch."""
    module, kept, seen = softmax_module(ctx), Kept(), []

    def look(param):
        names, values = param.eval_metric.get()
        global_names, global_values = param.eval_metric.get_global()
        assert names == global_names == ['cross-entropy', 'keepdims']
        assert_close(values[0], values[1], tolerances.FLOAT64)
        assert_close(global_values[0], global_values[1], tolerances.FLOAT64)
        seen.append((values[0], global_values[0], len(kept.window), len(kept.all)))

    with caplog.at_level(logging.INFO):
        fit(
            module,
            [StableCrossEntropy(), kept],
            validation_metric=mx.metric.create('stable_cross_entropy', name='held-out'),
            batch_end_callback=[look, mx.callback.Speedometer(BATCH, frequent=2)],
            eval_end_callback=mx.callback.LogValidationMetricsCallback(),
        )
    text = '\n'.join(record.getMessage() for record in caplog.records)
    assert [sizes[2:] for sizes in seen] == [(1, 1), (2, 2), (3, 3), (1, 4), (2, 5)] * 2
    logged = [float(value) for value in re.findall(r'Speed: .*\tcross-entropy=([0-9.]+)\t', text)]
    logged_as = tolerances.SIX_DECIMALS.approx
    assert logged == [logged_as(seen[batch][0]) for batch in (2, 4, 7, 9)]
    logged = [float(value) for value in re.findall(r'Train-cross-entropy=([0-9.]+)', text)]
    assert logged == [logged_as(seen[batch][1]) for batch in (4, 9)]
    (held_out,) = module.score(iterate(1), StableCrossEntropy())
    logged = [float(value) for value in re.findall(r'Validation-held-out=([0-9.]+)', text)]
    assert logged[-1] == logged_as(held_out[1])
    assert len(logged) == 4  # the callback's and the Module's own, in each epoch


# DataLoader


@pytest.mark.parametrize('pin_memory', [False, True], ids=['', 'pinned'])
@pytest.mark.parametrize('workers', [0, 1, 4])
def test_batches_of_a_data_loader(workers, pin_memory):
    """Those of workers live in shared memory, while the output of an eager net lives on the CPU."""
    data, label = blobs(0)
    dataset = gluon.data.ArrayDataset(data, label)
    loader = gluon.data.DataLoader(dataset, BATCH, num_workers=workers, pin_memory=pin_memory)
    loss_fn = StableSoftmaxCELoss()
    metric, losses = loss_fn.create_metric(), []
    for pred, labels in loader:
        losses.append(loss_fn(pred * 2, labels).asnumpy())
        metric.update(labels, pred * 2)
    expected = reference.loss_and_gradient(2 * data, label)[0]
    assert_close(np.concatenate(losses), expected, NLL)
    assert metric.get()[1] == NLL.approx(expected.mean())
