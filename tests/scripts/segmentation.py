# ruff: noqa: UP031
"""Train a small fully convolutional network to segment made images, with the classes on axis 1."""

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon, init
from mxnet.gluon import nn

NUM_CLASSES = 4


class ShapesDataset(gluon.data.Dataset):
    """Images of a disk, a square and a bar on a background, and the class of each pixel."""

    def __init__(self, count, seed, size=24):
        rng = np.random.RandomState(seed)
        rows, columns = np.mgrid[:size, :size]
        self.images, self.masks = [], []
        for _ in range(count):
            mask = np.zeros((size, size), 'float32')
            y, x, r = rng.randint(5, size - 5, 2).tolist() + [rng.randint(3, 6)]
            mask[(rows - y) ** 2 + (columns - x) ** 2 < r * r] = 1
            y, x, r = rng.randint(0, size - 8, 2).tolist() + [rng.randint(4, 8)]
            mask[y : y + r, x : x + r] = 2
            x = rng.randint(0, size - 3)
            mask[:, x : x + 3] = 3
            colours = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0.5, 0, 1]])[mask.astype(int)]
            self.images.append(
                (colours + rng.normal(0, 0.3, colours.shape)).astype('float32').transpose(2, 0, 1)
            )
            self.masks.append(mask)

    def __getitem__(self, index):
        return self.images[index], self.masks[index]

    def __len__(self):
        return len(self.images)


def bilinear_kernel(in_channels, out_channels, kernel_size):
    factor = (kernel_size + 1) // 2
    center = factor - 1 if kernel_size % 2 == 1 else factor - 0.5
    og = np.ogrid[:kernel_size, :kernel_size]
    filt = (1 - abs(og[0] - center) / factor) * (1 - abs(og[1] - center) / factor)
    weight = np.zeros((in_channels, out_channels, kernel_size, kernel_size), dtype='float32')
    weight[range(in_channels), range(out_channels), :, :] = filt
    return mx.nd.array(weight)


mx.random.seed(2)
np.random.seed(2)
train_data = gluon.data.DataLoader(ShapesDataset(64, seed=0), batch_size=8, shuffle=True, num_workers=2)
val_data = gluon.data.DataLoader(ShapesDataset(16, seed=1), batch_size=8)

net = nn.HybridSequential()
net.add(
    nn.Conv2D(16, kernel_size=3, padding=1, strides=2, activation='relu'),
    nn.Conv2D(32, kernel_size=3, padding=1, activation='relu'),
    nn.Conv2D(NUM_CLASSES, kernel_size=1),
    nn.Conv2DTranspose(NUM_CLASSES, kernel_size=4, padding=1, strides=2),
)
net.initialize(init.Xavier())
net[-1].initialize(init.Constant(bilinear_kernel(NUM_CLASSES, NUM_CLASSES, 4)), force_reinit=True)
net.hybridize()

loss = gluon.loss.SoftmaxCrossEntropyLoss(axis=1)
trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.2, 'wd': 1e-3})
ctx = mx.cpu()
metrics = mx.metric.create(['acc', 'ce'])
train_loss = mx.metric.Loss()

for epoch in range(5):
    train_loss.reset()
    for data, label in train_data:
        with autograd.record():
            output = net(data.as_in_context(ctx))
            L = loss(output, label)
        L.backward()
        trainer.step(data.shape[0])
        train_loss.update(None, L)
    print('epoch %d train %s %.8f' % (epoch, *train_loss.get()))
    metrics.reset()
    for data, label in val_data:
        probs = mx.nd.softmax(net(data), axis=1).transpose((0, 2, 3, 1)).reshape((-1, NUM_CLASSES))
        metrics.update([label.reshape((-1,))], [probs])
    for name, value in metrics.get_name_value():
        print('epoch %d val %s %.8f' % (epoch, name, value))
