"""Train on real digits, and see what an epsilon hides on the digits that the net gets wrong."""
import gzip
import os
import sys

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

from .loss import StableSoftmaxCrossEntropyLoss

TOLERANCE = 1e-5  # relative, of our mean NLL against float64
EPS = 1e-12  # what mx.metric.CrossEntropy adds


def add_arguments(parser):
    """Add the command's flags to an argparse parser."""
    parser.add_argument('--epochs', type=int, default=40, help='passes over the training images (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the split, the weights, the order and the noise (default: %(default)s)')
    parser.add_argument('--out', default='demo-output', metavar='DIR', help='where the net and the picture go (default: %(default)s)')
    parser.add_argument('--fashion-mnist', metavar='DIR', help="folder of Fashion-MNIST's four idx.gz files, instead of the digits")


def run(args):
    """Train, evaluate, export, reload and draw; 0 if all agrees, 1 if not, 2 if the data can't be read."""
    if args.epochs < 1:
        print(f'demo: --epochs: expected at least 1, got {args.epochs}', file=sys.stderr)
        return 2
    try:
        os.makedirs(args.out, exist_ok=True)
        train, test = digits(args.seed) if args.fashion_mnist is None else fashion_mnist(args.fashion_mnist)
    except (OSError, ValueError) as error:
        print(f'demo: {error}', file=sys.stderr)
        return 2
    mx.random.seed(args.seed)
    rng = np.random.RandomState(args.seed)
    loss_fn = StableSoftmaxCrossEntropyLoss()
    net = small_net(classes=10)
    fit(net, loss_fn, train, args.epochs, rng)

    images, labels = test
    shifts = {'held out': images, 'rotated by 30 degrees': rotated(images, 30), 'with noise': noisy(images, rng)}
    rows, hardest = [], None
    for name, shifted in shifts.items():
        row = evaluate(name, net, loss_fn, shifted, labels)
        rows.append(row)
        if hardest is None or row['under eps'] > hardest['under eps']:
            hardest = row
    print(table(rows))
    picture = os.path.join(args.out, 'nll.png')
    draw(hardest, picture)
    gap = export_and_reload(net, loss_fn, images, labels, os.path.join(args.out, 'net'))
    print(f'\nNet and loss exported to {args.out}, loaded back, largest difference {gap:.1e}. Picture: {picture}')
    off = max(row['off'] for row in rows)
    if off > TOLERANCE or gap > 0:
        print(f'demo: our NLL is off by {off:.1e} (at most {TOLERANCE:.0e}), the reloaded loss by {gap:.1e} (at most 0)', file=sys.stderr)
        return 1
    return 0


def digits(seed):
    """scikit-learn's 1,797 real digits of 8 x 8 pixels, a third of them held out; ((images, labels), (images, labels))."""
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(seed).permutation(len(labels))
    images, labels = images[order].reshape(-1, 1, 8, 8).astype('float32') / 16, labels[order].astype('float32')
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def fashion_mnist(folder):
    """Fashion-MNIST as it is distributed: ((images, labels), (images, labels)). Gluon's own class accepts only its own download."""
    def idx(name, ndim):
        path = os.path.join(folder, name)
        try:
            with gzip.open(path) as file:
                data = file.read()
        except EOFError as error:
            raise ValueError(f'{path}: the file ends too early') from error
        shape = tuple(np.frombuffer(data[4:4 + 4 * ndim], '>i4')) if len(data) >= 4 + 4 * ndim else ()
        if data[:4] != bytes([0, 0, 8, ndim]) or len(data) != 4 + 4 * ndim + np.prod(shape, dtype='int64'):
            raise ValueError(f'{path}: expected an idx file of bytes with {ndim} axes')
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)

    def pair(name):
        images, labels = idx(f'{name}-images-idx3-ubyte.gz', 3), idx(f'{name}-labels-idx1-ubyte.gz', 1)
        if len(images) != len(labels) or labels.max(initial=0) > 9:
            raise ValueError(f'{folder}: {len(images)} {name} images do not fit {len(labels)} labels up to {labels.max(initial=0)}')
        return images[:, None].astype('float32') / 255, labels.astype('float32')

    return pair('train'), pair('t10k')


def small_net(classes):
    """Two convolutions and a dense layer."""
    net = nn.HybridSequential()
    net.add(nn.Conv2D(16, 3, padding=1, activation='relu'), nn.MaxPool2D(), nn.Conv2D(32, 3, padding=1, activation='relu'),
            nn.Flatten(), nn.Dense(classes))
    net.initialize(mx.init.Xavier())
    net.hybridize(static_alloc=True)
    return net


def fit(net, loss_fn, data, epochs, rng, batch_size=64):
    """Train with Adam, with a progress bar that shows the metric of each epoch."""
    from tqdm import tqdm
    images, labels = mx.nd.array(data[0]), mx.nd.array(data[1])
    trainer = gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 3e-3})
    metric = loss_fn.create_metric()
    with tqdm(range(epochs), desc='training', unit='epoch', file=sys.stdout) as progress:
        for _ in progress:
            metric.reset()
            order = rng.permutation(len(labels))
            for start in range(0, len(order), batch_size):
                batch = mx.nd.array(order[start:start + batch_size], dtype='int32')
                x, y = images.take(batch), labels.take(batch)
                with autograd.record():
                    logits = net(x)
                    loss = loss_fn(logits, y)
                loss.backward()
                trainer.step(len(batch))
                metric.update(y, logits)
            progress.set_postfix({'NLL': f'{metric.get()[1]:.2e} nats'})


def rotated(images, degrees):
    """The images turned about their centres."""
    from scipy.ndimage import rotate
    return rotate(images, degrees, axes=(2, 3), reshape=False, order=1)


def noisy(images, rng):
    """The images with Gaussian noise of half the largest brightness."""
    return images + rng.normal(0, 0.5, images.shape).astype('float32')


def evaluate(name, net, loss_fn, images, labels, batch_size=256):
    """NLL of the labels by float64, by our metric and by MXNet's two, which read probabilities."""
    ours, stock, perplexity = loss_fn.create_metric(), mx.metric.CrossEntropy(), mx.metric.Perplexity(ignore_label=None)
    logits = []
    for start in range(0, len(labels), batch_size):
        x, y = mx.nd.array(images[start:start + batch_size]), mx.nd.array(labels[start:start + batch_size])
        logits.append(net(x))
        probs = mx.nd.softmax(logits[-1])
        ours.update(y, logits[-1])
        stock.update([y], [probs])
        perplexity.update([y], [probs])
    nll = exact_nll(np.concatenate([part.asnumpy() for part in logits]), labels)
    truth = nll.mean()
    return {'name': name, 'nll': nll, 'truth': truth, 'ours': ours.get()[1], 'off': abs(ours.get()[1] - truth) / truth,
            'stock': stock.get()[1], 'stock perplexity': perplexity.get()[1], 'under eps': int((nll > -np.log(EPS)).sum())}


def exact_nll(logits, labels):
    """Negative log-likelihood of each label, in float64 and without our code; (N,) nats."""
    from scipy.special import logsumexp
    logits = logits.astype('float64')
    return logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels.astype(int)]


def table(rows):
    """What the three say of the same predictions, as text."""
    lines = ['', f"{'':24}{'mean NLL in nats':^38}{'perplexity':^38}{'samples':>12}",
             f"{'test images':24}{'mx.metric':>12}{'ours':>13}{'float64':>13}{'mx.metric':>12}{'ours':>13}{'float64':>13}{'p < 1e-12':>12}"]
    for row in rows:
        cells = (row['stock'], row['ours'], row['truth'], row['stock perplexity'], np.exp(row['ours']), np.exp(row['truth']))
        lines.append(f"{row['name']:24}" + ''.join(f'{cell:{width}.7g}' for cell, width in zip(cells, (12, 13, 13) * 2))
                     + f"{row['under eps']:>6} of {len(row['nll'])}")
    return '\n'.join(lines)


def draw(row, path):
    """Per-sample NLL, sorted: exact, and as mx.metric.CrossEntropy counts it."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    nll = np.sort(row['nll'])[::-1]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout='constrained')
    axes.plot(nll, label='exact, and StableCrossEntropy')
    axes.plot(-np.log(np.exp(-nll) + EPS), '--', label='mx.metric.CrossEntropy')
    axes.axhline(-np.log(EPS), color='gray', linewidth=0.8)
    axes.annotate('the floor of 1e-12: 27.6 nats', (len(nll), -np.log(EPS)), ha='right', va='bottom', color='gray')
    axes.set(xlabel='test images, the hardest first', ylabel='NLL of the label in nats',
             title=f"{row['name']}: {row['under eps']} of {len(nll)} images lie above what the stock metric can say")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


class WithLoss(gluon.HybridBlock):
    """A net and its loss in one graph."""

    def __init__(self, net, loss_fn):
        super().__init__()
        self.net, self.loss_fn = net, loss_fn

    def hybrid_forward(self, F, images, labels):
        return self.loss_fn(self.net(images), labels)


def export_and_reload(net, loss_fn, images, labels, path):
    """Export net and loss as one graph, load it without our code, and return the largest difference between the two."""
    images, labels = mx.nd.array(images), mx.nd.array(labels)
    both = WithLoss(net, loss_fn)
    both.hybridize()
    before = both(images, labels)
    both.export(path)
    loaded = gluon.SymbolBlock.imports(f'{path}-symbol.json', ['data0', 'data1'], f'{path}-0000.params')
    return float((loaded(images, labels) - before).abs().max().asscalar())
