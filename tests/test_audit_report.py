"""The result of an audit, as text, as JSON and as a picture."""

import io
import json
import math
import sys

import numpy as np
import pytest
import tolerances
from audit_cases import distributions, labels_for, same, strict_json
from tolerances import assert_close

from gluon_stable_ce import audit
from gluon_stable_ce.auditing.report import check_plot


@pytest.fixture
def with_small_p():
    """2000 samples: every hundredth has p < eps, and one has p = 0."""
    p = np.random.RandomState(5).uniform(0.1, 1, 2000)
    p[::100] = 10.0 ** -np.arange(13, 33)
    p[42] = 0
    return np.stack([p, 1 - p], axis=1), np.zeros(2000, int)


def test_table_is_aligned_and_names_its_values(with_small_p):
    table = audit(*with_small_p).table()
    lines = table.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith('samples counted')] == ['2000']
    assert 'outside [0, 2)' in table
    assert '100.000% of the total loss' in table
    assert 'mx.metric.CrossEntropy(eps=1e-12)' in table
    assert len(lines) == 11 + 2 + 10
    assert len({len(line) for line in lines[12:]}) == 1
    assert all(
        line[48] != ' ' and line[49:51] in ('', '  ') for line in lines[:11]
    )  # the values end in one column
    assert 'sum to 1' not in audit(*with_small_p, pred_type='logits').table()


def test_as_dict_is_strict_json(with_small_p):
    found = audit(*with_small_p)
    again = strict_json(json.dumps(found.as_dict(), allow_nan=False))
    assert (again['nll'], again['error'], again['samples'], again['worst'][0]) == (
        'inf',
        'inf',
        2000,
        {'index': [42], 'label': 0, 'p': 0.0, 'nll': 'inf'},
    )
    assert {*again} == {name for name in found.__dataclass_fields__ if name != '_curve'} | {'error'}
    assert float(again['nll']) == found.nll  # the strings are what float() reads


def test_plot_shows_both_curves_the_bound_and_what_is_infinite(with_small_p, tmp_path):
    from matplotlib.image import imread

    figure = audit(*with_small_p).plot(tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    image = imread(tmp_path / 'a.png')
    assert image.shape[0] >= 300
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 100
    (axes,) = figure.axes
    assert 'nats' in axes.get_ylabel()
    assert axes.get_xlabel()
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    floor = -math.log(1e-12)
    assert max(lines['mx.metric.CrossEntropy']) <= floor + 1e-9
    assert sorted(lines['exact'])[-2] > 70
    assert list(lines['exact']) == sorted(lines['exact'], reverse=True)
    assert_close(next(y for label, y in lines.items() if '1e-12' in label), floor, tolerances.AUDIT)
    assert any('infinite: 1 ' in label for label in lines)


def test_plot_is_drawn_from_a_bounded_number_of_ranks_up_to_the_last():
    count = 300000
    p = 1 - np.arange(count) / count * 0.9
    rank, exact, stock = audit(np.stack([p, 1 - p], axis=1), np.zeros(count, int))._curve
    assert 9000 < len(rank) < 13000
    np.testing.assert_array_equal(rank[:1000], np.arange(1, 1001))
    assert rank[-1] == count
    assert len(set(np.diff(rank[1001:]))) == 1
    assert_close(exact, -np.log(p[count - rank.astype(int)]), tolerances.ROUNDED_FLOAT32)
    assert_close(stock, exact, tolerances.EPSILON)


@pytest.mark.parametrize('count', [1, 2, 999, 1001, 30000])
def test_plot_has_each_rank_once_and_the_worst_first(count):
    rank, exact, _ = audit(distributions(count, 3), labels_for(count, 3))._curve
    assert (rank[0], rank[-1]) == (1, count)
    assert (np.diff(rank) > 0).all()
    assert (np.diff(exact) <= 0).all()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(('stream', 'progress', 'shown'), [
    pytest.param(Terminal(), True, True, id='terminal'),
    pytest.param(Terminal(), False, False, id='terminal, not asked for'),
    pytest.param(io.StringIO(), True, False, id='no terminal'),
])  # fmt: skip
def test_progress_bar_is_shown_only_on_a_terminal(monkeypatch, stream, progress, shown):
    monkeypatch.setattr(sys, 'stderr', stream)
    audit(distributions(50, 4), labels_for(50, 4), progress=progress)
    assert ('chunk' in stream.getvalue()) == shown


def test_progress_needs_no_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tqdm', None)
    pred, label = distributions(50, 4), labels_for(50, 4)
    assert same(audit(pred, label, progress=True), audit(pred, label))


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ImportError, match='pip install "matplotlib<3.9"'):
        audit(distributions(50, 4), labels_for(50, 4)).plot()


@pytest.mark.parametrize('path', ['a.png', 'a.PDF', 'a'])
def test_check_plot_accepts_what_plot_can_save(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_plot(path)
    audit(distributions(50, 4), labels_for(50, 4)).plot(path)
    assert len(list(tmp_path.iterdir())) == 1
