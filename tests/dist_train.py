"""Train on handwritten digits with several workers.

Each worker has a part of the data, and reports the cross entropy of all of it.
"""

import sys

import mxnet as mx
from mxnet import autograd, gluon
from sklearn.datasets import load_digits

from gluon_stable_ce import StableSoftmaxCrossEntropyLoss

BATCH = 32


def load(rank, workers):
    """Return the batches that worker `rank` trains on, and those that it tests on.

    Every worker has equally many batches to train on, since 'dist_sync' waits for all workers at each step.
    """
    images, labels = load_digits(return_X_y=True)
    data = list(zip((images / 16).astype('float32'), labels.astype('float32')))
    train = gluon.data.SimpleDataset(data[rank:1440:workers])
    test = gluon.data.SimpleDataset(data[1440 + rank :: workers])
    return (
        gluon.data.DataLoader(train, BATCH, shuffle=True, last_batch='discard'),
        gluon.data.DataLoader(test, BATCH),
    )


def build():
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(32, activation='relu', in_units=64), gluon.nn.Dense(10, in_units=32))
    return net


if __name__ == '__main__':
    # the only store of this process: the trainer and the metric share it
    store = mx.kv.create('dist_sync')
    train, test = load(store.rank, store.num_workers)
    net = build()
    net.initialize(mx.init.Xavier())
    loss_fn = StableSoftmaxCrossEntropyLoss()
    metric = loss_fn.create_metric()
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.01}, kvstore=store)
    for epoch in range(3):
        for data, label in train:
            with autograd.record():
                loss = loss_fn(net(data), label)
            loss.backward()
            trainer.step(BATCH * store.num_workers)
        metric.reset()
        for data, label in test:
            metric.update(label, net(data))
        whole = metric.all_reduce(store)  # the metric of all workers, the same on each
        result = f'{whole.get()[1]!r} nats over {whole.num_inst} digits'
        print(f'epoch {epoch}: {result}, worker {store.rank}', flush=True)
    if store.rank == 0:
        net.save_parameters(sys.argv[1])
