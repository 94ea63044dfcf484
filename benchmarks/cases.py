"""The problems of the benchmark, and how each contender solves them. Importing this needs NumPy only."""

from collections import namedtuple

import numpy as np

# One call solves a batch of each of the shapes, in this order.
Case = namedtuple('Case', 'name shapes axis dtype ignored')
LENGTHS = (35, 10, 55, 5, 40, 20, 60, 15, 50, 30, 45, 25)
CASES = [
    Case('64 x 10', [(64, 10)], -1, 'float32', 0),
    Case('128 x 1000', [(128, 1000)], -1, 'float32', 0),
    Case('16 x T x 2000, T from 5 to 60', [(16, length, 2000) for length in LENGTHS], -1, 'float32', 0),
    Case('256 x 10000', [(256, 10000)], -1, 'float32', 0),
    Case('512 x 50257', [(512, 50257)], -1, 'float32', 0),
    Case('2048 x 32000', [(2048, 32000)], -1, 'float32', 0),
    Case('8 x 21 x 128 x 128, axis 1', [(8, 21, 128, 128)], 1, 'float32', 0),
    Case('2 x 150 x 128 x 128, axis 1', [(2, 150, 128, 128)], 1, 'float32', 0),
    Case('32 x 128 x 8000, 40% ignored', [(32, 128, 8000)], -1, 'float32', 0.4),
    Case('128 x 50257, float16', [(128, 50257)], -1, 'float16', 0),
]
IGNORE = -1

OURS, HYBRIDIZED, STATIC = 'ours', 'gluon, hybridized', 'gluon, static_alloc'
EAGER = 'gluon, as scripts call it'
CONTENDERS = [OURS, HYBRIDIZED, STATIC, EAGER, 'SoftmaxOutput', 'softmax_cross_entropy']
TORCH = 'PyTorch F.cross_entropy'

PROBS, LOSSES = 'cross entropy from probabilities, 512 x 50257', 'loss from 512 values'
STOCK = 'stock'
UPDATES = 100  # of a metric in an epoch, which ends with its get()

# The largest ratio allowed of our time to that of another contender: for a case, forward and backward.
BOUNDS = {
    ('64 x 10', HYBRIDIZED): 0.95,
    ('128 x 1000', HYBRIDIZED): 1.0,
    ('16 x T x 2000, T from 5 to 60', HYBRIDIZED): 1.1,
    ('512 x 50257', HYBRIDIZED): 1.05,
    ('512 x 50257', EAGER): 0.4,
    ('8 x 21 x 128 x 128, axis 1', HYBRIDIZED): 0.4,
    ('2 x 150 x 128 x 128, axis 1', HYBRIDIZED): 0.4,
    ('128 x 50257, float16', HYBRIDIZED): 0.1,
    (f'{PROBS}, update', STOCK): 0.02,
    (f'{LOSSES}, epoch', STOCK): 0.3,
}


def data(case):
    """Return the (logits, label) of each batch, the same for every contender; ignored labels are IGNORE."""
    rng = np.random.RandomState(0)
    return [_batch(case, shape, rng) for shape in case.shapes]


def _batch(case, shape, rng):
    pred = rng.standard_normal(shape).astype('float32')
    pred *= 3
    positions = tuple(np.delete(shape, case.axis).tolist())
    label = rng.randint(0, shape[case.axis], positions).astype('float32')
    label[rng.uniform(size=positions) < case.ignored] = IGNORE
    return pred.astype(case.dtype), label


def truth(case):
    """Return the loss of every position of all batches in float64, a row at a time; 0 where ignored."""
    return np.concatenate([_true_losses(pred, label, case.axis) for pred, label in data(case)])


def _true_losses(pred, label, axis):
    pred, label = np.moveaxis(pred, axis, -1).reshape(-1, pred.shape[axis]), label.ravel().astype(int)
    loss = np.zeros(len(label))
    for i in np.flatnonzero(label != IGNORE):
        row = pred[i].astype('float64')
        loss[i] = np.log(np.exp(row - row.max()).sum()) + row.max() - row[label[i]]
    return loss


def make(case, contender):
    """Return (forward, forward and backward, losses of all positions) as functions that return when done.

    None if the contender cannot solve the case. Where labels are ignored, gluon's loss takes a
    `sample_weight`. The third is None if the contender does not return the loss of each position.
    """
    import mxnet as mx
    from mxnet import autograd

    functions = _loss_functions(case, contender)
    if functions is None:
        return None
    call, each = functions
    batches = [[mx.nd.array(array, dtype=array.dtype) for array in batch] for batch in data(case)]
    for batch in batches:
        batch[0].attach_grad()
        if case.ignored and contender in (HYBRIDIZED, STATIC, EAGER):
            batch.append(mx.nd.expand_dims(batch[1] != IGNORE, axis=-1))

    def forward():
        for batch in batches:
            call(*batch).wait_to_read()

    def forward_backward():
        for batch in batches:
            with autograd.record():
                loss = call(*batch)
            loss.backward()
            batch[0].grad.wait_to_read()

    def losses():
        return np.concatenate([each(*batch).asnumpy().ravel() for batch in batches])

    return forward, forward_backward, each and losses


def _loss_functions(case, contender):
    """Return a contender's (loss, loss of each position or None), or None if it cannot solve the case."""
    import mxnet as mx
    from mxnet import gluon

    from gluon_stable_ce import StableSoftmaxCELoss

    if contender == OURS:
        options = {'axis': case.axis, 'ignore_label': IGNORE if case.ignored else None}
        return StableSoftmaxCELoss(**options), StableSoftmaxCELoss(reduction='none', **options)
    if contender in (HYBRIDIZED, STATIC, EAGER):
        call = gluon.loss.SoftmaxCrossEntropyLoss(axis=case.axis)
        if contender != EAGER:
            call.hybridize(static_alloc=contender == STATIC)

        def each(pred, label, weight=None):
            loss = -mx.nd.pick(mx.nd.log_softmax(pred, axis=case.axis), label, axis=case.axis)
            return loss if weight is None else loss * weight.squeeze()

        return call, each
    if (
        case.dtype == 'float16'
    ):  # the others want labels in the dtype of the logits, too small for the classes
        return None
    if contender == 'SoftmaxOutput':  # it returns the probabilities; only its gradient is that of the loss

        def call(pred, label):
            if case.axis == -1:
                pred, label = pred.reshape((-1, pred.shape[-1])), label.reshape((-1,))
            ignore = {'use_ignore': bool(case.ignored), 'ignore_label': IGNORE}
            return mx.nd.SoftmaxOutput(pred, label, multi_output=case.axis == 1, **ignore)

        return call, None
    if len(case.shapes[0]) == 2 and not case.ignored:
        return mx.nd.softmax_cross_entropy, None  # the sum over the batch
    return None


def make_torch(case):
    """Return the same for PyTorch's F.cross_entropy, with labels of its own dtype."""
    import torch
    import torch.nn.functional as F

    batches = []
    for pred, label in data(case):
        pred, label = torch.tensor(pred), torch.tensor(label.astype('int64'))
        if case.axis == -1:
            pred, label = pred.reshape(-1, pred.shape[-1]), label.reshape(-1)
        batches.append((pred.requires_grad_(), label))

    def forward():
        with torch.no_grad():
            for pred, label in batches:
                F.cross_entropy(pred, label, ignore_index=IGNORE)

    def forward_backward():
        for pred, label in batches:
            pred.grad = None
            F.cross_entropy(pred, label, ignore_index=IGNORE).backward()

    def losses():
        with torch.no_grad():
            each = [F.cross_entropy(*batch, ignore_index=IGNORE, reduction='none') for batch in batches]
        return np.concatenate([loss.float().numpy().ravel() for loss in each])

    return forward, forward_backward, losses


def make_metrics(name):
    """Return each contender's (metric, labels, preds), by contender."""
    import mxnet as mx

    from gluon_stable_ce import StableCrossEntropy, StableLoss

    rng = np.random.RandomState(0)
    if name == LOSSES:
        loss = mx.nd.array(rng.uniform(size=512))
        return {OURS: (StableLoss(), None, [loss]), STOCK: (mx.metric.Loss(), None, [loss])}
    probs = mx.nd.softmax(mx.nd.array(rng.standard_normal((512, 50257))))
    label = mx.nd.array(rng.randint(0, 50257, 512))
    return {
        OURS: (StableCrossEntropy(), [label], [probs]),
        STOCK: (mx.metric.CrossEntropy(), [label], [probs]),
    }
