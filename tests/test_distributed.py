"""All-reduce: real processes on this machine, one scheduler, servers and workers, as MXNet's own launcher starts them."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import dist_worker
import mxnet as mx
import numpy as np
import pytest
from dist_worker import numbers_of

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


def answers_of(*args, **sizes):
    """What each worker says to a call of a function of dist_worker.py."""
    return [json.loads(out.splitlines()[-1]) for out in launch('dist_worker.py', *args, **sizes)]


def sums_of(workers, calls=3):
    return [
        [sum(column) for column in zip(*(numbers_of(rank, call) for rank in range(workers)))]
        for call in range(calls)
    ]


@pytest.mark.dist
@pytest.mark.parametrize(
    ('kind', 'workers', 'servers'), [('dist_sync', 2, 1), ('dist_sync', 3, 2), ('dist_async', 2, 1)]
)
def test_sums_are_exact_call_after_call(kind, workers, servers):
    assert answers_of('reduces', kind, workers=workers, servers=servers) == [sums_of(workers)] * workers


@pytest.mark.dist
def test_one_distributed_worker_is_its_own_sum():
    assert answers_of('reduces', workers=1) == [sums_of(1)]


@pytest.mark.dist
def test_many_calls_find_keys_that_every_server_has():
    """Two servers, and keys so great that key * 9973 leaves the int32 that MXNet computes it in."""
    assert answers_of('reduces_from', str(215329 - 6), servers=2) == [sums_of(2, 8)] * 2


@pytest.mark.dist
@pytest.mark.parametrize(
    ('kind', 'optimizer', 'update_on_kvstore', 'devices'),
    [
        ('dist_sync', 'sgd', True, 1),  # with multi_precision, where servers keep float64 values in float32
        ('dist_sync', 'adam', True, 2),
        ('dist_sync', 'sgd', False, 1),
        ('dist_device_sync', 'sgd', False, 2),
        ('dist_async', 'sgd', True, 1),
    ],
)
def test_a_store_that_trains_carries_numbers_too_and_trains_the_same(
    kind, optimizer, update_on_kvstore, devices
):
    call = 'training', kind, optimizer, str(update_on_kvstore), str(devices)
    answers = answers_of(*call, 'True')
    assert [answer['sums'] for answer in answers] == [sums_of(2)] * 2
    assert [answer['trained'] for answer in answers] == [update_on_kvstore] * 2
    assert np.abs(np.array(answers[0]['weight']) - 0.5).min() > 1e-4  # it did train
    if kind != 'dist_async':  # where the result depends on who comes first
        assert [answer['weight'] for answer in answers + answers_of(*call, 'False')] == [
            answers[0]['weight']
        ] * 4


@pytest.mark.dist
@pytest.mark.parametrize(('case', 'pulled'), [('names', 2), ('compression', 1)])
def test_a_store_that_cannot_carry_numbers_says_so_on_every_worker_and_goes_on(case, pulled):
    for message, out in answers_of('refused', case):
        assert (
            message
            == 'kvstore: expected integers for keys, not names as Module uses, and no gradient compression'
        )
        assert out == [pulled, pulled]


@pytest.mark.parametrize('kind', ['local', 'device'])
def test_one_process_is_its_own_sum(kind):
    numbers = [3, -(2**2239), 0, np.int64(5)]
    sums = all_reduce(mx.kv.create(kind), numbers)
    assert sums == numbers
    assert sums is not numbers
    assert all(type(number) is int for number in sums)
    assert all_reduce(mx.kv.create(kind), []) == []


class PushPull:
    """The interface of MXNet's Horovod store, which has no servers: `pushpull` waits for all workers and gives each of them the sum."""

    type = 'pushpull'

    def __init__(self, rank, world, spoil):
        self.rank, self.num_workers, self._world, self._spoil = rank, len(world['given']), world, spoil

    def pushpull(self, key, value, out=None, priority=0):
        """Sum over all workers, as the store would over machines."""
        assert isinstance(key, str)
        self._world['given'][self.rank] = value.asnumpy()
        self._world['barrier'].wait(30)
        out[:] = mx.nd.array(self._spoil(self._world['given'], self.rank), dtype='float64')
        self._world['barrier'].wait(30)


def run_pushpull(workers, spoil):
    """Three calls of each worker, a thread each; what they returned, or the error."""
    world, answers = {'given': [None] * workers, 'barrier': threading.Barrier(workers)}, [None] * workers

    def work(rank):
        store = PushPull(rank, world, spoil)
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


@pytest.mark.parametrize('workers', [2, 3])
@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_a_store_with_pushpull_only(workers, dtype):
    assert (
        run_pushpull(workers, lambda given, rank: sum(rows.astype(dtype) for rows in given))
        == [sums_of(workers)] * workers
    )


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
def test_a_store_that_gives_back_something_else_is_found_out_by_every_worker(spoil):
    message = 'kvstore: expected the sum of what 3 workers gave, got something else'
    assert run_pushpull(3, spoil) == [message] * 3


@pytest.mark.parametrize(
    ('store', 'numbers', 'error', 'message'),
    [
        (
            None,
            [1],
            TypeError,
            'kvstore: expected a store as mx.kv.create makes it, or with rank, num_workers and pushpull; got None',
        ),
        ('dist_sync', [1], TypeError, "kvstore: expected a store .* got 'dist_sync'"),
        (threading.Event(), [1], TypeError, 'kvstore: expected a store'),
        ('local', 1, TypeError, 'numbers: expected a list of integers, got 1'),
        ('local', [1.0], TypeError, r'numbers: expected a list of integers, got \[1.0\]'),
        ('local', '12', TypeError, "numbers: expected a list of integers, got '12'"),
        (
            'local',
            [0, 2**2239],
            ValueError,
            r'numbers: expected integers from -2\*\*2239 to 2\*\*2239 - 1, got one of 2240 bits',
        ),
        ('local', [-(2**2239) - 1], ValueError, 'numbers: expected integers from'),
    ],
)
def test_bad_input(store, numbers, error, message):
    store = mx.kv.create('local') if store == 'local' else store
    with pytest.raises(error, match=message):
        all_reduce(store, numbers)


@pytest.mark.dist
@pytest.mark.parametrize(('shards', 'workers'), [('even', 2), ('even', 3), ('uneven', 2), ('uneven', 3)])
def test_a_metric_is_the_wholes_on_every_worker(shards, workers):
    """Exactly what one process over all data says, whether a worker has no data or is asked twice."""
    stop = min(28 * workers, 83) if shards == 'even' else dist_worker.SHARDS[workers - 1][1]
    probs, labels = dist_worker.predictions(0, stop)
    whole = StableCrossEntropy()
    whole.update(labels, probs)
    once = [whole.get()[1], whole.num_inst]
    whole.update(labels, probs)
    twice = [whole.get()[1], whole.num_inst]
    assert once[1] == stop
    assert answers_of('metric', shards, workers=workers) == [[once, once, once, twice]] * workers


@pytest.mark.parametrize('kind', ['local', 'device'])
def test_a_metric_of_one_process_stays_as_it_is(kind):
    probs, labels = dist_worker.predictions()
    metric = StableCrossEntropy()
    metric.update(labels, probs)
    before = metric.get(), metric.num_inst
    metric.all_reduce(mx.kv.create(kind))
    assert (metric.get(), metric.num_inst) == before


@pytest.mark.dist
def test_distributed_training_reports_one_number(tmp_path):
    """The example of the README: every worker says the same of every epoch, and the last is true of the net that was saved."""
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
    assert float(values[0][-1].split()[2]) == pytest.approx(metric.get()[1], rel=1e-6)
    assert metric.get()[1] < 1  # a guess has 2.3
