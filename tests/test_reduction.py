"""The steps between the terms of a position and the loss of a sample: combine, reduce, and the weights' alignment."""

import modes
import mxnet as mx
import numpy as np
import pytest
import reference
from mxnet import gluon
from tolerances import NLL, ROUNDED_FLOAT32, assert_close

from gluon_stable_ce import StableSoftmaxCELoss
from gluon_stable_ce.call import Call
from gluon_stable_ce.class_terms import ClassTerms
from gluon_stable_ce.formula import combine
from gluon_stable_ce.options import Options
from gluon_stable_ce.reduction import align_sample_weight, reduce

nd = mx.nd
nan, inf = float('nan'), float('inf')


def evaluate(compose, *arrays):
    """What `compose(F, *inputs)` gives for symbols that know nothing of `arrays`, as NumPy arrays."""
    names = [f'input{i}' for i in range(len(arrays))]
    symbol = compose(mx.sym, *map(mx.sym.var, names))
    inputs = {name: nd.array(array, dtype=np.asarray(array).dtype) for name, array in zip(names, arrays)}
    outputs = symbol.bind(mx.cpu(), {name: inputs[name] for name in symbol.list_arguments()}).forward()
    return [output.asnumpy() for output in outputs]


class TestCombine:
    TERMS = ClassTerms(
        nll=nd.array([1, 2, inf]), logsumexp=nd.array([3, 4, 5]), uniform_nll=nd.array([6, 7, 8])
    )

    @pytest.mark.parametrize(
        ('options', 'expected'),
        [
            ({}, [1, 2, inf]),
            ({'label_smoothing': 0.25}, [2.25, 3.25, inf]),
            ({'label_smoothing': 1}, [6, 7, 8]),
            ({'lse_square_scale': 0.5}, [5.5, 10, inf]),
            ({'label_smoothing': 0.5, 'lse_square_scale': 1}, [12.5, 20.5, inf]),
        ],
        ids=str,
    )
    def test_values(self, options, expected):
        np.testing.assert_array_equal(combine(nd, Call(Options(**options)), self.TERMS).asnumpy(), expected)

    def test_an_infinite_logsumexp_has_no_gradient(self):
        logsumexp = nd.array([3, inf])
        logsumexp.attach_grad()
        with mx.autograd.record():
            loss = combine(nd, Call(Options(lse_square_scale=0.5)), ClassTerms(nd.zeros(2), logsumexp))
        loss.backward()
        np.testing.assert_array_equal(logsumexp.grad.asnumpy(), [3, 0])


class TestReduce:
    LOSS = np.arange(1, 7, dtype='float32').reshape(2, 3)  # (batch, len)
    PRED = nd.zeros((2, 3, 5))  # (batch, len, C)

    def reduced(self, loss, label=None, sample_weight=None, layout=None, ndim=3, **options):
        call = Call(Options(**options), ndim=ndim, label_ndim=2, weight_layout=layout)
        label = nd.zeros((2, 3)) if label is None else nd.array(label)
        return reduce(nd, call, nd.array(loss), self.PRED, label, sample_weight).asnumpy()

    @pytest.mark.parametrize('ndim', [3, None], ids=['rank-known', 'rank-unknown'])
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
    def test_values(self, ndim, options, expected):
        reduced = self.reduced(self.LOSS if ndim else self.LOSS[..., None], ndim=ndim, **options)
        np.testing.assert_array_equal(reduced.squeeze(), expected)

    @pytest.mark.parametrize('keeps_axis', [False, True], ids=['', 'keeps-axis'])
    @pytest.mark.parametrize(
        ('label', 'expected'), [([[0, 4, -1], [-1, -1, -1]], [3, 15]), ([[0, 1, 9]] * 2, [2, 5])]
    )
    def test_mean_divides_by_the_count_and_never_by_zero(self, label, expected, keeps_axis):
        """The losses of positions that do not count are 0 when they come here; these are not, to see the divisor."""
        label = np.array(label)[..., None] if keeps_axis else label
        call = Call(Options(ignore_label=-1), ndim=3, label_ndim=np.ndim(label))
        loss = reduce(nd, call, nd.array(self.LOSS), self.PRED, nd.array(label))
        np.testing.assert_array_equal(loss.asnumpy(), expected)

    @pytest.mark.parametrize(
        ('label', 'divisor'), [([[0, 1, -1], [2, -1, -1]], 1.5), ([[-1, -1, -1]] * 2, 1)]
    )
    def test_valid_divides_by_the_mean_count(self, label, divisor):
        loss = self.reduced(self.LOSS, label, reduction='valid', ignore_label=-1)
        np.testing.assert_array_equal(loss, np.array([6, 15], 'float32') / np.float32(divisor))

    def test_valid_of_one_position_per_sample(self):
        call = Call(Options(reduction='valid', ignore_label=-1), ndim=2, label_ndim=1)
        loss, label = nd.array([1, 2, 0, 0]), nd.array([0, 1, -1, -1])
        np.testing.assert_array_equal(reduce(nd, call, loss, nd.zeros((4, 5)), label).asnumpy(), [2, 4, 0, 0])

    def test_mean_of_a_batch_axis_behind_the_class_axis(self):
        call = Call(Options(axis=0, batch_axes=(1,), ignore_label=-1), ndim=3, label_ndim=2)
        label = nd.array([[0, 4, -1], [2, -1, -1]])
        loss = reduce(nd, call, nd.array(self.LOSS), nd.zeros((5, 2, 3)), label)
        np.testing.assert_array_equal(loss.asnumpy(), [3, 15])

    def test_sample_weight_of_zero_removes_infinite_losses(self):
        weight = nd.array([[0, 2, 0], [0, 3, 0]])
        loss = self.reduced(
            [[inf, 1, 0], [nan, 2, 0]], sample_weight=weight, layout='positions', reduction='sum'
        )
        np.testing.assert_array_equal(loss, [2, 6])


class TestAlignSampleWeight:
    SHAPE, AXIS = (3, 5, 2, 4), 1  # of pred
    KEPT = (3, 1, 2, 4)

    def check(self, weight, aligned):
        expected = reference.align_sample_weight(weight, self.SHAPE, self.AXIS, [0])
        expected = np.expand_dims(np.broadcast_to(expected, (3, 2, 4)), 1)
        assert_close(aligned, expected, ROUNDED_FLOAT32)

    def aligned(self, weight, layout, batch_axes=(0,)):
        call = Call(Options(axis=self.AXIS, batch_axes=batch_axes), ndim=4, weight_layout=layout)
        weight, kept, pred = nd.array(weight), nd.zeros(self.KEPT), nd.zeros(self.SHAPE)
        return align_sample_weight(nd, call, weight, kept, pred).asnumpy()

    @staticmethod
    def aligned_in_a_graph(weight, pred, axis):
        def compose(F, weight, kept, pred):
            return align_sample_weight(F, Call(Options(axis=axis)), weight, kept, pred)

        kept = np.expand_dims(np.zeros(np.delete(pred, axis), 'float32'), axis)
        (aligned,) = evaluate(compose, weight, kept, np.zeros(pred, 'float32'))
        return aligned

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
        self.check(weight, self.aligned(weight, layout))

    @pytest.mark.parametrize('dtype', ['bool', 'int32', 'float16', 'float64'])
    def test_another_dtype(self, dtype):
        call = Call(Options(), dtype='float32', ndim=2, weight_layout='batch')
        weight = nd.array([1, 2], dtype=dtype)
        aligned = align_sample_weight(nd, call, weight, nd.zeros((2, 1)), nd.zeros((2, 3)))
        assert aligned.dtype == np.float32

    @pytest.mark.parametrize('mode', [modes.np_mode, modes.np_mode_nested], ids=['array', 'graph'])
    @pytest.mark.parametrize('dtype', ['bool', 'int32', 'float16', 'float64'])
    def test_another_dtype_in_np_mode(self, dtype, mode, rng):
        if (dtype, mode) == ('float64', modes.np_mode_nested) and modes.VERSION < (1, 8):
            pytest.skip('broadcast_like takes arrays of one dtype before MXNet 1.8')
        arrays = (
            rng.normal(0, 2, (3, 4)).astype('float32'),
            np.array([1, 0, 3]),
            np.array([[1], [0], [1]], dtype),
        )
        ours, stock = (
            mode(loss_fn, *arrays) for loss_fn in (StableSoftmaxCELoss(), gluon.loss.SoftmaxCELoss())
        )
        for got, expected in zip(ours, stock):
            assert_close(got, expected, NLL)

    def test_batch_layout_of_several_batch_axes(self, rng):
        weight = rng.uniform(0, 2, (3, 4)).astype('float32')
        aligned = self.aligned(weight, 'batch', batch_axes=(-1, 0))
        np.testing.assert_array_equal(aligned, np.broadcast_to(weight[:, None, None, :], self.KEPT))

    @pytest.mark.parametrize('shape', [(3, 1, 2, 4), (3, 1, 1, 1), (1, 1, 2, 1), (3, 5, 2, 4)], ids=str)
    def test_unknown_layout(self, shape, rng):
        weight = rng.uniform(0, 2, shape).astype('float32')
        self.check(weight, self.aligned_in_a_graph(weight, self.SHAPE, self.AXIS))

    @pytest.mark.parametrize('shape', [(3,), (1,), (3, 2), (3, 2, 1), (1, 2, 1), (3, 2, 5)], ids=str)
    def test_unknown_layout_with_the_classes_last(self, shape, rng):
        weight = rng.uniform(0, 2, shape).astype('float32')
        expected = weight.reshape(shape + (1,) * (3 - len(shape))).mean(-1, keepdims=True)
        aligned = self.aligned_in_a_graph(weight, (3, 2, 5), -1)
        assert_close(aligned, np.broadcast_to(expected, (3, 2, 1)), ROUNDED_FLOAT32)

    @pytest.mark.parametrize(
        ('shape', 'pred', 'axis'),
        [
            ((2, 3, 3), (2, 3, 3, 3), 1),
            ((2,), (2, 5, 3), 1),
            ((3,), (3, 5, 3), 1),
            ((4, 6, 2), (4, 6, 5), -1),
            ((6,), (4, 6, 5), -1),
        ],
        ids=str,
    )
    def test_another_layout_is_a_shape_error(self, shape, pred, axis):
        with pytest.raises(mx.MXNetError):
            self.aligned_in_a_graph(np.ones(shape, 'float32'), pred, axis)


@modes.parametrize([modes.eager, modes.default, modes.nested])
@pytest.mark.parametrize('shape', [(2, 3), (2, 3, 1)], ids=str)
def test_losses_of_positions_have_the_shape_of_the_label(mode, shape):
    loss_fn = StableSoftmaxCELoss(reduction='none')
    loss, _ = mode(loss_fn, np.zeros((2, 3, 5), 'float32'), np.zeros(shape, 'float32'))
    np.testing.assert_allclose(loss, np.full(shape, np.log(5)), rtol=1e-5)


class TestSeveralClassAxes:
    """Further class axes of dense log-probabilities, over which is summed."""

    OPTIONS = {'axis': (1, -1), 'sparse_label': False, 'from_logits': True}  # noqa: RUF012

    @modes.parametrize([modes.eager, modes.default, modes.nested])
    @pytest.mark.parametrize('reduction', ['mean', 'sum'])
    @pytest.mark.parametrize('weight', [None, (2, 1, 1, 1), (2, 1, 4, 1)], ids=str)
    def test_loss(self, mode, reduction, weight, rng):
        target, p = rng.uniform(0.1, 1, (2, 2, 3, 4, 5)).astype('float32')
        log_p = np.log(p)
        weights = [] if weight is None else [rng.uniform(1, 2, weight).astype('float32')]
        expected = -(log_p * target).sum((1, 3), keepdims=True)
        for given in weights:
            expected = expected * given
        expected = getattr(np, reduction)(expected, (1, 2, 3))
        loss, _ = mode(StableSoftmaxCELoss(reduction=reduction, **self.OPTIONS), log_p, target, *weights)
        assert_close(loss, expected, ROUNDED_FLOAT32)

    def test_axes_that_are_the_same(self):
        with pytest.raises(ValueError, match='^axis: expected different axes of pred'):
            StableSoftmaxCELoss(**{**self.OPTIONS, 'axis': (1, -2)})(nd.zeros((2, 3, 4)), nd.zeros((2, 3, 4)))
