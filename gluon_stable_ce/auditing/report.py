"""The result of an audit: its numbers, as text, as JSON and as a picture."""

import json
import math
import os
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any, Optional, Tuple

import numpy as np

Worst = namedtuple('Worst', 'index label p nll')
Worst.__doc__ = (
    "A sample: its `index` in the labels' shape, its `label`, that label's `p`, and the exact `nll` in nats."
)


@dataclass(frozen=True)
class Audit:
    """The result of `audit`.

    Exact and stock values are of the same samples: those with a valid label that is not ignored.

    Attributes
    ----------
    pred_type, classes, eps
        The arguments.
    samples, ignored, invalid : int
        The numbers of samples that counted, of ignored labels, and of labels that are outside [0, classes),
        NaN or fractional.
    nll, perplexity : float
        Exact mean negative log-likelihood in nats, inf if any p is 0; and ``exp(nll)``. Like all means, they
        are NaN if no sample counts.
    stock_cross_entropy, stock_perplexity : float
        The values of ``mx.metric.CrossEntropy(eps)``, in nats, and of ``mx.metric.Perplexity``.
    under_eps, under_eps_share : int, float
        The number of samples with p < eps, and their share of the total loss, from 0 to 1.
    zero, nan : int
        The numbers of samples with p = 0, whose NLL is infinite, and of samples without an NLL, whose
        probability is NaN or impossible: below 0 or above 1.001.
    bad_rows, row_tolerance : int or None, float
        The number of distributions that do not sum to 1 within the tolerance, without those of ignored
        labels; None for logits.
    hints : tuple of str
        Possible mistakes in the input: the share of invalid labels, and predictions of a kind other
        than `pred_type`.
    worst : tuple of (index, label, p, nll)
        The samples of the largest NLL, the worst first. NaN ranks as infinite.

    Examples
    --------
    >>> import numpy as np
    >>> from gluon_stable_ce import audit
    >>> found = audit(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([1, 0]))
    >>> found.zero, found.nll, round(found.stock_cross_entropy, 4), found.error
    (1, inf, 14.1621, inf)
    >>> found.worst[0]
    Worst(index=(0,), label=1, p=0.0, nll=inf)
    """

    pred_type: str
    classes: int
    eps: float
    samples: int
    ignored: int
    invalid: int
    nll: float
    perplexity: float
    stock_cross_entropy: float
    stock_perplexity: float
    under_eps: int
    under_eps_share: float
    zero: int
    nan: int
    bad_rows: Optional[int]
    row_tolerance: float
    hints: Tuple[str, ...]
    worst: Tuple[Worst, ...]
    # rank from the worst on, exact NLL, stock NLL: (3, points)
    _curve: Any = field(repr=False, compare=False)

    @property
    def error(self) -> float:
        """Relative error of `stock_cross_entropy`; inf if only `nll` is infinite, NaN if one is NaN."""
        stock, exact = self.stock_cross_entropy, self.nll
        if stock == exact:
            return 0.0
        if math.isnan(stock + exact):
            return float('nan')
        return abs(stock - exact) / exact if 0 < exact < float('inf') else float('inf')

    @property
    def verdict(self) -> str:
        """How far off the stock metric is, and in which direction."""
        if math.isnan(self.error):
            return 'not comparable with NaN'
        if not self.error:
            return 'equal'
        direction = 'low' if self.stock_cross_entropy < self.nll else 'high'
        return f'{"infinitely" if math.isinf(self.error) else f"{100 * self.error:.3g}%"} too {direction}'

    def as_dict(self) -> dict:
        """All fields and `error` for strict JSON: infinities and NaN are the strings 'inf', '-inf', 'nan'."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != '_curve'}
        worst = [sample._asdict() for sample in self.worst]
        text = json.dumps({**fields, 'error': self.error, 'worst': worst})
        return json.loads(text, parse_constant=lambda name: str(float(name)))

    def table(self) -> str:
        """The report as aligned plain text."""
        stock = f'mx.metric.CrossEntropy(eps={self.eps:g})'
        rows = [
            ('samples counted', self.samples, ''),
            ('labels ignored', self.ignored, ''),
            ('labels invalid', self.invalid, f'outside [0, {self.classes}), NaN or fractional; not counted'),
            ('mean NLL, exact', f'{self.nll:.9g}', 'nats'),
            (stock, f'{self.stock_cross_entropy:.9g}', f'nats; {self.verdict}'),
            ('perplexity, exact', f'{self.perplexity:.9g}', ''),
            ('mx.metric.Perplexity', f'{self.stock_perplexity:.9g}', ''),
            ('samples with p < eps', self.under_eps, f'{self.under_eps_share:.3%} of the total loss'),
            ('samples with p = 0', self.zero, 'infinite NLL'),
            ('samples without an NLL', self.nan, 'NaN, or an impossible probability'),
        ]
        if self.bad_rows is not None:
            rows.append(('rows that do not sum to 1', self.bad_rows, f'to within {self.row_tolerance:g}'))
        lines = [*self.hints, ''] if self.hints else []
        lines += [f'{name:<34} {value:>14}  {note}'.rstrip() for name, value, note in rows]
        if self.worst:
            lines += ['', f'{"worst samples":<26} {"label":>7} {"p":>14} {"NLL (nats)":>14}']
            lines += [
                f'{", ".join(map(str, index)):<26} {label:>7} {p:>14.6g} {nll:>14.6g}'
                for index, label, p, nll in self.worst
            ]
        return '\n'.join(lines)

    def plot(self, path: Any = None) -> Any:
        """Draw each sample's NLL, exact and stock, over its rank from the worst on.

        It is drawn from the 1000 worst samples, and from up to 10000 whose ranks are evenly spaced.

        Parameters
        ----------
        path : str, path or file, optional
            Where to save the picture.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            If there is no matplotlib.
        """
        figure = _new_figure()
        axes = figure.add_subplot()
        rank, exact, stock = self._curve
        top = 1.1 * np.max(self._curve[1:], initial=1.0, where=np.isfinite(self._curve[1:]))
        exact = np.where(exact == np.inf, top, exact)
        axes.fill_between(rank, exact, stock, alpha=0.2, color='tab:red', label='difference')
        axes.plot(rank, exact, 'o-', markersize=3, color='tab:red', label='exact')
        axes.plot(rank, stock, 'o-', markersize=2, color='tab:blue', label='mx.metric.CrossEntropy')
        if self.eps:
            bound = f'-log {self.eps:g}, the bound of the eps'
            axes.axhline(-math.log(self.eps), linestyle='--', color='gray', label=bound)
        if self.zero:
            infinite = f'infinite: {self.zero} samples with p = 0'
            axes.axhline(top, linestyle=':', color='tab:red', label=infinite)
        axes.set(xscale='log', xlabel='rank, from the worst sample on', ylabel='NLL of the sample (nats)')
        axes.set_title(
            f'{self.under_eps} of {self.samples} samples with p < eps: {self.under_eps_share:.2%} of the loss'
        )
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def check_plot(path: str) -> None:
    """Raise an error now if `Audit.plot` could not save to `path` later."""
    suffixes = _new_figure().canvas.get_supported_filetypes()
    suffix = os.path.splitext(path)[1][1:].lower()
    if suffix and suffix not in suffixes:  # matplotlib adds one where there is none
        raise ValueError(f'{path}: expected one of the suffixes {", ".join(sorted(suffixes))}, got {suffix}')
    if not os.path.isdir(os.path.dirname(path) or '.'):
        raise FileNotFoundError(f'{path}: No such file or directory')


def _new_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "matplotlib<3.9"') from error
    return Figure(figsize=(8, 5))  # without pyplot, which needs a display or changes the caller's backend
