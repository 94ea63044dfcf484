"""Packages that use gluon's loss: the jobs of jobs_*.py give the same numbers with stock and patched.

d2l has a masked loss that overrides `forward`, and training loops in NumPy mode. gluoncv has losses that hold
gluon's, losses of its own beside metrics, and threads that share a loss. gluonnlp has a masked loss that
overrides `hybrid_forward`. gluonts uses gluon's loss in WaveNet, and mx.metric.Loss. Sockeye's own losses do
not change.
"""

import re

import pytest

pytestmark = pytest.mark.slow

JOBS = {
    'd2l': ['masked_loss', 'train_seq2seq', 'train_ch3', 'train_ch8', 'train_batch_ch13'],
    'gluoncv': ['distillation', 'siamrpn', 'segmentation', 'ssd', 'classification_with_mixup', 'parallel'],
    'gluonnlp': [
        'masked_loss', 'masked_loss_of_log_probabilities', 'masked_loss_with_label_smoothing',
        'language_model', 'sampled_softmax', 'masked_words_of_bert', 'translation',
    ],
    'gluonts': [
        'wavenet_with_weights_of_positions', 'wavenet_with_weights_of_positions_hybridized', 'feed_forward',
    ],
    'sockeye': ['with_gluons_loss', 'perplexity_metric'],
}  # fmt: skip
# Losses and metrics that are replaced in all jobs.
COUNTS = {
    'd2l': (6, 0),  # two masked losses in the first job, and one loss in each of the others
    'gluoncv': (
        15,
        5,
    ),  # two in each of the six distillation losses, one each in three jobs; metrics in three jobs
    'gluonnlp': (11, 0),  # two, one and two masked losses; one, one and two of gluon's; two masked losses
    'sockeye': (1, 1),
}


@pytest.mark.parametrize(('client', 'job'), [(client, job) for client, jobs in JOBS.items() for job in jobs])
def test_same_numbers(same_numbers, client, job):
    pytest.importorskip(client)
    same_numbers(f'jobs_{client}.py', job)


@pytest.mark.parametrize('client', COUNTS)
def test_losses_and_metrics_are_replaced(counts, client):
    pytest.importorskip(client)
    assert counts(f'jobs_{client}.py') == COUNTS[client]


def test_losses_and_metrics_of_gluonts_are_replaced(counts):
    pytest.importorskip('gluonts')
    losses, metrics = counts('jobs_gluonts.py')
    assert losses >= 2
    assert metrics >= 9


@pytest.mark.parametrize('job', ['wavenet', 'wavenet_hybridized'])
def test_rejects_the_weights_of_gluonts(results, job):
    """WaveNet's weights have the shape (8, 1, 1, 6), where a loss of shape (8, 6, 1) is to be weighted.

    Stock broadcasts both to (8, 8, 6, 6): each sample is weighted with the weights of all positions of all
    others, and each loss is the mean over the batch. It is not noticed since the weights are 1 unless values are
    missing. This package raises an error, as for each shape that the documentation does not allow.
    """
    pytest.importorskip('gluonts')
    stock, ours = results('jobs_gluonts.py', job)
    assert 'losses' in stock
    # arrays are refused by name, and in a graph MXNet's error names the lengths that do not fit
    assert re.search('sample_weight: expected|cannot be broadcasted', ours['error'])
