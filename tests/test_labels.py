"""How sparse labels are read: which are valid, which count, what class they name, and what is filled in."""

import cases
import mxnet as mx
import numpy as np
import pytest

from gluon_stable_ce.call import METRIC_FILL, Call
from gluon_stable_ce.labels import Labels, align_label, fill, is_counted, read_labels
from gluon_stable_ce.options import Options

nd = mx.nd
nan, inf = float('nan'), float('inf')
FEW = pytest.mark.parametrize('has_few_classes', [True, False], ids=['few', 'many'])


def call_of(ndim=2, label_ndim=1, **facts):
    """A call of float32 logits."""
    options = {name: facts.pop(name) for name in list(facts) if name in Options._fields}
    return Call(Options(**options), dtype='float32', ndim=ndim, label_ndim=label_ndim, **facts)


def evaluate(compose, label, pred):
    """What `compose(F, label, pred)` gives for symbols that know nothing of the arrays, as a NumPy array."""
    symbol = compose(mx.sym, mx.sym.var('label'), mx.sym.var('pred'))
    inputs = {'label': nd.array(label), 'pred': nd.array(pred)}
    return (
        symbol.bind(mx.cpu(), {name: inputs[name] for name in symbol.list_arguments()}).forward()[0].asnumpy()
    )


class TestReadLabels:
    LABELS = np.array([0, 2, 3, -1, 1.5, nan, inf, -inf, -0.0], 'float32')
    IS_VALID = (1, 1, 0, 0, 0, 0, 0, 0, 1)

    @FEW
    def test_index_and_is_valid(self, has_few_classes, ctx):
        call = call_of(has_few_classes=has_few_classes)
        labels = read_labels(nd, call, nd.array(self.LABELS), nd.zeros((9, 3)))
        assert labels.is_counted is None
        np.testing.assert_array_equal(labels.is_valid.asnumpy(), self.IS_VALID)
        index = labels.index.asnumpy()
        np.testing.assert_array_equal(index[np.array(self.IS_VALID) == 1], [0, 2, 0])
        assert np.isin(index, [0, 1, 2]).all()  # never NaN

    @FEW
    @pytest.mark.parametrize('dtype', cases.LABEL_DTYPES)
    def test_valid_labels_of_each_dtype(self, dtype, has_few_classes, ctx):
        label, call = nd.array([2, 0, 1], dtype=dtype), call_of(has_few_classes=has_few_classes)
        labels = read_labels(nd, call, label, nd.zeros((3, 3)))
        np.testing.assert_array_equal(labels.index.asnumpy(), [2, 0, 1])
        np.testing.assert_array_equal(labels.is_valid.asnumpy(), 1)

    @FEW
    def test_clip_names_the_nearest_class(self, has_few_classes, ctx):
        call = call_of(invalid_label='clip', has_few_classes=has_few_classes)
        labels = read_labels(nd, call, nd.array(self.LABELS), nd.zeros((9, 3)))
        assert labels.is_valid is None
        np.testing.assert_array_equal(labels.index.asnumpy(), [0, 2, 2, 0, 1, 0, 2, 0, 0])

    @pytest.mark.parametrize('ignore_label', [-1, 2, 7])
    def test_is_counted(self, ignore_label, ctx):
        label = np.array([0, 2, -1, 7, nan], 'float32')
        labels = read_labels(nd, call_of(ignore_label=ignore_label), nd.array(label), nd.zeros((5, 3)))
        np.testing.assert_array_equal(labels.is_counted.asnumpy(), label != ignore_label)
        np.testing.assert_array_equal(labels.is_valid.asnumpy(), [1, 1, 0, 0, 0])

    @pytest.mark.parametrize('dtype', ['int32', 'int64', 'float64'])
    def test_labels_above_what_float32_counts(self, dtype, ctx):
        classes = 2**24 + 2
        label = nd.array([0, classes - 1, classes], dtype=dtype)
        labels = read_labels(nd, call_of(), label, nd.zeros((1, classes)))
        np.testing.assert_array_equal(labels.is_valid.asnumpy(), [1, 1, 0])
        assert labels.index.asnumpy()[1] == classes - 1

    @FEW
    @pytest.mark.parametrize('axis', [1, -2])
    def test_class_axis_of_symbols(self, axis, has_few_classes, ctx):
        """Symbols of unknown rank count the classes on the same axis."""
        call = call_of(None, None, axis=axis, has_few_classes=has_few_classes)
        label, pred = np.array([[0, 3], [4, 2]], 'float32'), np.zeros((2, 4, 2), 'float32')
        is_valid = evaluate(lambda F, *inputs: read_labels(F, call, *inputs).is_valid, label, pred)
        index = evaluate(lambda F, *inputs: read_labels(F, call, *inputs).index, label, pred)
        np.testing.assert_array_equal(is_valid, [[1, 1], [0, 1]])
        np.testing.assert_array_equal(index[is_valid == 1], [0, 3, 2])

    def test_label_has_gradient_zero(self, ctx):
        label = nd.array([0, 1])
        label.attach_grad()
        with mx.autograd.record():
            read_labels(nd, call_of(label_dtype='float32'), label, nd.zeros((2, 3))).index.sum().backward()
        np.testing.assert_array_equal(label.grad.asnumpy(), 0)


def test_is_counted_without_ignore_label_is_none():
    assert is_counted(nd, Call(), nd.zeros(3)) is None


@pytest.mark.parametrize('ndim', [3, None], ids=['rank-known', 'rank-unknown'])
@pytest.mark.parametrize('keeps_axis', [True, False], ids=['keepdims', 'removed'])
@pytest.mark.parametrize('axis', [1, -2])
def test_align_label_gives_the_positions_shape(ndim, keeps_axis, axis, rng):
    label = rng.randint(0, 4, (2, 1, 3) if keeps_axis else (2, 3)).astype('float32')
    pred = np.zeros((2, 4, 3), 'float32')
    call = call_of(ndim, ndim and label.ndim, axis=axis)
    if ndim:
        aligned = align_label(nd, call, nd.array(label), nd.array(pred)).asnumpy()
    else:
        aligned = evaluate(lambda F, *inputs: align_label(F, call, *inputs), label, pred)
    np.testing.assert_array_equal(aligned, label.reshape(2, 3))


@pytest.mark.parametrize('shape', [(3, 2), (6,), (2, 4, 3), (2, 3, 1)], ids=str)
def test_align_label_of_another_shape_is_a_shape_error(shape):
    call = call_of(None, None, axis=1)
    with pytest.raises(mx.MXNetError, match='[Ss]hape'):
        evaluate(lambda F, *inputs: align_label(F, call, *inputs), np.zeros(shape), np.zeros((2, 4, 3)))


class TestFill:
    @pytest.mark.parametrize(
        ('is_valid', 'is_counted', 'expected'),
        [
            (None, None, [1, inf, nan, 4]),
            ([1, 0, 1, 1], None, [1, -2, nan, 4]),
            (None, [1, 1, 0, 1], [1, inf, -1, 4]),
            ([1, 0, 0, 1], [1, 1, 0, 0], [1, -2, -1, -1]),  # ignored, valid or not
        ],
        ids=['all', 'invalid', 'ignored', 'both'],
    )
    def test_values(self, is_valid, is_counted, expected):
        conditions = [None if given is None else nd.array(given) for given in (is_valid, is_counted)]
        terms = fill(nd, Call(fill=METRIC_FILL), Labels(None, *conditions), nd.array([1, inf, nan, 4]))
        np.testing.assert_array_equal(terms.asnumpy(), expected)

    def test_filled_positions_have_gradient_zero(self):
        terms = nd.array([1, 2, 3])
        terms.attach_grad()
        with mx.autograd.record():
            fill(nd, Call(), Labels(None, nd.array([1, 0, 1]), nd.array([1, 1, 0])), terms).backward()
        np.testing.assert_array_equal(terms.grad.asnumpy(), [1, 0, 0])
