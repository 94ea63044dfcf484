"""A script as a user types it, for the type checkers only: tests/test_readme.py runs them on it."""

from typing import Optional

import mxnet as mx
import numpy as np
from mxnet import gluon

from gluon_stable_ce import (
    StableBitsPerToken,
    StableCrossEntropy,
    StableLoss,
    StablePerplexity,
    StableSoftmaxCELoss,
    StableSoftmaxCrossEntropyLoss,
    audit,
    patch,
)


def make_loss(pad: Optional[int] = None) -> StableSoftmaxCrossEntropyLoss:
    return StableSoftmaxCrossEntropyLoss(
        1, ignore_label=pad, reduction='sum', invalid_label='raise', kernel='stock'
    )


loss_fn = make_loss(-1)
loss: gluon.loss.Loss = StableSoftmaxCELoss(label_smoothing=0.1)
count: int = loss_fn.valid_count([1, -1])
metric: StableCrossEntropy = loss_fn.create_metric(name='nll')
metrics = mx.metric.CompositeEvalMetric(
    [metric, StablePerplexity(0, pred_type='logits'), StableBitsPerToken(pred_type='log_probs'), StableLoss()]
)
metric.load_state_dict(metric.state_dict())
metric.merge(metric)
whole: StableCrossEntropy = metric.all_reduce(mx.kv.create('local'))
name, nats = whole.get()
infinite: int = whole.num_infinite
metric.update(mx.nd.zeros(2), mx.nd.softmax(mx.nd.zeros((2, 3))))
StableLoss().update(None, mx.nd.zeros(2))
with patch(ignore_label=-1) as patched:
    replaced: int = patched.losses + patched.metrics
table: str = audit(np.full((1, 2), 0.5), np.ones(1), pred_type='probs').table()
