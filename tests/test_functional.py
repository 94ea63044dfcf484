"""The functions of F between the label and the loss, one by one: read_labels, combine, mask, reduce_positions and the two aligners."""

import cases
import mxnet as mx
import numpy as np
import pytest
import reference

from gluon_stable_ce import functional
from gluon_stable_ce.functional import Labels
from gluon_stable_ce.kernels import ClassTerms

nd = mx.nd
nan, inf = float('nan'), float('inf')
RANK_KNOWN = pytest.mark.parametrize('is_rank_known', [True, False], ids=['rank-known', 'rank-unknown'])


def evaluate(compose, *arrays):
    """What `compose(F, *inputs)` gives for symbols that know nothing of `arrays`, as NumPy arrays."""
    names = [f'input{i}' for i in range(len(arrays))]
    symbol = compose(mx.sym, *map(mx.sym.var, names))
    symbol = mx.sym.Group(symbol) if isinstance(symbol, (list, tuple)) else symbol
    inputs = {name: nd.array(array, dtype=np.asarray(array).dtype) for name, array in zip(names, arrays)}
    outputs = symbol.bind(mx.cpu(), {name: inputs[name] for name in symbol.list_arguments()}).forward()
    return [output.asnumpy() for output in outputs]


class TestReadLabels:
    LABELS = np.array([0, 2, 3, -1, 1.5, nan, inf, -inf, -0.0], 'float32')
    IS_VALID = (1, 1, 0, 0, 0, 0, 0, 0, 1)

    @pytest.mark.parametrize('few_classes', [True, False], ids=['few', 'many'])
    def test_index_and_is_valid(self, few_classes, ctx):
        labels = functional.read_labels(
            nd,
            nd.array(self.LABELS),
            nd.zeros((9, 3)),
            few_classes=few_classes,
            label_dtype='float32' if few_classes else 'float64',
        )
        assert labels.is_counted is None
        np.testing.assert_array_equal(labels.is_valid.asnumpy(), self.IS_VALID)
        index = labels.index.asnumpy()
        np.testing.assert_array_equal(index[np.array(self.IS_VALID) == 1], [0, 2, 0])
        assert np.isin(index, [0, 1, 2]).all()  # never NaN

    @pytest.mark.parametrize('dtype', cases.LABEL_DTYPES)
    @pytest.mark.parametrize('few_classes', [True, False], ids=['few', 'many'])
    def test_valid_labels_of_each_dtype(self, dtype, few_classes, ctx):
        label = nd.array([2, 0, 1], dtype=dtype)
        known = {'few_classes': few_classes, 'label_dtype': 'float32' if few_classes else 'float64'}
        labels = functional.read_labels(nd, label, nd.zeros((3, 3)), **known)
        np.testing.assert_array_equal(labels.index.asnumpy(), [2, 0, 1])
        np.testing.assert_array_equal(labels.is_valid.asnumpy(), 1)

    def test_clip_names_the_nearest_class(self, ctx):
        labels = functional.read_labels(
            nd, nd.array(self.LABELS), nd.zeros((9, 3)), invalid_label='clip', few_classes=True
        )
        assert labels.is_valid is None
        np.testing.assert_array_equal(labels.index.asnumpy(), [0, 2, 2, 0, 1, 0, 2, 0, 0])

    @pytest.mark.parametrize('ignore_label', [-1, 2, 7])
    def test_is_counted(self, ignore_label, ctx):
        label = np.array([0, 2, -1, 7, nan], 'float32')
        labels = functional.read_labels(nd, nd.array(label), nd.zeros((5, 3)), ignore_label=ignore_label)
        np.testing.assert_array_equal(labels.is_counted.asnumpy(), label != ignore_label)
        np.testing.assert_array_equal(labels.is_valid.asnumpy(), [1, 1, 0, 0, 0])

    @pytest.mark.parametrize('axis', [1, -2])
    @pytest.mark.parametrize('few_classes', [True, False], ids=['few', 'many'])
    def test_class_axis(self, axis, few_classes, ctx):
        """Symbols of unknown rank count the classes on the same axis."""
        label = np.array([[0, 3], [4, 2]], 'float32')

        def compose(F, label, pred):
            labels = functional.read_labels(
                F, label, pred, axis, few_classes=few_classes, label_dtype='float32'
            )
            return labels.index, labels.is_valid

        index, is_valid = evaluate(compose, label, np.zeros((2, 4, 2), 'float32'))
        np.testing.assert_array_equal(is_valid, [[1, 1], [0, 1]])
        np.testing.assert_array_equal(index[is_valid == 1], [0, 3, 2])

    def test_label_has_gradient_zero(self, ctx):
        label = nd.array([0, 1])
        label.attach_grad()
        with mx.autograd.record():
            functional.read_labels(nd, label, nd.zeros((2, 3)), label_dtype='float32').index.sum().backward()
        np.testing.assert_array_equal(label.grad.asnumpy(), 0)


def test_is_counted_without_ignore_label_is_none():
    assert functional.is_counted(nd, nd.zeros(3), None) is None


@RANK_KNOWN
@pytest.mark.parametrize('keeps_axis', [True, False], ids=['keepdims', 'removed'])
@pytest.mark.parametrize('axis', [1, -2])
def test_align_label_gives_the_positions_shape(is_rank_known, keeps_axis, axis, rng):
    label = rng.randint(0, 4, (2, 1, 3) if keeps_axis else (2, 3)).astype('float32')
    pred = np.zeros((2, 4, 3), 'float32')
    if is_rank_known:
        aligned = functional.align_label(nd, nd.array(label), nd.array(pred), axis, 3, label.ndim).asnumpy()
    else:
        (aligned,) = evaluate(
            lambda F, label, pred: functional.align_label(F, label, pred, axis), label, pred
        )
    np.testing.assert_array_equal(aligned, label.reshape(2, 3))


@pytest.mark.parametrize('shape', [(3, 2), (6,), (2, 4, 3), (2, 3, 1)], ids=str)
def test_align_label_of_another_shape_is_a_shape_error(shape):
    with pytest.raises(mx.MXNetError, match='[Ss]hape'):
        evaluate(
            lambda F, label, pred: functional.align_label(F, label, pred, 1),
            np.zeros(shape, 'float32'),
            np.zeros((2, 4, 3), 'float32'),
        )


class TestCombine:
    TERMS = ClassTerms(
        nll=nd.array([1, 2, inf]), logsumexp=nd.array([3, 4, 5]), uniform_nll=nd.array([6, 7, 8])
    )

    @pytest.mark.parametrize(
        ('options', 'expected'),
        [
            ({}, [1, 2, inf]),
            ({'weight_of_label': [2, 0.5, 1]}, [2, 1, inf]),
            ({'weight_of_label': [2, 1, 0]}, [2, 2, 0]),
            ({'label_smoothing': 0.25}, [2.25, 3.25, inf]),
            ({'label_smoothing': 1}, [6, 7, 8]),
            ({'lse_square_scale': 0.5}, [5.5, 10, inf]),
            (
                {'weight_of_label': [4, 0, 0], 'label_smoothing': 0.5, 'lse_square_scale': 1},
                [14, 19.5, 29],
            ),
        ],
        ids=str,
    )
    def test_values(self, options, expected):
        weight = options.get('weight_of_label')
        options = {**options, 'weight_of_label': None if weight is None else nd.array(weight)}
        np.testing.assert_allclose(functional.combine(nd, self.TERMS, **options).asnumpy(), expected)


class TestMask:
    VALUES = nd.array([1, inf, nan, 4])

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
        values = functional.mask(nd, self.VALUES, Labels(None, *conditions), invalid=-2, ignored=-1)
        np.testing.assert_array_equal(values.asnumpy(), expected)

    def test_masked_positions_have_gradient_zero(self):
        values = nd.array([1, 2, 3])
        values.attach_grad()
        labels = Labels(None, nd.array([1, 0, 1]), nd.array([1, 1, 0]))
        with mx.autograd.record():
            functional.mask(nd, values, labels, nan, 0).backward()
        np.testing.assert_array_equal(values.grad.asnumpy(), [1, 0, 0])


class TestReducePositions:
    LOSS = np.arange(1, 7, dtype='float32').reshape(2, 3)  # (batch, len)
    PRED = nd.zeros((2, 3, 5))  # (batch, len, C)

    @RANK_KNOWN
    @pytest.mark.parametrize(
        ('options', 'expected'),
        [
            ({'reduction': 'mean'}, [2, 5]),
            ({'reduction': 'valid'}, [2, 5]),
            ({'reduction': 'sum'}, [6, 15]),
            ({'reduction': 'none'}, [[1, 2, 3], [4, 5, 6]]),
            ({'reduction': 'mean', 'batch_axes': (1,)}, [2.5, 3.5, 4.5]),
            ({'reduction': 'mean', 'batch_axes': (0, 1)}, [[1, 2, 3], [4, 5, 6]]),
        ],
        ids=str,
    )
    def test_values(self, is_rank_known, options, expected):
        ndim = 3 if is_rank_known else None
        loss = functional.reduce_positions(nd, nd.array(self.LOSS), self.PRED, ndim=ndim, **options)
        np.testing.assert_allclose(loss.asnumpy(), expected)

    @pytest.mark.parametrize(
        ('is_counted', 'expected'), [([[1, 1, 0], [0, 0, 0]], [3, 15]), ([[1, 1, 1]] * 2, [2, 5])]
    )
    def test_mean_divides_by_the_count_and_never_by_zero(self, is_counted, expected):
        """The losses of positions that do not count are 0 when they come here; these are not, to see the divisor."""
        loss = functional.reduce_positions(nd, nd.array(self.LOSS), self.PRED, nd.array(is_counted), ndim=3)
        np.testing.assert_allclose(loss.asnumpy(), expected)

    @pytest.mark.parametrize(('is_counted', 'divisor'), [([[1, 1, 0], [1, 0, 0]], 1.5), ([[0, 0, 0]] * 2, 1)])
    def test_valid_divides_by_the_mean_count(self, is_counted, divisor):
        counted = nd.array(is_counted)
        loss = functional.reduce_positions(
            nd, nd.array(self.LOSS), self.PRED, counted, reduction='valid', ndim=3
        )
        np.testing.assert_allclose(loss.asnumpy(), np.array([6, 15]) / divisor, rtol=1e-6)

    def test_sample_weight_of_zero_removes_infinite_losses(self):
        loss = functional.reduce_positions(
            nd,
            nd.array([[inf, 1], [nan, 2]]),
            nd.zeros((2, 2, 5)),
            reduction='sum',
            sample_weight=nd.array([[0, 2], [0, 3]]),
            weight_layout='positions',
            ndim=3,
        )
        np.testing.assert_array_equal(loss.asnumpy(), [2, 6])


class TestAlignSampleWeight:
    SHAPE, AXIS = (3, 5, 2, 4), 1  # of pred
    KEPT = (3, 1, 2, 4)

    def check(self, weight, aligned):
        expected = reference.align_sample_weight(weight, self.SHAPE, self.AXIS, [0])
        expected = np.expand_dims(np.broadcast_to(expected, (3, 2, 4)), 1)
        np.testing.assert_allclose(aligned, expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ('layout', 'shape'),
        [
            ('batch', (3,)),
            ('batch', (1,)),
            ('positions', (3, 2, 4)),
            ('keepdims', (3, 1, 2, 4)),
            ('keepdims', (1, 1, 2, 1)),
            ('pred', (3, 5, 2, 4)),
            ('pred', (1, 5, 1, 4)),
        ],
        ids=str,
    )
    def test_known_layouts(self, layout, shape, rng):
        weight = rng.uniform(0, 2, shape).astype('float32')
        aligned = functional.align_sample_weight(
            nd, nd.array(weight), nd.zeros(self.KEPT), nd.zeros(self.SHAPE), self.AXIS, layout=layout, ndim=4
        )
        self.check(weight, aligned.asnumpy())

    @staticmethod
    def aligned_in_a_graph(weight, pred, axis):
        def compose(F, weight, kept, pred):
            return functional.align_sample_weight(F, weight, kept, pred, axis)

        kept = np.zeros(np.delete(pred, axis), 'float32')
        kept = np.expand_dims(kept, axis)
        (aligned,) = evaluate(compose, weight, kept, np.zeros(pred, 'float32'))
        return aligned

    @pytest.mark.parametrize('shape', [(3, 1, 2, 4), (3, 1, 1, 1), (1, 1, 2, 1), (3, 5, 2, 4)], ids=str)
    def test_unknown_layout(self, shape, rng):
        weight = rng.uniform(0, 2, shape).astype('float32')
        self.check(weight, self.aligned_in_a_graph(weight, self.SHAPE, self.AXIS))

    @pytest.mark.parametrize('shape', [(3,), (1,), (3, 2), (3, 2, 1), (1, 2, 1), (3, 2, 5)], ids=str)
    def test_unknown_layout_with_the_classes_last(self, shape, rng):
        weight = rng.uniform(0, 2, shape).astype('float32')
        expected = weight.reshape(shape + (1,) * (3 - len(shape))).mean(-1, keepdims=True)
        aligned = self.aligned_in_a_graph(weight, (3, 2, 5), -1)
        np.testing.assert_allclose(aligned, np.broadcast_to(expected, (3, 2, 1)), rtol=1e-6)

    @pytest.mark.parametrize(
        ('shape', 'pred', 'axis'),
        [
            ((2, 3, 3), (2, 3, 3, 3), 1),
            ((2,), (2, 5, 3), 1),
            ((4, 6, 2), (4, 6, 5), -1),
            ((6,), (4, 6, 5), -1),
        ],
        ids=str,
    )
    def test_another_layout_is_a_shape_error(self, shape, pred, axis):
        with pytest.raises(mx.MXNetError):
            self.aligned_in_a_graph(np.ones(shape, 'float32'), pred, axis)

    @pytest.mark.parametrize('ndim', [4, None], ids=['rank-known', 'rank-unknown'])
    def test_batch_layout_of_several_batch_axes(self, ndim, rng):
        weight = rng.uniform(0, 2, (3, 4)).astype('float32')
        aligned = functional.align_sample_weight(
            nd,
            nd.array(weight),
            nd.zeros(self.KEPT),
            nd.zeros(self.SHAPE),
            self.AXIS,
            (0, 3),
            layout='batch',
            ndim=ndim,
        )
        np.testing.assert_allclose(
            aligned.asnumpy(), np.broadcast_to(weight[:, None, None, :], self.KEPT), rtol=1e-6
        )
