"""A call of a loss or a metric as one value: its options, and what is known of its arrays.

`plan` makes it. Everything below takes ``(F, call, ...)``, and a compiled graph belongs to one `Call`.
A field is None where a symbol does not tell.
"""

from enum import Enum
from typing import Any, NamedTuple, Optional, Sequence, Tuple

from .options import Options

INPUTS = ('pred', 'label', 'sample_weight', 'class_weight')  # of a graph, in this order


def given(inputs: Sequence[Any]) -> Tuple[str, ...]:
    """Name the inputs that are given, of those in the order of INPUTS."""
    return tuple(name for name, array in zip(INPUTS, inputs) if array is not None)


class Fill(Enum):
    """The terms of positions that have none of their own: where the label is no class, or is ignored."""

    LOSS = float('nan'), 0.0
    METRIC = -1.0, -2.0  # marks: no NLL of a sparse label is negative

    def __init__(self, invalid: float, ignored: float) -> None:
        self.invalid, self.ignored = invalid, ignored

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the name: an Enum is found by its value, and NaN is not equal to itself."""
        return getattr, (Fill, self.name)


class Call(NamedTuple):
    """What a graph may rely on. Hashable: a graph belongs to one call, and serves arrays of all sizes.

    Of the sizes it holds only what the fields of classes and `is_empty` say.
    """

    options: Options = Options()
    fill: Fill = Fill.LOSS
    inputs: Tuple[str, ...] = ('pred', 'label')  # those of INPUTS that are given
    np_style: bool = False  # whether the inputs are of the NumPy-style API
    dtype: Optional[str] = None  # of `pred`
    ndim: Optional[int] = None  # of `pred`; None for symbols
    label_dtype: Optional[str] = None
    label_ndim: Optional[int] = None
    weight_layout: Optional[str] = None  # of sample_weight: 'keepdims', 'pred', 'positions' or 'batch'
    # so few that an array of them is cheap, and that `dtype` holds every label exactly
    has_few_classes: bool = False
    classes: Optional[int] = None  # their number, where the graph serves no other
    # so many, or maybe so many, that `log_softmax` adds up their exponentials badly, which the stock kernel
    # mends
    has_many_classes: bool = False
    is_empty: bool = False  # whether there are no positions, for which MXNet's static memory fails
    kernel: str = 'stock'
    # whether an operator that can add gradients has to stand in front of the fused one
    needs_guard: bool = True

    @property
    def compute_dtype(self) -> str:
        """In what the class axis is reduced."""
        return 'float64' if self.dtype == 'float64' else 'float32'

    @property
    def label_compare_dtype(self) -> str:
        """In what labels are compared: float64 holds all."""
        return self.compute_dtype if self.has_few_classes else 'float64'
