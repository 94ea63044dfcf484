"""One process of a Horovod job: calls each of the functions below, and writes what they return as JSON, by name."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import mxnet as mx
from dist_worker import SHARDS, numbers_of, predictions, token_net, train_on_tokens
from mxnet import autograd, gluon

from gluon_stable_ce import StableCrossEntropy
from gluon_stable_ce.distributed import all_reduce


def sums(hvd):
    """Sums of three calls, to which the processes come at different times, and of one call in np mode."""
    results = []
    for call in range(3):
        time.sleep(0.2 * (hvd.rank() if call % 2 else hvd.size() - hvd.rank()))
        results.append(all_reduce(hvd, numbers_of(hvd.rank(), call)))
    with mx.util.np_array(True):
        results.append(all_reduce(hvd, numbers_of(hvd.rank(), 3)))
    return results


def metrics(hvd):
    """A metric over this process's shard in two windows, before and after it is reduced twice."""
    metric = StableCrossEntropy()

    def update():
        start, stop = SHARDS[hvd.rank()]
        if stop > start:
            probs, labels = predictions(start, stop)
            metric.update(labels, probs)

    update()
    metric.reset_local()
    update()
    local = metric.state_dict()
    wholes = [metric.all_reduce(hvd) for _ in range(2)]
    return {
        'states': [whole.state_dict() for whole in wholes],
        'values': [whole.get()[1] for whole in wholes] + [whole.get_global()[1] for whole in wholes],
        'is_unchanged': metric.state_dict() == local,
    }


def training(hvd, reduces):
    """Train with Horovod's trainer, with or without calls of all_reduce between the steps."""
    net = gluon.nn.Dense(3, in_units=4)
    net.initialize(mx.init.Constant(0.5))
    hvd.broadcast_parameters(net.collect_params(), root_rank=0)
    trainer = hvd.DistributedTrainer(net.collect_params(), 'sgd', {'learning_rate': 1e-3})
    results = []
    for step in range(3):
        with autograd.record():
            loss = (net(mx.nd.arange(16).reshape((4, 4)) + hvd.rank()) ** 2).sum()
        loss.backward()
        trainer.step(4)
        if reduces:
            results.append(all_reduce(hvd, numbers_of(hvd.rank(), step)))
    return {'sums': results, 'weight': net.weight.data().asnumpy().tolist()}


def token_mean(hvd):
    """The weight after three steps of the recipe of the mean over the tokens of all workers."""
    net = token_net()
    trainer = hvd.DistributedTrainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    return train_on_tokens(net, trainer, hvd, hvd.rank(), hvd.size(), 1 / hvd.size())


def error_of(store):
    """Return the message of the error that a store raises, or the sum that it returns."""
    try:
        return all_reduce(store, [1])
    except (RuntimeError, ValueError) as error:
        return f'{type(error).__name__}: {error}'


def errors(hvd):
    """What stores of one worker say, a Horovod that averages, and Horovod itself after them."""

    def average(array, op, name):
        return hvd.allreduce(array, op=hvd.Average, name=name)

    averaging = SimpleNamespace(rank=hvd.rank, size=hvd.size, allreduce=average, Sum=hvd.Sum)
    stores = {
        'horovod': mx.kv.create('horovod'),
        'local': mx.kv.create('local'),
        'average': averaging,
        'hvd': hvd,
    }
    return {name: error_of(store) for name, store in stores.items()}


def main(folder, seconds):
    """Write the results to a file that is called by the rank."""
    signal.alarm(int(seconds))  # ends the process, even if Horovod waits for another
    import horovod.mxnet as hvd

    before_init = {'hvd': error_of(hvd), 'horovod': error_of(mx.kv.create('horovod'))}
    hvd.init()
    results = {
        'before_init': before_init,
        'sums': sums(hvd),
        'metrics': metrics(hvd),
        'training': training(hvd, True),
        'training alone': training(hvd, False),
        'token mean': token_mean(hvd),
        'errors': errors(hvd),
    }
    with open(os.path.join(folder, f'{hvd.rank()}.json'), 'w') as file:
        json.dump(results, file)
    hvd.shutdown()


if __name__ == '__main__':
    main(*sys.argv[1:])
