"""A process that prints how much more memory it has, in MB: after a call, after 20 that were recorded at the same time,
after what the command line says, and after 20 losses, each of other options, of which the last is alive.
"""

import gc
import sys

import mxnet as mx

from gluon_stable_ce import StableSoftmaxCELoss


def resident():
    """The resident memory of this process in MB, when nothing is queued any more."""
    gc.collect()
    mx.nd.waitall()
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def train(loss_fn, calls):
    """Record some calls, and run backward once."""
    with mx.autograd.record():
        losses = [loss_fn(pred, label) for _ in range(calls)]
    mx.autograd.backward(losses)
    mx.nd.waitall()


if __name__ == '__main__':
    pred, label = mx.nd.random.normal(shape=(20000, 100)), mx.nd.zeros(20000)
    pred.attach_grad()
    train(StableSoftmaxCELoss(), 1)  # is deleted, and has the graph of the next one
    loss_fn = StableSoftmaxCELoss()
    before = resident()
    train(loss_fn, 1)
    print(resident() - before)
    train(loss_fn, 20)
    print(resident() - before)
    exec(sys.argv[1])
    print(resident() - before)
    for ignore_label in range(20):
        loss_fn = StableSoftmaxCELoss(ignore_label=-ignore_label - 1)
        train(loss_fn, 1)
    print(resident() - before)
