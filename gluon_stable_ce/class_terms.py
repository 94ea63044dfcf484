"""The terms of a loss or a metric: the class axis reduced to one number per position."""

from typing import Any, Callable, NamedTuple, Optional

from . import array_api
from .array_api import Array, F

ROUNDING = 1e-3  # by which probabilities may be above 1, and log-probabilities above 0


def is_impossible(pred: Any, pred_type: str) -> Any:
    """Where predictions, of MXNet or NumPy, are in no distribution. NaN is not among them."""
    return pred > ROUNDING if pred_type == 'log_probs' else (pred > 1 + ROUNDING) + (pred < 0)


class ClassTerms(NamedTuple):
    """Terms, (positions...), in nats; None for what was not asked for.

    In a graph of symbols, they have a class axis of length 1, and so the rank of the logits.

    `kernels.class_terms` returns them weighted by class, and filled in where labels are invalid or ignored.
    """

    nll: Array  # -w_y log p_y, or -sum_j w_j target_j log p_j
    logsumexp: Optional[Array] = None  # log sum_j exp z_j
    uniform_nll: Optional[Array] = None  # -1/C sum_j w_j log p_j

    def map(self, function: Callable[[Array], Array]) -> 'ClassTerms':
        """Call a function with each of the terms."""
        return ClassTerms(*(None if term is None else function(term) for term in self))


def weighted(F: F, term: Array, weight: Array) -> Array:
    """Multiply; a weight of 0 removes the term, and both gradients are 0, also if it is infinite or NaN."""
    return array_api.multiply(F, F.where(weight == 0, F.zeros_like(term), term), weight)
