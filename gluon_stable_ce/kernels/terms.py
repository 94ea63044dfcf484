"""What a kernel computes of the class axis."""

from typing import NamedTuple, Optional

from ..array_api import Array


class ClassTerms(NamedTuple):
    """Terms of the class axis, (positions...), in nats, weighted by class and filled in.

    None for what was not asked for.
    """

    nll: Array  # -log p of the label's class, or -sum_j target_j log p_j
    logsumexp: Optional[Array] = None  # log sum_j exp z_j
    uniform_nll: Optional[Array] = None  # -1/C sum_j w_j log p_j
