"""The benchmark's tables and pictures, from a small problem and from made-up times."""

import importlib
import os
import sys

import mpmath
import numpy as np
import pages
import pytest

FOLDER = os.path.join(pages.ROOT, 'benchmarks')
pytest.importorskip('matplotlib', reason='the benchmark needs the demo extra')


def load(*names):
    """Import modules of the benchmark. Its `cases` must not take the place of the tests' module of that name."""
    ours = sys.modules.pop('cases', None)
    sys.path.insert(0, FOLDER)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(FOLDER)
        sys.modules.pop('cases', None)
        if ours:
            sys.modules['cases'] = ours


cases, measure, run, accuracy = load('cases', 'measure', 'run', 'accuracy')
TIMES = {'median': 2e-3, 'low': 1e-3, 'high': 3e-3}


def made_up_results():
    """Results in which each contender takes the same time, on a machine that could be twice as fast."""
    rows = {name: {'forward': TIMES, 'both': TIMES, 'memory': 300} for name in cases.CONTENDERS}
    case = {'rows': rows, 'gradient': 100, 'limit': {'forward': 1e-3, 'both': 1e-3}}
    metric = {
        'rows': {cases.OURS: {'update': 1, 'epoch': 1}, cases.STOCK: {'update': 100, 'epoch': 100}},
        'limit': 0,
    }
    machine = {'mxnet': '1', 'python': '3', 'system': 's', 'architecture': 'a', 'cores': 2, 'bandwidth': 1e9}
    return {
        'machine': machine,
        'cases': {one.name: case for one in cases.CASES},
        'nets': {},
        'metrics': {cases.PROBS: metric},
    }


def test_bounds_are_about_what_is_measured():
    results = made_up_results()
    results['metrics'] = dict.fromkeys(cases.UPDATES, results['metrics'][cases.PROBS])
    measured = {what for what, _ in run.quantities(results)}
    assert {bound.what for bound in cases.BOUNDS} <= measured
    assert len(cases.CONTENDERS) + 1 <= 8  # and PyTorch


def test_bounds_that_are_not_met_are_named():
    lines = run.bounds_table(made_up_results()).splitlines()
    assert '| 512 x 50257 | ours, stock | gluon, hybridized | 1.05 | 1 |' in lines
    assert "| 512 x 50257 | ours, fused | the machine's limit | 1.8 | 2, not met |" in lines
    memory = '| 512 x 50257, peak memory | ours, fused | the size of the gradient | 1.15 | 3, not met |'
    assert memory in lines
    assert not any('PyTorch' in line for line in lines)  # it was not measured


@pytest.mark.slow
def test_picture_is_drawn_without_some_contenders(tmp_path):
    results = made_up_results()
    for name in (cases.OURS_FUSED, cases.SUM):
        del results['cases']['64 x 10']['rows'][name]
    run.draw.draw(results, str(tmp_path / 'results.png'))
    assert (tmp_path / 'results.png').read_bytes().startswith(b'\x89PNG')


def per_sample(gradient):
    """Each sample's gradient, scaled to 1 at most: the contenders divide by different counts."""
    gradient = gradient.reshape(len(gradient), -1)
    return gradient / np.abs(gradient).max(-1, keepdims=True)


@pytest.mark.parametrize('case', cases.CASES, ids=lambda case: case.name)
def test_contenders_solve_the_same_problem(case):
    case = cases.small(case)
    batches, truth, gradients = cases.inputs(case), cases.truth(case), {}
    for contender in cases.CONTENDERS:
        steps = cases.make(case, contender, batches)
        if steps is None:
            continue
        steps.forward()
        steps.both()
        gradients[contender] = batches[0][0].grad.asnumpy().astype('float64')
        if steps.losses:
            tolerance = 1e-2 if case.dtype == 'float16' else 1e-4
            np.testing.assert_allclose(steps.losses(), truth, atol=tolerance)
    expected = per_sample(gradients[cases.HYBRIDIZED])
    for gradient in gradients.values():
        np.testing.assert_allclose(per_sample(gradient), expected, atol=5e-3)


def test_operator_is_taken_off_in_the_same_round(monkeypatch):
    """By a clock that only the calls move on, and each round by more than the last."""
    now, rounds = [0.0], [0]

    def operator():
        rounds[0] += 1
        now[0] += 10 * rounds[0]

    def loss():
        now[0] += 10 * rounds[0] + 3

    monkeypatch.setattr(measure.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(measure.random, 'sample', lambda calls, _: calls)
    times = measure.medians({'operator': operator, 'loss': loss}, seconds=0, least=5, less='operator')
    assert times == {'loss': {'median': 3, 'low': 3, 'high': 3}}


def test_exact_losses_of_the_accuracy_page():
    for problem in (accuracy.Problem(2, 'float32', 3, 1), accuracy.Problem(10, 'float64', 3, 1)):
        logits = accuracy.data(problem)
        with mpmath.workdps(120):
            for row, loss in zip(logits, accuracy.truth(logits)):
                terms = [mpmath.e ** mpmath.mpf(float(logit)) for logit in row]
                expected = mpmath.log(mpmath.fsum(terms) / terms[0])
                assert abs(mpmath.mpf(str(loss)) / expected - 1) < 1e-15
