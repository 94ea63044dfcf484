"""Compute exact sums over given predictions, and what MXNet's own metrics report for the same ones."""

from numbers import Integral
from typing import Any, Optional

import numpy as np

from ..class_terms import ROUNDING, is_impossible
from ..exact_sums import ExactSums
from ..options import PRED_TYPES, PredType, check_choice, check_ignore_label, check_number
from .arrays import check_arrays, split_into_chunks
from .report import Audit, Worst

_FLOOR = 1e-10  # of mx.metric.Perplexity
_WORST, _SPREAD = 1000, 10000  # how many samples a picture has: the worst, and of evenly spaced ranks
# Of a sample: exact NLL in nats, probability, label, and flat index in the labels.
_SAMPLE = np.dtype([('nll', 'f8'), ('p', 'f8'), ('label', 'i8'), ('position', 'i8')])


def audit(
    pred: Any,
    label: Any,
    *,
    pred_type: PredType = 'probs',
    axis: int = -1,
    ignore_label: Optional[int] = None,
    eps: float = 1e-12,
    worst: int = 10,
    progress: bool = False,
) -> Audit:
    r"""Compare the exact mean NLL of given predictions, in nats, with what MXNet's own metrics report.

    .. math:: \frac{1}{N} \sum_n -\log p_n \quad\text{and}\quad \frac{1}{N} \sum_n -\log(p_n + \epsilon)

    Parameters
    ----------
    pred : (N, ..., C at `axis`, ...) float16, float32 or float64
        A NumPy array or an MXNet array. A memory map is read in chunks, of a size that
        ``python -m gluon_stable_ce audit --help`` describes. 4 bytes for each sample stay in memory, for the
        picture.
    label : `pred`'s shape without `axis`, or with 1 there; integers, floats or bools
        Class indices. A label outside [0, C), NaN or a fraction is invalid, and does not count.
    pred_type : 'probs', 'logits' or 'log_probs'
        The kind of `pred`. For 'logits' and 'log_probs', the stock metrics are taken to be fed with
        ``softmax(pred)`` or ``exp(pred)``, rounded to `pred`'s dtype.
    axis : int, default -1
        Class axis of `pred`.
    ignore_label : int, optional
        Label that does not count. ``mx.metric.CrossEntropy`` has no such option: its value here is for the
        samples that count.
    eps : float, default 1e-12
        The eps of ``mx.metric.CrossEntropy``, from 0 to 1.
    worst : int, default 10
        The length of the list of the worst samples.
    progress : bool, default False
        Show a progress bar if stderr is a terminal and tqdm is installed.

    Returns
    -------
    Audit
        Its values are NaN if no sample counts.

    Raises
    ------
    TypeError, ValueError
        If arrays, shapes, dtypes or options do not fit. The message names the argument and its problem.

    Notes
    -----
    *Numerics*: the NLL is computed in float64 from the input as it was rounded. It is summed exactly, so that
    chunks change nothing.

    The stock values are computed term by term in `pred`'s dtype, as MXNet does. MXNet also adds up each
    update in that dtype. Here all samples are one update, summed exactly and rounded once. In float32 and
    float64 the batch size changes only the last digits. In float16 a batch that adds up to more than 65504
    gives inf, and smaller batches may not.

    A probability below 0 or above 1.001 and a log-probability above 0.001 are impossible. Such a sample has
    the NLL NaN. `Audit.hints` says what such predictions may be.

    A row sums to 1 if it does so within 1e-3, or in float16 within 1e-2.

    Examples
    --------
    >>> import numpy as np
    >>> from gluon_stable_ce import audit
    >>> found = audit(np.array([[-99.0, 0.0], [0.0, -99.0]]), np.array([0, 0]), pred_type='log_probs')
    >>> found.nll, round(found.stock_cross_entropy, 2), found.under_eps, found.under_eps_share
    (49.5, 13.82, 1, 1.0)
    """
    check_choice('pred_type', pred_type, PRED_TYPES)
    check_number('axis', axis, Integral)
    check_ignore_label(ignore_label, sparse_label=True)
    check_number('eps', eps, low=0, high=1)
    check_number('worst', worst, Integral, low=0)
    pred, label = check_arrays(pred, label, axis)
    tally = _Tally(pred, label, axis, pred_type, ignore_label, float(eps), worst)
    with np.errstate(all='ignore'):  # infinite values and NaN are counted
        for start, rows, labels in split_into_chunks(pred, label, axis, progress):
            tally.add(start, rows, labels)
        return tally.report()


_KINDS = {'probs': 'probabilities', 'log_probs': 'log-probabilities', 'logits': 'logits'}


class _Tally:
    """Sums and counts of the chunks so far."""

    def __init__(self, pred, label, axis, pred_type, ignore_label, eps, size):
        self.pred_type, self.ignore_label, self.eps, self.size = pred_type, ignore_label, eps, size
        self.positions, self.classes = label.shape, pred.shape[axis]
        self.dtype = np.dtype(pred.dtype.name)  # in the machine's byte order
        self.tolerance = 1e-2 if self.dtype == 'float16' else 1e-3
        self.exact, self.under, self.stock, self.floored = [ExactSums()] * 4
        self.ignored = self.invalid = self.bad_rows = self.rows = 0
        self.looks_like = dict.fromkeys(PRED_TYPES, 0)  # counts of doubtful rows
        self.label_range = float('inf'), float('-inf')
        self.worst = np.zeros(0, _SAMPLE)
        self.nlls = [np.zeros(0, 'float32')]  # of all samples: a picture needs no float64

    def add(self, start, rows, labels):
        """Add a chunk: predictions (n, C), labels (n,) float64, and the flat index of the first of them."""
        is_valid = (labels >= 0) & (labels < self.classes) & (labels == np.floor(labels))  # NaN is not
        is_counted = labels != self.ignore_label  # all, if it is None
        self.ignored += int((~is_counted).sum())
        self.invalid += int((is_counted & ~is_valid).sum())
        self._look_at(rows[is_counted] if self.ignored else rows, labels[is_counted])
        chosen = is_counted & is_valid
        rows, index = rows if chosen.all() else rows[chosen], labels[chosen].astype('int64')  # (m, C), (m,)
        nll, p = _nll_and_p(rows, index, self.pred_type)  # (m,) each
        self._add_sums(nll, p.astype(self.dtype))
        position = start + np.flatnonzero(chosen)
        self._add_samples(np.rec.fromarrays([nll, p, index, position], dtype=_SAMPLE))

    def _look_at(self, rows, labels):
        """Count the rows, (n, C), by the kinds they look like, and widen the range of the labels, (n,)."""
        if (
            self.pred_type == 'logits'
        ):  # which may be anything, so only rows that are all probabilities matter
            doubtful = rows if self.looks_like['probs'] == self.rows else rows[:0]
        else:
            p = rows if self.pred_type == 'probs' else np.exp(rows, dtype='float64')
            doubtful = rows[~self._sum_to_1(p)]
            self.bad_rows += len(doubtful)
        self.rows += len(rows)
        least, largest = doubtful.min(axis=-1), doubtful.max(axis=-1)
        counts = {
            'probs': (least >= 0) & self._sum_to_1(doubtful),
            'log_probs': (largest <= ROUNDING) & self._sum_to_1(np.exp(doubtful, dtype='float64')),
            'logits': (least < 0) | (largest > 1 + ROUNDING),
        }
        for kind, looks_like_it in counts.items():
            self.looks_like[kind] += int(looks_like_it.sum())
        low, high = self.label_range
        self.label_range = min(low, labels.min(initial=low)), max(high, labels.max(initial=high))

    def _sum_to_1(self, p):
        """Whether each row of probabilities, (n, C), is a distribution."""
        return np.abs(p.sum(axis=-1, dtype='float64') - 1) <= self.tolerance

    def _hints(self):
        """Say how the input may be wrong."""
        labels = self.exact.count + self.invalid
        hints = []
        if self.invalid:
            hints.append(f'{self.invalid / labels:.3%} of the labels are invalid{self._shift()}')
        kind = self._kind()
        if kind != self.pred_type:
            hints.append(f'these look like {_KINDS[kind]}: --pred-type {kind}')
        return tuple(hints)

    def _shift(self):
        low, high = self.label_range
        if (low, high) == (1, self.classes):
            return f': they go from 1 to {high:g}, and the classes from 0 to {high - 1:g}. Shifted by one?'
        return ': if -1 is padding, --ignore-label -1' if low == -1 else ''

    def _kind(self):
        """Return the kind that the predictions look like, if that is certain; else `pred_type`."""
        kinds = ('probs',) if self.pred_type == 'logits' else ('probs', 'log_probs')  # which are logits, too
        for kind in kinds:
            if self.looks_like[kind] == self.rows > 0:
                return kind
        logits = self.looks_like['logits']
        return 'logits' if 2 * logits > self.rows or (logits and self.exact.nan) else self.pred_type

    def _add_sums(self, nll, p):
        """Add exact NLLs, (m,), and those of both stock metrics from `p`, (m,)."""
        self.exact += ExactSums.of(nll)
        self.under += ExactSums.of(nll[nll > -np.log(self.eps)])
        self.stock += ExactSums.of(self._stock_nll(p))
        self.floored += ExactSums.of(-np.log(np.maximum(self.dtype.type(_FLOOR), p)).astype('float64'))

    def _stock_nll(self, p):
        """Return the terms of mx.metric.CrossEntropy, in the dtype of `p`, (m,)."""
        return -np.log(p + self.eps).astype('float64')

    def _add_samples(self, samples):
        """Keep the worst samples, and the NLL of all."""
        self.nlls.append(samples['nll'].astype('float32'))
        if len(self.worst) == self.size:
            least = _difficulty(self.worst).min(initial=np.inf)
            samples = samples[_difficulty(samples) > least]
        merged = np.concatenate([self.worst, samples])
        # the worst first, and of equal ones the first to come
        self.worst = merged[np.argsort(-_difficulty(merged), kind='stable')[: self.size]]

    def report(self):
        """Return the result of all chunks."""
        nll = self.exact.over(self.exact.count)
        return Audit(
            pred_type=self.pred_type,
            classes=self.classes,
            eps=self.eps,
            samples=self.exact.count,
            ignored=self.ignored,
            invalid=self.invalid,
            nll=nll,
            perplexity=float(np.exp(nll)),
            stock_cross_entropy=self._stock_mean(self.stock),
            stock_perplexity=float(np.exp(self._stock_mean(self.floored))),
            under_eps=self.under.count,
            under_eps_share=self._under_eps_share(),
            zero=self.exact.infinite,
            nan=self.exact.nan,
            bad_rows=None if self.pred_type == 'logits' else self.bad_rows,
            row_tolerance=self.tolerance,
            hints=self._hints(),
            worst=tuple(self._describe(*sample) for sample in self.worst.tolist()),
            _curve=self._curve(),
        )

    def _stock_mean(self, sums):
        """The mean that a stock metric reports: it adds up in `pred`'s dtype, and divides in float64."""
        return float(self.dtype.type(sums.over(1))) / sums.count if sums.count else float('nan')

    def _under_eps_share(self):
        if not self.exact.count or self.exact.nan:
            return float('nan')
        if self.under.infinite:
            return 1.0
        return self.under.total / self.exact.total if self.under.count else 0.0

    def _describe(self, nll, p, label, position):
        return Worst(tuple(map(int, np.unravel_index(position, self.positions))), label, p, nll)

    def _curve(self):
        """Rank, exact and stock NLL, (3, points), of the worst samples and of evenly spaced ranks."""
        nll = np.concatenate(self.nlls)
        nll.sort()  # NaN comes last
        count = len(nll)
        spread = np.arange(count, 0, -(count // _SPREAD + 1))
        rank = np.union1d(np.arange(1, min(count, _WORST) + 1), spread)
        exact = nll[count - rank].astype('float64')
        stock = self._stock_nll(np.exp(-exact).astype(self.dtype))
        return np.stack([rank, np.where(np.isnan(exact), np.inf, exact), stock])


def _difficulty(samples):
    """By what the worst are ranked: the NLL, with NaN as if it were infinite."""
    return np.where(np.isnan(samples['nll']), np.inf, samples['nll'])


def _nll_and_p(rows, index, pred_type):
    """Exact NLL and probability of each row's label, float64 (n,) each, from rows (n, C) and classes (n,)."""
    at_label = np.arange(len(index)), index
    if pred_type == 'logits':
        nll = _nll_of_logits(rows.astype('float64'), at_label)
        return nll, np.exp(-nll)
    chosen = rows[at_label].astype('float64')
    p, log_p = (chosen, np.log(chosen)) if pred_type == 'probs' else (np.exp(chosen), chosen)
    nll = np.maximum(-log_p, 0) + 0.0
    return np.where(is_impossible(chosen, pred_type), np.nan, nll), p  # + 0: no negative zero


def _nll_of_logits(rows, at_label):
    """Exact NLL, (n,), from float64 logits (n, C), which are overwritten."""
    rows -= rows.max(axis=-1, keepdims=True)  # the largest is 0
    logit = rows[at_label]
    terms = np.exp(rows, out=rows)
    terms[at_label] = 0  # the label's term is apart from the sum, so that an NLL near 0 keeps its digits
    return np.log1p(terms.sum(axis=-1) + np.expm1(logit)) - logit
