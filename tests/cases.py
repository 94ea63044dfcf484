"""The one source of what tests run on: shapes and axes, options and data."""

from typing import NamedTuple, Optional

import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


class Layout(NamedTuple):
    """A shape of `pred`, its class axis, of size CLASSES, and its batch axis or axes."""

    shape: tuple
    axis: int
    batch_axis: object = 0


CLASSES = 5
CLASS_WEIGHT = [1, 2, 0, 0.5, 3]
LAYOUTS = {
    'rows': Layout((6, 5), -1),
    'rows-class-first': Layout((5, 6), 0, 1),
    'text': Layout((3, 4, 5), -1),
    'text-time-first': Layout((3, 4, 5), 2, 1),
    'text-every-token': Layout((3, 4, 5), -1, (0, 1)),
    'image': Layout((3, 5, 2, 4), 1),
    'image-batch-last': Layout((3, 5, 2, 4), -3, -1),
    'image-every-row': Layout((3, 5, 2, 4), 1, (2, 0)),
}
# One of each rank, with the class axis last and moved, for tests that try each mode.
FEW_LAYOUTS = ('rows', 'text', 'image')
REDUCTIONS = ['mean', 'valid', 'sum', 'none']
SPARSE = {
    'plain': {},
    'weight': {'weight': 0.5},
    'ignore': {'ignore_label': -1},
    'ignore-a-class': {'ignore_label': 2},
    'class-weight': {'class_weight': CLASS_WEIGHT},
    'smoothing': {'label_smoothing': 0.1},
    'smoothing-only': {'label_smoothing': 1},
    'z-loss': {'lse_square_scale': 1e-2},
    'log-probs': {'from_logits': True},
    'log-probs-options': {
        'from_logits': True, 'label_smoothing': 0.2, 'class_weight': CLASS_WEIGHT, 'ignore_label': -1,
    },
    'clip': {'invalid_label': 'clip'},
    'all': {
        'ignore_label': -1, 'class_weight': CLASS_WEIGHT, 'label_smoothing': 0.1, 'lse_square_scale': 1e-2, 'weight': 2.0,
    },
}  # fmt: skip
DENSE = {
    f'dense-{name}': {'sparse_label': False, **options}
    for name, options in {
        'plain': {},
        'log-probs': {'weight': 0.5, 'from_logits': True},
        'class-weight': {'class_weight': CLASS_WEIGHT, 'label_smoothing': 0.1},
        'z-loss': {'lse_square_scale': 1e-2},
    }.items()
}
WEIGHT_SHAPES = {  # of a sample_weight for the layout 'image'
    'batch': (3,),
    'one': (1,),
    'label': (3, 2, 4),
    'gluon': (3, 1, 2, 4),
    'gluon-broadcast': (3, 1, 1, 1),
    'pred': (3, 5, 2, 4),
    'pred-broadcast': (1, 5, 1, 4),
}
NOT_IN_GRAPHS = [
    WEIGHT_SHAPES[name] for name in ('batch', 'one', 'label')
]  # for axis=1, as the rank is unknown


def params(named):
    """A dict as parameters of pytest, with the names as ids."""
    return [pytest.param(value, id=name) for name, value in named.items()]


def rows(named):
    """A dict of tuples as parameters of pytest for several arguments, with the names as ids."""
    return [pytest.param(*values, id=name) for name, values in named.items()]


def make(rng, shape, axis, sparse_label=True, from_logits=False, ignore_label=None, invalid=True, **_):
    """Predictions and labels, float32, that exercise what the options allow: ignored and invalid labels, and targets of 0."""
    pred = rng.normal(0, 3, shape)
    if from_logits:
        pred = np.moveaxis(reference.log_softmax(np.moveaxis(pred, axis, -1)), -1, axis)
    classes, positions = shape[axis], tuple(np.delete(shape, axis))
    if sparse_label:
        label = rng.randint(0, classes, positions).astype('float32')
        flat = label.reshape(-1)
        if ignore_label is not None:
            flat[::3] = ignore_label
        if invalid:
            flat[1::7] = classes + 3
    else:
        label = np.moveaxis(rng.dirichlet(np.ones(classes), positions), -1, axis).astype('float32')
        label[label < 0.1] = 0
    return pred.astype('float32'), label


def assert_within(got, expected, bound, skipped=False):
    """NaN and infinities are exactly where they are expected, and all other entries are within `bound`; except those `skipped`."""
    got, expected, bound, skipped = np.broadcast_arrays(
        np.asarray(got, dtype='float64'), expected, bound, skipped
    )
    finite = np.isfinite(expected)
    error = np.abs(np.where(finite, got, 0) - np.where(finite, expected, 0))
    is_right = (
        np.where(finite, error <= bound, (got == expected) | (np.isnan(got) & np.isnan(expected))) | skipped
    )
    if not is_right.all():
        first = tuple(np.argwhere(~is_right)[0])
        raise AssertionError(
            f'at {first}: expected {expected[first]!r} within {bound[first]:.2g}, got {got[first]!r}\n'
            f'got\n{got}\nexpected\n{expected}'
        )


class Problem(NamedTuple):
    """A call of a loss: its inputs as NumPy arrays, and its options."""

    pred: np.ndarray
    label: np.ndarray
    sample_weight: Optional[np.ndarray]
    settings: dict

    @property
    def arrays(self):
        """The inputs that there are."""
        return [array for array in self[:3] if array is not None]

    @property
    def axis(self):
        """The class axis, counted from 0."""
        return self.settings['axis'] % self.pred.ndim


GRID = 16  # logits are multiples of 1/16 up to 50: sums of them are exact, in float16 too
LABEL_DTYPES = ['int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64']
HUGE = {'float16': 6e4, 'float32': 1e30, 'float64': 1e30}
HUGE_SQUARED = {'float16': 6e4, 'float32': 1e15, 'float64': 1e15}  # whose square is a float32


@st.composite
def problems(
    draw,
    dtypes=('float32', 'float64'),
    classes=12,
    options=True,
    ignored=True,
    dense=False,
    special=False,
    weighted=False,
    symbolic=False,
):
    """Draw a `Problem`: logits on a grid, any layout, labels of any dtype that can name the classes.

    Parameters
    ----------
    dtypes : those of `pred`
    classes : how many there are at most
    options : whether options are set beside the axes
    ignored : whether ignore_label is among them
    dense : whether labels may be distributions
    special : whether there are infinite, huge and NaN logits, log-probabilities above 0, invalid labels and negative targets
    weighted : whether there may be a sample_weight
    symbolic : whether it is for a graph of symbols, which does not know ranks and dtypes: what needs them is left out
    """
    ndim = draw(st.integers(2, 4))
    order = draw(st.permutations(range(ndim)))
    axis, batch_axes = order[0], order[1 : 1 + draw(st.integers(1, ndim - 1 if special else 1))]
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[axis] = draw(st.integers(1, classes))
    dtype = draw(st.sampled_from(dtypes))
    pred = draw(hnp.arrays(np.int32, tuple(shape), elements=st.integers(-50 * GRID, 50 * GRID))) / GRID
    sparse_label = not dense or draw(st.sampled_from([True, True, False]))
    settings = {
        'axis': axis - draw(st.sampled_from([0, ndim])),
        'batch_axis': batch_axes[0] - draw(st.sampled_from([0, ndim])),
    }
    if settings['axis'] == settings['batch_axis']:
        settings['axis'] %= ndim
    if len(batch_axes) > 1:
        settings['batch_axis'] = draw(st.sampled_from([tuple, list]))(batch_axes)
    if options:
        unweighted = symbolic and dtype == 'float64'
        settings.update(
            draw(_options(shape[axis], sparse_label, special, ignored and sparse_label, unweighted))
        )
    if not sparse_label:
        settings['sparse_label'] = False
    if settings.get('from_logits'):
        pred = -np.abs(pred)
    if special:
        pred = draw(_with_special_logits(pred, dtype, settings))
    pred = pred.astype(dtype)
    label = draw(_labels(pred, axis, sparse_label, settings.get('ignore_label'), special, symbolic))
    if special and settings.get('from_logits') and (label >= 0).all():
        pred = draw(
            _with(pred, [2**-10, 3.0])
        )  # rounding can raise log p above 0, and so can a missing normalisation
    sample_weight = None
    if weighted and draw(st.booleans()):
        # a graph cannot count axes from the other end
        known = not symbolic or (settings['axis'] == -1 and settings['batch_axis'] in (0, (0,), [0]))
        sample_weight = draw(_sample_weights(pred, axis, sorted(batch_axes), symbolic, known))
    return Problem(pred, label, sample_weight, settings)


def _options(classes, sparse_label, special, ignored, unweighted):
    """Settings that go together, with or without ignore_label and class weights."""
    choices = {
        'label_smoothing': st.sampled_from([0.1, 0.5, 1] if special else [0.1, 0.5]),
        'lse_square_scale': st.just(1e-2),
        'reduction': st.sampled_from(REDUCTIONS),
        'weight': st.sampled_from([0.5, 2]),
    }
    if not unweighted:
        choices['class_weight'] = st.lists(
            st.sampled_from([0, 0.5, 1, 3]), min_size=classes, max_size=classes
        )
    if ignored:
        choices['ignore_label'] = st.integers(-1, classes) | st.sampled_from(
            [-100, 2**24] if special else [-100]
        )
    if special:
        choices['from_logits'] = st.just(True)
        if sparse_label:
            choices['invalid_label'] = st.sampled_from(['clip', 'raise'])
    return st.fixed_dictionaries({}, optional=choices).map(_without_z_loss_of_log_probs)


def _without_z_loss_of_log_probs(options):
    return {
        name: value
        for name, value in options.items()
        if name != 'lse_square_scale' or 'from_logits' not in options
    }


@st.composite
def _with(draw, array, values, most=3):
    """`array` with some entries replaced by some of the `values`."""
    array = array.copy()
    entries = st.tuples(st.integers(0, array.size - 1), st.sampled_from(values))
    for index, value in draw(st.lists(entries, max_size=most)):
        array.flat[index] = value
    return array


def _with_special_logits(pred, dtype, settings):
    """-inf masks a class, a huge logit is a certainty, and NaN is a bug of the net."""
    huge = (HUGE_SQUARED if settings.get('lse_square_scale') else HUGE)[dtype]
    values = [-np.inf, -huge, np.nan] + ([] if settings.get('from_logits') else [huge, -np.inf])
    return _with(pred, values)


@st.composite
def _labels(draw, pred, axis, sparse_label, ignore_label, special, symbolic):
    shape, classes = pred.shape, pred.shape[axis]
    if not sparse_label:
        # eighths: exact in every dtype
        label = draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 8))) / 8
        label = draw(_with(label, [-1.0, -0.125, 0.0])) if special else label
        return label.astype(
            pred.dtype if symbolic else draw(st.sampled_from(['float16', 'float32', 'float64']))
        )
    dtype = draw(st.sampled_from(LABEL_DTYPES))
    positions = shape[:axis] + shape[axis + 1 :]
    named = st.integers(0, classes - 1)
    if ignore_label is not None and _is_in(dtype, ignore_label):
        named |= st.just(ignore_label)
    label = draw(hnp.arrays(dtype, positions, elements=named))
    if special:
        nearly_ignored = [] if ignore_label is None else [ignore_label + 1, ignore_label - 1]
        values = [label for label in nearly_ignored if _is_in(dtype, label)]
        values += [] if dtype[0] in 'iu' else [-0.0]
        label = draw(_with(label, invalid_labels(dtype, classes) + values))
        if draw(st.booleans()):
            label = np.expand_dims(label, axis)
    return label


def invalid_labels(dtype, classes):
    """What a dtype can hold outside [0, C), and what is no integer, and what is nearly a class."""
    values = [-1, -100, classes, classes + 1, 127, 200, 2**24, 2**24 + 1, 2**31 - 1, 2**32 + 1, -(2**40)]
    if dtype[0] in 'iu':
        values += [2**53 + 1, 2**62, np.iinfo(dtype).min or classes, np.iinfo(dtype).max]
    else:
        values += [float(np.nextafter(np.array(classes - 1, dtype), np.array(classes, dtype)))]
        values += [classes - 0.5, 0.5, -0.5, -1e-7, 3e9, 1e300, np.nan, np.inf, -np.inf]
    return [value for value in values if _is_in(dtype, value)]


def _is_in(dtype, value):
    """Whether a dtype can hold a value, or infinity and NaN."""
    info = np.iinfo(dtype) if dtype[0] in 'iu' else np.finfo(dtype)
    return not np.isfinite(value) or info.min <= value <= info.max


@st.composite
def _sample_weights(draw, pred, axis, batch_axes, symbolic, known):
    shape = pred.shape
    keepdims = tuple(1 if i == axis else size for i, size in enumerate(shape))
    layouts = [keepdims, tuple(size if draw(st.booleans()) else 1 for size in keepdims)]
    layouts += [shape, tuple(size if draw(st.booleans()) else 1 for size in shape)]
    batch = tuple(shape[i] for i in batch_axes)
    if known:
        layouts += [batch, (1,) * len(batch)]
    if not symbolic:
        layouts += [shape[:axis] + shape[axis + 1 :]]
    weight = draw(
        hnp.arrays('int8', draw(st.sampled_from(layouts)), elements=st.sampled_from([0, 1, 2, 3, 12, -4]))
    )
    return (weight / 4).astype(pred.dtype if symbolic else draw(st.sampled_from(['float32', 'float64'])))
