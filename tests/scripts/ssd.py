# ruff: noqa: UP008, UP031
"""Train a small single shot detector on made images of squares and bars."""

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

NUM_CLASSES = 2
SIZES = [[0.3, 0.4], [0.55, 0.7]]
RATIOS = [[1, 2, 0.5]] * 2
NUM_ANCHORS = len(SIZES[0]) + len(RATIOS[0]) - 1


def make_data(count, size=32):
    rng = np.random.RandomState(5)
    images = rng.normal(0, 0.1, (count, 3, size, size)).astype('float32')
    labels = np.zeros((count, 1, 5), 'float32')
    for image, label in zip(images, labels):
        kind = rng.randint(NUM_CLASSES)
        height = rng.randint(10, 20)
        width = height if kind == 0 else height // 2 + 1
        top, left = rng.randint(size - height), rng.randint(size - width)
        image[kind, top : top + height, left : left + width] += 1
        box = np.array([left, top, left + width, top + height]) / size
        label[0] = [kind, *box]
    return images, labels


def class_predictor(num_anchors, num_classes):
    return nn.Conv2D(num_anchors * (num_classes + 1), 3, padding=1)


def box_predictor(num_anchors):
    return nn.Conv2D(num_anchors * 4, 3, padding=1)


def down_sample(num_filters):
    out = nn.HybridSequential()
    for _ in range(2):
        out.add(nn.Conv2D(num_filters, 3, padding=1))
        out.add(nn.BatchNorm(in_channels=num_filters))
        out.add(nn.Activation('relu'))
    out.add(nn.MaxPool2D(2))
    return out


def flatten_prediction(pred):
    return mx.nd.flatten(mx.nd.transpose(pred, axes=(0, 2, 3, 1)))


class ToySSD(gluon.Block):
    def __init__(self, num_classes, **kwargs):
        super(ToySSD, self).__init__(**kwargs)
        self.num_classes = num_classes
        with self.name_scope():
            self.body = nn.HybridSequential()
            for filters in (8, 16):
                self.body.add(down_sample(filters))
            self.down = down_sample(16)
            self.class_preds = [class_predictor(NUM_ANCHORS, num_classes) for _ in SIZES]
            self.box_preds = [box_predictor(NUM_ANCHORS) for _ in SIZES]
            for block in self.class_preds + self.box_preds:
                self.register_child(block)

    def forward(self, x):
        x = self.body(x)
        anchors, class_preds, box_preds = [], [], []
        for i, (sizes, ratios) in enumerate(zip(SIZES, RATIOS)):
            anchors.append(mx.nd.contrib.MultiBoxPrior(x, sizes=sizes, ratios=ratios))
            class_preds.append(flatten_prediction(self.class_preds[i](x)))
            box_preds.append(flatten_prediction(self.box_preds[i](x)))
            if i == 0:
                x = self.down(x)
        class_preds = mx.nd.concat(*class_preds, dim=1).reshape((0, -1, self.num_classes + 1))
        return mx.nd.concat(*anchors, dim=1), class_preds, mx.nd.concat(*box_preds, dim=1)


def training_targets(anchors, class_preds, labels):
    # With hard negative mining, anchors that are neither positive nor hard negatives get the class -1.
    return mx.nd.contrib.MultiBoxTarget(
        anchors,
        labels,
        mx.nd.transpose(class_preds, axes=(0, 2, 1)),
        negative_mining_ratio=3,
        negative_mining_thresh=0.5,
        ignore_label=-1,
    )


mx.random.seed(3)
np.random.seed(3)
images, labels = make_data(96)
train_data = mx.io.NDArrayIter(images, labels, batch_size=16, shuffle=False)

net = ToySSD(NUM_CLASSES)
net.initialize(mx.init.Xavier(magnitude=2))
trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1, 'wd': 5e-4})
cls_loss = gluon.loss.SoftmaxCrossEntropyLoss()
box_loss = gluon.loss.L1Loss()
ce_metric = mx.metric.Loss('CrossEntropy')
smoothl1_metric = mx.metric.Loss('L1')

for epoch in range(8):
    train_data.reset()
    ce_metric.reset()
    smoothl1_metric.reset()
    for batch in train_data:
        x, y = batch.data[0], batch.label[0]
        with autograd.record():
            anchors, class_preds, box_preds = net(x)
            with autograd.pause():
                box_target, box_mask, cls_target = training_targets(anchors, class_preds, y)
            # The anchors that do not train get weight 0 and a class that exists.
            weight = (cls_target >= 0).expand_dims(axis=-1)
            loss1 = cls_loss(class_preds, mx.nd.maximum(cls_target, 0), weight)
            loss2 = box_loss(box_preds * box_mask, box_target * box_mask)
            loss = loss1 + loss2
        loss.backward()
        trainer.step(x.shape[0])
        ce_metric.update(0, [loss1])
        smoothl1_metric.update(0, [loss2])
    for metric in (ce_metric, smoothl1_metric):
        name, value = metric.get()
        print('epoch %d %s %.8f' % (epoch, name, value))

anchors, class_preds, box_preds = net(mx.nd.array(images[:16]))
detections = mx.nd.contrib.MultiBoxDetection(
    mx.nd.softmax(class_preds).transpose((0, 2, 1)), box_preds, anchors, force_suppress=True
)
print('best score %.8f' % detections[:, :, 1].max().asscalar())
