"""Measure the error of the loss for probabilities near 0 and near 1 (``make bench`` runs this, too).

The label's logit is from 100 below to 100 above the logsumexp of the other logits. This distance is the gap.

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
LAST_NORMAL = 87  # for larger gaps, the loss is a denormal float32, which has fewer digits
DRAWN = [problem for problem in PROBLEMS if problem.dtype == 'float32' and problem.classes in (10, 50257)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], epilog=__doc__.split('\n')[-2])
    parser.add_argument('--with-torch', metavar='PYTHON', help='a Python that has PyTorch, to measure it too')
    parser.add_argument('--out', default=HERE, metavar='DIR', help='where accuracy.md is written')
    parser.add_argument('--picture', default=PICTURE, metavar='FILE', help='where the picture is written')
    parser.add_argument('--torch-losses', metavar='FILE', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_losses:
        np.savez(args.torch_losses, *[torch_losses(problem) for problem in PROBLEMS])
        return
    errors = measure(args.with_torch)
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


def truth(logits):
    """Return log(1 + exp(logsumexp of the others - label)) of each row in the longest floats of NumPy.

    On x86 these have 19 digits. Nothing is subtracted that is nearly equal, so the relative error is at most
    1e-16 for all gaps.
    """
    losses = np.empty(len(logits), 'longdouble')
    for row, (label, *_) in enumerate(logits[:, :1]):
        others = logits[row, 1:].astype('longdouble')
        distance = np.log(np.exp(others).sum()) - np.longdouble(label)
        losses[row] = np.logaddexp(np.longdouble(0), distance)
    return losses


def measure(torch):
    """Return the (absolute, relative) errors of each row, by contender and problem."""
    from tqdm import tqdm

    of_torch = run_torch(torch) if torch else None
    errors = {}
    for index, problem in enumerate(tqdm(PROBLEMS, desc='accuracy', unit='problem', disable=None)):
        logits = data(problem)
        exact = truth(logits)
        losses = mxnet_losses(logits)
        if torch:
            losses[TORCH] = of_torch[f'arr_{index}']
        for name, values in losses.items():
            off = np.abs(values - exact)
            errors[name, problem] = off, off / exact
    return errors


def mxnet_losses(logits):
    """Return the losses of gluon and of each kernel that is there."""
    import mxnet as mx

    from gluon_stable_ce import StableSoftmaxCELoss
    from gluon_stable_ce.kernels import library

    pred, label = mx.nd.array(logits, dtype=logits.dtype), mx.nd.zeros(len(logits))
    loss_fns = {GLUON: mx.gluon.loss.SoftmaxCELoss()}
    for name, kernel in KERNELS.items():
        if kernel == 'stock' or library.load():
            loss_fns[name] = StableSoftmaxCELoss(kernel=kernel)
    return {name: loss_fn(pred, label).asnumpy() for name, loss_fn in loss_fns.items()}


def torch_losses(problem):
    """Return the losses of PyTorch, which runs in this process."""
    import torch
    import torch.nn.functional as F

    pred = torch.tensor(data(problem))
    return F.cross_entropy(pred, torch.zeros(len(pred), dtype=torch.int64), reduction='none').double().numpy()


def run_torch(python):
    """Return the losses of PyTorch for each problem, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'losses.npz')
        subprocess.run([python, os.path.abspath(__file__), '--torch-losses', path], check=True)
        with np.load(path) as losses:
            return dict(losses)


def markdown(errors):
    """Return a table of the largest errors, under a description of the logits."""
    import mxnet as mx

    lines = [
        f"The largest errors of the loss with MXNet {mx.__version__}. The label's logit is from 100 below to "
        '100 above the logsumexp of the other logits, which are normally distributed. So p is from 4e-44 to '
        '1 - 4e-44. Relative errors are given for p up to 1/2 and for p above 1/2. A relative error of 1 is '
        f'that of a loss of 0. Relative errors for float16 and float32 are for gaps up to {LAST_NORMAL}: '
        'smaller losses are denormal float32 numbers, which have fewer digits.\n',
        '| contender | dtype | classes | nats | relative, p up to 1/2 | relative, p above 1/2 |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for name in dict.fromkeys(name for name, _ in errors):
        for dtype in DTYPES:
            for group, classes in GROUPS.items():
                chosen = [key for key in errors if key[0] == name and key[1].dtype == dtype]
                chosen = [key for key in chosen if key[1].classes in classes]
                cells = [f'{largest:.1e}' for largest in largest_errors(errors, chosen)]
                lines.append(f'| {" | ".join([name, dtype, group, *cells])} |')
    return '\n'.join(lines) + '\n'


def largest_errors(errors, keys):
    """Return the largest error in nats, and the largest relative ones for p up to 1/2 and above."""
    found = []
    for key in keys:
        absolute, relative = errors[key]
        gaps = gaps_of(key[1])
        above = (gaps > 0) & ((gaps < LAST_NORMAL) | (key[1].dtype == 'float64'))
        found.append((absolute.max(), relative[gaps < 0].max(), relative[above].max()))
    return np.max(np.array(found, 'float64'), axis=0)


def draw(errors, path):
    """Draw the relative error of float32 losses over the gap: the largest of each gap's rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained', facecolor='white')
    for axes, problem in zip(figure.subplots(1, len(DRAWN), sharey=True), DRAWN):
        gaps = np.linspace(-100, 100, problem.gaps)
        for name in [name for name in COLORS if (name, problem) in errors]:
            worst = errors[name, problem][1].astype('float64').reshape(problem.gaps, problem.rows).max(-1)
            style = '--' if name == TORCH else '-'  # it lies on others
            axes.plot(gaps, np.clip(worst, 1e-9, 10), style, color=COLORS[name], label=name, linewidth=1.5)
        axes.axhline(1, color='black', linestyle=':', linewidth=1)
        axes.text(-100, 1.3, 'as wrong as a loss of 0', fontsize=8)
        axes.set(
            title=f'{problem.classes:,} classes, float32',
            xlabel="label's logit less the logsumexp of the others",
            yscale='log',
            ylim=(1e-9, 10),
        )
    figure.axes[0].set_ylabel('relative error of the loss')
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    sys.exit(main())
