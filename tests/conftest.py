"""What all tests share: contexts to run on, one seed, the examples as modules, the order, and a sample."""

import gc
import os
import sys
import zlib

# Processes of tests share the cores. MXNet reads this when it is imported.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')

import hypothesis
import mxnet as mx
import numpy as np
import pytest

from gluon_stable_ce.kernels import library
from gluon_stable_ce.kernels.choice import KERNEL_VARIABLE

# Every run of the tests tries the same examples; `make fuzz` tries new ones.
FUZZ_EXAMPLES, IS_QUICK = os.environ.get('FUZZ_EXAMPLES'), bool(os.environ.get('QUICK'))
hypothesis.settings.register_profile(
    'same', deadline=None, max_examples=20 if IS_QUICK else 60, derandomize=True
)
hypothesis.settings.register_profile('fuzz', deadline=None, max_examples=int(FUZZ_EXAMPLES or 60))
hypothesis.settings.load_profile('fuzz' if FUZZ_EXAMPLES else 'same')

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'examples'))

collect_ignore = ['mutation', 'typed_script.py', 'under_amp.py']  # scripts, no tests

CONTEXTS = [mx.cpu(0)] + [mx.gpu(0)] * (mx.context.num_gpus() > 0)


def pytest_report_header():
    """Say once where the tests run."""
    return f'contexts: {", ".join(map(str, CONTEXTS))}' + ('' if CONTEXTS[1:] else ' (MXNet can use no GPU)')


@pytest.hookimpl(hookwrapper=True)
def pytest_collection_modifyitems(config, items):
    """In parallel, slow tests come first, so that no worker is left alone with one.

    Jobs of several processes run one after the other. `make quick` runs a sample.
    """
    if IS_QUICK:
        sample = _sample(items)
        config.hook.pytest_deselected(items=list(set(items).difference(sample)))
        items[:] = sample
    for item in items:
        if item.get_closest_marker('dist'):
            item.add_marker(pytest.mark.xdist_group('dist'))
    yield
    if 'PYTEST_XDIST_WORKER' in os.environ:
        items.sort(key=lambda item: item.get_closest_marker('slow') is None)


def _sample(items):
    """Choose the first variant of each test with each kernel, and one in eight of the others."""
    first = {}
    for item in items:
        test, _, variant = item.nodeid.partition('[')
        first.setdefault((test, 'fused' in variant), item)
    chosen = set(first.values())
    return [item for item in items if item in chosen or zlib.crc32(item.nodeid.encode()) % 8 == 0]


def pytest_collection_finish():
    """Keep thousands of collected tests out of the garbage collections, which take longer with them."""
    gc.freeze()


@pytest.fixture(params=CONTEXTS, ids=str)
def ctx(request):
    """Every context that exists, as the current one."""
    with request.param:
        yield request.param


# older versions have one kernel, and test_fused.py says why
KERNELS = ['stock', 'fused'] if library.why_unsupported() is None else ['stock']


@pytest.fixture(scope='module', params=KERNELS)
def kernel(request):
    """Each kernel, wherever it can be used, in graphs of symbols too."""
    if request.param == 'fused' and not library.load():
        pytest.skip(library.why_unavailable())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KERNEL_VARIABLE, request.param)
        yield request.param


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.RandomState(0)
