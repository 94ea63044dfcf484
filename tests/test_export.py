"""Net and loss as one exported graph, run by everything in MXNet that runs graphs, in processes that know nothing of this package."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys

import modes
import mxnet as mx
import numpy as np
import pytest
import tolerances
from digits import WithLoss
from mxnet import autograd, gluon
from mxnet.base import _LIB, check_call
from tolerances import assert_close

from gluon_stable_ce import StableSoftmaxCELoss

WEIGHTS = [1, 2, 0, 0.1, 3]
EVERY_OPTION = {
    'axis': 1,
    'ignore_label': -1,
    'class_weight': WEIGHTS,
    'label_smoothing': 0.1,
    'lse_square_scale': 0.01,
    'weight': 2.0,
}
GRAPHS = {
    'every-option': EVERY_OPTION,
    'every-option-none': dict(EVERY_OPTION, reduction='none'),
    'every-option-sum-clip': dict(EVERY_OPTION, reduction='sum', invalid_label='clip'),
    'distributions': dict(EVERY_OPTION, ignore_label=None, sparse_label=False),
    'log-probabilities': dict(EVERY_OPTION, lse_square_scale=0, from_logits=True, axis=-1),
    'time-first': dict(EVERY_OPTION, lse_square_scale=0, from_logits=True, axis=-1, batch_axis=1),
    'np-every-option': EVERY_OPTION,
    'np-distributions': dict(EVERY_OPTION, ignore_label=None, sparse_label=False),
}
pytestmark = pytest.mark.xdist_group('export')
CLASSIC = [name for name in GRAPHS if not name.startswith('np-')]
NP = [name for name in GRAPHS if name.startswith('np-')]

PREAMBLE = """
import json, sys
import numpy as np

folder, device, number, *names = sys.argv[1:]

def inputs_of(name):
    with np.load(f'{folder}/{name}.npz') as file:
        return [file[key] for key in ('data0', 'data1', 'data2')]
"""

SYMBOL_BLOCK = (
    PREAMBLE
    + """
import mxnet as mx
ctx = mx.Context(device, int(number))
for name in names:
    if name.startswith('np-'):
        mx.npx.set_np()
        array, ones_like = mx.np.array, mx.np.ones_like
    else:
        array, ones_like = mx.nd.array, mx.nd.ones_like
    inputs = [array(value, ctx=ctx) for value in inputs_of(name)]
    net = mx.gluon.SymbolBlock.imports(f'{folder}/{name}-symbol.json', ['data0', 'data1', 'data2'], f'{folder}/{name}-0000.params', ctx=ctx)
    inputs[0].attach_grad()
    with mx.autograd.record():
        loss = net(*inputs)
    loss.backward(ones_like(loss))
    assert loss.context == ctx
    before = {key: value.data().asnumpy() for key, value in net.collect_params().items() if not key.startswith('data')}
    mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1.0}).step(1)
    changed = {key for key, value in before.items() if (value != net.collect_params()[key].data().asnumpy()).any()}
    assert changed and not any('classweight' in key for key in changed), changed
    np.savez(f'{folder}/{name}-answer.npz', loss=loss.asnumpy(), gradient=inputs[0].grad.asnumpy())
"""
)

MODULE = (
    PREAMBLE
    + """
import mxnet as mx
for name in names:
    inputs = dict(zip(('data0', 'data1', 'data2'), map(mx.nd.array, inputs_of(name))))
    symbol, arg_params, aux_params = mx.model.load_checkpoint(f'{folder}/{name}', 0)
    module = mx.mod.Module(symbol, data_names=list(inputs), label_names=None, context=mx.Context(device, int(number)))
    module.bind([(key, value.shape) for key, value in inputs.items()], inputs_need_grad=True)
    module.set_params(arg_params, aux_params)
    module.forward(mx.io.DataBatch(list(inputs.values())), is_train=True)
    loss, = module.get_outputs()
    module.backward([mx.nd.ones_like(loss)])
    module.init_optimizer(optimizer='sgd', optimizer_params={'learning_rate': 1.0, 'wd': 0.1})
    module.update()
    changed = {key for key, value in module.get_params()[0].items() if (value != arg_params[key]).sum().asscalar()}
    assert changed and not any('classweight' in key for key in changed), changed
    np.savez(f'{folder}/{name}-answer.npz', loss=loss.asnumpy(), gradient=module.get_input_grads()[0].asnumpy())
"""
)

# no MXNet in Python at all
PREDICT_API = (
    PREAMBLE
    + """
import ctypes
libmxnet, *names = names
lib = ctypes.CDLL(libmxnet)
lib.MXGetLastError.restype = ctypes.c_char_p

def call(function, *args):
    if getattr(lib, function)(*args):
        raise SystemExit(f'{function}: {lib.MXGetLastError().decode()}')

for name in names:
    call('MXSetIsNumpyShape', int(name.startswith('np-')), ctypes.byref(ctypes.c_int()))
    inputs = inputs_of(name)
    shapes = [size for value in inputs for size in value.shape]
    edges = np.cumsum([0] + [value.ndim for value in inputs]).tolist()
    with open(f'{folder}/{name}-symbol.json', 'rb') as file:
        graph = file.read()
    with open(f'{folder}/{name}-0000.params', 'rb') as file:
        params = file.read()
    predictor, shape, ndim = ctypes.c_void_p(), ctypes.POINTER(ctypes.c_uint32)(), ctypes.c_uint32()
    call('MXPredCreate', graph, params, len(params), {'cpu': 1, 'gpu': 2}[device], int(number), 3,
         (ctypes.c_char_p * 3)(b'data0', b'data1', b'data2'), (ctypes.c_uint32 * 4)(*edges), (ctypes.c_uint32 * len(shapes))(*shapes),
         ctypes.byref(predictor))
    for key, value in zip((b'data0', b'data1', b'data2'), inputs):
        call('MXPredSetInput', predictor, key, np.ascontiguousarray(value).ctypes.data_as(ctypes.c_void_p), value.size)
    call('MXPredForward', predictor)
    call('MXPredGetOutputShape', predictor, 0, ctypes.byref(shape), ctypes.byref(ndim))
    loss = np.empty(shape[:ndim.value], 'float32')
    call('MXPredGetOutput', predictor, 0, loss.ctypes.data_as(ctypes.c_void_p), loss.size)
    call('MXPredFree', predictor)
    np.savez(f'{folder}/{name}-answer.npz', loss=loss)
assert 'mxnet' not in sys.modules
"""
)

EPILOGUE = """
assert 'gluon_stable_ce' not in sys.modules
"""


def build_net(log_probs):
    """Return a net of 5 classes: logits on axis 1, or log-probabilities on the last axis."""
    if not log_probs:
        return gluon.nn.Conv2D(5, 3, padding=1, in_channels=2)
    net = gluon.nn.HybridSequential()
    net.add(
        gluon.nn.Dense(5, flatten=False, in_units=6),
        gluon.nn.HybridLambda(lambda F, pred: F.log_softmax(pred, axis=-1)),
    )
    return net


def build(name, rng):
    """Return an initialised net with its loss, and inputs that include ignored and invalid labels, NumPy float32."""
    options = GRAPHS[name]
    log_probs = options.get('from_logits', False)
    net = build_net(log_probs)
    net.initialize(mx.init.Normal(1))
    both = WithLoss(net, StableSoftmaxCELoss(kernel='stock', **options))
    data = rng.normal(0, 1, (3, 4, 6) if log_probs else (4, 2, 3, 7))
    label = rng.randint(-1, 5, (3, 4) if log_probs else (4, 3, 7)).astype('float32')
    if options.get('sparse_label', True):
        label[1, 1] = 5
        label[0, 0] = -1
    else:
        label = np.moveaxis(rng.dirichlet(np.ones(5), label.shape), -1, 1)
    sample_weight = rng.uniform(0.5, 2, (3, 4, 1) if log_probs else (4, 1, 1, 1))
    return both, [array.astype('float32') for array in (data, label, sample_weight)]


def loss_and_gradient(net, inputs, array=mx.nd.array):
    """Of an eager call, as NumPy arrays; the gradient is that of the sum with respect to the data."""
    data, label, sample_weight = map(array, inputs)
    data.attach_grad()
    with autograd.record():
        loss = net(data, label, sample_weight)
    loss.backward()
    return loss.asnumpy(), data.grad.asnumpy()


def export(name, folder):
    """Write graph `name`, its inputs and what an eager call makes of them to `folder`."""
    rng = np.random.RandomState(0)
    if name.startswith('np-'):
        with modes.numpy_semantics():
            return _export(name, folder, rng, mx.np.array)
    return _export(name, folder, rng, mx.nd.array)


def _export(name, folder, rng, array):
    mx.random.seed(0)
    net, inputs = build(name, rng)
    loss, gradient = loss_and_gradient(net, inputs, array)
    net.hybridize()
    net(*map(array, inputs))
    net.export(str(folder / name))
    arrays = {f'data{i}': array for i, array in enumerate(inputs)}
    np.savez(str(folder / f'{name}.npz'), loss=loss, gradient=gradient, **arrays)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder with every graph."""
    folder = tmp_path_factory.mktemp('exported')
    for name in GRAPHS:
        export(name, folder)
    return folder


def answers(script, folder, names, ctx, *args):
    """(name, expected, answer) of every graph that `script` has run in a process of its own, in which this package cannot be found."""
    for name in names:
        if (folder / f'{name}-answer.npz').exists():
            (folder / f'{name}-answer.npz').unlink()
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    command = [sys.executable, '-c', script + EPILOGUE, str(folder), ctx.device_type, str(ctx.device_id)]
    process = subprocess.run(
        [*command, *args, *names],
        env=env,
        cwd=str(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    return [
        (name, np.load(str(folder / f'{name}.npz')), np.load(str(folder / f'{name}-answer.npz')))
        for name in names
    ]


def assert_same(results, keys=('loss', 'gradient')):
    for name, expected, answer in results:
        for key in keys:
            assert answer[key].shape == expected[key].shape, name
            assert_close(answer[key], expected[key], tolerances.SAME_OPERATORS, f'{name} {key}')


def test_what_is_exported_is_worth_comparing(exported):
    """Invalid labels show as NaN where they should and gradients are there, so that graphs which lost an option could not pass."""
    losses = {name: np.load(str(exported / f'{name}.npz'))['loss'] for name in GRAPHS}
    nan = [int(np.isnan(losses[name]).sum()) for name in GRAPHS]
    assert nan == [1, 7, 0, 0, 1, 1, 1, 0]
    for name in GRAPHS:
        gradient = np.load(str(exported / f'{name}.npz'))['gradient']
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    'names',
    [
        CLASSIC,
        pytest.param(
            NP,
            marks=pytest.mark.skipif(
                mx.__version__.startswith('1.6'), reason='MXNet 1.6 loads np graphs as classic ones'
            ),
        ),
    ],
    ids=['nd', 'np'],
)
def test_symbol_block_imports(names, exported, ctx):
    """Where it was exported, and on another context; to be trained on, too, all but the class weights."""
    assert_same(answers(SYMBOL_BLOCK, exported, names, ctx))
    if ctx.device_type == 'cpu':
        assert_same(answers(SYMBOL_BLOCK, exported, names, mx.cpu(1)))


@pytest.mark.slow
def test_load_checkpoint_and_module(exported, ctx):
    """Except for 'time-first', as a Module slices whatever comes out along its first axis. What it trains is the net, not the class weights."""
    assert_same(answers(MODULE, exported, [name for name in CLASSIC if name != 'time-first'], ctx))


def test_c_predict_api(exported, ctx):
    (libmxnet,) = mx.libinfo.find_lib_path()[:1]
    if not hasattr(ctypes.CDLL(libmxnet), 'MXPredCreate'):
        pytest.skip('this libmxnet was built without the C predict API')
    assert_same(answers(PREDICT_API, exported, GRAPHS, ctx, libmxnet), ['loss'])


@pytest.mark.parametrize('name', GRAPHS)
def test_the_graph_has_stock_operators_only(name, exported):
    """Those that libmxnet registers, and none that calls back into Python."""
    size, names = ctypes.c_uint(), ctypes.POINTER(ctypes.c_char_p)()
    check_call(_LIB.MXListAllOpNames(ctypes.byref(size), ctypes.byref(names)))
    python = {'Custom', '_Native', '_NDArray', '_CrossDeviceCopy'}
    stock = {names[i].decode() for i in range(size.value)} - python
    nodes = json.loads((exported / f'{name}-symbol.json').read_text())['nodes']
    used = {node['op'] for node in nodes} - {'null'}
    assert 'relu' in used
    assert used <= stock, used - stock
    assert not any('subgraphs' in node for node in nodes)


@pytest.mark.parametrize('array', ['nd', 'np'])
def test_class_weights_that_nobody_initialised_are_in_the_file(array, exported):
    """Only the net's body was ever initialised, as when its values come from a file."""
    name = {'nd': 'every-option', 'np': 'np-every-option'}[array]
    with modes.numpy_semantics() if array == 'np' else contextlib.nullcontext():
        saved = mx.nd.load(str(exported / f'{name}-0000.params'))
    (weights,) = (value for key, value in saved.items() if key.endswith('classweight0_value'))
    np.testing.assert_array_equal(weights.asnumpy(), np.float32(WEIGHTS))
