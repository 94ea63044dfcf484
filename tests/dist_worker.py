"""One worker of a distributed job: calls the functions named on its command line, and prints the results as a line of JSON."""

import json
import random
import sys
import time

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

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
