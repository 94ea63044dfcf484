"""Train a net on handwritten digits, and compare ways to report its cross entropy on test images.

The test images are as they are, rotated, noisy or inverted. For each of these, MXNet's metrics, this package
and float64 arithmetic compute the mean negative log-likelihood (NLL) of the labels and the perplexity. If the
fused kernel has been built, there is a column for the package with it, and one without it.

Example: ``python examples/digits.py --epochs 40``
"""

import argparse
import os
import textwrap
from collections import namedtuple

import mxnet as mx
import numpy as np
from matplotlib.figure import Figure
from mxnet import autograd, gluon
from mxnet.gluon import nn
from scipy.ndimage import rotate
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from tqdm import tqdm

from gluon_stable_ce import StableSoftmaxCrossEntropyLoss
from gluon_stable_ce.kernels import library

EPS = 1e-12  # mx.metric.CrossEntropy adds it to each probability
STOCK, FUSED, EXACT = 'mx.metric', 'ours, fused', 'float64'
# by column: the mean NLL, and the perplexity; the exact NLL of each image; how many labels have p < EPS
Result = namedtuple('Result', 'mean_nlls perplexities exact below_eps')


def main():
    """Train, evaluate, draw and export."""
    parser = argparse.ArgumentParser(description='Train on digits, and compare ways to report the NLL.')
    parser.add_argument('--epochs', type=int, default=40, help='passes over the training images')
    parser.add_argument('--seed', type=int, default=0, help='seed of the split, the training and the noise')
    parser.add_argument(
        '--out', default='demo-output', metavar='DIR', help='where the picture and the net are written'
    )
    parser.add_argument('--picture', metavar='FILE', help='where the picture is written, if not into DIR')
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    mx.random.seed(args.seed)
    rng = np.random.RandomState(args.seed)

    (train_images, train_labels), (images, labels) = load_data(rng)
    net = build_net()
    loss_fn = StableSoftmaxCrossEntropyLoss()
    train(net, loss_fn, train_images, train_labels, args.epochs, rng)

    test_sets = {
        'as they are': images,
        'rotated by 30 degrees': rotate(images, 30, axes=(2, 3), reshape=False, order=1),
        'with noise': images + rng.normal(0, 0.5, images.shape).astype('float32'),
        'inverted': 1 - images,
    }
    results = {name: evaluate(net, test_set, labels) for name, test_set in test_sets.items()}
    print_table(results)

    picture = args.picture or os.path.join(args.out, 'nll.png')
    draw(results, picture)
    difference = export_and_reload(net, loss_fn, images, labels, os.path.join(args.out, 'net'))
    print(f'\nPicture of the NLL of each image: {picture}')
    print(f'Net and loss as one graph: {args.out}; reloaded, its losses differ by at most {difference:.1e}')


def load_data(rng):
    """Return 1,200 training and 597 test digits of 8 x 8 pixels, each as (images, labels)."""
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images = images[order].reshape(-1, 1, 8, 8).astype('float32') / 16  # (images, 1, 8, 8), from 0 to 1
    labels = labels[order].astype('float32')  # (images,)
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def build_net():
    """Return two convolutions and a dense layer that gives 10 logits."""
    net = nn.HybridSequential()
    net.add(
        nn.Conv2D(16, 3, padding=1, activation='relu'),
        nn.MaxPool2D(),
        nn.Conv2D(32, 3, padding=1, activation='relu'),
        nn.Flatten(),
        nn.Dense(10),
    )
    net.initialize(mx.init.Xavier())
    net.hybridize(static_alloc=True)
    return net


def train(net, loss_fn, images, labels, epochs, rng, batch_size=64):
    """Train with Adam; the progress bar shows the mean NLL of each epoch."""
    images, labels = mx.nd.array(images), mx.nd.array(labels)
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 3e-3})
    metric = loss_fn.create_metric()
    progress = tqdm(range(epochs), desc='training', unit='epoch', disable=None)
    for _ in progress:
        metric.reset()
        order = rng.permutation(len(labels))
        for start in range(0, len(order), batch_size):
            batch = mx.nd.array(order[start : start + batch_size], dtype='int32')
            data, label = images.take(batch), labels.take(batch)
            with autograd.record():
                logits = net(data)
                loss = loss_fn(logits, label)
            loss.backward()
            trainer.step(len(batch))
            metric.update(label, logits)
        progress.set_postfix({'NLL': f'{metric.get()[1]:.2e} nats'})


def our_columns():
    """Return the kernel of each of our columns."""
    if library.load():
        return {'ours, stock': 'stock', FUSED: 'fused'}
    return {'ours': 'stock'}


def evaluate(net, images, labels):
    """Return the Result for some test images."""
    label = mx.nd.array(labels)
    logits = net(mx.nd.array(images))
    stock, stock_perplexity = mx.metric.CrossEntropy(), mx.metric.Perplexity(ignore_label=None)
    for metric in (stock, stock_perplexity):
        metric.update([label], [mx.nd.softmax(logits)])
    mean_nlls, perplexities = {STOCK: stock.get()[1]}, {STOCK: stock_perplexity.get()[1]}
    exact = exact_nll(logits.asnumpy(), labels)
    for column, kernel in our_columns().items():
        ours = StableSoftmaxCrossEntropyLoss(kernel=kernel).create_metric()
        ours.update(label, logits)
        mean_nlls[column] = ours.get()[1]
    mean_nlls[EXACT] = exact.mean()
    perplexities.update({name: np.exp(nll) for name, nll in mean_nlls.items() if name != STOCK})
    return Result(mean_nlls, perplexities, exact, int((exact > -np.log(EPS)).sum()))


def exact_nll(logits, labels):
    """Return the negative log-likelihood of each label in nats, computed in float64 without this package."""
    logits = logits.astype('float64')
    return logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels.astype(int)]


def print_table(results):
    """Print what each way reports, and what to look at and why."""
    print('The loss of a trained net on test images of digits, as MXNet and as this package report it.')
    print('The true value is in the column float64.')
    print_rows('mean NLL, nats', {name: result.mean_nlls for name, result in results.items()})
    print_rows('perplexity', {name: result.perplexities for name, result in results.items()})
    print()
    for sentence in explain(results):
        print(textwrap.fill(sentence, 100))


def print_rows(title, rows):
    """Print one number for each test set and column."""
    line = '{:22}' + '{:>14}' * len(next(iter(rows.values())))
    print('\n' + line.format(title, *next(iter(rows.values()))))
    for name, row in rows.items():
        print(line.format(name, *map(shown, row.values())))


def shown(value):
    """Write a value with seven digits, about as many as float32 has."""
    return f'{value:#.7g}'


def explain(results):
    """Yield sentences on the row with the largest error, and on the last digits."""
    name, result = max(results.items(), key=lambda item: item[1].below_eps)
    if result.below_eps == 0:
        yield 'All agree, because no label has a probability below 1e-12; train for more epochs.'
        return
    gap = result.mean_nlls[EXACT] - result.mean_nlls[STOCK]
    yield (
        f'Look at the row "{name}": mx.metric.CrossEntropy is {gap:.2g} nats too low, and ours agrees with '
        'float64. The reason is that mx.metric.CrossEntropy adds 1e-12 to each probability, and so counts at '
        f'most {-np.log(EPS):.1f} nats for a label. Here {result.below_eps} of {len(result.exact)} labels '
        'have a probability below 1e-12. This package computes the loss from the logits, and adds nothing.'
    )
    yield (
        'The relative error of the loss is small, also where the loss is small, as in the first row. So the '
        'mean NLL of ours agrees with float64 in all digits shown, but perhaps the last.'
    )
    if FUSED not in result.mean_nlls:
        yield f'The fused kernel is faster, and may be compiled: {library.HOW_TO_BUILD}'


def draw(results, path):
    """Draw the sorted NLL of each image: exact, and as mx.metric.CrossEntropy counts it."""
    figure = Figure(figsize=(10, 3.5), layout='constrained', facecolor='white')
    for axes, (name, result) in zip(figure.subplots(1, len(results), sharey=True), results.items()):
        nll = np.sort(result.exact)[::-1]
        axes.axhline(-np.log(EPS), color='#888888', linestyle=':')
        axes.plot(nll, color='#0072B2', linewidth=2, label='exact (float64)')
        counted = -np.log(np.exp(-nll) + EPS)
        axes.plot(counted, '--', color='#D55E00', linewidth=2, label='mx.metric.CrossEntropy')
        axes.set(title=name, xlabel='test images, sorted')
    figure.axes[0].set_ylabel('NLL of the label in nats')
    figure.axes[0].text(0, 28.5, f'{-np.log(EPS):.1f} = -log(1e-12)', color='#555555', fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center', ncol=2)
    figure.savefig(path, dpi=120)


class WithLoss(gluon.HybridBlock):
    """A net and its loss in one graph, called with the data, the label and whatever else the loss takes."""

    def __init__(self, net, loss_fn):
        super().__init__()
        self.net, self.loss_fn = net, loss_fn

    def hybrid_forward(self, F, data, label, *others):
        return self.loss_fn(self.net(data), label, *others)


def export_and_reload(net, loss_fn, images, labels, path):
    """Export net and loss as one graph, load it again, and return the largest difference of the losses."""
    images, labels = mx.nd.array(images), mx.nd.array(labels)
    both = WithLoss(net, loss_fn)
    both.hybridize()
    loss = both(images, labels)
    both.export(path)
    # given the parameters too, `imports` would leave the dtype of the inputs open, and warn
    loaded = gluon.SymbolBlock.imports(f'{path}-symbol.json', ['data0', 'data1'])
    loaded.load_parameters(f'{path}-0000.params')
    return float((loaded(images, labels) - loss).abs().max().asscalar())


if __name__ == '__main__':
    main()
