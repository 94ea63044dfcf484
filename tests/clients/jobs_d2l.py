"""The masked loss and the training loops of d2l (Dive into Deep Learning) on made data."""

from d2l import mxnet as d2l  # isort: skip
import numpy as onp
import runner
from mxnet import autograd, gluon, np, npx
from mxnet.gluon import nn, rnn

npx.set_np()
DRAWN = []


class Recorder:
    """In the place of d2l.Animator: keeps what it would draw."""

    def __init__(self, *args, **kwargs):
        self.values = []
        DRAWN.append(self)

    def add(self, x, y):
        y = y if hasattr(y, '__len__') else [y]
        self.values += [float(value) for value in y if value is not None]


d2l.Animator = Recorder


def blobs(count, seed=0):
    rng = onp.random.RandomState(seed)
    label = rng.randint(0, 4, count)
    images = rng.normal(0, 0.5, (count, 1, 8, 8))
    for image, k in zip(images, label):
        image[0, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1
    return images.astype('float32'), label.astype('int32')


def loader(count, workers=0, seed=0):
    return gluon.data.DataLoader(gluon.data.ArrayDataset(*blobs(count, seed)), 32, num_workers=workers)


def masked_loss():
    """The example of the book, section 9.7, and logits that are not all equal."""
    book = d2l.MaskedSoftmaxCELoss()(np.ones((3, 4, 10)), np.ones((3, 4)), np.array([4, 2, 0]))
    pred = np.random.normal(0, 2, (3, 4, 10))
    pred.attach_grad()
    with autograd.record():
        loss = d2l.MaskedSoftmaxCELoss()(
            pred, np.array([[1, 2, 3, 4], [5, 6, 0, 0], [9, 0, 0, 0]]), np.array([4, 2, 1])
        )
    loss.backward()
    return {'book': book, 'loss': loss, 'gradient': pred.grad}


class Decoder(d2l.Decoder):
    """The decoder of the book, section 9.7, which is not in the package."""

    def __init__(self, vocab_size, embed_size, num_hiddens, num_layers, **kwargs):
        super().__init__(**kwargs)
        self.embedding = nn.Embedding(vocab_size, embed_size)
        self.rnn = rnn.GRU(num_hiddens, num_layers)
        self.dense = nn.Dense(vocab_size, flatten=False)

    def init_state(self, enc_outputs, *args):
        return enc_outputs[1]

    def forward(self, X, state):
        X = self.embedding(X).swapaxes(0, 1)
        context = np.broadcast_to(state[0][-1], (X.shape[0], state[0][-1].shape[0], state[0][-1].shape[1]))
        output, state = self.rnn(np.concatenate((X, context), 2), state)
        return self.dense(output).swapaxes(0, 1), state


def train_seq2seq():
    rng = onp.random.RandomState(0)
    lengths = rng.randint(2, 7, 64)
    source = rng.randint(4, 12, (64, 6)) * (onp.arange(6) < lengths[:, None])
    arrays = (source, lengths, source[:, ::-1].copy(), lengths)
    arrays = [array.astype('float32') for array in arrays]
    net = d2l.EncoderDecoder(d2l.Seq2SeqEncoder(12, 8, 16, 1), Decoder(12, 8, 16, 1))
    data = gluon.data.DataLoader(gluon.data.ArrayDataset(*arrays), 16)
    d2l.train_seq2seq(net, data, 0.01, 10, {'<bos>': 1}, npx.cpu())
    return {'loss': DRAWN[-1].values, 'net': net}


def train_ch3():
    """Softmax regression. Data come from workers of the DataLoader."""
    net = nn.Sequential()
    net.add(nn.Dense(4))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    d2l.train_ch3(net, loader(256, 2), loader(64, 2, 1), gluon.loss.SoftmaxCrossEntropyLoss(), 5, trainer)
    return {'curves': DRAWN[-1].values, 'net': net}


def train_ch8():
    """A character model. The perplexity is exp of the mean loss."""
    text = 'the time traveller for so it will be convenient to speak of him was expounding ' * 12
    vocab = d2l.Vocab(list(text))
    data = d2l.SeqDataLoader.__new__(d2l.SeqDataLoader)
    data.data_iter_fn, data.corpus, data.vocab = d2l.seq_data_iter_sequential, vocab[list(text)], vocab
    data.batch_size, data.num_steps = 4, 12
    net = d2l.RNNModel(rnn.RNN(24), len(vocab))
    d2l.train_ch8(net, data, vocab, 0.5, 10, npx.cpu())
    return {'perplexity': DRAWN[-1].values, 'net': net}


def train_batch_ch13():
    """Data parallel on two devices."""
    net = nn.Sequential()
    net.add(nn.Dense(4, in_units=64))
    devices = [npx.cpu(0), npx.cpu(1)]
    net.initialize(ctx=devices)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    losses = []
    for X, y in loader(96):
        total, _ = d2l.train_batch_ch13(net, X.reshape(-1, 64), y, loss, trainer, devices, d2l.split_batch)
        losses.append(float(total))
    return {'losses': losses, 'weight': net[0].weight.data(devices[0])}


runner.main(masked_loss, train_seq2seq, train_ch3, train_ch8, train_batch_ch13)
