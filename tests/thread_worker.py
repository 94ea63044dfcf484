"""One loss called from four threads, the main one among them, each with its own kind of call, and compared with calls made alone.

``thread_worker.py CALLS`` prints how many of the CALLS of each thread differed, as JSON. Label arrays and class weights are shared by
all threads; each has its own ``pred`` and ``sample_weight``, since MXNet itself crashes if two threads record with one handle of an
array that has a gradient.
"""

import json
import sys
import threading

import mxnet as mx
import numpy as np
from mxnet import autograd

from gluon_stable_ce import StableSoftmaxCELoss

CLASS_WEIGHT = [1, 2, 0.5, 0.25, 3]
KINDS = [  # shape and dtype of pred, and the layout of sample_weight, which has that many axes
    ((4, 5), 'float32', None),
    ((4, 5), 'float64', 1),
    ((3, 4, 5), 'float32', 2),
    ((3, 4, 5), 'float16', None),
]


def call(loss_fn, pred, label, weight):
    """The loss, and the gradient of its sum."""
    with autograd.record():
        loss = loss_fn(pred, label, weight) if weight is not None else loss_fn(pred, label)
    loss.backward()
    return loss.asnumpy(), pred.grad.asnumpy()


def work(thread, loss_fn, metric, labels, calls, expected, differing):
    shape, dtype, weight_ndim = KINDS[thread]
    rng = np.random.RandomState(thread)
    pred = mx.nd.array(rng.normal(0, 3, shape), dtype=dtype)
    weight = None if weight_ndim is None else mx.nd.array(rng.uniform(0, 2, shape[:weight_ndim]))
    pred.attach_grad()
    for _ in range(calls):
        got = call(loss_fn, pred, labels[len(shape)], weight)
        metric.update(labels[len(shape)], pred)
        if expected[thread] is None:
            expected[thread] = got
        elif not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, expected[thread])):
            differing[thread] += 1


def in_threads(function, arguments, at_once=True):
    """Call a function with each of the arguments in a thread of its own, of which the first is the main one."""
    first, *others = arguments
    threads = [threading.Thread(target=function, args=(argument,)) for argument in others]
    if not at_once:
        function(first)
    for thread in threads:
        thread.start()
        if not at_once:
            thread.join()
    if at_once:
        function(first)
    for thread in threads:
        thread.join()


def main(calls):
    rng = np.random.RandomState(9)
    labels = {ndim: mx.nd.array(rng.randint(-1, 6, (4,) if ndim == 2 else (3, 4))) for ndim in (2, 3)}
    for label in labels.values():
        label[:] = mx.nd.where(label > 4, mx.nd.zeros_like(label), label)
    loss_fn = StableSoftmaxCELoss(ignore_label=-1, class_weight=CLASS_WEIGHT, label_smoothing=0.1)
    metric = loss_fn.create_metric()
    expected, differing = [None] * len(KINDS), [0] * len(KINDS)
    errors = []

    def compute_alone(thread):
        other = StableSoftmaxCELoss(ignore_label=-1, class_weight=CLASS_WEIGHT, label_smoothing=0.1)
        work(thread, other, other.create_metric(), labels, 1, expected, differing)

    def compute(thread):
        try:
            work(thread, loss_fn, metric, labels, calls, expected, differing)
        except Exception as error:
            errors.append(repr(error))

    in_threads(compute_alone, range(len(KINDS)), at_once=False)
    in_threads(compute, range(len(KINDS)))
    counted = sum(int((labels[len(shape)] != -1).sum().asscalar()) for shape, _, _ in KINDS)
    return {
        'differing': differing,
        'errors': errors,
        'count': metric.num_inst,
        'expected_count': counted * calls,
    }


if __name__ == '__main__':
    print(json.dumps(main(int(sys.argv[1]))))
