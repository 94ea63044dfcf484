"""The formula of the loss of one position: label smoothing and z-loss."""

from typing import Any

from .array_api import Array, F
from .call import Call
from .class_terms import ClassTerms


def combine(F: F, call: Call, terms: ClassTerms) -> Array:
    r"""Combine the terms of each position.

    .. math:: \ell = (1-a)\, w_y (-\log p_y) + \frac{a}{C} \sum_j w_j (-\log p_j) + s \log^2 \sum_j e^{z_j}

    with label smoothing a, class weights w and `lse_square_scale` s.
    """
    smoothing, scale = call.options.label_smoothing, call.options.lse_square_scale
    loss: Any = terms.nll
    if smoothing == 1:  # 0 * inf would be NaN
        loss = terms.uniform_nll
        if call.ndim is None:  # every graph of symbols reads the label
            loss = F.where(F.zeros_like(loss), F.BlockGrad(terms.nll), loss)
    elif smoothing:
        uniform: Any = terms.uniform_nll
        loss = (1 - smoothing) * loss + smoothing * uniform
    if scale:
        logsumexp: Any = terms.logsumexp
        # the gradient of an infinite one's square is infinite, and NaN where it is multiplied by 0
        is_finite = logsumexp - logsumexp == 0
        logsumexp = F.where(is_finite, logsumexp, F.BlockGrad(logsumexp))
        loss = loss + scale * F.square(logsumexp)
    return loss
