"""What an audit found: its numbers, as text, as JSON and as a picture."""
import math
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any, Optional, Tuple

import numpy as np

Worst = namedtuple('Worst', 'index label p nll')
Worst.__doc__ = "A sample: its `index` in the labels' shape, its `label`, the label's probability `p`, and its exact `nll` in nats."


@dataclass(frozen=True)
class Audit:
    """What `audit` found. Exact and stock values are of the same samples: those with a valid label that is not ignored.

    Attributes
    ----------
    pred_type, classes, eps
        What was looked at, and with which eps.
    samples, ignored, invalid : int
        How many samples counted; how many labels are `ignore_label`; how many are outside [0, classes), NaN or fractional.
    nll, perplexity : float
        Exact mean negative log-likelihood, nats, inf if any p is 0; and ``exp(nll)``. NaN without samples, as is what follows.
    stock_cross_entropy, stock_perplexity : float
        What ``mx.metric.CrossEntropy(eps)``, in nats, and ``mx.metric.Perplexity`` print.
    under_eps, under_eps_share : int, float
        How many samples have p < eps, and their share of the total loss, from 0 to 1.
    zero, nan : int
        How many samples have p = 0, an infinite NLL; how many have no NLL, as of a NaN or a negative probability.
    bad_rows, row_tolerance : int or None, float
        How many distributions, of labels that are not ignored, sum to something further than the tolerance from 1; None for logits.
    worst : tuple of (index, label, p, nll)
        The samples of the largest NLL, nats, the worst first, by their index in the labels' shape. NaN ranks as infinite.

    Examples
    --------
    >>> import numpy as np
    >>> from gluon_stable_ce.audit import audit
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
    worst: Tuple[Worst, ...]
    _curve: Any = field(repr=False, compare=False)  # rank from the worst on, exact NLL, stock NLL; (3, points)

    @property
    def error(self) -> float:
        """Relative error of `stock_cross_entropy`: inf if it is finite and `nll` is not, NaN if there is nothing to compare."""
        stock, exact = self.stock_cross_entropy, self.nll
        if stock == exact:
            return 0.0
        if math.isnan(stock + exact):
            return float('nan')
        return abs(stock - exact) / exact if 0 < exact < float('inf') else float('inf')

    def as_dict(self) -> dict:
        """All fields and `error`, ready for strict JSON: what is not finite is one of the strings 'inf', '-inf' and 'nan'."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != '_curve'}
        return _plain({**fields, 'error': self.error, 'worst': [sample._asdict() for sample in self.worst]})

    def table(self) -> str:
        """The report as aligned plain text."""
        rows = [('samples counted', self.samples, ''),
                ('labels ignored', self.ignored, ''),
                ('labels invalid', self.invalid, f'outside [0, {self.classes}), NaN or fractional; not counted'),
                ('mean NLL, exact', f'{self.nll:.9g}', 'nats'),
                (f'mx.metric.CrossEntropy(eps={self.eps:g})', f'{self.stock_cross_entropy:.9g}', f'nats; relative error {self.error:.3g}'),
                ('perplexity, exact', f'{self.perplexity:.9g}', ''),
                ('mx.metric.Perplexity', f'{self.stock_perplexity:.9g}', ''),
                ('samples with p < eps', self.under_eps, f'hold {self.under_eps_share:.3%} of the total loss'),
                ('samples with p = 0', self.zero, 'infinite NLL'),
                ('samples without an NLL', self.nan, 'NaN, or a negative probability')]
        if self.bad_rows is not None:
            rows.append(('rows that do not sum to 1', self.bad_rows, f'to within {self.row_tolerance:g}'))
        lines = [f'{name:<34} {value:>14}  {note}'.rstrip() for name, value, note in rows]
        if self.worst:
            lines += ['', f"{'worst samples':<26} {'label':>7} {'p':>14} {'NLL (nats)':>14}"]
            lines += [f"{', '.join(map(str, index)):<26} {label:>7} {p:>14.6g} {nll:>14.6g}" for index, label, p, nll in self.worst]
        return '\n'.join(lines)

    def plot(self, path: Any = None) -> Any:
        """Draw each sample's NLL, exact and stock, over its rank from the worst on, so that the stock curve's ceiling shows.

        Drawn from the 1000 worst samples, and 10000 or so spread evenly over all, whose ranks are estimates. Saved to `path` if given.
        Returns a ``matplotlib.figure.Figure``; raises ImportError where there is no matplotlib.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('a plot needs matplotlib: pip install "gluon-stable-ce[demo]"') from error
        figure = Figure(figsize=(8, 5))
        FigureCanvasAgg(figure)  # no pyplot: neither a display nor the caller's backend has a say
        axes = figure.add_subplot()
        rank, exact, stock = self._curve
        top = 1.1 * np.max(self._curve[1:], initial=1.0, where=np.isfinite(self._curve[1:]))
        exact = np.where(exact == np.inf, top, exact)
        axes.fill_between(rank, exact, stock, alpha=0.2, color='tab:red', label='hidden')
        axes.plot(rank, exact, 'o-', markersize=3, color='tab:red', label='exact')
        axes.plot(rank, stock, 'o-', markersize=2, color='tab:blue', label='mx.metric.CrossEntropy')
        if self.eps:
            axes.axhline(-math.log(self.eps), linestyle='--', color='gray', label=f'-log {self.eps:g}, where the eps takes over')
        if self.zero:
            axes.axhline(top, linestyle=':', color='tab:red', label=f'infinite: {self.zero} samples with p = 0')
        axes.set(xscale='log', xlabel='rank of the sample, from the worst on', ylabel='NLL of the sample (nats)',
                 title=f'{self.under_eps} of {self.samples} samples have p < eps and hold {self.under_eps_share:.2%} of the loss')
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def _plain(value):
    """`value` as strict JSON knows it."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
