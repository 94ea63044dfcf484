"""Losses and training loops of gluoncv, on made data."""

import gluoncv
import mxnet as mx
import numpy as np
import runner
from gluoncv import loss as cv_loss
from gluoncv.utils.parallel import Parallel, Parallelizable
from mxnet import autograd, gluon


def images(count, size=32, classes=4):
    label = np.random.randint(0, classes, count)
    data = np.random.normal(0, 0.5, (count, 3, size, size))
    half = size // 2
    for image, k in zip(data, label):
        image[:, half * (k // 2) : half * (k // 2) + half, half * (k % 2) : half * (k % 2) + half] += 1
    return mx.nd.array(data), mx.nd.array(label)


def distillation():
    """Dense and sparse labels, at three weights of the hard label."""
    results = {}
    output, label = mx.nd.random.normal(0, 2, (6, 5)), mx.nd.array([0, 1, 2, 3, 4, 0])
    soft = mx.nd.softmax(mx.nd.random.normal(0, 2, (6, 5)) / 3)
    for weight in (0, 0.5, 1):
        for sparse, labels in ((True, label), (False, mx.nd.one_hot(label, 5))):
            loss_fn = cv_loss.DistillationSoftmaxCrossEntropyLoss(3, weight, sparse)
            loss_fn.hybridize()
            loss, gradient = runner.with_gradient(loss_fn, output, labels, soft)
            results.update({f'loss {weight} {sparse}': loss, f'gradient {weight} {sparse}': gradient})
    return results


def siamrpn():
    """The loss picks positive and negative positions, and makes predictions of two classes of them."""
    batch, pairs = 2, 5
    cls_pred = mx.nd.random.normal(0, 1, (batch, 2 * pairs, 17, 17))
    loc_pred, loc_label = mx.nd.random.normal(0, 1, (2, batch, 4 * pairs, 17, 17))
    label = mx.nd.array(np.random.randint(0, 2, (batch, pairs, 17, 17)))
    flat = label.asnumpy().ravel()
    positive, negative = (mx.nd.array(np.nonzero(flat == k)[0][:40]) for k in (1, 0))
    weight = mx.nd.random.uniform(0, 1, (batch, pairs, 17, 17))
    loss_fn = cv_loss.SiamRPNLoss(batch)
    cls_pred.attach_grad()
    with autograd.record():
        cls_loss, loc_loss = loss_fn(
            cls_pred,
            loc_pred,
            label,
            positive,
            negative,
            loc_label.reshape((batch, 4, pairs, 17, 17)),
            weight,
        )
    cls_loss.backward()
    return {'class loss': cls_loss, 'location loss': loc_loss, 'gradient': cls_pred.grad}


def segmentation():
    """Losses of gluoncv with an auxiliary head and an ignored label. They do not use gluon's, and their mean goes into a metric."""
    losses, metric = [], mx.metric.Loss('segmentation')
    pred, aux = mx.nd.random.normal(0, 1, (2, 2, 4, 8, 8))
    label = mx.nd.array(np.random.randint(-1, 4, (2, 8, 8)))
    for loss_fn in (cv_loss.MixSoftmaxCrossEntropyLoss(aux=True), cv_loss.SoftmaxCrossEntropyLoss()):
        loss = loss_fn(pred, aux, label) if 'Mix' in type(loss_fn).__name__ else loss_fn(pred, label)
        metric.update(0, [loss])
        losses.append(loss)
    pixels = gluoncv.utils.metrics.SegmentationMetric(4)
    pixels.update(label, pred)
    return {'losses': losses, 'metric': metric.get()[1], 'segmentation metric': list(pixels.get())}


def ssd():
    """The multibox loss with hard negative mining, and the metrics of gluoncv's training script."""
    cls_pred, box_pred = mx.nd.random.normal(0, 1, (2, 50, 4)), mx.nd.random.normal(0, 1, (2, 50, 4))
    cls_target, box_target = (
        mx.nd.array(np.random.randint(-1, 3, (2, 50)).clip(0)),
        mx.nd.random.normal(0, 1, (2, 50, 4)),
    )
    ce_metric, smoothl1_metric = mx.metric.Loss('CrossEntropy'), mx.metric.Loss('SmoothL1')
    for _ in range(3):
        sums, cls_loss, box_loss = cv_loss.SSDMultiBoxLoss()(cls_pred, box_pred, cls_target, box_target)
        ce_metric.update(0, [loss * 2 for loss in cls_loss])
        smoothl1_metric.update(0, [loss * 2 for loss in box_loss])
        cls_pred = cls_pred * 0.5
    return {'sum': sums, 'metrics': [ce_metric.get()[1], smoothl1_metric.get()[1]]}


def classification_with_mixup():
    """A network of the model zoo, dense labels of two mixed images, and label smoothing, as in gluoncv's script."""
    net = gluoncv.model_zoo.get_model('cifar_resnet20_v1', classes=4)
    net.initialize(mx.init.Xavier())
    net.hybridize()
    loss_fn = gluon.loss.SoftmaxCrossEntropyLoss(sparse_label=False)
    trainer = gluon.Trainer(net.collect_params(), 'nag', {'learning_rate': 0.02, 'momentum': 0.9})
    metric, losses = mx.metric.Loss(), []
    for _ in range(6):
        data, label = images(16)
        share = np.random.beta(1, 1)
        smooth = [mx.nd.one_hot(part, 4) * 0.9 + 0.1 / 4 for part in (label, label[::-1])]
        with autograd.record():
            loss = loss_fn(
                net(share * data + (1 - share) * data[::-1]), share * smooth[0] + (1 - share) * smooth[1]
            )
        loss.backward()
        trainer.step(16)
        metric.update(None, loss)
        losses.append(loss.mean().asscalar())
    data, label = images(32)
    evaluation = mx.metric.create(['acc', 'ce'])
    evaluation.update([label], [mx.nd.softmax(net(data))])
    return {'losses': losses, 'metric': metric.get()[1], 'evaluation': evaluation.get()[1]}


class ParallelNet(Parallelizable):
    """The example in the docstring of gluoncv's Parallel."""

    def __init__(self, net, loss):
        self.net, self.loss = net, loss

    def forward_backward(self, x):
        data, label = x
        with autograd.record():
            loss = self.loss(self.net(data), label)
        loss.backward()
        return loss


def parallel():
    """One loss is called from the threads of gluoncv's Parallel."""
    devices = [mx.cpu(0), mx.cpu(1)]
    net = gluon.nn.Dense(4)
    net.initialize(mx.init.Xavier(), ctx=devices)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.01})
    work = Parallel(2, ParallelNet(net, gluon.loss.SoftmaxCrossEntropyLoss()))
    losses = []
    for _ in range(8):
        data, label = images(16, size=8)
        for x in zip(*(gluon.utils.split_and_load(array, devices) for array in (data, label))):
            work.put(x)
        losses.append(sum(work.get().sum().asscalar() for _ in devices))
        trainer.step(16)
    return {'losses': losses, 'weight': net.weight.data(devices[0])}


runner.main(distillation, siamrpn, segmentation, ssd, classification_with_mixup, parallel)
