"""Ways to measure: medians of interleaved calls, memory of a fresh process, bandwidth of the machine."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
# glibc then returns each array's memory when it is freed, and the peak is the same in each run
RETURN_MEMORY = {'MALLOC_MMAP_THRESHOLD_': '65536'}


def medians(calls, seconds=1.0, least=7, most=3000, less=None):
    """Return the median time of each call and its quartiles, in seconds.

    The calls take turns in a random order, so that caches and other load on the machine affect all alike. The
    time of the call that `less` names is taken off the others' of the same round. What is left is 0 where
    that call's noise is larger.
    """
    times = {name: [] for name in calls}
    for call in calls.values():  # the first call builds graphs
        call()
        call()
    begin = time.perf_counter()
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() - begin < seconds * len(calls)):
        for name, call in random.sample(list(calls.items()), len(calls)):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    off = times.pop(less) if less else 0
    return {
        name: dict(
            zip(
                ('median', 'low', 'high'),
                np.percentile(np.subtract(taken, off), [50, 25, 75]).clip(0).tolist(),
            )
        )
        for name, taken in times.items()
    }


def time_of(steps, kind, effort):
    """Return the times of one kind of step of all contenders, without the operator that makes the logits."""
    from problems import OPERATOR

    return medians({name: getattr(step, kind) for name, step in steps.items()}, **effort, less=OPERATOR)


def epochs(metrics, updates, seconds=1.0, least=7):
    """Return the median times of an update, and of an epoch per update, in seconds, of each metric.

    `metrics` has (metric, labels, preds) for each contender. An epoch ends with a get(), and so includes the
    work that the updates deferred.
    """
    single = {name: [] for name in metrics}

    def epoch(name):
        metric, labels, preds = metrics[name]
        metric.reset()
        for _ in range(updates):
            start = time.perf_counter()
            metric.update(labels, preds)
            single[name].append(time.perf_counter() - start)
        metric.get()

    whole = medians({name: partial(epoch, name) for name in metrics}, seconds, least)
    return {
        name: {'update': float(np.median(single[name])), 'epoch': whole[name]['median'] / updates}
        for name in metrics
    }


def bandwidth(megabytes=256):
    """Return the bytes per second that all cores together read or write when they copy large arrays."""
    cores = os.cpu_count()
    arrays = [np.ones(megabytes * 2**20 // 8 // cores) for _ in range(2 * cores)]

    def copy():
        threads = [threading.Thread(target=np.copyto, args=arrays[2 * i : 2 * i + 2]) for i in range(cores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return 2 * megabytes * 2**20 / medians({'copy': copy}, least=15, seconds=1)['copy']['median']


def in_fresh_process(python, what, *args):
    """Return the JSON that ``measure.py what args...`` prints."""
    done = subprocess.run(
        [python, os.path.join(HERE, 'measure.py'), what, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(RETURN_MEMORY if what == 'memory' else {})},
    )
    if done.returncode:
        raise RuntimeError(f'{what} {args}: {done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(case, contender, in_torch):
    """Return the peak resident set of three steps in bytes, less what the process holds before them."""
    import problems

    make = problems.make_torch if in_torch else problems.make
    make(problems.small(case), contender).both()  # loads libraries' code
    steps = make(case, contender)
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # resets the peak
    before = _status('VmRSS')
    for _ in range(3):
        steps.both()
    return _status('VmHWM') - before


def _status(field):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure_torch(case, effort):
    """Return the times and errors of PyTorch, which runs in this process."""
    import problems
    import torch

    steps = {name: problems.make_torch(case, name) for name in (problems.TORCH, problems.OPERATOR)}
    return {
        **{kind: time_of(steps, kind, effort)[problems.TORCH] for kind in ('forward', 'both')},
        'version': torch.__version__,
        **errors(steps[problems.TORCH].losses(), problems.truth(case)),
    }


def main(what, index, *args):
    import problems

    case = problems.CASES[int(index)]
    if what == 'memory':
        print(json.dumps(peak_memory(case, args[0], args[1] == 'torch')))
    elif what == 'torch':
        print(json.dumps(measure_torch(case, json.loads(args[0]))))


def errors(values, truth):
    """Return the largest absolute error, and the largest relative error of losses above 0.01."""
    off = np.abs(values - truth)
    large = truth > 0.01
    return {'absolute': float(off.max()), 'relative': float((off[large] / truth[large]).max(initial=0))}


if __name__ == '__main__':
    main(*sys.argv[1:])
