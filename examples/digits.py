"""Train a net on handwritten digits, and compare three ways to report its cross entropy on test images.

The test images are as they are, rotated, noisy or inverted. For each of these, MXNet's metrics, this package
and float64 arithmetic compute the mean negative log-likelihood (NLL) of the labels and the perplexity.

Example: ``python examples/digits.py --epochs 40``
"""

import argparse
import os
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

EPS = 1e-12  # mx.metric.CrossEntropy adds it to each probability
COLUMNS = ['mx.metric', 'ours', 'float64']
# means and perplexities in the order of COLUMNS; the exact NLL of each image; how many labels have p < EPS
Result = namedtuple('Result', 'mean_nlls perplexities exact below_eps')


def main():
    """Train, evaluate, draw and export."""
    parser = argparse.ArgumentParser(description='Train on digits, and compare three ways to report the NLL.')
    parser.add_argument('--epochs', type=int, default=40, help='passes over the training images')
    parser.add_argument('--seed', type=int, default=0, help='seed of the split, the training and the noise')
    parser.add_argument(
        '--out', default='demo-output', metavar='DIR', help='where the picture and the net are written'
    )
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
    results = {name: evaluate(net, loss_fn, test_set, labels) for name, test_set in test_sets.items()}
    print_table(results)

    picture = os.path.join(args.out, 'nll.png')
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


def evaluate(net, loss_fn, images, labels):
    """Return the Result for some test images."""
    label = mx.nd.array(labels)
    logits = net(mx.nd.array(images))
    ours = loss_fn.create_metric()
    ours.update(label, logits)
    stock, stock_perplexity = mx.metric.CrossEntropy(), mx.metric.Perplexity(ignore_label=None)
    for metric in (stock, stock_perplexity):
        metric.update([label], [mx.nd.softmax(logits)])
    exact = exact_nll(logits.asnumpy(), labels)
    mean_nlls = [stock.get()[1], ours.get()[1], exact.mean()]
    perplexities = [stock_perplexity.get()[1], np.exp(ours.get()[1]), np.exp(exact.mean())]
    return Result(mean_nlls, perplexities, exact, int((exact > -np.log(EPS)).sum()))


def exact_nll(logits, labels):
    """Return the negative log-likelihood of each label in nats, computed in float64 without this package."""
    logits = logits.astype('float64')
    return logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels.astype(int)]


def print_table(results):
    """Print the three columns side by side, and one sentence that says what to look at and why."""
    head, line = '{:22}{:^33}{:^33}{:>14}', '{:22}' + '{:>11}' * 6 + '{:>14}'
    print(head.format('', 'mean NLL in nats', 'perplexity', 'labels with'))
    print(line.format('test images', *COLUMNS, *COLUMNS, 'p < 1e-12'))
    for name, result in results.items():
        mean_nlls = [f'{value:.5f}' for value in result.mean_nlls]
        perplexities = [f'{value:.4g}' for value in result.perplexities]
        print(line.format(name, *mean_nlls, *perplexities, f'{result.below_eps} of {len(result.exact)}'))
    name, result = max(results.items(), key=lambda item: item[1].below_eps)
    if result.below_eps == 0:
        print('\nAll three agree, because no label has a probability below 1e-12; train for more epochs.')
        return
    gap = result.mean_nlls[2] - result.mean_nlls[0]
    most = -np.log(EPS)
    print(
        f'\nLook at the row "{name}": ours agrees with float64, but mx.metric.CrossEntropy is {gap:.2g} nats'
    )
    print(
        f'too low, because it adds 1e-12 to each probability and counts at most {most:.1f} nats for a label.'
    )


def draw(results, path):
    """Draw the sorted NLL of each image: exact, and as mx.metric.CrossEntropy counts it."""
    figure = Figure(figsize=(10, 3.5), layout='constrained')
    for axes, (name, result) in zip(figure.subplots(1, len(results), sharey=True), results.items()):
        nll = np.sort(result.exact)[::-1]
        axes.plot(nll, label='float64')
        axes.plot(-np.log(np.exp(-nll) + EPS), '--', label='mx.metric.CrossEntropy')
        axes.set(title=name, xlabel='test images, sorted')
    figure.axes[0].set_ylabel('NLL of the label in nats')
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
