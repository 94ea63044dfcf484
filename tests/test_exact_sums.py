"""Sums without rounding, against fractions and math.fsum."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from gluon_stable_ce.exact_sums import ExactSums, exact_sum

inf, nan = math.inf, math.nan


def terms_of(name):
    rng = np.random.RandomState(0)
    bits = rng.randint(0, 2**63, 1000, dtype='int64').view('float64')
    largest = np.full(1000, np.finfo('float64').max)
    special = [5e-324, -1.7e308, 0.0, -0.0, 2.0**53 + 2]
    mixed = np.concatenate([rng.normal(0, 1, 1000) * 10.0 ** rng.randint(-300, 300, 1000), special])
    return {
        'mixed': mixed,
        'any-bits': bits[np.isfinite(bits)],
        'largest': -largest,
        'largest-and-mixed': np.concatenate([largest, mixed]),
        'none': mixed[:0],
        'one': mixed[:1],
        'few-mixed': mixed[-40:],
        'few-bits': bits[np.isfinite(bits)][:100],
        'few-largest': np.concatenate([largest[:9], mixed[-9:]]),
        'few-subnormal': np.array([5e-324, -1e-310, 2.2e-308, 1.0]),
    }[name]


NAMES = ['mixed', 'any-bits', 'largest', 'largest-and-mixed', 'none', 'one']
FEW = ['few-mixed', 'few-bits', 'few-largest', 'few-subnormal']


@pytest.mark.parametrize('name', [*NAMES, *FEW])
def test_sum_is_that_of_fractions(name):
    terms = terms_of(name)
    assert Fraction(exact_sum(terms), 2**1126) == sum(map(Fraction, terms.tolist()))


@pytest.mark.slow
def test_sum_of_ten_million_is_fsum(rng):
    """math.fsum rounds once, as the quotient here does."""
    values = np.concatenate([rng.rand(5 * 10**6) * 1e-6, rng.rand(5 * 10**6) * 100])
    rng.shuffle(values)
    assert ExactSums.of(values).over(1) == math.fsum(values)


def test_addition_is_concatenation(rng):
    values = np.concatenate([rng.normal(0, 1, 50), [inf, -inf, nan]])
    together = ExactSums.of(values[:20], invalid=2) + ExactSums.of(values[20:], invalid=1)
    assert together.as_dict() == ExactSums.of(values, invalid=3).as_dict()


def test_dict_is_json_and_back(rng):
    sums = ExactSums.of(np.append(rng.normal(0, 1e300, 50), [nan, inf]), invalid=3)
    fields = json.loads(json.dumps(sums.as_dict(), allow_nan=False))
    assert ExactSums.from_dict(fields).as_dict() == sums.as_dict()


@pytest.mark.parametrize('change', [
    *({'total': total} for total in (1, 'x', ' 0x1f ', '1_0', 'f')),  # of no values, the sum is 0
    *({name: -1} for name in ('count', 'infinite', 'minus_infinite', 'nan', 'invalid')),
    {'count': 1.0}, {'count': True}, {'nan': None}, {'infinite': 2, 'count': 1},
], ids=str)  # fmt: skip
def test_from_dict_rejects_malformed(change):
    with pytest.raises(ValueError, match='^state: expected sums '):
        ExactSums.from_dict({**ExactSums().as_dict(), **change})


@pytest.mark.parametrize(('values', 'mean'), [
    ([inf, 1], inf),
    ([-inf, 1], -inf),
    ([inf, -inf], nan),
    ([nan, inf], nan),
    ([], nan),
    ([1.7e308, 1.7e308], 1.7e308),
    ([0.1] * 10, 0.1),
], ids=str)  # fmt: skip
def test_mean(values, mean):
    np.testing.assert_array_equal(ExactSums.of(np.array(values, 'float64')).over(len(values)), mean)


@pytest.mark.parametrize(('sign', 'expected'), [(1, inf), (-1, -inf)])
def test_a_sum_above_all_floats_is_infinite(sign, expected):
    assert ExactSums.of(np.full(2, sign * 1.7e308)).over(1) == expected
