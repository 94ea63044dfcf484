"""Measure the error of the loss and of its gradient for probabilities near 0 and near 1.

The label's logit is from 100 below to 100 above the logsumexp of the other logits. This distance is the gap.
``make bench`` runs this, too.

Example: ``python benchmarks/accuracy.py --with-torch .venv-torch/bin/python``
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import namedtuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
PICTURE = os.path.join(os.path.dirname(HERE), 'docs', 'pictures', 'accuracy.png')
GLUON, STOCK, FUSED, TORCH = "gluon's loss", 'ours, stock kernel', 'ours, fused kernel', 'PyTorch'
KERNELS = {STOCK: 'stock', FUSED: 'fused'}
COLORS = {GLUON: '#D55E00', STOCK: '#56B4E9', FUSED: '#0072B2', TORCH: '#009E73'}
DTYPES = ('float16', 'float32', 'float64')
# `rows` random rows for each of `gaps` gaps from -100 to 100
Problem = namedtuple('Problem', 'classes dtype gaps rows')
SIZES = [(2, 201, 64), (10, 201, 64), (1000, 201, 8), (50257, 101, 4)]
PROBLEMS = [Problem(classes, dtype, gaps, rows) for dtype in DTYPES for classes, gaps, rows in SIZES]
GROUPS = {'2 to 1,000': (2, 10, 1000), '50,257': (50257,)}
# Relative errors of each row, (gaps * rows,), of the other classes the largest one.
Errors = namedtuple('Errors', 'loss at_label at_others')
LAST = 62  # at larger gaps, the loss is below 1e-27, where the stock kernel's error is absolute
DRAWN = Problem(1000, 'float32', 201, 8)
PANELS = {'loss': 'loss', 'at_label': 'gradient at the label', 'at_others': 'gradient at the other classes'}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], epilog=__doc__.split('\n')[-2])
    parser.add_argument('--with-torch', metavar='PYTHON', help='a Python that has PyTorch, to measure it too')
    parser.add_argument('--out', default=HERE, metavar='DIR', help='where accuracy.md is written')
    parser.add_argument('--picture', default=PICTURE, metavar='FILE', help='where the picture is written')
    parser.add_argument('--torch-errors', metavar='FILE', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_errors:
        np.savez(args.torch_errors, *measure({TORCH: torch_results}).values())
        return
    from tqdm import tqdm  # which the environment of PyTorch does not have

    errors = measure(mxnet_contenders(), tqdm(PROBLEMS, desc='accuracy', unit='problem', disable=None))
    if args.with_torch:
        errors.update(run_torch(args.with_torch))
    text = markdown(errors)
    print(text)
    with open(os.path.join(args.out, 'accuracy.md'), 'w') as file:
        file.write(text)
    draw(errors, args.picture)


def data(problem):
    """Return logits (gaps * rows, classes) in the problem's dtype; the label is class 0."""
    rng = np.random.RandomState(problem.classes)
    logits = rng.standard_normal((problem.gaps * problem.rows, problem.classes))
    logits[:, 1:] -= np.log(np.exp(logits[:, 1:]).sum(-1, keepdims=True))
    logits[:, 0] = gaps_of(problem)
    logits += rng.uniform(-5, 5, (len(logits), 1))  # else the exact loss is often a float32 number
    return logits.astype(problem.dtype)


def gaps_of(problem):
    """Return the gap of each row, (gaps * rows,)."""
    return np.repeat(np.linspace(-100, 100, problem.gaps), problem.rows)


def log_odds(row):
    """Return the logsumexp of the other logits less the label's, in the longest floats of NumPy.

    On x86 these have 19 digits. Nothing is subtracted that is nearly equal, so what is computed from it has a
    relative error of at most 1e-16 for all gaps.
    """
    return np.log(np.exp(row[1:].astype('longdouble')).sum()) - np.longdouble(row[0])


def truth(logits):
    """Return the loss of each row, log(1 + exp(log_odds))."""
    return np.array([np.logaddexp(np.longdouble(0), log_odds(row)) for row in logits])


def exact_gradient(row):
    """Return the gradient of a row, (classes,): the label's p less 1, and p of the others."""
    odds = log_odds(row)
    p = np.exp(row.astype('longdouble') - np.longdouble(row[0]) - np.logaddexp(np.longdouble(0), odds))
    p[0] = -1 / (1 + np.exp(-odds))
    return p


def measure(contenders, problems=PROBLEMS):
    """Return the Errors by contender and problem; contenders return the losses and gradients of logits."""
    errors = {}
    for problem in problems:
        logits = data(problem)
        for name, compute in contenders.items():
            errors[name, problem] = errors_of(logits, *compute(logits))
    return errors


def errors_of(logits, losses, gradients):
    """Return the Errors of what a contender computed."""
    exact = truth(logits)
    entries = np.empty((2, len(logits)))
    for index, row in enumerate(logits):
        gradient = exact_gradient(row)
        off = np.abs(gradients[index] - gradient) / np.abs(gradient)
        entries[:, index] = off[0], off[1:].max()
    return Errors((np.abs(losses - exact) / exact).astype('float64'), *entries)


def mxnet_contenders():
    """Return gluon's loss and each kernel that is there, as functions of logits."""
    from functools import partial

    import mxnet as mx

    from gluon_stable_ce import StableSoftmaxCELoss
    from gluon_stable_ce.kernels import library

    loss_fns = {GLUON: mx.gluon.loss.SoftmaxCELoss()}
    for name, kernel in KERNELS.items():
        if kernel == 'stock' or library.load():
            loss_fns[name] = StableSoftmaxCELoss(kernel=kernel)
    return {name: partial(mxnet_results, loss_fn) for name, loss_fn in loss_fns.items()}


def mxnet_results(loss_fn, logits):
    """Return the losses of a Gluon block and their gradients."""
    import mxnet as mx

    pred, label = mx.nd.array(logits, dtype=logits.dtype), mx.nd.zeros(len(logits))
    pred.attach_grad()
    with mx.autograd.record():
        losses = loss_fn(pred, label)
    losses.backward()
    return losses.asnumpy(), pred.grad.asnumpy()


def torch_results(logits):
    """Return the losses of PyTorch and their gradients."""
    import torch
    import torch.nn.functional as F

    pred = torch.tensor(logits, requires_grad=True)
    losses = F.cross_entropy(pred, torch.zeros(len(pred), dtype=torch.int64), reduction='none')
    losses.sum().backward()
    return losses.detach().numpy(), pred.grad.numpy()


def run_torch(python):
    """Return the Errors of PyTorch for each problem, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'errors.npz')
        subprocess.run([python, os.path.abspath(__file__), '--torch-errors', path], check=True)
        with np.load(path) as saved:
            return {(TORCH, problem): Errors(*array) for problem, array in zip(PROBLEMS, saved.values())}


def markdown(errors):
    """Return a table of the largest errors, under a description of the logits."""
    import mxnet as mx

    lines = [
        f"The largest relative errors with MXNet {mx.__version__}. The label's logit is from {LAST} below to "
        f'{LAST} above the logsumexp of the other logits, which are normally distributed. So p is from 1e-27 '
        'to 1 - 1e-27. A relative error of 1 is that of a loss of 0. The gradient of float16 logits is '
        'rounded to float16.\n',
        '| contender | dtype | classes | loss, p up to 1/2 | loss, p above 1/2 | gradient at the label '
        '| at the other classes |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for name in dict.fromkeys(name for name, _ in errors):
        for dtype in DTYPES:
            for group, classes in GROUPS.items():
                chosen = [key for key in errors if key[0] == name and key[1].dtype == dtype]
                chosen = [key for key in chosen if key[1].classes in classes]
                cells = [f'{largest:.1e}' for largest in largest_errors(errors, chosen)]
                if dtype == 'float16':
                    cells[2:] = 2 * ['rounded']
                lines.append(f'| {" | ".join([name, dtype, group, *cells])} |')
    return '\n'.join(lines) + '\n'


def largest_errors(errors, keys):
    """Return the largest errors of the loss, for p up to 1/2 and above, and of the gradient's entries."""
    found = []
    for key in keys:
        of, gaps = errors[key], gaps_of(key[1])
        below, above = (gaps < 0) & (gaps >= -LAST), (gaps > 0) & (gaps <= LAST)
        found.append([of.loss[below].max(), of.loss[above].max()])
        found[-1] += [entries[below | above].max() for entries in (of.at_label, of.at_others)]
    return np.max(found, axis=0)


def draw(errors, path):
    """Draw the relative errors over the gap, the largest of each gap's rows: readable on a narrow screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 8), layout='constrained', facecolor='white')
    all_axes = figure.subplots(len(PANELS), 1, sharex=True, sharey=True)
    for axes, (quantity, title) in zip(all_axes, PANELS.items()):
        draw_panel(
            axes, {name: getattr(errors[name, DRAWN], quantity) for name in COLORS if (name, DRAWN) in errors}
        )
        axes.set_title(title, fontsize=11)
    all_axes[0].set(yscale='log', ylim=(1e-9, 30))
    all_axes[0].text(-100, 1.6, 'as wrong as 0 would be', fontsize=9)
    all_axes[-1].set_xlabel("label's logit less the logsumexp of the others", fontsize=11)
    figure.suptitle(f'Relative error, {DRAWN.classes:,} classes, {DRAWN.dtype}', fontsize=12)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=11)
    figure.savefig(path, dpi=160)


def draw_panel(axes, errors):
    """Draw one quantity of each contender."""
    gaps = np.linspace(-100, 100, DRAWN.gaps)
    for name, values in errors.items():
        worst = values.reshape(DRAWN.gaps, DRAWN.rows).max(-1)
        style = '--' if name == TORCH else '-'  # it lies on others
        axes.plot(gaps, np.clip(worst, 1e-9, 10), style, color=COLORS[name], label=name, linewidth=1.5)
    axes.axhline(1, color='black', linestyle=':', linewidth=1)
    axes.tick_params(labelsize=10)


if __name__ == '__main__':
    sys.exit(main())
