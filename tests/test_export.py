"""Net and loss as one exported graph, run by everything in MXNet that runs graphs."""

import contextlib
import ctypes
import json
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
every_graph = pytest.mark.parametrize('name', GRAPHS)
INPUTS = ['data0', 'data1', 'data2']

# no MXNet in Python at all
PREDICT_API = """
import ctypes, sys
import numpy as np

folder, device, number, libmxnet, *names = sys.argv[1:]
lib = ctypes.CDLL(libmxnet)
lib.MXGetLastError.restype = ctypes.c_char_p

def call(function, *args):
    if getattr(lib, function)(*args):
        raise SystemExit(f'{function}: {lib.MXGetLastError().decode()}')

for name in names:
    call('MXSetIsNumpyShape', int(name.startswith('np-')), ctypes.byref(ctypes.c_int()))
    with np.load(f'{folder}/{name}.npz') as file:
        inputs = [file[f'data{i}'] for i in range(3)]
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
    np.save(f'{folder}/{name}-loss.npy', loss)
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


def loss_and_gradient(net, inputs):
    """Of an eager call, as NumPy arrays; the gradient is that of the sum with respect to the data."""
    inputs[0].attach_grad()
    with autograd.record():
        loss = net(*inputs)
    loss.backward()
    return {'loss': loss.asnumpy(), 'gradient': inputs[0].grad.asnumpy()}


@contextlib.contextmanager
def arrays_of(name):
    """How a graph's inputs are made of NumPy arrays."""
    if not name.startswith('np-'):
        yield mx.nd.array
    else:
        with modes.numpy_semantics():
            yield mx.np.array


def export(name, folder):
    """Write a graph, its inputs and what an eager call makes of them."""
    mx.random.seed(0)
    with arrays_of(name) as array:
        net, inputs = build(name, np.random.RandomState(0))
        results = loss_and_gradient(net, [array(value) for value in inputs])
        net.hybridize()
        net(*map(array, inputs))
        net.export(str(folder / name))
    np.savez(folder / f'{name}.npz', **results, **dict(zip(INPUTS, inputs)))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder with every graph."""
    folder = tmp_path_factory.mktemp('exported')
    for name in GRAPHS:
        export(name, folder)
    return folder


def assert_as_exported(folder, name, results):
    expected = np.load(folder / f'{name}.npz')
    for key, value in results.items():
        assert value.shape == expected[key].shape
        assert_close(value, expected[key], tolerances.SAME_OPERATORS, key)


def assert_net_is_trained(before, after):
    """All parameters have changed but the class weights."""
    changed = {name for name, value in before.items() if (value != after[name]).any()}
    assert changed == {name for name in before if not name.endswith('classweight0_value')}


def test_what_is_exported_is_worth_comparing(exported):
    """Invalid labels give NaN, and there are gradients: a graph that has lost an option does not pass."""
    files = [np.load(exported / f'{name}.npz') for name in GRAPHS]
    assert [np.isnan(file['loss']).sum() for file in files] == [1, 7, 0, 0, 1, 1, 1, 0]
    for file in files:
        assert np.isfinite(file['gradient']).all()
        assert np.abs(file['gradient']).max() > 0.01


@every_graph
@pytest.mark.parametrize('on', [None, mx.cpu(1)], ids=['where-it-was', 'elsewhere'])
def test_symbol_block_imports(name, on, exported, ctx):
    if name.startswith('np-') and modes.VERSION < (1, 7):
        pytest.skip('MXNet 1.6 loads np graphs as classic ones')
    on, file = on or ctx, np.load(exported / f'{name}.npz')
    with arrays_of(name) as array:
        path = str(exported / name)
        net = gluon.SymbolBlock.imports(f'{path}-symbol.json', INPUTS, f'{path}-0000.params', ctx=on)
        assert_as_exported(
            exported, name, loss_and_gradient(net, [array(file[key], ctx=on) for key in INPUTS])
        )
        parameters = {key: value for key, value in net.collect_params().items() if key not in INPUTS}
        before = {key: value.data().asnumpy() for key, value in parameters.items()}
        gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1.0}).step(1)
        assert_net_is_trained(before, {key: value.data().asnumpy() for key, value in parameters.items()})


# a Module slices its outputs along the first axis, which is not the batch of 'time-first'
@pytest.mark.parametrize('name', [name for name in GRAPHS if name != 'time-first' and name[:3] != 'np-'])
def test_load_checkpoint_and_module(name, exported, ctx):
    file = np.load(exported / f'{name}.npz')
    symbol, arg_params, aux_params = mx.model.load_checkpoint(str(exported / name), 0)
    module = mx.mod.Module(symbol, data_names=INPUTS, label_names=None, context=ctx)
    module.bind([(key, file[key].shape) for key in INPUTS], inputs_need_grad=True)
    module.set_params(arg_params, aux_params)
    module.forward(mx.io.DataBatch([mx.nd.array(file[key]) for key in INPUTS]), is_train=True)
    (loss,) = module.get_outputs()
    module.backward([mx.nd.ones_like(loss)])
    results = {'loss': loss.asnumpy(), 'gradient': module.get_input_grads()[0].asnumpy()}
    assert_as_exported(exported, name, results)
    module.init_optimizer(optimizer='sgd', optimizer_params={'learning_rate': 1.0, 'wd': 0.1})
    module.update()
    after = {key: value.asnumpy() for key, value in module.get_params()[0].items()}
    assert_net_is_trained({key: value.asnumpy() for key, value in arg_params.items()}, after)


def test_c_predict_api(exported, ctx):
    """In a process that has neither MXNet's Python nor this package."""
    (libmxnet,) = mx.libinfo.find_lib_path()[:1]
    if not hasattr(ctypes.CDLL(libmxnet), 'MXPredCreate'):
        pytest.skip('this libmxnet was built without the C predict API')
    command = [sys.executable, '-c', PREDICT_API, str(exported), ctx.device_type, str(ctx.device_id)]
    done = subprocess.run(
        [*command, libmxnet, *GRAPHS], cwd=exported, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in GRAPHS:
        assert_as_exported(exported, name, {'loss': np.load(exported / f'{name}-loss.npy')})


@every_graph
def test_the_graph_has_stock_operators_only(name, exported):
    """Those that libmxnet registers: none that calls back into Python, and not the fused one."""
    size, names = ctypes.c_uint(), ctypes.POINTER(ctypes.c_char_p)()
    check_call(_LIB.MXListAllOpNames(ctypes.byref(size), ctypes.byref(names)))
    others = {'Custom', '_Native', '_NDArray', '_CrossDeviceCopy', 'stable_ce_class_terms'}
    stock = {names[i].decode() for i in range(size.value)} - others
    nodes = json.loads((exported / f'{name}-symbol.json').read_text())['nodes']
    used = {node['op'] for node in nodes} - {'null'}
    assert 'relu' in used
    assert used <= stock, used - stock
    assert not any('subgraphs' in node for node in nodes)


@pytest.mark.parametrize('axis', range(-3, 3))
@pytest.mark.parametrize('batch_axis', range(-3, 3))
@pytest.mark.parametrize('shape', [(3, 3), (3,), (1,)], ids=str)
def test_weights_never_weigh_another_axis(axis, batch_axis, shape, rng):
    """A graph has no ranks: it computes what the loss computes of arrays, or it refuses the weights."""
    loss_fn = StableSoftmaxCELoss(axis=axis, batch_axis=batch_axis)
    arrays = [rng.normal(0, 1, (3, 3, 3)), rng.randint(0, 3, (3, 3)), rng.uniform(0, 2, shape)]
    arrays = [mx.nd.array(array) for array in arrays]
    loaded = modes.load_exported(loss_fn, 3, sample_weight=True)
    try:
        loss = loaded(*arrays).asnumpy()
    except mx.MXNetError:
        return
    assert_close(loss, loss_fn(*arrays).asnumpy())


def test_an_export_has_as_many_classes_as_there_are_class_weights(tmp_path):
    StableSoftmaxCELoss(class_weight=[1, 2, 3]).export(str(tmp_path / 'loss'))
    nodes = json.loads((tmp_path / 'loss-symbol.json').read_text())['nodes']
    assert [node['attrs']['depth'] for node in nodes if node['op'] == 'one_hot'] == ['3']


@pytest.mark.parametrize('name', ['every-option', 'np-every-option'])
def test_class_weights_that_nobody_initialised_are_in_the_file(name, exported):
    """Only the net's body was ever initialised, as when its values come from a file."""
    with arrays_of(name):
        saved = mx.nd.load(str(exported / f'{name}-0000.params'))
    (weights,) = (value for key, value in saved.items() if key.endswith('classweight0_value'))
    np.testing.assert_array_equal(weights.asnumpy(), np.float32(WEIGHTS))
