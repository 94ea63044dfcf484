"""All-reduce: real processes on this machine, one scheduler, servers and workers, as MXNet's own launcher starts them."""

import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import dist_worker
import mxnet as mx
import numpy as np
import pytest
import tolerances
from dist_worker import numbers_of, sums_of
from tolerances import assert_close

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCrossEntropyLoss
from gluon_stable_ce.distributed import all_reduce

HERE = os.path.dirname(os.path.abspath(__file__))
TIMEOUT = 120  # seconds for a whole job; one takes three


def launch(script, *args, workers=2, servers=1):
    """Run `script` as the workers of one distributed job; what each of them printed, in no particular order."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    env = dict(
        os.environ,
        DMLC_PS_ROOT_URI='127.0.0.1',
        DMLC_PS_ROOT_PORT=str(port),
        DMLC_NUM_SERVER=str(servers),
        DMLC_INTERFACE='lo',
        DMLC_NODE_HOST='127.0.0.1',
        DMLC_NUM_WORKER=str(workers),
        OMP_NUM_THREADS='1',
        PYTHONPATH=os.pathsep.join([os.path.dirname(HERE), os.environ.get('PYTHONPATH', '')]),
    )
    roles = ['scheduler'] + ['server'] * servers + ['worker'] * workers
    processes, deadline = [], time.monotonic() + TIMEOUT
    try:
        for role in roles:
            command = [os.path.join(HERE, script), *args] if role == 'worker' else ['-c', 'import mxnet']
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=dict(env, DMLC_ROLE=role),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    universal_newlines=True,
                )
            )
        codes = [None]
        while (
            None in codes and not any(codes) and time.monotonic() < deadline
        ):  # servers stop by themselves when the workers have
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        answers = [process.communicate() for process in processes]
    assert codes == [0] * len(roles), [
        (role, code, err) for role, code, (_, err) in zip(roles, codes, answers)
    ]
    return [out for out, _ in answers[-workers:]]


# Jobs of dist_worker.py: (kind of the store, workers, servers), and what is called one after the other.
MANY_KEYS = f'reduces_from:{215329 - 6}'
JOBS = {
    'sync': (
        ('dist_sync', 2, 1),
        ('reduces', 'metric:even', 'metric:uneven', 'training:sgd,False,1', 'refused:compression'),
    ),
    'three': (('dist_sync', 3, 2), ('reduces', 'metric:even', 'metric:uneven', MANY_KEYS)),
    'one': (('dist_sync', 1, 1), ('reduces',)),
    'async': (('dist_async', 2, 1), ('reduces', 'training:sgd,True,1')),
    'sgd': (('dist_sync', 2, 1), ('training:sgd,True,1',)),
    'adam': (('dist_sync', 2, 1), ('training:adam,True,2',)),
    'device': (('dist_device_sync', 2, 1), ('training:sgd,False,2',)),
    'names': (('dist_sync', 2, 1), ('refused:names',)),
    'tokens': (('dist_sync', 3, 2), ('token_mean',)),
}


@functools.lru_cache(maxsize=None)  # a job takes some seconds
def results_of(job):
    """What each worker returned from each call."""
    (kind, workers, servers), calls = JOBS[job]
    printed = launch('dist_worker.py', kind, *calls, workers=workers, servers=servers)
    return [json.loads(out.splitlines()[-1]) for out in printed]


def answers_of(job, call):
    """What each worker returned from a call."""
    return [results[call] for results in results_of(job)]


@pytest.mark.dist
@pytest.mark.parametrize(('job', 'workers'), [('one', 1), ('sync', 2), ('three', 3), ('async', 2)])
def test_sums_are_exact_call_after_call(job, workers):
    assert answers_of(job, 'reduces') == [sums_of(workers)] * workers


@pytest.mark.dist
def test_keys_of_many_calls_have_a_server():
    """Two servers, and keys so great that key * 9973 leaves the int32 that MXNet computes it in."""
    assert answers_of('three', MANY_KEYS) == [sums_of(3, 8)] * 3


@pytest.mark.dist
@pytest.mark.parametrize(('job', 'optimizer', 'update_on_kvstore', 'devices'), [
    ('sgd', 'sgd', True, 1),  # with multi_precision, where servers keep float64 values in float32
    ('adam', 'adam', True, 2),
    ('sync', 'sgd', False, 1),
    ('device', 'sgd', False, 2),
    ('async', 'sgd', True, 1),
])  # fmt: skip
def test_store_of_a_trainer_reduces_too_and_trains_the_same(job, optimizer, update_on_kvstore, devices):
    """As one process with all data does. But for 'dist_async', where the result depends on who comes first."""
    answers = answers_of(job, f'training:{optimizer},{update_on_kvstore},{devices}')
    assert [answer['sums'] for answer in answers] == [sums_of(2)] * 2
    assert [answer['trained'] for answer in answers] == [update_on_kvstore] * 2
    assert np.abs(np.array(answers[0]['weight']) - 0.5).min() > 1e-4  # it did train
    if job != 'async':
        alone = dist_worker.training(None, optimizer, 'False', 1)['weight']
        assert answers[0]['weight'] == answers[1]['weight']
        assert_close(answers[0]['weight'], alone, tolerances.SAME_OPERATORS)


@pytest.mark.dist
def test_recipe_of_the_token_mean_trains_as_one_process():
    """With uneven padding, and one worker at each step that has nothing else.

    With SGD, as Adam takes the same steps whatever the divisor is, and enlarges the error of small gradients.
    """
    weights = answers_of('tokens', 'token_mean')
    expected = dist_worker.token_mean_of_one_process(3)
    assert np.abs(expected - 0.5).min() > 1e-4  # it did train
    for weight in weights:
        assert weight == weights[0]
        assert_close(weight, expected, tolerances.ONE_PROCESS)


@pytest.mark.dist
@pytest.mark.parametrize(('job', 'case', 'pulled'), [('names', 'names', 2), ('sync', 'compression', 1)])
def test_unsuitable_store_is_an_error_on_every_worker_and_goes_on(job, case, pulled):
    for message, out in answers_of(job, f'refused:{case}'):
        assert message == (
            'store: expected integers for keys, not names as Module uses, and no gradient compression'
        )
        assert out == [pulled, pulled]


@pytest.mark.parametrize('kind', ['local', 'device'])
def test_sum_of_one_process(kind):
    numbers = [3, -(2**2239), 0, np.int64(5)]
    sums = all_reduce(mx.kv.create(kind), numbers)
    assert sums == numbers
    assert sums is not numbers
    assert all(type(number) is int for number in sums)
    assert all_reduce(mx.kv.create(kind), []) == []


class World:
    """Workers that are threads: `total` waits for all of them, and returns what `spoil` makes of their arrays."""

    def __init__(self, workers, spoil):
        self.workers, self._spoil = workers, spoil
        self._given, self._barrier = [None] * workers, threading.Barrier(workers)

    def total(self, rank, key, value):
        assert isinstance(key, str)
        assert value.dtype == np.float64
        self._given[rank] = value.asnumpy()
        self._barrier.wait(30)
        result = mx.nd.array(self._spoil(self._given, rank), dtype='float64')
        self._barrier.wait(30)
        return result


class PushPull:
    """The interface of a store without servers, as BytePS's."""

    type = 'pushpull'

    def __init__(self, rank, world):
        self.rank, self.num_workers, self._world = rank, world.workers, world

    def pushpull(self, key, value, out=None, priority=0):
        """Sum over all workers, as the store would over machines."""
        out[:] = self._world.total(self.rank, key, value)


class Horovod:
    """The functions of the module horovod.mxnet that a reduction needs. tests/horovod runs the module itself."""

    Average, Sum = range(2)

    def __init__(self, rank, world):
        self._rank, self._world = rank, world

    def rank(self):
        return self._rank

    def size(self):
        return self._world.workers

    def allreduce(self, tensor, average=None, name=None, op=None):
        """Sum over all workers. Without `op`, the module returns the average."""
        assert op == self.Sum
        return self._world.total(self._rank, name, tensor)


interfaces = pytest.mark.parametrize('interface', [PushPull, Horovod])


def run_threads(interface, workers, spoil):
    """Three calls of each worker, a thread each; what they returned, or the error."""
    world, answers = World(workers, spoil), [None] * workers

    def work(rank):
        store = interface(rank, world)
        try:
            answers[rank] = [all_reduce(store, numbers_of(rank, call)) for call in range(3)]
        except RuntimeError as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


@interfaces
@pytest.mark.parametrize('workers', [2, 3])
@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_sums_are_exact_without_servers(interface, workers, dtype):
    assert (
        run_threads(interface, workers, lambda given, rank: sum(rows.astype(dtype) for rows in given))
        == [sums_of(workers)] * workers
    )


@interfaces
@pytest.mark.parametrize(
    'spoil',
    [
        lambda given, rank: sum(given) / len(given),  # a mean
        lambda given, rank: given[rank],  # one worker alone
        lambda given, rank: sum(given).astype('float16'),
        lambda given, rank: abs(
            sum(given) - 65535 * np.eye(1, given[0].shape[1], 7)
        ),  # another limb of 16 bits, in each row
        lambda given, rank: sum(given) + np.eye(1, given[0].shape[1], 7) / 4,
        lambda given, rank: sum(given) * np.nan,
        lambda given, rank: given[0] * 0,
    ],
    ids=['mean', 'alone', 'float16', 'limb', 'fraction', 'nan', 'zero'],
)
def test_wrong_sums_are_an_error_on_every_worker(spoil, interface):
    message = 'store: expected the sum of the numbers of 3 workers, got another one'
    assert run_threads(interface, 3, spoil) == [message] * 3


def in_horovod_job(monkeypatch, says, size):
    """Make this process one of a Horovod job, as the module or horovodrun's environment says."""
    if says == 'module':
        hvd = SimpleNamespace(is_initialized=lambda: True, size=lambda: size)
        monkeypatch.setitem(sys.modules, 'horovod.mxnet', hvd)
    else:
        monkeypatch.setenv('HOROVOD_SIZE', str(size))
        monkeypatch.setitem(sys.modules, 'horovod.mxnet', SimpleNamespace(is_initialized=lambda: False))


@pytest.mark.parametrize('says', ['module', 'environment'])
@pytest.mark.parametrize('kind', ['horovod', 'local'])
def test_a_store_of_one_worker_is_refused_in_a_horovod_job_of_several(kind, says, monkeypatch):
    in_horovod_job(monkeypatch, says, 2)
    metric = StableCrossEntropy()
    message = (
        'store: expected the module horovod.mxnet, as this is one of 2 Horovod processes; '
        f"got a store of type '{kind}', which has one worker. Pass hvd of `import horovod.mxnet as hvd`"
    )
    with pytest.raises(ValueError, match=message):
        metric.all_reduce(mx.kv.create(kind))


@pytest.mark.parametrize('says', ['module', 'environment'])
def test_a_store_of_one_worker_is_accepted_in_a_horovod_job_of_one(says, monkeypatch):
    in_horovod_job(monkeypatch, says, 1)
    assert all_reduce(mx.kv.create('horovod'), [3]) == [3]


@pytest.mark.parametrize(('store', 'numbers', 'error', 'message'), [
    (
        None, [1], TypeError,
        'store: expected a store as mx.kv.create makes it, the module horovod.mxnet, or an object with rank, num_workers and pushpull; got None',
    ),
    ('dist_sync', [1], TypeError, "store: expected a store .* got 'dist_sync'"),
    (threading.Event(), [1], TypeError, 'store: expected a store'),
    ('local', 1, TypeError, 'numbers: expected a list of integers, got 1'),
    ('local', [1.0], TypeError, r'numbers: expected a list of integers, got \[1.0\]'),
    ('local', '12', TypeError, "numbers: expected a list of integers, got '12'"),
    (
        'local', [0, 2**2239], ValueError,
        r'numbers: expected integers from -2\*\*2239 to 2\*\*2239 - 1, got one of 2240 bits',
    ),
    ('local', [-(2**2239) - 1], ValueError, 'numbers: expected integers from'),
])  # fmt: skip
def test_all_reduce_rejects_bad_arguments(store, numbers, error, message):
    store = mx.kv.create('local') if store == 'local' else store
    with pytest.raises(error, match=message):
        all_reduce(store, numbers)


@pytest.mark.dist
@pytest.mark.parametrize('shards', ['even', 'uneven'])
@pytest.mark.parametrize(('job', 'workers'), [('sync', 2), ('three', 3)])
def test_metric_of_the_whole_on_every_worker(job, workers, shards):
    """Exactly what one process reports of all data, also if a worker has no data, and at every call."""
    stop = min(28 * workers, 83) if shards == 'even' else dist_worker.SHARDS[workers - 1][1]
    probs, labels = dist_worker.predictions(0, stop)
    whole = StableCrossEntropy()
    whole.update(labels, probs)
    once = [whole.get()[1], whole.num_inst]
    whole.update(labels, probs)
    twice = [whole.get()[1], whole.num_inst]
    assert once[1] == stop
    assert answers_of(job, f'metric:{shards}') == [[once, once, once, twice]] * workers


@pytest.mark.parametrize('kind', ['local', 'device'])
def test_metric_of_one_process_is_a_copy(kind):
    probs, labels = dist_worker.predictions()
    metric = StableCrossEntropy()
    metric.update(labels, probs)
    before = metric.state_dict()
    whole = metric.all_reduce(mx.kv.create(kind))
    assert type(whole) is type(metric)
    assert metric.state_dict() == whole.state_dict() == before
    whole.update(labels, probs)
    assert metric.state_dict() == before
    assert whole.num_inst == 2 * metric.num_inst


@pytest.mark.dist
def test_distributed_training_reports_the_same_on_every_worker(tmp_path):
    """The example of docs/metrics.md: every worker reports the same of every epoch, and the last value is that of the net that was saved."""
    pytest.importorskip('sklearn', reason='the example trains on digits that come with scikit-learn')
    import dist_train

    path = str(tmp_path / 'digits.params')
    said = [out.splitlines() for out in launch('dist_train.py', path)]
    values = [[line.split(',')[0] for line in lines] for lines in said]
    assert values[0] == values[1]
    assert sorted(lines[-1][-8:] for lines in said) == ['worker 0', 'worker 1']
    assert len(values[0]) == 3
    net = dist_train.build()
    net.load_parameters(path)
    metric = StableSoftmaxCrossEntropyLoss().create_metric()
    for data, label in dist_train.load(0, 1)[1]:
        metric.update(label, net(data))
    assert metric.num_inst == 357
    assert values[0][-1].endswith('nats over 357 digits')
    # other batches than the workers': a matrix product may round differently
    assert float(values[0][-1].split()[2]) == tolerances.ROUNDED_FLOAT32.approx(metric.get()[1])
    assert metric.get()[1] < 1  # a guess has 2.3
