"""Sockeye 2: its own losses do not change, and gluon's loss in its training loop is replaced."""

import pytest

pytest.importorskip('sockeye')
pytestmark = pytest.mark.slow

JOBS = ['with_softmax_output', 'without_softmax_output', 'with_gluons_loss', 'perplexity_metric']


@pytest.mark.parametrize('job', JOBS)
def test_same_numbers(same_numbers, job):
    same_numbers('jobs_sockeye.py', job)


def test_a_loss_and_a_metric_are_replaced(counts):
    assert counts('jobs_sockeye.py') == (1, 1)
