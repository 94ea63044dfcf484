"""What an epsilon hid in given predictions: exact sums over all of them, next to what MXNet's own metrics print."""
import json
import math
import sys
from numbers import Integral
from typing import Any, Optional

import mxnet as mx
import numpy as np

from . import functional
from ._options import check_choice, check_number
from ._files import check_arrays, chunks, read_files
from ._report import Audit, Worst
from ._running_mean import ExactSums as Sums

__all__ = ['Audit', 'audit']

_FLOOR = 1e-10  # of mx.metric.Perplexity
_WORST, _SAMPLE = 1000, 10000  # samples that a plot is drawn from

def audit(pred: Any, label: Any, *, pred_type: str = 'probs', axis: int = -1, ignore_label: Optional[int] = None, eps: float = 1e-12,
          worst: int = 10, progress: bool = False) -> Audit:
    r"""Exact mean NLL of the labels, in nats, next to what MXNet's own metrics print for the same samples, and why they differ.

    .. math:: \frac{1}{N} \sum_n -\log p_n \quad\text{and}\quad \frac{1}{N} \sum_n -\log(p_n + \epsilon)

    Parameters
    ----------
    pred : (N, ..., C at `axis`, ...) float16, float32 or float64
        A NumPy array, memory maps included, or an MXNet array. Read in chunks along the first axis, or the second if the first is the
        class axis: a memory map may be larger than the memory.
    label : `pred`'s shape without `axis`, or with 1 there; integers or floats
        Class indices; the loss's own rule says which are valid and which count.
    pred_type : 'probs', 'logits' or 'log_probs'
        What `pred` is. For the others than 'probs', the stock metrics are taken to be fed with ``softmax(pred)`` or ``exp(pred)``,
        rounded to `pred`'s dtype.
    axis : int, default -1
        Class axis of `pred`.
    ignore_label : int, optional
        Label that does not count. ``mx.metric.CrossEntropy`` knows no such thing: its value here is that of the samples that count.
    eps : float, default 1e-12
        The eps of ``mx.metric.CrossEntropy``, from 0 to 1.
    worst : int, default 10
        How many of the worst samples to list.
    progress : bool, default False
        Show a progress bar, on a terminal and if there is a tqdm.

    Raises
    ------
    TypeError, ValueError
        If arrays, shapes, dtypes or options do not fit; the message says what was expected and what came.

    Notes
    -----
    Numerics: float64 arithmetic on the input, rounded as it came, and exact sums: chunks change nothing. The stock values are computed
    term by term in `pred`'s dtype, as MXNet does. MXNet adds up each update in that dtype too; here all is one update, summed exactly
    and rounded once. In float32 and float64 the batch size changes no more than the last digits. In float16 a batch that adds up
    to more than 65504 prints inf, and smaller ones may not. Rows sum to 1 if they do to within 1e-3, or in float16 1e-2.

    Examples
    --------
    >>> import numpy as np
    >>> from gluon_stable_ce.audit import audit
    >>> found = audit(np.array([[-99.0, 0.0], [0.0, -99.0]]), np.array([0, 0]), pred_type='log_probs')
    >>> found.nll, round(found.stock_cross_entropy, 2), found.under_eps, found.under_eps_share
    (49.5, 13.82, 1, 1.0)
    """
    check_choice('pred_type', pred_type, ('probs', 'logits', 'log_probs'))
    check_number('axis', axis, Integral)
    check_number('ignore_label', ignore_label, Integral, optional=True)
    check_number('eps', eps, low=0, high=1)
    check_number('worst', worst, Integral, low=0)
    positions = check_arrays(pred, label, axis)
    axis, eps, count = int(axis) % pred.ndim, float(eps), math.prod(positions)
    dtype, classes = np.dtype(np.dtype(pred.dtype).name), pred.shape[axis]  # in the machine's byte order
    like, tolerance = mx.nd.zeros((1, classes), dtype='float64'), 1e-2 if dtype == 'float16' else 1e-3
    exact, under, stock, floored = Sums(), Sums(), Sums(), Sums()
    ignored, bad_rows, largest, spread = 0, 0, None, []
    with np.errstate(all='ignore'):
        for start, rows, labels in chunks(pred, label, axis, progress):  # (n, C), (n,)
            read = functional.read_labels(mx.nd, mx.nd.array(labels, dtype="float64"), like, ignore_label=ignore_label)
            index, valid = read.index.asnumpy().astype('int64'), read.is_valid.asnumpy() != 0
            place = np.arange(start, start + len(labels))
            if read.is_counted is not None:
                kept = read.is_counted.asnumpy() != 0
                ignored += int((~kept).sum())
                rows, index, valid, place = rows if kept.all() else rows[kept], index[kept], valid[kept], place[kept]
            if pred_type != 'logits':
                total = (rows if pred_type == 'probs' else np.exp(rows, dtype='float64')).sum(axis=-1, dtype='float64')
                bad_rows += int((~(np.abs(total - 1) <= tolerance)).sum())
            nll, p = (values[valid] for values in _label_nll(rows, index, pred_type))
            index, place, rounded = index[valid], place[valid], p.astype(dtype)
            stock_nll = (-np.log(rounded + eps)).astype('float64')
            exact += Sums.of(nll, invalid=len(valid) - len(nll))
            under += Sums.of(nll[nll > (-math.log(eps) if eps else np.inf)])
            stock += Sums.of(stock_nll)
            floored += Sums.of(-np.log(np.maximum(dtype.type(_FLOOR), rounded)).astype('float64'))
            largest = _largest(max(worst, _WORST), largest, (np.where(np.isnan(nll), np.inf, nll), stock_nll, nll, p, index, place))
            even = place * 2654435769 % 2 ** 32 < 2 ** 32 * _SAMPLE / count  # evenly spread, and in step with no period of the data
            spread.append(np.stack([nll[even], stock_nll[even]]))
        share = 0.0 if not under.count else 1.0 if under.infinite else under.total / exact.total
        nll = exact.over(exact.count)
        return Audit(
            pred_type=pred_type, classes=classes, eps=eps, samples=exact.count, ignored=ignored, invalid=exact.invalid,
            nll=nll, perplexity=float(np.exp(nll)),
            stock_cross_entropy=_printed(stock, dtype), stock_perplexity=float(np.exp(_printed(floored, dtype))),
            under_eps=under.count, under_eps_share=share if exact.count and not exact.nan else float('nan'),
            zero=exact.infinite, nan=exact.nan, bad_rows=None if pred_type == 'logits' else bad_rows, row_tolerance=tolerance,
            worst=tuple(Worst(tuple(int(i) for i in np.unravel_index(place, positions)), int(index), float(p), float(nll))
                        for _, _, nll, p, index, place in zip(*([column[:worst] for column in largest or [()] * 6]))),
            _curve=_curve(largest, spread, exact.count))


def _label_nll(rows, index, pred_type):
    """Exact NLL of each row's label and its probability, float64; (n, C) and (n,) -> (n,), (n,)."""
    at_label = np.arange(len(index)), index
    if pred_type == 'logits':
        below = rows.astype('float64')
        below -= below.max(axis=-1, keepdims=True)  # (n, C), the largest is 0
        own = below[at_label]
        others = np.exp(below, out=below)
        others[at_label] = 0  # apart from the label's, so that an NLL near 0 keeps its digits
        nll = np.log1p(others.sum(axis=-1) + np.expm1(own)) - own
        return nll, np.exp(-nll)
    own = rows[at_label].astype('float64')
    p, log_p = (own, np.log(own)) if pred_type == 'probs' else (np.exp(own), own)
    return np.maximum(-log_p, 0) + 0.0, p  # + 0: no negative zero


def _printed(sums, dtype):
    """The mean that a stock metric prints: it adds up in `dtype` and divides in float64."""
    return float(dtype.type(sums.over(1))) / sums.count if sums.count else float('nan')


def _largest(size, kept, columns):
    """Of the rows in `kept` and `columns`, (n,) each, the `size` of largest first column, the first to come among equals."""
    if kept is not None:
        if len(kept[0]) == size:
            columns = [column[columns[0] > kept[0][-1]] for column in columns]
        columns = [np.concatenate(pair) for pair in zip(kept, columns)]
    order = np.argsort(-columns[0], kind='stable')[:size]
    return [column[order] for column in columns]


def _curve(largest, spread, count):
    """Rank, exact and stock NLL, (3, points): of the worst samples, and of those evenly spread ones that are no worse than them."""
    if not count:
        return np.ones((3, 0))
    worst = np.stack([np.arange(1, len(largest[0]) + 1), *largest[:2]])
    rest = np.concatenate(spread, axis=1)
    rest = rest[:, rest[0] <= worst[1, -1]]
    rest = rest[:, np.argsort(-rest[0], kind='stable')]
    share = np.arange(1, rest.shape[1] + 1) / max(1, rest.shape[1])
    return np.concatenate([worst, [worst[0, -1] + share * (count - worst[0, -1]), *rest]], axis=1)


def add_arguments(parser: Any) -> None:
    """Give the command's arguments to an ``argparse`` parser."""
    add = parser.add_argument
    add('files', nargs='+', metavar='FILE', help='one .npz (keys pred, label), two .npy (predictions, then labels), or one .params or .nd '
        'of mx.nd.save. Read in chunks, but for .params and .nd, and in an .npz Fortran order or --axis 0: those are loaded whole')
    add('--pred-type', default='probs', choices=('probs', 'logits', 'log_probs'), help='what the predictions are')
    add('--axis', type=int, default=-1, help='class axis of the predictions')
    add('--ignore-label', type=int, help='label that does not count')
    add('--eps', type=float, default=1e-12, help='the eps of mx.metric.CrossEntropy')
    add('--plot', metavar='FILE', help="draw each sample's NLL, stock and exact")
    add('--json', action='store_true', help="print JSON; what is not finite is a string: 'inf', '-inf' or 'nan'")
    add('--max-error', type=float, metavar='R', help='exit 1 if mx.metric.CrossEntropy is off by more than R, relative')


def run(args: Any) -> int:
    """Run the command on an ``argparse`` namespace; return its exit code.

    0; or 1 if the stock cross entropy is off by more than ``--max-error``, or cannot be compared; or 2, with one line on stderr, if files
    or arguments are bad.
    """
    try:
        check_number('--max-error', args.max_error, low=0, optional=True)
        found = audit(*read_files(args.files, args.axis), pred_type=args.pred_type, axis=args.axis, ignore_label=args.ignore_label,
                      eps=args.eps, progress=True)
        print(json.dumps(found.as_dict(), allow_nan=False) if args.json else found.table())
        if args.plot:
            found.plot(args.plot)
    except (OSError, ValueError, TypeError, ImportError, MemoryError, mx.MXNetError) as error:
        print('audit:', ' '.join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 2
    return 0 if args.max_error is None or found.error <= args.max_error else 1
