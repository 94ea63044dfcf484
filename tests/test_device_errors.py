"""Errors of a device: MXNet reports them late and once, and skips other work silently."""

import contextlib
import ctypes
import math
import signal
import threading
import time

import mxnet as mx
import numpy as np
import pytest
import tolerances
from mxnet.base import _LIB

from gluon_stable_ce import StableCrossEntropy, StableLoss, device_errors

nd = mx.nd
ROWS, CLASSES = 6, 4
KINDS = {
    'loss': StableLoss,
    'probs': StableCrossEntropy,
    'log-probs': lambda: StableCrossEntropy(pred_type='log_probs'),
    'logits': lambda: StableCrossEntropy(pred_type='logits'),
    'dense': lambda: StableCrossEntropy(sparse_label=False),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


class Raising(mx.operator.CustomOp):
    def forward(self, **_):
        raise ValueError('on purpose')


class Blocked(mx.operator.CustomOp):
    event = threading.Event()

    def forward(self, **_):
        assert self.event.wait(timeout=60)


def register(name, operator):
    class Prop(mx.operator.CustomOpProp):
        def create_operator(self, *_):
            return operator()

    mx.operator.register(name)(Prop)


register('stable_ce_raising', Raising)
register('stable_ce_blocked', Blocked)


FAILING = {
    'random': lambda: nd.random.normal(0, -1, shape=(ROWS, CLASSES)),
    'custom': lambda: nd.Custom(nd.ones((ROWS, CLASSES)), op_type='stable_ce_raising'),
    'behind': lambda: nd.softmax(nd.random.gamma(-1, 1, shape=(ROWS, CLASSES)) + 1),
}


def wait_for_all():
    """Let all errors be reported."""
    for _ in range(20):
        with contextlib.suppress(mx.MXNetError):
            nd.waitall()


@pytest.fixture(autouse=True)
def nothing_is_pending():
    yield
    wait_for_all()


def inputs_of(kind, rng):
    """A label and predictions in NumPy, and the values that a metric counts."""
    p = rng.dirichlet(np.ones(CLASSES), ROWS).astype('float32')
    label = rng.randint(0, CLASSES, ROWS)
    if kind == 'loss':
        return label, p, p.ravel()
    pred = p if kind in ('probs', 'dense') else np.log(p)
    return np.eye(CLASSES)[label] if kind == 'dense' else label, pred, -np.log(p[np.arange(ROWS), label])


class Run:
    """A metric, one label and one prediction that are written over, and what the metric should count."""

    def __init__(self, kind, seed):
        self.kind, self.rng = kind, np.random.RandomState(seed)
        self.metric, self.values = KINDS[kind](), []
        label, pred, self.now = inputs_of(kind, self.rng)
        self.label, self.pred = nd.array(label), nd.array(pred)
        self.is_unknown = False  # whether the metric was given failed arrays

    def update(self):
        self.metric.update(self.label, self.pred)
        self.values.extend(self.now)

    def fail(self):
        self.is_unknown = True
        self.metric.update(self.label, self.failed())

    def failed(self):
        return FAILING[self.rng.choice(sorted(FAILING))]()

    def write_over(self):
        label, pred, now = inputs_of(self.kind, self.rng)
        label, pred = nd.array(label), nd.array(pred)
        self.label[:], self.pred[:] = label, pred
        self.now = now

    def wait(self):
        self.pred.wait_to_read()

    def wait_for_all(self):
        nd.waitall()

    def wait_for_failed(self):
        self.failed().wait_to_read()

    def reset(self):
        self.metric.reset()
        self.values, self.is_unknown = [], False

    def step(self):
        steps = (self.update, self.update, self.write_over, self.fail, self.wait, self.wait_for_all)
        with contextlib.suppress(mx.MXNetError):
            self.rng.choice([*steps, self.wait_for_failed, self.reset])()

    def check(self):
        """The metric is right, or raises and goes on to raise."""
        for _ in range(20):  # each error that is pending is reported once
            try:
                value = self.metric.get()[1]
            except mx.MXNetError:
                continue
            assert not self.is_unknown
            assert self.metric.num_inst == len(self.values)
            mean = np.mean(self.values) if self.values else math.nan
            assert value == pytest.approx(mean, nan_ok=True, rel=tolerances.NLL.relative)
            return
        with pytest.raises(mx.MXNetError, match=r'^After an error on the device, .* reset\(\) clears them$'):
            self.metric.get()


@every_kind
@pytest.mark.parametrize('seed', range(20))
def test_get_is_right_or_raises_after_any_sequence(kind, seed):
    run = Run(kind, seed)
    for _ in range(12):
        run.step()
    run.check()
    run.reset()
    wait_for_all()
    run.write_over()
    run.update()
    assert run.metric.get()[1] == pytest.approx(np.mean(run.values), rel=tolerances.NLL.relative)


@every_kind
@pytest.mark.parametrize('failing', FAILING)
def test_get_raises_also_if_another_one_was_told_of_the_error(kind, failing):
    """While the device is busy, so that it comes to the metric's work after the error was reported."""
    run, busy = Run(kind, 0), nd.ones((500, 500))
    run.update()
    failed = FAILING[failing]()
    for _ in range(5):
        busy = nd.dot(busy, busy)
    run.metric.update(run.label, failed)
    with pytest.raises(mx.MXNetError):
        failed.wait_to_read()
    for _ in range(2):
        with pytest.raises(mx.MXNetError, match='^After an error on the device'):
            run.metric.get()
    with pytest.raises(mx.MXNetError, match='^After an error on the device'):
        run.metric.get_global()


@every_kind
def test_what_was_read_before_an_error_is_known(kind):
    run = Run(kind, 0)
    run.update()
    assert run.metric.num_inst == len(run.values)
    with pytest.raises(mx.MXNetError):
        FAILING['random']().wait_to_read()
    run.update()
    run.check()
    assert run.metric.num_inst == len(run.values)


def test_unknown_values_go_into_checkpoints_and_merges():
    run = Run('loss', 0)
    run.metric.update(None, FAILING['random']())
    with pytest.raises(mx.MXNetError):
        run.metric.get()
    resumed, merged = StableLoss(), StableLoss()
    resumed.load_state_dict(run.metric.state_dict())
    merged.merge(run.metric)
    for metric in (resumed, merged, run.metric.all_reduce(mx.kv.create('local'))):
        with pytest.raises(mx.MXNetError, match='^After an error on the device'):
            metric.get()
    run.metric.reset_local()
    assert math.isnan(run.metric.get()[1])
    with pytest.raises(mx.MXNetError, match='^After an error on the device'):
        run.metric.get_global()


WAITING = {
    'boolean_mask': lambda array: nd.contrib.boolean_mask(array, nd.ones(len(array))),
    'nonzero': lambda array: mx.np.nonzero(array.as_np_ndarray()),
    'shared memory': lambda array: array.as_in_context(mx.Context('cpu_shared', 0))._to_shared_mem(),
    'copy': lambda array: array.asnumpy(),
}


@every_kind
@pytest.mark.parametrize('wait', WAITING.values(), ids=WAITING)
def test_an_error_that_other_functions_report_is_known(wait, kind):
    run = Run(kind, 0)
    run.update()
    failed = FAILING['random']()
    run.metric.update(run.label, failed)
    with pytest.raises(mx.MXNetError):
        wait(failed)
    with pytest.raises(mx.MXNetError, match='^After an error on the device'):
        run.metric.get()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason='signals interrupt it')
@pytest.mark.parametrize('waits', [lambda metric, array: metric.get(), lambda metric, array: array.asnumpy()])
def test_an_interrupt_of_a_wait_does_not_hide_an_error(waits):
    slow = product = nd.ones((1000, 1000))
    for _ in range(10):
        product = nd.dot(product, slow) * 1e-3
    failed = nd.broadcast_add(product[:4, :3], nd.random.normal(0, -1, shape=(4, 3)))
    metric = StableLoss()
    metric.update(None, failed)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with contextlib.suppress(KeyboardInterrupt, mx.MXNetError):
            waits(metric, failed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(mx.MXNetError, match='^After an error on the device'):
        metric.get()


def slow_failure():
    """An array that fails a while later."""
    product = nd.ones((500, 500))
    for _ in range(3):
        product = nd.dot(product, product) * 1e-3
    return nd.random.normal(0, -1, shape=(ROWS, CLASSES)) + product[:ROWS, :CLASSES]


def started(wait):
    """A thread that waits, and expects no error."""
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


WAITS = {
    'array': lambda failed: failed.wait_to_read(),
    'copy': lambda failed: failed.asnumpy(),
    'all': lambda _: nd.waitall(),
}


@pytest.mark.parametrize('wait', WAITS.values(), ids=WAITS)
def test_errors_that_a_thread_is_being_told_of_are_counted(wait):
    failed, before = slow_failure(), device_errors.count()

    def expect_error():
        with pytest.raises(mx.MXNetError):
            wait(failed)

    thread = started(expect_error)
    while thread.is_alive() and not device_errors._calls():
        time.sleep(1e-4)
    assert device_errors.count_all() == before + 1
    thread.join(timeout=60)


def told_late(failed, other, told):
    """Be told of an error, and count it a while later, as if this thread had to wait for the interpreter."""
    ctypes.CDLL(_LIB._name).MXNDArrayWaitToRead(failed.handle)  # without the counter
    told.append(True)
    time.sleep(0.02)
    _LIB.MXNDArrayWaitToRead(other.handle)


@every_kind
def test_get_raises_also_if_a_thread_is_told_of_the_error_at_the_same_moment(kind):
    # not by threads that race for one error: MXNet itself may crash then
    run, failed, told = Run(kind, 0), slow_failure(), []
    run.is_unknown = True
    run.metric.update(run.label, failed)
    thread = started(lambda: told_late(failed, FAILING['random'](), told))
    while not told:
        time.sleep(1e-4)
    run.check()
    thread.join(timeout=60)


def test_get_does_not_depend_on_what_another_thread_waits_for(monkeypatch):
    monkeypatch.setattr(device_errors, '_PAUSES', 10)
    Blocked.event.clear()
    thread = started(nd.Custom(nd.ones(1), op_type='stable_ce_blocked').wait_to_read)
    try:
        run = Run('loss', 0)
        run.update()
        run.check()
        assert thread.is_alive()
    finally:
        Blocked.event.set()
        thread.join(timeout=60)
