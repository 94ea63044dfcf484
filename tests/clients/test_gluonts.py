"""gluonts: WaveNet, which uses gluon's loss, and the Trainer, which uses mx.metric.Loss."""

import re

import pytest

pytest.importorskip('gluonts')
pytestmark = pytest.mark.slow

JOBS = ['wavenet_with_weights_of_positions', 'wavenet_with_weights_of_positions_hybridized', 'feed_forward']


@pytest.mark.parametrize('job', JOBS)
def test_same_numbers(same_numbers, job):
    same_numbers('jobs_gluonts.py', job)


@pytest.mark.parametrize('job', ['wavenet', 'wavenet_hybridized'])
def test_rejects_the_weights_of_gluonts(results, job):
    """WaveNet's weights have the shape (8, 1, 1, 6), where a loss of shape (8, 6, 1) is to be weighted.

    Stock broadcasts both to (8, 8, 6, 6): each sample is weighted with the weights of all positions of all others, and
    each loss is the mean over the batch. It is not noticed since the weights are 1 unless values are missing. This package
    raises an error, as for each shape that the documentation does not allow.
    """
    stock, ours = results('jobs_gluonts.py', job)
    assert 'losses' in stock
    # arrays are refused by name, and in a graph MXNet's error names the lengths that do not fit
    assert re.search('sample_weight: expected|cannot be broadcasted', ours['error'])


def test_losses_and_metrics_are_replaced(counts):
    losses, metrics = counts('jobs_gluonts.py')
    assert losses >= 2
    assert metrics >= 9
