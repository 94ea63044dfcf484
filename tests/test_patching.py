"""patch() and the command run: MXNet's own names stand for this package's loss and metrics, and scripts do not notice."""

import abc
import contextlib
import copy
import gc
import inspect
import pickle
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import modes
import mxnet as mx
import numpy as np
import pytest
from modes import VERSION
from mxnet import autograd, gluon
from mxnet.gluon.loss import SoftmaxCELoss as ImportedBefore
from tolerances import FLOAT64, HALF_SUM, NLL, ROUNDED_FLOAT32, assert_close

from gluon_stable_ce import (
    StableCrossEntropy,
    StableLoss,
    StablePerplexity,
    StableSoftmaxCrossEntropyLoss,
    array_api,
    patch,
    unpatch,
)

STOCK = {
    'SoftmaxCrossEntropyLoss': gluon.loss.SoftmaxCrossEntropyLoss,
    'SoftmaxCELoss': gluon.loss.SoftmaxCELoss,
    'CrossEntropy': mx.metric.CrossEntropy,
    'NegativeLogLikelihood': mx.metric.NegativeLogLikelihood,
    'Perplexity': mx.metric.Perplexity,
    'Loss': mx.metric.Loss,
}
METRICS = {
    'CrossEntropy': StableCrossEntropy,
    'NegativeLogLikelihood': StableCrossEntropy,
    'Perplexity': StablePerplexity,
    'Loss': StableLoss,
}
REGISTERED = {
    'ce': 'CrossEntropy',
    'crossentropy': 'CrossEntropy',
    'nll_loss': 'NegativeLogLikelihood',
    'negativeloglikelihood': 'NegativeLogLikelihood',
    'perplexity': 'Perplexity',
    'loss': 'Loss',
}


def bindings():
    """All that a patch may change, by identity."""
    places = {name: getattr(gluon.loss if 'Softmax' in name else mx.metric, name) for name in STOCK}
    own = {
        (kind, name): value
        for kind in STOCK.values()
        for name, value in vars(kind).items()
        if callable(value)
    }
    own['text'] = mx.metric.EvalMetric.__str__
    return places, own, mx.registry.get_registry(mx.metric.EvalMetric)


@pytest.fixture(autouse=True)
def restored():
    """Each test leaves everything as it was."""
    before = bindings()
    yield
    assert bindings() == before


@pytest.fixture
def patched():
    with patch() as active:
        yield active


@pytest.fixture
def logits(rng):
    return mx.nd.array(rng.normal(0, 2, (6, 5)))


LABEL = mx.nd.array([0, 1, 2, 3, 4, 0])


# What is replaced


def test_replaces_the_loss_by_both_names(patched, logits):
    assert gluon.loss.SoftmaxCELoss is gluon.loss.SoftmaxCrossEntropyLoss
    loss_fn = gluon.loss.SoftmaxCrossEntropyLoss()
    assert isinstance(loss_fn, StableSoftmaxCrossEntropyLoss)
    assert isinstance(loss_fn, STOCK['SoftmaxCELoss'])
    assert_close(loss_fn(logits, LABEL).asnumpy(), ImportedBefore()(logits, LABEL).asnumpy(), NLL)
    assert loss_fn(mx.nd.array([[20, 0]]), mx.nd.array([0])).asscalar() >= 0


@pytest.mark.parametrize('name', METRICS)
def test_replaces_the_metrics(patched, name):
    assert isinstance(getattr(mx.metric, name)(*[None] * (name == 'Perplexity')), METRICS[name])


@pytest.mark.parametrize('name', REGISTERED)
def test_replaces_the_metrics_that_create_finds_by_name(patched, name):
    metric = mx.metric.create(name, **({'ignore_label': None} if name == 'perplexity' else {}))
    assert type(metric) is getattr(mx.metric, REGISTERED[name])


@pytest.mark.parametrize(('name', 'shown'), [('ce', 'cross-entropy'), ('nll_loss', 'nll-loss')])
def test_a_patched_metric_has_no_floor(patched, name, shown):
    metric = mx.metric.create(name)
    metric.update([mx.nd.array([0])], [mx.nd.array([[1e-43, 1]])])
    assert metric.get() == (shown, ROUNDED_FLOAT32.approx(-np.log(np.float32(1e-43))))


@pytest.mark.parametrize('name', STOCK)
def test_inspect_shows_the_stock_arguments(patched, name):
    kind = getattr(gluon.loss if 'Softmax' in name else mx.metric, name)

    class Subclass(kind):
        def __init__(self, other):
            super().__init__()

    assert inspect.signature(kind) == inspect.signature(STOCK[name])
    assert list(inspect.signature(Subclass).parameters) == ['other']


@pytest.mark.parametrize('name', ['ce', 'loss'])
def test_global_statistics_can_be_switched_off(patched, name):
    metric = mx.metric.create(name)
    metric._has_global_stats = False
    metric.update([mx.nd.array([0])], [mx.nd.array([[0.5, 0.5]])])
    assert metric.get_global() == metric.get()
    metric.reset_local()
    assert np.isnan(metric.get_global()[1])


def test_metric_configuration_makes_the_metric_again(patched):
    metric = mx.metric.Perplexity(0, name='ppl')
    again = mx.metric.create(metric.get_config())
    assert type(again) is type(metric)
    assert again.get_config() == metric.get_config()


def test_the_loss_has_gluons_name(patched):
    """So a log of Estimator, or a file of parameters, has the names that it has without the patch."""
    assert re.fullmatch(r'softmaxcrossentropyloss\d+', gluon.loss.SoftmaxCELoss().name)
    assert gluon.loss.SoftmaxCELoss(prefix='a_').prefix == 'a_'


# Until when


def test_an_exception_restores():
    with pytest.raises(KeyError), patch():
        raise KeyError


def test_unpatch_without_a_patch():
    with pytest.raises(RuntimeError, match='unpatch: expected a patch'):
        unpatch()


def test_nested_patches_restore_one_level_each(logits):
    with patch(ignore_label=0):
        outer = bindings()
        with patch(ignore_label=1):
            assert bindings()[0] != outer[0]
            assert gluon.loss.SoftmaxCELoss()(logits, LABEL).asnumpy()[1] == 0
        assert bindings() == outer
        patch()
        assert gluon.loss.SoftmaxCELoss()(logits, LABEL).asnumpy().all()
        unpatch()
        assert gluon.loss.SoftmaxCELoss()(logits, LABEL).asnumpy()[0] == 0


def test_leaving_the_block_undoes_the_patches_made_inside():
    with patch():
        patch(ignore_label=-1)
        patch()
    assert gluon.loss.SoftmaxCELoss is STOCK['SoftmaxCELoss']


def test_leaving_the_block_after_unpatch():
    with patch():
        with patch():
            unpatch()
        assert gluon.loss.SoftmaxCELoss is not STOCK['SoftmaxCELoss']


def test_restores_a_name_that_somebody_else_had_replaced(monkeypatch):
    other = type('Other', (STOCK['CrossEntropy'],), {})
    monkeypatch.setattr(mx.metric, 'CrossEntropy', other)
    with patch():
        assert isinstance(mx.metric.CrossEntropy(), StableCrossEntropy)
    assert mx.metric.CrossEntropy is other


def test_objects_go_on_after_unpatch(logits):
    with patch(ignore_label=0):
        loss_fn, metric = gluon.loss.SoftmaxCELoss(), mx.metric.create('ce')
    assert loss_fn(logits, LABEL).asnumpy()[0] == 0
    metric.update([LABEL], [mx.nd.softmax(logits)])
    assert 0 < metric.get()[1] < 10


def test_a_patch_that_is_undone_is_not_kept():
    with patch() as active:
        gluon.loss.SoftmaxCELoss()
    reference = weakref.ref(active)
    del active
    gc.collect()
    assert reference() is None


# Half precision


BFLOAT16 = np.dtype([('bfloat16', np.uint16)])
HALF = [
    'float16',
    pytest.param(
        BFLOAT16, marks=pytest.mark.skipif(VERSION < (1, 8), reason="gluon's loss takes bfloat16 since 1.8")
    ),
]


def cast(array, dtype):
    return mx.nd.amp_cast(array, dtype=dtype) if dtype is BFLOAT16 else array.astype(dtype)


def objective(F, loss, pred, mask):
    return loss * mask + 0.1 * F.mean(F.square(pred), axis=0, exclude=True)


class Nested(gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        self.loss_fn = gluon.loss.SoftmaxCELoss()

    def hybrid_forward(self, F, pred, label, mask):
        return objective(F, self.loss_fn(pred, label), pred, mask)


def subclass():
    class Objective(gluon.loss.SoftmaxCELoss):
        def hybrid_forward(self, F, pred, label, mask):
            return objective(F, super().hybrid_forward(F, pred, label), pred, mask)

    return Objective()


def eager():
    loss_fn = gluon.loss.SoftmaxCELoss()
    return lambda pred, label, mask: objective(mx.nd, loss_fn(pred, label), pred, mask)


def hybridized(make):
    def make_hybridized():
        block = make()
        block.hybridize()
        return block

    return make_hybridized


@pytest.mark.parametrize('shape', [(4, 5), (4, 3, 5)], ids=str)
@pytest.mark.parametrize('dtype', HALF, ids=['float16', 'bfloat16'])
@pytest.mark.parametrize(
    'make',
    [eager, subclass, hybridized(subclass), Nested, hybridized(Nested)],
    ids=['eager', 'subclass', 'hybridized subclass', 'nested', 'hybridized nested'],
)
def test_loss_has_the_dtype_that_gluons_has(rng, make, dtype, shape):
    pred, mask = cast(mx.nd.array(rng.normal(0, 3, shape)), dtype), cast(mx.nd.array([1, 0, 2, 1]), dtype)
    label = mx.nd.array(rng.randint(0, 5, shape[:-1]))
    exact = [pred.astype('float32'), label, mask.astype('float32')]
    expected, stock = make()(*exact), make()(pred, label, mask)
    with patch():
        ours = make()
        loss = ours(pred, label, mask)
        assert array_api.dtype_name(loss) == array_api.dtype_name(stock) != 'float32'
        assert_close(loss.astype('float32').asnumpy(), expected.asnumpy(), HALF_SUM)
        assert_close(ours(*exact).asnumpy(), expected.asnumpy(), NLL)
        assert array_api.dtype_name(ours(pred, label, mask)) == array_api.dtype_name(loss)


@pytest.mark.parametrize('dtype', HALF, ids=['float16', 'bfloat16'])
@pytest.mark.parametrize('sparse_label', [True, False], ids=['sparse', 'dense'])
@modes.parametrize([modes.nested_eager, modes.nested, modes.exported])
def test_weights_and_targets_of_half_precision(rng, patched, mode, dtype, sparse_label):
    label = rng.randint(0, 5, 4) if sparse_label else rng.dirichlet(np.ones(5), 4)
    inputs = [np.float32(array) for array in (rng.normal(0, 3, (4, 5)), label, rng.uniform(0, 1, (4, 1)))]

    class Net(gluon.HybridBlock):
        """A net that is given bfloat16, which NumPy lacks, as float32."""

        def __init__(self):
            super().__init__()
            self.loss_fn = gluon.loss.SoftmaxCELoss(sparse_label=sparse_label)

        def hybrid_forward(self, F, *inputs):
            pred, label, weight = [F.cast(array, dtype=dtype) for array in inputs]
            return F.cast(self.loss_fn(pred, inputs[1] if sparse_label else label, weight), dtype='float32')

    expected, _ = modes.default(ImportedBefore(sparse_label=sparse_label), *inputs)
    loss, _ = mode(Net(), *inputs)
    assert_close(loss, expected, HALF_SUM)


def test_dtype_of_a_net_that_is_cast_after_its_first_use(patched):
    class Scaled(Nested):
        def __init__(self):
            super().__init__()
            self.scale = self.params.get('scale', shape=(1, 5), init='ones')

        def hybrid_forward(self, F, pred, label, mask, scale):
            return super().hybrid_forward(F, F.broadcast_mul(pred, scale), label, mask)

    pred, label, mask = mx.nd.ones((2, 5)), mx.nd.zeros(2), mx.nd.ones(2)
    net = hybridized(Scaled)()
    net.initialize()
    assert net(pred, label, mask).dtype == np.float32
    net.cast('float16')
    assert net(pred.astype('float16'), label, mask.astype('float16')).dtype == np.float16


def test_gradient_has_the_dtype_of_the_logits(patched):
    pred = mx.nd.array([[1, 2], [3, 1]], dtype='float16')
    pred.attach_grad()
    with autograd.record():
        loss = gluon.loss.SoftmaxCELoss()(pred, mx.nd.array([0, 1]))
    loss.backward()
    assert (loss.dtype, pred.grad.dtype) == (np.float16, np.float16)
    assert_close(pred.grad.asnumpy(), (pred.astype('float32').softmax() - mx.nd.eye(2)).asnumpy(), HALF_SUM)


# Options of the loss


@pytest.mark.parametrize(
    ('args', 'kwargs', 'axis'),
    [((), {}, 1), ((-1,), {}, -1), ((), {'axis': -1}, -1)],
    ids=['default', 'positional', 'keyword'],
)
def test_arguments_win_over_the_options_of_the_patch(args, kwargs, axis):
    with patch(axis=1, batch_axis=0):
        assert gluon.loss.SoftmaxCELoss(*args, **kwargs)._axis == axis


def test_positional_arguments_are_gluons(patched, logits):
    probs = mx.nd.one_hot(LABEL, 5)
    ours = gluon.loss.SoftmaxCELoss(-1, False, True, 0.5, 0)(mx.nd.log_softmax(logits), probs)
    stock = ImportedBefore(-1, False, True, 0.5, 0)(mx.nd.log_softmax(logits), probs)
    assert_close(ours.asnumpy(), stock.asnumpy(), NLL)


def test_options_that_a_call_rules_out_are_left_out(logits):
    with patch(ignore_label=-1, invalid_label='raise', lse_square_scale=0.1, label_smoothing=0.1):
        gluon.loss.SoftmaxCELoss(sparse_label=False)(logits, mx.nd.one_hot(LABEL, 5))
        gluon.loss.SoftmaxCELoss(-1, False)(logits, mx.nd.one_hot(LABEL, 5))
        gluon.loss.SoftmaxCELoss(from_logits=True)(mx.nd.log_softmax(logits), LABEL)
        with pytest.raises(ValueError, match='label'):
            gluon.loss.SoftmaxCELoss()(logits, LABEL + 1)


def test_scripts_may_use_this_packages_options(patched, logits):
    assert gluon.loss.SoftmaxCELoss(ignore_label=0)(logits, LABEL).asnumpy()[0] == 0


@pytest.mark.parametrize(
    ('options', 'error'),
    [({'ignore_label': 'pad'}, TypeError), ({'label_smoothing': 2}, ValueError), ({'colour': 1}, TypeError)],
)
def test_rejects_options_that_the_loss_does_not_take(options, error):
    before = bindings()
    with pytest.raises(error, match=next(iter(options))):
        patch(**options)
    assert bindings() == before


# Arguments of stock metrics


def test_ignore_label_is_that_of_the_metrics_too():
    label, pred = mx.nd.array([0, -1]), mx.nd.array([[0.5, 0.5], [0.5, 0.5]])
    with patch(ignore_label=-1):
        metrics = [mx.metric.create('ce'), mx.metric.Perplexity(None)]
        other = mx.metric.Perplexity(0)
    for metric in metrics:
        metric.update([label], [pred])
        assert metric.num_inst == 1
    assert other.get_config()['ignore_label'] == 0


@pytest.mark.parametrize('kwargs', [{}, {'invalid_label': 'raise'}, {'sparse_label': False}])
@pytest.mark.parametrize('invalid_label', ['nan', 'raise', 'clip'])
def test_invalid_label_clip_is_that_of_the_metrics_too(invalid_label, kwargs):
    with patch(invalid_label=invalid_label, ignore_label=-1):
        metrics = [mx.metric.create('ce', **kwargs), mx.metric.Perplexity(None, **kwargs)]
    clips = invalid_label == 'clip' and not kwargs
    assert [metric.get_config()['invalid_label'] for metric in metrics] == ['clip' if clips else 'raise'] * 2


def test_perplexity_takes_ignore_label_first(patched):
    """Three rows of three classes, where an axis of 0 would fit as well."""
    probs = mx.nd.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.375, 0.5]])
    metric = mx.metric.Perplexity(0)
    metric.update([mx.nd.array([0, 1, 1])], [probs])
    assert metric.get()[1] == FLOAT64.approx((0.5 * 0.375) ** -0.5)
    assert mx.metric.Perplexity(-1, -1, 'ppl').name == 'ppl'


def test_loss_metric_takes_a_name_first(patched):
    metric = mx.metric.Loss('CrossEntropy')
    metric.update(0, [mx.nd.array([1, 2]), mx.nd.array([3])])
    assert metric.get() == ('CrossEntropy', 2)


def test_eps_is_ignored_with_a_warning(patched):
    for make in (
        lambda: mx.metric.CrossEntropy(1e-3),
        lambda: mx.metric.create('ce', eps=1e-3),
        lambda: mx.metric.NegativeLogLikelihood(1e-3),
    ):
        with pytest.warns(UserWarning, match=r'eps: 0\.001 is ignored'):
            metric = make()
        assert metric.eps == 1e-3
        metric.update([mx.nd.array([0])], [mx.nd.array([[0.5, 0.5]])])
        assert metric.get()[1] == FLOAT64.approx(np.log(2))


def test_no_warning_without_eps(patched, recwarn):
    assert mx.metric.CrossEntropy(name='ce').eps == 1e-12
    assert mx.metric.create(STOCK['CrossEntropy']().get_config()).eps == 1e-12
    assert not [warning for warning in recwarn if 'eps' in str(warning.message)]


@pytest.mark.parametrize('make', [
    lambda: mx.metric.create('ce'),
    lambda: mx.metric.create(['acc', 'nll_loss']),
    lambda: mx.metric.CompositeEvalMetric([mx.metric.create(['ce'])], name='both'),
], ids=['single', 'several', 'nested'])  # fmt: skip
def test_metrics_can_be_printed_after_an_invalid_label(patched, make):
    metric = make()
    metric.update([mx.nd.array([0, 7])], [mx.nd.array([[0.5, 0.5], [0.5, 0.5]])])
    assert str(metric).startswith(f'EvalMetric: {metric.name}: 1 of 2 labels are invalid')
    with pytest.raises(ValueError, match='1 of 2 labels are invalid'):
        metric.get()


# isinstance and subclasses


def test_isinstance_of_objects_made_before():
    loss_fn, metric = STOCK['SoftmaxCELoss'](), STOCK['CrossEntropy']()
    subclass = type('Subclass', (STOCK['SoftmaxCELoss'],), {})
    with patch():
        assert isinstance(loss_fn, gluon.loss.SoftmaxCELoss)
        assert isinstance(subclass(), gluon.loss.SoftmaxCELoss)
        assert isinstance(metric, mx.metric.CrossEntropy)
        assert not isinstance(metric, mx.metric.Perplexity)


def test_isinstance_of_the_replacements(patched):
    perplexity = mx.metric.Perplexity(None)
    assert isinstance(perplexity, mx.metric.Perplexity)
    assert isinstance(perplexity, mx.metric.EvalMetric)
    assert not isinstance(perplexity, (mx.metric.CrossEntropy, mx.metric.Loss, mx.metric.Accuracy))
    assert not isinstance(gluon.loss.L2Loss(), gluon.loss.SoftmaxCELoss)
    assert isinstance(StableSoftmaxCrossEntropyLoss(), gluon.loss.SoftmaxCELoss)
    assert not isinstance(3, gluon.loss.SoftmaxCELoss)
    assert issubclass(gluon.loss.SoftmaxCELoss, gluon.loss.Loss)
    with pytest.raises(TypeError):
        issubclass(3, gluon.loss.SoftmaxCELoss)
    with patch():
        assert isinstance(perplexity, mx.metric.Perplexity)


def test_isinstance_of_a_subclass_is_about_the_subclass(patched):
    class Subclass(gluon.loss.SoftmaxCELoss):
        pass

    assert isinstance(Subclass(), Subclass)
    assert isinstance(Subclass(), gluon.loss.SoftmaxCELoss)
    assert not isinstance(gluon.loss.SoftmaxCELoss(), Subclass)
    assert not isinstance(ImportedBefore(), Subclass)


def masked_loss():
    """A subclass as clients write it, of what the name stands for now."""

    class MaskedLoss(gluon.loss.SoftmaxCrossEntropyLoss):
        def __init__(
            self, axis=-1, sparse_label=True, from_logits=False, weight=None, batch_axis=0, **kwargs
        ):
            super().__init__(axis, sparse_label, from_logits, weight, batch_axis, **kwargs)

        def hybrid_forward(self, F, pred, label, valid_length):
            weight = F.expand_dims(F.ones_like(label), axis=-1)
            weight = F.SequenceMask(weight, sequence_length=valid_length, use_sequence_length=True, axis=1)
            return super().hybrid_forward(F, pred, label, weight)

    return MaskedLoss


@pytest.mark.parametrize('hybridize', [False, True], ids=['eager', 'hybrid'])
def test_subclass_with_a_mask(rng, hybridize):
    pred, label = mx.nd.array(rng.normal(0, 1, (3, 4, 5))), mx.nd.array(rng.randint(0, 5, (3, 4)))
    lengths = mx.nd.array([4, 2, 1])
    losses, gradients = [], []
    with patch():
        ours = masked_loss()
    for kind in (ours, masked_loss()):
        loss_fn = kind()
        loss_fn.hybridize(hybridize)
        pred.attach_grad()
        with autograd.record():
            loss = loss_fn(pred, label, lengths)
        loss.backward()
        losses.append(loss.asnumpy())
        gradients.append(pred.grad.asnumpy())
    assert issubclass(ours, StableSoftmaxCrossEntropyLoss)
    assert_close(*losses, NLL)
    assert_close(*gradients, NLL)


def test_hybrid_forward_that_a_script_replaces(patched, logits, monkeypatch):
    loss_class = gluon.loss.SoftmaxCELoss
    before = loss_class.hybrid_forward
    monkeypatch.setattr(loss_class, 'hybrid_forward', lambda *inputs: 2 * before(*inputs))
    assert_close(loss_class()(logits, LABEL).asnumpy(), 2 * ImportedBefore()(logits, LABEL).asnumpy(), NLL)


def test_subclass_with_the_name_of_its_base(patched, logits):
    class SoftmaxCrossEntropyLoss(gluon.loss.SoftmaxCrossEntropyLoss):
        def __init__(self, **kwargs):
            super(SoftmaxCrossEntropyLoss, self).__init__(**kwargs)  # noqa: UP008

    assert SoftmaxCrossEntropyLoss()(logits, LABEL).shape == (6,)


def test_subclass_with_an_abstract_base_class(patched, logits):
    class Named(abc.ABC):
        @abc.abstractmethod
        def title(self):
            pass

    class NamedLoss(gluon.loss.SoftmaxCELoss, Named):
        def title(self):
            return 'loss'

    assert NamedLoss().title() == 'loss'
    assert NamedLoss()(logits, LABEL).shape == (6,)


def test_subclass_of_the_loss_metric_that_adds_up_by_itself(patched):
    class Mean(mx.metric.Loss):
        def update(self, _, preds):
            for value, count in preds:
                self.sum_metric += value
                self.num_inst += count

    metric = Mean('mean')
    metric.update(None, [(3, 2), (1, 2)])
    assert metric.get() == ('mean', 1)


# The stock classes go on


def test_stock_classes_work_while_their_names_are_replaced(patched, logits):
    assert type(ImportedBefore()) is STOCK['SoftmaxCELoss']
    assert ImportedBefore()(logits, LABEL).shape == (6,)
    for name in METRICS:
        stock = STOCK[name](*[None] * (name == 'Perplexity'))
        assert stock.name in ('cross-entropy', 'nll-loss', 'perplexity', 'loss')
    assert mx.metric.Torch().name == 'torch'
    assert mx.metric.create('caffe').name == 'caffe'


def test_subclasses_made_before_the_patch_stay_stock(rng):
    kind = masked_loss()
    with patch() as active:
        loss = kind()(mx.nd.array(rng.normal(0, 1, (3, 4, 5))), mx.nd.zeros((3, 4)), mx.nd.array([4, 2, 1]))
    assert loss.shape == (3,)
    assert active.losses == 0


@pytest.mark.parametrize(
    'kind', [StableSoftmaxCrossEntropyLoss, StableLoss, StableCrossEntropy], ids=lambda kind: kind.__name__
)
def test_no_recursion_if_a_name_is_bound_to_this_packages_class_by_hand(monkeypatch, kind):
    """Gluon's own __init__ looks its name up."""
    module, name = {
        StableSoftmaxCrossEntropyLoss: (gluon.loss, 'SoftmaxCrossEntropyLoss'),
        StableLoss: (mx.metric, 'Loss'),
        StableCrossEntropy: (mx.metric, 'CrossEntropy'),
    }[kind]
    monkeypatch.setattr(module, name, kind)
    assert isinstance(getattr(module, name)(), kind)
    with patch():
        assert isinstance(getattr(module, name)(), kind)
        assert isinstance(kind(), kind)
    assert getattr(module, name) is kind


# Pickle, copies, threads, Estimator


@pytest.mark.parametrize('active', [True, False], ids=['patched', 'unpatched'])
def test_pickles_do_not_need_a_patch(logits, active):
    with patch(ignore_label=0):
        loss_fn, metric = gluon.loss.SoftmaxCELoss(), mx.metric.Perplexity(0)
        metric.update([LABEL], [mx.nd.softmax(logits)])
        data = pickle.dumps((loss_fn, metric))
    with patch() if active else contextlib.nullcontext():
        loss_again, metric_again = pickle.loads(data)
        names = gluon.loss.SoftmaxCELoss, mx.metric.Perplexity
    expected = names if active else (StableSoftmaxCrossEntropyLoss, StablePerplexity)
    assert (type(loss_again), type(metric_again)) == expected
    np.testing.assert_array_equal(loss_again(logits, LABEL).asnumpy(), loss_fn(logits, LABEL).asnumpy())
    assert metric_again.get() == metric.get()


PRED, CLASSES = mx.nd.array([[0.5, 0.5], [0.25, 0.75]]), mx.nd.array([0, 1])


def stock_objects():
    """Objects of MXNet's own classes, and what each of them does next."""
    loss_fn = STOCK['SoftmaxCELoss'](1, True, True, 2.0, 0, prefix='mine_')
    loss_metric = STOCK['Loss']('train')
    loss_metric.update(None, mx.nd.array([1, 2, 4]))
    metrics = [STOCK['CrossEntropy'](name='ce'), STOCK['NegativeLogLikelihood'](), STOCK['Perplexity'](1, -1)]
    for metric in metrics:
        metric.update([CLASSES], [PRED])
        metric.reset_local()
        metric.update([CLASSES[:1]], [PRED[:1]])
    composite = mx.metric.CompositeEvalMetric([copy.deepcopy(metrics[0]), mx.metric.Accuracy()])
    return loss_fn, loss_metric, [*metrics, composite]


def results(loss_fn, loss_metric, metrics):
    loss_metric.update(None, mx.nd.array([1]))
    for metric in metrics:
        metric.update([CLASSES], [PRED])
    values = [metric.get_global()[1] for metric in [loss_metric, *metrics[:-1]]]
    values += [metric.get()[1] for metric in metrics[:-1]] + metrics[-1].get()[1]
    return [loss_metric.get(), loss_fn.prefix, loss_fn(PRED.log(), CLASSES).asnumpy().tolist()], values


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_stock_objects_become_replacements(protocol):
    data = pickle.dumps(stock_objects(), protocol)
    with patch() as active:
        loss_fn, loss_metric, metrics = pickle.loads(data)
    assert active.losses == 1
    assert active.metrics == 5
    assert isinstance(loss_fn, StableSoftmaxCrossEntropyLoss)
    assert metrics[2].get_config()['ignore_label'] == 1
    got, values = results(loss_fn, loss_metric, metrics)
    expected, expected_values = results(*stock_objects())
    assert got == [('train', 2.0), *expected[1:]]
    assert_close(values, expected_values, NLL)


def test_pickles_of_stock_objects_of_a_subclass(monkeypatch):
    class Mean(STOCK['Loss']):
        __module__, __qualname__ = 'mxnet.metric', 'Mean'

        def __init__(self, factor):
            super().__init__('mean')
            self.factor = factor

    monkeypatch.setattr(mx.metric, 'Mean', Mean, raising=False)
    metric = Mean(factor=3)
    metric.update(None, mx.nd.array([1, 2]))
    data = pickle.dumps(metric)
    with patch():

        class Mean(mx.metric.Loss):  # the script runs again, with the patch
            pass

        monkeypatch.setattr(mx.metric, 'Mean', Mean)
        again = pickle.loads(data)
        assert (type(again), again.factor, again.get()) == (Mean, 3, ('mean', 1.5))


@pytest.mark.parametrize('protocol', [0, pickle.HIGHEST_PROTOCOL])
def test_stock_objects_can_be_pickled_and_copied_while_their_names_are_replaced(protocol):
    thing = stock_objects()
    with patch(), patch():
        again = pickle.loads(pickle.dumps(thing, protocol))
        copied = copy.deepcopy(thing)
    data = pickle.dumps(thing, protocol)
    expected = results(*thing)
    for other in (again, copied, pickle.loads(data)):
        assert [type(other[0]), type(other[1])] == [STOCK['SoftmaxCELoss'], STOCK['Loss']]
        assert results(*other) == expected


class Subclass:  # the test binds it
    pass


@pytest.mark.parametrize('protocol', [0, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize('name', STOCK)
def test_replaced_classes_can_be_pickled(monkeypatch, name, protocol):
    with patch():
        kind = getattr(gluon.loss if 'Softmax' in name else mx.metric, name)
        subclass = type(kind)('Subclass', (kind,), {'__module__': __name__})
        monkeypatch.setitem(globals(), 'Subclass', subclass)
        data = pickle.dumps((kind, subclass), protocol)
        assert pickle.loads(data) == (kind, subclass)
    assert pickle.loads(data) == (METRICS.get(name, StableSoftmaxCrossEntropyLoss), subclass)


def test_copies_have_the_class(patched):
    for thing in (gluon.loss.SoftmaxCELoss(), mx.metric.Loss(), mx.metric.create('ce')):
        assert type(copy.deepcopy(thing)) is type(thing)
        assert type(copy.copy(thing)) is type(thing)


def test_counts_from_several_threads(patched):
    threads = [threading.Thread(target=lambda: [mx.metric.Loss() for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert patched.metrics == 200
    assert repr(patched) == '<patch(): 0 losses and 200 metrics were replaced>'


def test_two_threads_trace_a_block_one_after_the_other(patched):
    """MXNet fails if they do so at once: a block has one name scope."""
    both_trace = threading.Barrier(2)

    class Traced(gluon.loss.SoftmaxCELoss):
        def hybrid_forward(self, F, pred, label):
            with contextlib.suppress(threading.BrokenBarrierError):
                both_trace.wait(timeout=0.2)
            return super().hybrid_forward(F, pred, label)

    block = Traced()
    block.hybridize()
    with ThreadPoolExecutor(2) as pool:
        losses = [pool.submit(block, mx.nd.zeros((1, 4)), mx.nd.zeros(1)) for _ in range(2)]
    assert losses[0].result().asscalar() == losses[1].result().asscalar() > 0
