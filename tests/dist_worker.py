"""One worker of a distributed job: calls the functions named on its command line, and prints the results as a line of JSON."""

import json
import random
import sys
import time

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from recipes import recipe

from gluon_stable_ce import StableCrossEntropy, distributed
from gluon_stable_ce.distributed import all_reduce

CLASSES = 10
SHARDS = ((0, 70), (70, 70), (70, 83))  # worker 1 has no data


def numbers_of(rank, call):
    """What worker `rank` gives to its reduce number `call`: integers of every size and both signs; one call in which worker 1 has zeros."""
    rng = random.Random(100 * call + rank)
    if call == 1 and rank == 1:
        return [0] * 6
    return [rng.choice((-1, 1)) * rng.getrandbits(bits) for bits in (1, 16, 64, 1126, 2150, 2239)]


def sums_of(workers, calls=3):
    """What all workers together give to each reduce."""
    return [
        [sum(column) for column in zip(*(numbers_of(rank, call) for rank in range(workers)))]
        for call in range(calls)
    ]


def predictions(start=0, stop=83):
    """Probabilities, (stop - start, CLASSES), some of them 0 or tiny, and labels, (stop - start,)."""
    rng = np.random.RandomState(7)
    logits = rng.standard_normal((83, CLASSES)) * 40
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    labels = rng.randint(0, CLASSES, 83)
    return mx.nd.array(probs[start:stop], dtype='float64'), mx.nd.array(labels[start:stop])


def reduces(store):
    """Several reduces, with workers that come to them at different times."""
    sums = []
    for call in range(3):
        time.sleep(0.05 * (store.rank if call % 2 else store.num_workers - store.rank))
        sums.append(all_reduce(store, numbers_of(store.rank, call)))
    return sums


def reduces_from(store, key):
    """Reduces whose keys begin at `key`."""
    while next(distributed._KEYS) < int(key):
        pass
    return [all_reduce(store, numbers_of(store.rank, call)) for call in range(8)]


def training(store, optimizer, update_on_kvstore, devices):
    """Train a net, with a reduce over the same store before each step. Without a store, with the data of two workers."""
    contexts = [mx.cpu(index) for index in range(int(devices))]
    net = gluon.nn.Dense(3, in_units=4)
    net.initialize(mx.init.Constant(0.5), ctx=contexts)
    params = {'learning_rate': 1e-4, 'wd': 0.01, 'multi_precision': optimizer == 'sgd'}
    on_store = {'update_on_kvstore': update_on_kvstore == 'True'} if store else {}
    trainer = gluon.Trainer(net.collect_params(), optimizer, params, kvstore=store, **on_store)
    trainer._init_kvstore()
    trainer._init_params()
    mx.nd.waitall()  # or MXNet may push the first gradient before it has pulled the first weight, and take the one for the other
    ranks, sums = [store.rank] if store else [0, 1], []
    for step in range(3):
        if store:
            sums.append(all_reduce(trainer._kvstore, numbers_of(store.rank, step)))
        data = mx.nd.concat(*(mx.nd.arange(16).reshape((4, 4)) + rank for rank in ranks), dim=0)
        with autograd.record():
            losses = [(net(part) ** 2).sum() for part in gluon.utils.split_and_load(data, contexts)]
        autograd.backward(losses)
        trainer.step(1)
    weight = net.weight.data(contexts[0]).asnumpy().tolist()
    return {'sums': sums, 'weight': weight, 'trained': trainer._update_on_kvstore}


def tokens(rank):
    """Sentences of worker `rank`, (2, 4, 3), and labels, (2, 4), with another number of -1 on each; worker 1 has only padding."""
    rng = np.random.RandomState(rank)
    label = rng.randint(0, 6, (2, 4))
    label[:, 3 - rank :] = -1
    return rng.normal(size=(2, 4, 3)).astype('float32'), np.full((2, 4), -1) if rank == 1 else label


def token_net():
    net = gluon.nn.Dense(6, use_bias=False, flatten=False, in_units=3)
    net.initialize(mx.init.Constant(0.5))
    return net


def token_mean(store):
    """The weight after three steps of the recipe."""
    net = token_net()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1}, kvstore=store)
    return train_on_tokens(net, trainer, store, store.rank, store.num_workers)


def train_on_tokens(net, trainer, store, rank, workers, divisor=1):
    """Make three steps of the recipe, and return the weight."""
    train_step = recipe('The mean over the tokens of all workers')['train_step']
    for step in range(3):
        data, label = map(mx.nd.array, tokens((rank + step) % workers))
        train_step(net, trainer, store, data, label, divisor)
    return net.weight.data().asnumpy().tolist()


def token_mean_of_one_process(workers):
    """The weight after three steps of gluon's loss on the mean over all tokens of all workers, (6, 3)."""
    net, loss_fn = token_net(), gluon.loss.SoftmaxCELoss()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    data, label = (np.concatenate(parts) for parts in zip(*map(tokens, range(workers))))
    data, label = mx.nd.array(data[label != -1]), mx.nd.array(label[label != -1])
    for _ in range(3):
        with autograd.record():
            loss = loss_fn(net(data), label)
        loss.backward()
        trainer.step(len(label))
    return net.weight.data().asnumpy()


def refused(store, case):
    """A store that cannot carry the numbers; then one more exchange of the user's, which has to work."""
    key = 'weight' if case == 'names' else 100
    if case == 'compression':
        store.set_gradient_compression({'type': '2bit', 'threshold': 0.5})
    store.init(key, mx.nd.zeros(2))
    try:
        got = all_reduce(store, [1, 2])
    except RuntimeError as error:
        got = str(error)
    store.push(key, mx.nd.ones(2))
    out = mx.nd.zeros(2)
    store.pull(key, out=out)
    return got, out.asnumpy().tolist()


def metric(store, shards):
    """A metric over shards of the data, reduced twice, in two windows."""
    start, stop = (
        SHARDS[store.rank] if shards == 'uneven' else (28 * store.rank, min(28 * store.rank + 28, 83))
    )
    local = StableCrossEntropy()

    def update():
        if stop > start:
            probs, labels = predictions(start, stop)
            local.update(labels, probs)

    results = []
    update()
    for _ in range(2):  # a second call gives the same
        before = local.state_dict()
        whole = local.all_reduce(store)
        assert local.state_dict() == before
        results.append((whole.get()[1], whole.num_inst))
    local.reset_local()
    update()
    whole = local.all_reduce(store)
    results.append((whole.get()[1], whole.num_inst))
    results.append((whole.get_global()[1], whole.global_num_inst))
    return results


def main(kind, *calls):
    """Call functions of this module with one store, each given as ``name`` or ``name:argument,argument``."""
    store = mx.kv.create(kind)  # a process can have only one
    results = {}
    for call in calls:
        name, _, args = call.partition(':')
        results[call] = globals()[name](store, *args.split(',') if args else ())
    print(json.dumps(results), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
