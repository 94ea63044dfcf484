"""gluoncv: losses that hold gluon's, losses of its own beside metrics, and threads that share a loss."""

import pytest

pytest.importorskip('gluoncv')
pytestmark = pytest.mark.slow

JOBS = ['distillation', 'siamrpn', 'segmentation', 'ssd', 'classification_with_mixup', 'parallel']


@pytest.mark.parametrize('job', JOBS)
def test_same_numbers(same_numbers, job):
    same_numbers('jobs_gluoncv.py', job)


def test_losses_and_metrics_are_replaced(counts):
    """Two losses in each of the six distillation losses, and one each in three jobs; metrics in three jobs."""
    assert counts('jobs_gluoncv.py') == (15, 5)
