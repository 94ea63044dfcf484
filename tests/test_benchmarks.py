"""The benchmark's tables and pictures, from a small problem and from made-up times."""

import os
import sys

import mpmath
import numpy as np
import pages
import pytest
import tolerances
from tolerances import assert_close

FOLDER = os.path.join(pages.ROOT, 'benchmarks')
pytest.importorskip('matplotlib', reason='the benchmark needs the demo extra')
sys.path.insert(0, FOLDER)
import accuracy  # noqa: E402
import measure  # noqa: E402
import problems  # noqa: E402
import run  # noqa: E402

TIMES = {'median': 2e-3, 'low': 1e-3, 'high': 3e-3}


def made_up_results():
    """Results in which each contender takes the same time, on a machine that could be twice as fast."""
    rows = {name: {'forward': TIMES, 'both': TIMES, 'memory': 300} for name in problems.CONTENDERS}
    case = {'rows': rows, 'gradient': 100, 'limit': {'forward': 1e-3, 'both': 1e-3}}
    metric = {
        'rows': {problems.OURS: {'update': 1, 'epoch': 1}, problems.STOCK: {'update': 100, 'epoch': 100}},
        'limit': 0,
    }
    machine = {'mxnet': '1', 'python': '3', 'system': 's', 'architecture': 'a', 'cores': 2, 'bandwidth': 1e9}
    return {
        'machine': machine,
        'cases': {one.name: case for one in problems.CASES},
        'nets': {},
        'metrics': {problems.PROBS: metric},
    }


def test_bounds_are_about_what_is_measured():
    results = made_up_results()
    results['metrics'] = dict.fromkeys(problems.UPDATES, results['metrics'][problems.PROBS])
    measured = {what for what, _ in run.quantities(results)}
    assert {bound.what for bound in problems.BOUNDS} <= measured


def test_bounds_that_are_not_met_are_named():
    lines = run.bounds_table(made_up_results()).splitlines()
    assert '| 512 x 50257 | ours, stock | gluon, static_alloc | 1.9 | 1 |' in lines
    assert "| 512 x 50257 | ours, fused | the machine's limit | 1.8 | 2, not met |" in lines
    memory = '| 512 x 50257, peak memory | ours, fused | the size of the gradient | 1.15 | 3, not met |'
    assert memory in lines
    assert not any('PyTorch' in line for line in lines)  # it was not measured


@pytest.mark.slow
def test_picture_is_drawn_without_some_contenders(tmp_path):
    results = made_up_results()
    for name in (problems.OURS_FUSED, problems.SUM):
        del results['cases']['64 x 10']['rows'][name]
    run.draw.draw(results, str(tmp_path / 'results.png'))
    assert (tmp_path / 'results.png').read_bytes().startswith(b'\x89PNG')


def per_sample(gradient):
    """Each sample's gradient, scaled to 1 at most: the contenders divide by different counts."""
    gradient = gradient.reshape(len(gradient), -1)
    return gradient / np.abs(gradient).max(-1, keepdims=True)


@pytest.mark.parametrize('case', problems.CASES, ids=lambda case: case.name)
def test_contenders_solve_the_same_problem(case):
    case = problems.small(case)
    batches, truth, gradients = problems.inputs(case), problems.truth(case), {}
    for contender in problems.CONTENDERS:
        steps = problems.make(case, contender, batches)
        if steps is None:
            continue
        steps.forward()
        steps.both()
        gradients[contender] = batches[0][0].grad.asnumpy().astype('float64')
        if steps.losses:
            assert_close(steps.losses(), truth, tolerances.STOCK_LOSS[case.dtype])
    expected = per_sample(gradients[problems.HYBRIDIZED])
    for gradient in gradients.values():
        assert_close(per_sample(gradient), expected, tolerances.STOCK_GRADIENT)


@pytest.mark.parametrize(('taken', 'expected'), [(3, 3), (-3, 0)], ids=['time', 'noise'])
def test_operator_is_taken_off_in_the_same_round(monkeypatch, taken, expected):
    """By a clock that only the calls move on, and each round by more than the last."""
    now, rounds = [0.0], [0]

    def operator():
        rounds[0] += 1
        now[0] += 10 * rounds[0]

    def loss():
        now[0] += 10 * rounds[0] + taken

    monkeypatch.setattr(measure.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(measure.random, 'sample', lambda calls, _: calls)
    times = measure.medians({'operator': operator, 'loss': loss}, seconds=0, least=5, less='operator')
    assert times == {'loss': {'median': expected, 'low': expected, 'high': expected}}


def test_exact_losses_of_the_accuracy_page():
    for problem in (accuracy.Problem(2, 'float32', 3, 1), accuracy.Problem(10, 'float64', 3, 1)):
        logits = accuracy.data(problem)
        with mpmath.workdps(120):
            for row, loss in zip(logits, accuracy.truth(logits)):
                terms = [mpmath.e ** mpmath.mpf(float(logit)) for logit in row]
                expected = mpmath.log(mpmath.fsum(terms) / terms[0])
                assert abs(mpmath.mpf(str(loss)) / expected - 1) < 1e-15
