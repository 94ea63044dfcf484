"""gluonnlp: its masked loss, which overrides `hybrid_forward`, and models that train with it and with gluon's loss."""

import pytest

pytest.importorskip('gluonnlp')
pytestmark = pytest.mark.slow

JOBS = [
    'masked_loss',
    'masked_loss_of_log_probabilities',
    'masked_loss_with_label_smoothing',
    'language_model',
    'sampled_softmax',
    'masked_words_of_bert',
    'translation',
]


@pytest.mark.parametrize('job', JOBS)
def test_same_numbers(same_numbers, job):
    same_numbers('jobs_gluonnlp.py', job)


def test_losses_are_replaced(counts):
    """Two, one and two masked losses; one, one and two of gluon's; two masked losses."""
    assert counts('jobs_gluonnlp.py') == (11, 0)
