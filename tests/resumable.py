"""A training run that may be killed at any moment: started again it goes on from its last checkpoint, and reports what it would have reported.

``resumable.py FOLDER`` trains to the end; ``resumable.py FOLDER STEP`` waits, once it has done STEP steps, for somebody to kill it.
"""

import json
import os
import signal
import sys

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from sklearn.datasets import load_digits

from gluon_stable_ce import StableSoftmaxCrossEntropyLoss

EPOCHS, BATCHES, BATCH, SAVE_EVERY = 2, 30, 32, 7


def main(folder, wait_at=None):
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype('float32'), labels.astype('float32')
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Dense(16, activation='relu', in_units=64), gluon.nn.Dense(10, in_units=16))
    mx.random.seed(0)
    net.initialize(mx.init.Xavier())
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1, 'momentum': 0.9})
    loss_fn = StableSoftmaxCrossEntropyLoss()
    metric = loss_fn.create_metric()

    checkpoint = os.path.join(folder, 'checkpoint.json')
    done = 0
    if os.path.exists(checkpoint):
        with open(checkpoint) as file:
            state = json.load(file)
        done = state['done']
        net.load_parameters(os.path.join(folder, f'{done}.params'))
        trainer.load_states(os.path.join(folder, f'{done}.states'))
        metric.load_state_dict(state['metric'])

    for epoch in range(done // BATCHES, EPOCHS):
        order = np.random.RandomState(epoch).permutation(len(labels))
        for batch in range(done % BATCHES, BATCHES):
            chosen = order[batch * BATCH : (batch + 1) * BATCH]
            data, label = mx.nd.array(images[chosen]), mx.nd.array(labels[chosen])
            with autograd.record():
                pred = net(data)
                loss = loss_fn(pred, label)
            loss.backward()
            trainer.step(BATCH)
            metric.update(label, pred)
            if batch % 20 == 19:
                metric.reset_local()
            done += 1
            if done == wait_at:
                print(f'waiting at {done}', flush=True)
                signal.pause()
            if done % SAVE_EVERY == 0:
                net.save_parameters(os.path.join(folder, f'{done}.params'))
                trainer.save_states(os.path.join(folder, f'{done}.states'))
                with open(checkpoint + '.new', 'w') as file:
                    json.dump({'done': done, 'metric': metric.state_dict()}, file, allow_nan=False)
                os.replace(checkpoint + '.new', checkpoint)  # at once, and last: what it names is complete
        print(
            json.dumps(
                {
                    'epoch': epoch,
                    'local': metric.get()[1],
                    'global': metric.get_global()[1],
                    'count': metric.global_num_inst,
                }
            ),
            flush=True,
        )
        metric.reset()


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:]))
