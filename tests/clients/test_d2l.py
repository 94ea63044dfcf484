"""d2l: its masked loss, which overrides `forward`, and its training loops, all in NumPy mode."""

import pytest

pytest.importorskip('d2l')
pytestmark = pytest.mark.slow

JOBS = ['masked_loss', 'train_seq2seq', 'train_ch3', 'train_ch6', 'train_ch8', 'train_batch_ch13']


@pytest.mark.parametrize('job', JOBS)
def test_same_numbers(same_numbers, job):
    same_numbers('jobs_d2l.py', job)


def test_losses_are_replaced(counts):
    """Two masked losses in the first job, and one loss in each of the others."""
    assert counts('jobs_d2l.py') == (7, 0)
