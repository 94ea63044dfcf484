"""All-reduce over Horovod: real processes, which horovodrun starts. `make test-horovod` builds Horovod and runs this."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pages
import pytest
from dist_worker import SHARDS, predictions, sums_of, token_mean_of_one_process

from gluon_stable_ce import StableCrossEntropy

pytest.importorskip('horovod.mxnet', reason='Horovod is not installed: make test-horovod')

pytestmark = pytest.mark.dist

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
TIMEOUT = 120  # seconds for a whole job; one takes about ten


def run_job(processes, folder, script, *args):
    """What each process of a job wrote as JSON into the folder, by rank."""
    command = [sys.executable, os.path.join(HERE, 'local_horovodrun.py'), '--gloo']
    command += ['-np', str(processes), '-H', f'localhost:{processes}', '--network-interfaces', 'lo']
    command += [sys.executable, str(script), *args]
    path = os.pathsep.join([os.path.dirname(TESTS), TESTS, os.environ.get('PYTHONPATH', '')])
    run = subprocess.Popen(
        command,
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    try:
        output, _ = run.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGTERM)  # horovodrun ends its processes; they end themselves, too
        run.wait(30)
        raise
    finally:
        if run.poll() is None:
            run.kill()
    assert run.returncode == 0, output
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(processes)]


@pytest.fixture(scope='module', params=[1, 2, 3], ids='{} processes'.format)
def job(request, tmp_path_factory):
    """What each process of a job returned, by rank."""
    folder = tmp_path_factory.mktemp('job')
    return run_job(request.param, folder, os.path.join(HERE, 'hvd_worker.py'), str(folder), str(TIMEOUT))


def test_sums_are_exact_call_after_call(job):
    assert [worker['sums'] for worker in job] == [sums_of(len(job), 4)] * len(job)


def test_a_reduced_metric_is_that_of_one_process_to_the_last_bit(job):
    """Its sums and its values, in both windows. The second of the processes has no data."""
    whole = StableCrossEntropy()
    probs, labels = predictions(0, SHARDS[len(job) - 1][1])
    whole.update(labels, probs)
    whole.reset_local()
    whole.update(labels, probs)
    expected = {
        'states': [whole.state_dict()] * 2,
        'values': [whole.get()[1]] * 2 + [whole.get_global()[1]] * 2,
        'is_unchanged': True,
    }
    assert [worker['metrics'] for worker in job] == [expected] * len(job)


def test_training_goes_on_with_the_same_weights(job):
    weights = [worker[name]['weight'] for worker in job for name in ('training', 'training alone')]
    assert weights == [weights[0]] * 2 * len(job)
    assert all(abs(weight - 0.5) > 1e-4 for row in weights[0] for weight in row)  # it did train
    assert [worker['training']['sums'] for worker in job] == [sums_of(len(job), 3)] * len(job)


def test_recipe_of_the_token_mean_trains_as_one_process(job):
    expected = token_mean_of_one_process(len(job))
    for worker in job:
        assert worker['token mean'] == job[0]['token mean']
        np.testing.assert_allclose(worker['token mean'], expected, rtol=0, atol=1e-6)


def test_a_store_of_one_worker_is_refused_by_name_if_there_are_more_processes(job):
    for worker in job:
        for kind in ('horovod', 'local'):
            if len(job) == 1:
                assert worker['errors'][kind] == [1]
            else:
                assert worker['errors'][kind] == (
                    f'ValueError: store: expected the module horovod.mxnet, as this is one of {len(job)} Horovod '
                    f'processes; got a store of type {kind!r}, which has one worker. '
                    'Pass hvd of `import horovod.mxnet as hvd`'
                )
        assert worker['before_init']['horovod'] == worker['errors']['horovod']


def test_horovod_that_is_not_initialised_is_an_error(job):
    assert all(
        worker['before_init']['hvd'].startswith('ValueError: Horovod has not been initialized')
        for worker in job
    )


def test_another_result_than_the_sum_is_an_error_on_every_process(job):
    message = f'RuntimeError: store: expected the sum of the numbers of {len(job)} workers, got another one'
    for worker in job:
        assert worker['errors']['average'] == ([1] if len(job) == 1 else message)
        assert worker['errors']['hvd'] == [len(job)]


def test_blocks_of_the_metrics_page_run_in_a_job(tmp_path):
    blocks = [block.text for block in pages.blocks_of('docs/metrics.md', 'python')]
    blocks.remove(pages.read('tests/dist_train.py'))  # a script of its own
    assert 'import horovod' in blocks[-1]
    report = f"""
with open(f'{tmp_path}/{{hvd.rank()}}.json', 'w') as file:
    json.dump([whole.num_inst, metric.num_inst, whole.get()[1], net.weight.data().asnumpy().tolist()], file)
"""
    (tmp_path / 'train.py').write_text('\n'.join([*blocks, report]))
    first, second = run_job(2, tmp_path, tmp_path / 'train.py')
    assert first == second
    assert first[:2] == [8, 4]
