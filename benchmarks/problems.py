"""The problems of the benchmark, and how each contender solves them. Importing this needs NumPy only."""

import os
from collections import namedtuple
from unittest.mock import patch

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
    Case('32 x 128 x 8000', [(32, 128, 8000)], -1, 'float32', 0),
    Case('32 x 128 x 8000, 40% ignored', [(32, 128, 8000)], -1, 'float32', 0.4),
    Case('128 x 50257, float16', [(128, 50257)], -1, 'float16', 0),
]
IGNORE = -1

# The package's loss: with the kernel that it chooses, and with each kernel.
OURS, OURS_STOCK, OURS_FUSED = 'ours', 'ours, stock', 'ours, fused'
OURS_NESTED = 'ours, stock, in a graph of symbols'  # as in a hybridized net, and in an export
KERNELS = {OURS: 'auto', OURS_STOCK: 'stock', OURS_FUSED: 'fused', OURS_NESTED: 'stock'}
HYBRIDIZED, STATIC, EAGER = 'gluon, hybridized', 'gluon, static_alloc', 'gluon, as scripts call it'
CAST, SAFE = "gluon, after astype('float32')", 'gluon, MXNET_SAFE_ACCUMULATION=1'  # for float16
GLUON = (HYBRIDIZED, STATIC, EAGER, CAST, SAFE)
OUTPUT, SUM = 'SoftmaxOutput', 'softmax_cross_entropy'
CONTENDERS = [OURS_STOCK, OURS_NESTED, OURS_FUSED, *GLUON, OUTPUT, SUM]
TORCH = 'PyTorch F.cross_entropy'
OPERATOR = 'operator'  # a copy, which makes the logits: its time and memory are taken off

# Whose best time ours is compared with.
RIVALS = (STATIC, TORCH)

# A whole training step of one dense layer: forward, loss, backward, update.
Net = namedtuple('Net', 'name batch features classes')
NETS = [
    Net('Dense 64 to 10, batch of 64', 64, 64, 10),
    Net('Dense 256 to 1000, batch of 128', 128, 256, 1000),
    Net('Dense 128 to 50257, batch of 512', 512, 128, 50257),
]
NET_CONTENDERS = [OURS_STOCK, OURS_NESTED, OURS_FUSED, HYBRIDIZED, STATIC]

PROBS, LOSSES = 'cross entropy from probabilities, 512 x 50257', 'loss from 512 values'
LOGITS = 'cross entropy from logits, 512 x 50257'
PRINTED = 'cross entropy from probabilities, 64 x 10, with a get() after each update'
STOCK, READ = 'stock', 'one operator, and a read of its result'
# Of a metric in an epoch, which ends with its get()
UPDATES = {PROBS: 50, LOGITS: 20, LOSSES: 100, PRINTED: 1}

LIMIT, GRADIENT = "the machine's limit", 'the size of the gradient'
# The largest ratio allowed of one of ours to something else: of times, or of what `what` names.
Bound = namedtuple('Bound', 'what ours other at_most')
# Of the fused kernel to gluon's loss with static memory
_FUSED = {
    '64 x 10': 0.7,
    '128 x 1000': 0.7,
    '16 x T x 2000, T from 5 to 60': 0.45,
    '256 x 10000': 0.45,
    '512 x 50257': 0.2,
    '2048 x 32000': 0.2,
    '8 x 21 x 128 x 128, axis 1': 0.07,
    '2 x 150 x 128 x 128, axis 1': 0.04,
    '32 x 128 x 8000, 40% ignored': 0.2,
    '128 x 50257, float16': 0.005,
}
_STOCK = {'128 x 1000': 1.6, '256 x 10000': 1.6, '512 x 50257': 1.9}
NOT_SMALL = [case.name for case in CASES[2:]]
BOUNDS = [
    *(Bound(name, OURS_FUSED, STATIC, most) for name, most in _FUSED.items()),
    *(Bound(f'{name}, forward', OURS_FUSED, STATIC, 0.8) for name in _FUSED),
    *(Bound(name, OURS_STOCK, STATIC, most) for name, most in _STOCK.items()),
    *(Bound(name, OURS_NESTED, STATIC, 2.2) for name in _STOCK),
    *(Bound(name, OURS_FUSED, TORCH, 1.0) for name in NOT_SMALL),
    *(Bound(name, OURS_FUSED, LIMIT, 1.8) for name in ('512 x 50257', '2048 x 32000')),
    *(Bound(f'{name}, peak memory', OURS_FUSED, GRADIENT, 1.15) for name in NOT_SMALL[1:]),
    Bound(f'{LOGITS}, epoch', OURS_FUSED, LIMIT, 1.3),
    Bound(f'{PROBS}, update', OURS, STOCK, 0.02),
    Bound(f'{PROBS}, epoch', OURS, STOCK, 0.05),
    Bound(f'{LOSSES}, epoch', OURS, STOCK, 0.5),
    Bound(f'{PRINTED}, epoch', OURS, STOCK, 2.0),
]


def small(case):
    """Return a tiny problem of the same kind."""
    return case._replace(shapes=[tuple(min(size, 8) for size in case.shapes[0])])


def data(case):
    """Return the (logits, label) of each batch, the same for every contender; ignored labels are IGNORE."""
    rng = np.random.default_rng(0)
    return [_batch(case, shape, rng) for shape in case.shapes]


def _batch(case, shape, rng):
    pred = rng.standard_normal(shape, dtype='float32')
    pred *= 3
    positions = tuple(np.delete(shape, case.axis).tolist())
    label = rng.integers(0, shape[case.axis], positions).astype('float32')
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


Steps = namedtuple('Steps', 'forward both losses')


def inputs(case):
    """Return (input of the operator, label) of each batch, and gluon's weights where labels are ignored."""
    import mxnet as mx

    batches = []
    for pred, label in data(case):
        pred, label = (mx.nd.array(array, dtype=array.dtype) for array in (pred, label))
        pred.attach_grad()
        weights = [mx.nd.expand_dims(label != IGNORE, axis=-1)] if case.ignored else []
        batches.append((pred, label, *weights))
    mx.nd.waitall()
    return batches


def make(case, contender, batches=None):
    """Return (forward, forward and backward, losses of all positions) as functions that return when done.

    None if the contender cannot solve the case. The logits come out of an operator, as a net's do: the first
    two run that operator and the loss, and OPERATOR is the operator alone. Where labels are ignored, gluon's
    loss takes a `sample_weight`. `losses` is None if the contender does not return each position's loss.
    """
    import mxnet as mx

    functions = _loss_functions(case, contender)
    if functions is None:
        return None
    call, each = functions
    batches = inputs(case) if batches is None else batches
    takes = slice(None, None if contender in GLUON else 1)  # the label, and weights

    def forward():
        for pred, *others in batches:
            call(mx.nd.identity(pred), *others[takes]).wait_to_read()

    def losses():
        values = [each(pred.detach(), *others[takes]) for pred, *others in batches]
        return np.concatenate([value.asnumpy().ravel() for value in values])

    steps = Steps(forward, _training_step(contender, call, batches, takes), each and losses)
    return Steps(*map(_with_safe_accumulation, steps)) if contender == SAFE else steps


def _training_step(contender, call, batches, takes):
    """Return forward and backward of the operator and of the loss."""
    import mxnet as mx
    from mxnet import autograd

    def step(pred, *others):
        with autograd.record():
            loss = call(mx.nd.identity(pred), *others)
        # these need no new head gradient: SoftmaxOutput ignores it, and the operator alone may have anything
        loss.backward({OPERATOR: pred.detach(), OUTPUT: loss}.get(contender))
        pred.grad.wait_to_read()

    def both():
        for pred, *others in batches:
            step(pred, *others[takes])

    return both


def _loss_functions(case, contender):
    """Return a contender's (loss, loss of each position or None), or None if it cannot solve the case."""
    import mxnet as mx

    if contender == OPERATOR:
        return (lambda pred, label: pred), None
    if contender in KERNELS:
        return _ours(case, contender)
    if contender in GLUON:
        return _gluon(case, contender)
    if case.dtype == 'float16':  # the others want labels of the logits' dtype, too small for the classes
        return None
    if contender == OUTPUT:
        return _softmax_output(case), None
    if len(case.shapes[0]) == 2 and not case.ignored:
        return mx.nd.softmax_cross_entropy, None  # the sum over the batch
    return None


def _ours(case, contender):
    from gluon_stable_ce import StableSoftmaxCELoss
    from gluon_stable_ce.kernels import library

    kernel = KERNELS[contender]
    if kernel == 'fused' and not library.load():
        return None
    options = {'axis': case.axis, 'ignore_label': IGNORE if case.ignored else None, 'kernel': kernel}
    call, each = StableSoftmaxCELoss(**options), StableSoftmaxCELoss(reduction='none', **options)
    return (_nested(call), _nested(each)) if contender == OURS_NESTED else (call, each)


def _nested(loss_fn, layer=None):
    """Return a net that has the loss in its graph, behind a layer if there is one."""
    import mxnet as mx

    class Net(mx.gluon.HybridBlock):
        def __init__(self):
            super().__init__()
            self.layer, self.loss_fn = layer, loss_fn

        def hybrid_forward(self, F, pred, label):
            return self.loss_fn(self.layer(pred) if self.layer else pred, label)

    net = Net()
    net.hybridize(static_alloc=True, static_shape=True)
    return net


def _gluon(case, contender):
    import mxnet as mx

    if contender in (CAST, SAFE) and case.dtype != 'float16':
        return None
    loss_fn = mx.gluon.loss.SoftmaxCrossEntropyLoss(axis=case.axis)
    if contender != EAGER:
        loss_fn.hybridize(static_alloc=contender != HYBRIDIZED)

    dtype = 'float32' if contender == CAST else case.dtype

    def call(pred, label, *weight):
        return loss_fn(pred.astype(dtype, copy=False), label, *weight)

    def each(pred, label, weight=None):
        log_p = mx.nd.log_softmax(pred.astype(dtype, copy=False), axis=case.axis)
        loss = -mx.nd.pick(log_p, label, axis=case.axis)
        return loss if weight is None else loss * weight.squeeze()

    return loss_fn if dtype == case.dtype else call, each


def _with_safe_accumulation(step):
    """Let MXNet add up float16 in float32 while `step` runs; it reads the variable in every operator."""

    def safe():
        with patch.dict(os.environ, MXNET_SAFE_ACCUMULATION='1'):
            return step()

    return safe


def _softmax_output(case):
    """Return the operator, whose output is the probabilities; only its gradient is that of the loss."""
    import mxnet as mx

    def call(pred, label):
        if case.axis == -1:
            pred, label = pred.reshape((-1, pred.shape[-1])), label.reshape((-1,))
        ignore = {'use_ignore': bool(case.ignored), 'ignore_label': IGNORE}
        return mx.nd.SoftmaxOutput(pred, label, multi_output=case.axis == 1, **ignore)

    return call


def make_torch(case, contender=TORCH):
    """Return the same for PyTorch's F.cross_entropy, or for the operator alone; labels are int64."""
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
                logits = pred.clone()
                if contender != OPERATOR:
                    F.cross_entropy(logits, label, ignore_index=IGNORE)

    def step(pred, label):
        pred.grad = None
        logits = pred.clone()
        if contender == OPERATOR:
            logits.backward(pred.detach())
        else:
            F.cross_entropy(logits, label, ignore_index=IGNORE).backward()

    def both():
        for batch in batches:
            step(*batch)

    def losses():
        with torch.no_grad():
            each = [F.cross_entropy(*batch, ignore_index=IGNORE, reduction='none') for batch in batches]
        return np.concatenate([loss.float().numpy().ravel() for loss in each])

    return Steps(forward, both, losses)


def make_net(net, contender):
    """Return a whole training step of a dense layer, or None if the contender is not there."""
    import mxnet as mx
    from mxnet import autograd, gluon

    functions = _loss_functions(Case(net.name, [(net.batch, net.classes)], -1, 'float32', 0), contender)
    if functions is None:
        return None
    loss_fn = functions[0]
    dense = gluon.nn.Dense(net.classes, in_units=net.features)
    dense.initialize()
    dense.hybridize(static_alloc=True)
    nested = _nested(loss_fn, dense) if contender == OURS_NESTED else None
    trainer = gluon.Trainer(dense.collect_params(), 'sgd', {'learning_rate': 1e-3})
    rng = np.random.RandomState(0)
    data = mx.nd.array(rng.standard_normal((net.batch, net.features)))
    label = mx.nd.array(rng.randint(0, net.classes, net.batch))

    def step():
        with autograd.record():
            loss = nested(data, label) if nested else loss_fn(dense(data), label)
        loss.backward()
        trainer.step(net.batch)
        mx.nd.waitall()

    return step


def make_metrics(name):
    """Return each contender's (metric, labels, preds), by contender."""
    import mxnet as mx

    from gluon_stable_ce import StableCrossEntropy, StableLoss
    from gluon_stable_ce.kernels import library

    rng = np.random.RandomState(0)
    if name == LOSSES:
        loss = mx.nd.array(rng.uniform(size=512))
        return {OURS: (StableLoss(), None, [loss]), STOCK: (mx.metric.Loss(), None, [loss])}
    positions, classes = (64, 10) if name == PRINTED else (512, 50257)
    logits = mx.nd.array(rng.standard_normal((positions, classes)))
    label = mx.nd.array(rng.randint(0, classes, positions))
    if name == LOGITS:
        kernels = [OURS_STOCK, *([OURS_FUSED] if library.load() else [])]
        metrics = {one: StableCrossEntropy(pred_type='logits', kernel=KERNELS[one]) for one in kernels}
        return {one: (metric, [label], [logits]) for one, metric in metrics.items()}
    probs = mx.nd.softmax(logits)
    metrics = {OURS: StableCrossEntropy(), STOCK: mx.metric.CrossEntropy()}
    if name == PRINTED:
        metrics[READ] = _Read()
    return {one: (metric, [label], [probs]) for one, metric in metrics.items()}


class _Read:
    """The least that a metric does whose values come from the device."""

    def reset(self):
        pass

    def update(self, labels, preds):
        self.values = labels[0] + 1

    def get(self):
        self.values.asnumpy()


def bytes_read(name):
    """Return the size of the logits that an update of a metric reads, or None if it reads none."""
    return 512 * 50257 * 4 if name == LOGITS else None
