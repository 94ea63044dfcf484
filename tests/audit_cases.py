"""What the tests of the audit share: predictions, labels, and the command run in this process."""

import argparse
import json

import numpy as np

from gluon_stable_ce.commands.audit import add_arguments, run


def distributions(*shape, seed=0, dtype='float32', sharpness=12):
    """Softmax over the last axis of random logits, with many probabilities near 0; rounded to `dtype`."""
    z = np.random.RandomState(seed).randn(*shape) * sharpness
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True)).astype(dtype)


def labels_for(shape, classes, seed=1):
    return np.random.RandomState(seed).randint(0, classes, shape)


def as_pred_type(p, pred_type):
    return p if pred_type == 'probs' else np.log(p.astype('float64')).astype(p.dtype)


def same(a, b):
    """Whether all fields are the same, NaN included."""
    return json.dumps(a.as_dict()) == json.dumps(b.as_dict())


def command(*arguments):
    """Run the audit command in this process; return its exit code."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    return json.loads(text, parse_constant=refuse)
