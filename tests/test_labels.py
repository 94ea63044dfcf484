"""Which labels name a class, and what the loss and the metric make of those that do not, in every dtype."""

import cases
import modes
import mxnet as mx
import numpy as np
import pytest
import tolerances
from checks import assert_loss_is_reference, every_mode
from tolerances import assert_close

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss
from gluon_stable_ce.call import Call, Fill
from gluon_stable_ce.labels import Labels, align_label, fill, is_counted, read_labels
from gluon_stable_ce.options import Options

nd, inf, nan = mx.nd, float('inf'), float('nan')
C = 3
MANY = 2**24 + 2  # more classes than float32 can count


@pytest.fixture(params=cases.LABEL_DTYPES)
def labels(request):
    """Every class, and invalid labels of a dtype."""
    labels = np.array([0, 1, 2], request.param)
    return np.append(labels, np.array(cases.invalid_labels(request.param, C), request.param))


@pytest.fixture
def pred(labels, rng):
    return rng.normal(0, 1, (len(labels), C)).astype('float32')


@every_mode
@pytest.mark.parametrize('options', [{}, {'invalid_label': 'clip'}, {'ignore_label': 1}], ids=str)
def test_loss(kernel, mode, options, labels, pred):
    """NaN with a gradient of 0, or as the nearest class, or 0 with a gradient of 0."""
    assert_loss_is_reference(options, pred, labels, mode=mode, kernel=kernel)


def test_loss_metric_and_check_agree(kernel, labels, pred):
    bad = len(labels) - C
    label, pred = nd.array(labels, dtype=labels.dtype), nd.array(pred)
    metric = StableCrossEntropy(pred_type='logits')
    metric.update(label, pred)
    assert bad > 0
    assert np.isnan(StableSoftmaxCELoss()(pred, label).asnumpy()).sum() == bad
    with pytest.raises(ValueError, match=f'^{bad} of {len(labels)} labels are invalid. If they are padding'):
        metric.get()
    with pytest.raises(ValueError, match=f'invalid labels: {bad} of {len(labels)}$'):
        StableSoftmaxCELoss(invalid_label='raise')(pred, label)


def test_ignore_label_does_not_ignore_its_neighbour(kernel):
    label = nd.array([2**24, 2**24 + 1, 0], dtype='int64')
    loss = StableSoftmaxCELoss(ignore_label=2**24)(nd.zeros((3, 2)), label).asnumpy()
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])


@pytest.mark.slow
@pytest.mark.xdist_group('gigabytes')
@pytest.mark.parametrize(
    ('mode', 'dtype'),
    [(modes.default, 'float64'), (modes.nested, 'int64')],
    ids=['float64', 'int64-nested'],
)
def test_more_classes_than_float32_can_count(kernel, mode, dtype):
    pred = np.zeros((3, MANY), 'float32')
    pred[:, -1], pred[:, -2] = 30, -30
    loss, gradient = mode(StableSoftmaxCELoss(), pred, np.array([MANY - 1, MANY - 2, MANY], dtype))
    assert_close(loss, [np.log1p(np.exp(-30.0) * (MANY - 2)), 60, nan], tolerances.NLL)
    assert gradient[0, -1] > -1e-4
    assert gradient[1, -2] < -0.999


@pytest.mark.slow
@pytest.mark.xdist_group('gigabytes')
@pytest.mark.parametrize('dtype', ['int32', 'int64'])
def test_a_metric_of_more_classes_than_float32_can_count(kernel, dtype):
    pred = nd.zeros((1, MANY))
    pred[0, MANY - 1] = 30
    metric = StableCrossEntropy(pred_type='logits')
    metric.update(nd.array([MANY - 1], dtype=dtype), pred)
    assert metric.get()[1] < 1e-4


@pytest.mark.parametrize(
    ('options', 'count'), [({}, 3), ({'ignore_label': -1}, 2), ({'ignore_label': 0}, 3)], ids=str
)
@pytest.mark.parametrize('is_compiled', [True, False], ids=['compiled', 'eager'])
def test_raise_counts_the_labels_that_are_not_ignored(kernel, options, count, is_compiled, ctx):
    pred, label = nd.array([[1, 2, 3]] * 4), nd.array([0, -1, 7, -2])
    loss_fn = StableSoftmaxCELoss(invalid_label='raise', **options)
    loss_fn.hybridize(is_compiled)
    with pytest.raises(
        ValueError, match=rf'^label: expected integers in \[0, 3\); invalid labels: {count} of 4$'
    ):
        loss_fn(pred, label)
    assert loss_fn(pred, nd.array([0, 1, 2, 2])).shape == (4,)


def test_clip_is_gluons(kernel, ctx):
    pred, label = nd.array([[1, 2, 3]] * 6), nd.array([0, -1, 7, -2, 1.5, 2.9])
    expected = mx.gluon.loss.SoftmaxCrossEntropyLoss()(pred, label).asnumpy()
    assert_close(StableSoftmaxCELoss(invalid_label='clip')(pred, label).asnumpy(), expected)


IGNORED = {'ignore_label': -1}
COUNTS = {
    'all': ({}, nd.array([[3, 1, -1], [2, -1, -1]]), 6),
    'ignored': (IGNORED, nd.array([[3, 1, -1], [2, -1, -1]]), 3),
    'none': (IGNORED, nd.array([-1, -1]), 0),
    'invalid': (IGNORED, nd.array([nan, 99, -1]), 2),
    'numpy': (IGNORED, np.array([1, -1, 2]), 2),
    'list': (IGNORED, [1, -1, 2], 2),
    'nested-list': (IGNORED, [[1, -1], [-1, -1]], 1),
    'arrays': (IGNORED, [nd.array([1, -1]), nd.array([2], ctx=mx.cpu(1))], 2),
    'empty': (IGNORED, [], 0),
    'sparse-storage': (IGNORED, nd.array([[1, -1, 0]]).tostype('row_sparse'), 2),
    'dense': ({'sparse_label': False}, nd.zeros((3, 2)), 3),
    'dense-axis': ({'sparse_label': False, 'axis': 1}, nd.zeros((2, 5, 4)), 8),
}


@pytest.mark.parametrize(('options', 'label', 'count'), cases.rows(COUNTS))
def test_valid_count(options, label, count):
    loss_fn = StableSoftmaxCELoss(**options)
    assert loss_fn.valid_count(label) == count
    if isinstance(label, nd.NDArray):
        with modes.numpy_semantics():
            assert loss_fn.valid_count(mx.np.array(label.asnumpy())) == count


@pytest.mark.parametrize('label', [None, 'abc', mx.sym.var('label'), 3], ids=['None', 'str', 'Symbol', 'int'])
def test_valid_count_refuses_what_is_no_label(label):
    with pytest.raises(TypeError, match='^label: expected an MXNet array, got '):
        StableSoftmaxCELoss(ignore_label=-1).valid_count(label)


# The functions of labels.py

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
        np.testing.assert_array_equal(is_valid, [[[1, 1]], [[0, 1]]])
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
def test_align_label_gives_one_shape(ndim, keeps_axis, axis, rng):
    label = rng.randint(0, 4, (2, 1, 3) if keeps_axis else (2, 3)).astype('float32')
    pred = np.zeros((2, 4, 3), 'float32')
    call = call_of(ndim, ndim and label.ndim, axis=axis)
    if ndim:
        aligned = align_label(nd, call, nd.array(label), nd.array(pred)).asnumpy()
    else:
        aligned = evaluate(lambda F, *inputs: align_label(F, call, *inputs), label, pred)
    np.testing.assert_array_equal(aligned, label.reshape((2, 3) if ndim else (2, 1, 3)))


def test_align_label_removes_no_other_axis_of_length_1():
    aligned = align_label(nd, call_of(3, 3, axis=1), nd.zeros((2, 1, 1)), nd.zeros((2, 4, 1)))
    assert aligned.shape == (2, 1)


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
            ([1, 0, 1, 1], None, [1, -1, nan, 4]),
            (None, [1, 1, 0, 1], [1, inf, -2, 4]),
            ([1, 0, 0, 1], [1, 1, 0, 0], [1, -1, -2, -2]),  # ignored, valid or not
        ],
        ids=['all', 'invalid', 'ignored', 'both'],
    )
    def test_values(self, is_valid, is_counted, expected):
        conditions = [None if given is None else nd.array(given) for given in (is_valid, is_counted)]
        terms = fill(nd, Call(fill=Fill.METRIC), Labels(None, *conditions), nd.array([1, inf, nan, 4]))
        np.testing.assert_array_equal(terms.asnumpy(), expected)

    def test_filled_positions_have_gradient_zero(self):
        terms = nd.array([1, 2, 3])
        terms.attach_grad()
        with mx.autograd.record():
            fill(nd, Call(), Labels(None, nd.array([1, 0, 1]), nd.array([1, 1, 0])), terms).backward()
        np.testing.assert_array_equal(terms.grad.asnumpy(), [1, 0, 0])
