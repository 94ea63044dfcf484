"""The options of losses and metrics, the values that they may have, and their checks."""

import inspect
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from typing import (
    Any,
    Callable,
    Dict,
    Literal,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    cast,
    get_args,
)

import numpy as np

INTEGERS = 2**53 - 1  # float64, in which labels are compared, tells this one from its neighbours
FLOAT32_MAX = 3.4028234663852886e38  # MXNet reads larger numbers as others

Reduction = Literal['mean', 'valid', 'sum', 'none']
InvalidLabel = Literal['nan', 'raise', 'clip']
MetricInvalidLabel = Literal['raise', 'clip']
Kernel = Literal['auto', 'stock', 'fused']
PredType = Literal['probs', 'logits', 'log_probs']
REDUCTIONS, INVALID_LABELS = get_args(Reduction), get_args(InvalidLabel)
METRIC_INVALID_LABELS = get_args(MetricInvalidLabel)
KERNELS, PRED_TYPES = get_args(Kernel), get_args(PredType)


BLOCK_OPTIONS = ('prefix', 'params')  # of every gluon.Block
Init = TypeVar('Init', bound=Callable[..., None])
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Options(NamedTuple):
    """The checked options of a loss or a metric. A metric has no `batch_axes`, and defaults of others."""

    axis: int = -1
    summed_axes: Tuple[int, ...] = ()  # further class axes of dense log-probabilities, over which is summed
    batch_axes: Tuple[int, ...] = (0,)  # none: the loss is one number for the whole batch
    sparse_label: bool = True
    pred_type: PredType = 'logits'
    weight: Optional[float] = None
    ignore_label: Optional[int] = None
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    reduction: Reduction = 'mean'
    invalid_label: InvalidLabel = 'nan'
    kernel: Kernel = 'auto'

    @property
    def class_axes(self) -> Tuple[int, ...]:
        """All axes of `pred` that are no positions."""
        return (self.axis, *self.summed_axes)


def checks_names(init: Init) -> Init:
    """Let an ``__init__`` refuse unknown options by the name of the class that was called, with a hint."""
    parameters = list(inspect.signature(init).parameters.values())[1:]
    known = [parameter.name for parameter in parameters if parameter.kind not in _VARIADIC]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        known.extend(BLOCK_OPTIONS)

    @wraps(init)
    def checked(self, *args, **kwargs):
        for name in kwargs:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f'did you mean {near[0]!r}?' if near else f'expected one of {", ".join(known)}'
                raise TypeError(f'{type(self).__name__}: unknown option {name!r}; {hint}')
        init(self, *args, **kwargs)

    return cast(Init, checked)


def check_loss_options(given: Dict[str, Any]) -> Options:
    """Check the options of a loss, by the names of its arguments.

    Raises
    ------
    TypeError, ValueError
        If an option or a combination of options is meaningless.
    """
    sparse_label = _gluons_flag('sparse_label', given['sparse_label'])
    axis, *summed_axes = _as_axes('axis', given['axis'])
    scale, weight, batch_axis = given['lse_square_scale'], given['weight'], given['batch_axis']
    options = Options(
        axis=axis,
        summed_axes=tuple(summed_axes),
        batch_axes=() if batch_axis is None else _as_axes('batch_axis', batch_axis),
        sparse_label=sparse_label,
        pred_type='log_probs' if _gluons_flag('from_logits', given['from_logits']) else 'logits',
        weight=check_number(
            'weight',
            float(weight) if isinstance(weight, (bool, np.bool_)) else weight,
            low=-FLOAT32_MAX,
            high=FLOAT32_MAX,
            optional=True,
        ),
        ignore_label=check_ignore_label(given['ignore_label'], sparse_label),
        label_smoothing=check_number('label_smoothing', given['label_smoothing'], low=0, high=1),
        lse_square_scale=check_number('lse_square_scale', scale, low=0, high=FLOAT32_MAX),
        reduction=check_choice('reduction', given['reduction'], REDUCTIONS),
        invalid_label=check_choice('invalid_label', given['invalid_label'], INVALID_LABELS),
        kernel=check_choice('kernel', given['kernel'], KERNELS),
    )
    _check_combination(options)
    return options


def check_metric_options(given: Dict[str, Any]) -> Options:
    """Check the options of a metric, by the names of its arguments; errors as `check_loss_options`."""
    sparse_label = check_flag('sparse_label', given['sparse_label'])
    invalid_label = check_choice('invalid_label', given['invalid_label'], METRIC_INVALID_LABELS)
    axis, *summed_axes = _as_axes('axis', given['axis'])
    options = Options(
        axis=axis,
        summed_axes=tuple(summed_axes),
        batch_axes=(),
        sparse_label=sparse_label,
        pred_type=check_choice('pred_type', given['pred_type'], PRED_TYPES),
        ignore_label=check_ignore_label(given['ignore_label'], sparse_label),
        invalid_label='clip' if invalid_label == 'clip' else 'nan',  # `get` raises, and no update
        kernel=check_choice('kernel', given['kernel'], KERNELS),
    )
    _check_combination(options, 'raise')
    return options


def _check_combination(options: Options, default: str = 'nan') -> None:
    """Raise ValueError unless the options mean something together; `default` is that of invalid_label."""
    if options.summed_axes and (options.sparse_label or options.pred_type == 'logits'):
        raise ValueError(
            f'axis: expected one class axis for sparse labels and for logits, got {options.class_axes}'
        )
    if options.summed_axes and (options.label_smoothing or options.reduction == 'none'):
        raise ValueError("axis: expected one class axis with label_smoothing or reduction='none'")
    if options.pred_type == 'log_probs' and options.lse_square_scale:
        raise ValueError(
            'lse_square_scale: expected 0 with from_logits=True, as log-probabilities have a logsumexp of 0; '
            f'got {options.lse_square_scale}'
        )
    if not options.sparse_label and options.invalid_label != 'nan':
        raise ValueError(
            f'invalid_label: expected {default!r} with sparse_label=False, as a distribution has no label to '
            f'check; got {options.invalid_label!r}'
        )


def _as_axes(name: str, axes: Any) -> Tuple[int, ...]:
    """Return one axis or several as a tuple; TypeError or ValueError if they are something else."""
    axes = axes.tolist() if isinstance(axes, np.ndarray) else axes
    axes = axes if isinstance(axes, (list, tuple)) else (axes,)
    checked = tuple(check_number(name, axis, Integral) for axis in axes)
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f'{name}: expected one axis or several different ones, got {axes}')
    return checked


def check_number(
    name: str,
    value: Any,
    kind: Any = Real,
    low: float = float('-inf'),
    high: float = float('inf'),
    optional: bool = False,
) -> Any:
    """Return `value` as an int or a float, or an optional None.

    Raises
    ------
    TypeError, ValueError
        If it is no such number.
    """
    if value is None and optional:
        return None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f'{name}: expected {"an integer" if kind is Integral else "a number"}, got {value!r}')
    if not low <= value <= high:
        raise ValueError(f'{name}: expected a number from {low} to {high}, got {value}')
    return int(value) if kind is Integral else float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; TypeError unless it is one, or 0 or 1."""
    if not isinstance(value, (bool, np.bool_, Integral)) or value not in (0, 1):
        raise TypeError(f'{name}: expected True or False, got {value!r:.80}')
    return bool(value)


def _gluons_flag(name: str, value: Any) -> bool:
    """Return a flag of gluon's loss, for which None is False."""
    return value is not None and check_flag(name, value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    """Return `value`; ValueError unless it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f'{name}: expected one of {", ".join(map(repr, choices))}, got {value!r:.80}')
    return value


def check_ignore_label(ignore_label: Any, sparse_label: bool) -> Optional[int]:
    """Return `ignore_label`; TypeError or ValueError unless labels can be compared with it."""
    ignore_label = check_number('ignore_label', ignore_label, Integral, -INTEGERS, INTEGERS, optional=True)
    if not sparse_label and ignore_label is not None:
        raise ValueError(
            'ignore_label: expected None with sparse_label=False, as a distribution has no label to compare '
            f'with {ignore_label}; in the loss, a sample_weight of 0 removes a position'
        )
    return ignore_label


def as_numbers(name: str, values: Any) -> np.ndarray:
    """Return a NumPy array or a list of numbers as float64; TypeError if it is something else."""
    array = np.asarray(values) if isinstance(values, (np.ndarray, list, tuple)) else np.asarray(None)
    if array.dtype.kind not in 'iuf':
        raise TypeError(f'{name}: expected an array or a list of numbers, got {values!r:.80}')
    return array.astype('float64')
