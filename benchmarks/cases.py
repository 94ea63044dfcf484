"""One setup for speed, memory and accuracy: the problems, and everybody's way to solve them. Importing this needs NumPy only."""
from collections import namedtuple

import numpy as np

Case = namedtuple('Case', 'name shape axis dtype ignored')
CASES = [
    Case('64 x 10', (64, 10), -1, 'float32', 0),
    Case('128 x 1000', (128, 1000), -1, 'float32', 0),
    Case('256 x 10000', (256, 10000), -1, 'float32', 0),
    Case('512 x 50257', (512, 50257), -1, 'float32', 0),
    Case('2048 x 32000', (2048, 32000), -1, 'float32', 0),
    Case('8 x 21 x 128 x 128, axis 1', (8, 21, 128, 128), 1, 'float32', 0),
    Case('2 x 150 x 128 x 128, axis 1', (2, 150, 128, 128), 1, 'float32', 0),
    Case('32 x 128 x 8000, 40% ignored', (32, 128, 8000), -1, 'float32', 0.4),
    Case('128 x 50257, float16', (128, 50257), -1, 'float16', 0),
]
IGNORE = -1

OURS, HYBRIDIZED, STATIC, EAGER = 'ours', 'gluon, hybridized', 'gluon, static_alloc', 'gluon, as scripts call it'
CONTENDERS = [OURS, HYBRIDIZED, STATIC, EAGER, 'SoftmaxOutput', 'softmax_cross_entropy']
TORCH = 'PyTorch F.cross_entropy'
PROBS, LOSSES = 'cross entropy from probabilities, 512 x 50257', 'loss from 512 values'
UPDATES = 100  # of a metric, between two get()

# What ours may take at most, as a ratio to another contender, forward and backward; of a metric, to the stock one.
BOUNDS = {('64 x 10', HYBRIDIZED): 1.2, ('128 x 1000', HYBRIDIZED): 1.05, ('512 x 50257', HYBRIDIZED): 1.05, ('512 x 50257', EAGER): 0.4,
          ('8 x 21 x 128 x 128, axis 1', HYBRIDIZED): 0.4, ('2 x 150 x 128 x 128, axis 1', HYBRIDIZED): 0.4,
          ('128 x 50257, float16', HYBRIDIZED): 0.1, (PROBS, 'stock'): 0.02, (LOSSES, 'stock'): 0.1}


def data(case):
    """Logits and labels of a case, the same for everybody; ignored labels are IGNORE."""
    rng = np.random.RandomState(0)
    pred = rng.standard_normal(case.shape).astype('float32')
    pred *= 3
    positions = tuple(np.delete(case.shape, case.axis).tolist())
    label = rng.randint(0, case.shape[case.axis], positions).astype('float32')
    label[rng.uniform(size=positions) < case.ignored] = IGNORE
    return pred.astype(case.dtype), label


def truth(case, pred, label):
    """The loss of every position in float64, a row at a time; ignored ones are 0."""
    pred, label = np.moveaxis(pred, case.axis, -1).reshape(-1, case.shape[case.axis]), label.ravel().astype(int)
    loss = np.zeros(len(label))
    for i in np.flatnonzero(label != IGNORE):
        row = pred[i].astype('float64')
        loss[i] = np.log(np.exp(row - row.max()).sum()) + row.max() - row[label[i]]
    return loss


def make(case, contender):
    """A contender's (forward, forward and backward, losses of all positions) of a case, the first two as calls that return when done.

    None if the contender can't do it at all. Where labels are ignored, each does what its users do: gluon's takes a sample_weight.
    """
    import mxnet as mx
    from mxnet import autograd, gluon

    from gluon_stable_ce import StableSoftmaxCELoss
    pred, label = (mx.nd.array(array, dtype=array.dtype) for array in data(case))
    pred.attach_grad()
    args = [pred, label]
    if contender == OURS:
        options = {'axis': case.axis, 'ignore_label': IGNORE if case.ignored else None}
        call, each = StableSoftmaxCELoss(**options), StableSoftmaxCELoss(reduction='none', **options)
    elif contender in (HYBRIDIZED, STATIC, EAGER):
        call = gluon.loss.SoftmaxCrossEntropyLoss(axis=case.axis)
        if contender != EAGER:
            call.hybridize(static_alloc=contender == STATIC)
        if case.ignored:
            args.append(mx.nd.expand_dims(label != IGNORE, axis=-1))

        def each(pred, label, weight=None):
            loss = -mx.nd.pick(mx.nd.log_softmax(pred, axis=case.axis), label, axis=case.axis)
            return loss if weight is None else loss * weight.squeeze()
    elif case.dtype == 'float16':  # the others want labels of the dtype of the logits, and float16 cannot name the classes
        return None
    elif contender == 'SoftmaxOutput':  # its output is the probabilities; the loss is in its gradient only
        def call(pred, label):
            if case.axis == -1:
                pred, label = pred.reshape((-1, case.shape[-1])), label.reshape((-1,))
            return mx.nd.SoftmaxOutput(pred, label, multi_output=case.axis == 1, use_ignore=bool(case.ignored), ignore_label=IGNORE)
        each = None
    elif contender == 'softmax_cross_entropy' and len(case.shape) == 2 and not case.ignored:  # the sum over the batch
        call, each = mx.nd.softmax_cross_entropy, None
    else:
        return None

    def forward():
        call(*args).wait_to_read()

    def forward_backward():
        with autograd.record():
            loss = call(*args)
        loss.backward()
        pred.grad.wait_to_read()

    return forward, forward_backward, each and (lambda: each(*args).asnumpy().ravel())


def make_torch(case):
    """The same of PyTorch's F.cross_entropy, with labels of its own dtype."""
    import torch
    import torch.nn.functional as F
    pred, label = data(case)
    pred, label = torch.tensor(pred, requires_grad=True), torch.tensor(label.astype('int64'))
    if case.axis == -1:
        pred = pred.detach().reshape(-1, case.shape[-1]).requires_grad_()
        label = label.reshape(-1)

    def forward():
        with torch.no_grad():
            F.cross_entropy(pred, label, ignore_index=IGNORE)

    def forward_backward():
        pred.grad = None
        F.cross_entropy(pred, label, ignore_index=IGNORE).backward()

    def each():
        with torch.no_grad():
            return F.cross_entropy(pred, label, ignore_index=IGNORE, reduction='none').float().numpy().ravel()

    return forward, forward_backward, each


def make_metrics():
    """Metrics and what they are updated with, as {name: {contender: (metric, labels, preds)}}."""
    import mxnet as mx

    from gluon_stable_ce import StableCrossEntropy, StableLoss
    rng = np.random.RandomState(0)
    probs = mx.nd.softmax(mx.nd.array(rng.standard_normal((512, 50257))))
    label = mx.nd.array(rng.randint(0, 50257, 512))
    loss = mx.nd.array(rng.uniform(size=512))
    mx.nd.waitall()
    return {PROBS: {OURS: (StableCrossEntropy(), [label], [probs]), 'stock': (mx.metric.CrossEntropy(), [label], [probs])},
            LOSSES: {OURS: (StableLoss(), None, [loss]), 'stock': (mx.metric.Loss(), None, [loss])}}
