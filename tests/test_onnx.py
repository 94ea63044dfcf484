"""The exported graph, run by onnxruntime, against the loss it was exported from."""

import functools
import inspect
import sys

import cases
import mxnet as mx
import numpy as np
import pytest
import tolerances
from digits import WithLoss
from mxnet import gluon
from tolerances import assert_close

from gluon_stable_ce import StableSoftmaxCrossEntropyLoss
from gluon_stable_ce.kernels import library
from gluon_stable_ce.onnx import export_model

if not hasattr(mx, 'onnx'):
    pytest.skip('mx.onnx.export_model came with MXNet 1.9', allow_module_level=True)
onnx = pytest.importorskip('onnx', reason='the extra "onnx" is not installed')
onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')

OPTIONS = {**cases.SPARSE, **cases.DENSE, 'raise': {'invalid_label': 'raise'}}
# several batch axes have no converter
LAYOUTS = {name: one for name, one in cases.LAYOUTS.items() if isinstance(one.batch_axis, int)}
IGNORED_NONE = {'ignore_label': -1, 'reduction': 'none'}

opsets = pytest.mark.parametrize('opset', [12, 13])
kinds = pytest.mark.parametrize(
    'rank_known', [True, False], ids=['exported by the loss', 'called on symbols']
)


def arrays_for(rng, shape, invalid_label='nan', **options):
    """Predictions, and labels among which are ignored and, where they are allowed, invalid ones; NumPy."""
    return cases.make(rng, shape, **{'axis': -1, **options}, invalid=invalid_label != 'raise')


def eager(loss, arrays):
    return loss(*(mx.nd.array(array, dtype=array.dtype) for array in arrays)).asnumpy()


def graph_of(loss, arrays, rank_known, tmp_path):
    """Symbol and parameters of the loss by itself, with inputs called data0 and so on."""
    if rank_known:
        given = {'sample_weight': len(arrays) > 2, 'dtype': arrays[0].dtype.name}
        loss.export(str(tmp_path / 'loss'), **given)
        return mx.model.load_checkpoint(str(tmp_path / 'loss'), 0)[:2]
    symbol = loss(*(mx.sym.var(f'data{i}') for i in range(len(arrays))))
    return symbol, {name: parameter.data() for name, parameter in loss.collect_params().items()}


def exported(symbol, params, feed, tmp_path, opset=13, **kwargs):
    """The ONNX file of a graph fed with such arrays."""
    names = [name for name in symbol.list_inputs() if name in feed]
    path = str(tmp_path / 'model.onnx')
    assert path == export_model(
        symbol,
        params,
        [feed[name].shape for name in names],
        [feed[name].dtype for name in names],
        path,
        opset_version=opset,
        **kwargs,
    )
    return path


def run(path, feed, opset=13):
    """What onnxruntime answers, the model being valid."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [opset]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # MXNet lists parameters among the inputs, which is worth a warning to it
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    assert {entry.name for entry in session.get_inputs()} == set(feed)
    return session.run(None, feed)[0]


def check(loss, arrays, rank_known, opset, tmp_path):
    """Export, run and compare."""
    want = eager(loss, arrays)
    feed = {f'data{i}': array for i, array in enumerate(arrays)}
    got = run(exported(*graph_of(loss, arrays, rank_known, tmp_path), feed, tmp_path, opset), feed, opset)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert_close(got, want)
    return got


@pytest.mark.slow
@pytest.mark.parametrize(
    ('opset', 'rank_known', 'weighted'),
    [(12, True, False), (13, True, True), (12, False, True), (13, False, False)],  # each pair
)
@pytest.mark.parametrize('options', cases.params(OPTIONS))
def test_every_option(options, weighted, rank_known, opset, rng, tmp_path):
    arrays = arrays_for(rng, (6, 4, 5), **options)
    if weighted:
        arrays += (np.array([1, 0, 2, 0.5, 3, 1], 'float32').reshape(6, 1, 1),)
    values = check(StableSoftmaxCrossEntropyLoss(**options), arrays, rank_known, opset, tmp_path)
    has_nan = options.get('sparse_label', True) and options.get('invalid_label', 'nan') == 'nan'
    assert np.isnan(values).any() == has_nan
    assert np.isfinite(values).any()


@pytest.mark.slow
@pytest.mark.parametrize(('opset', 'rank_known'), [(12, False), (13, True)])
@pytest.mark.parametrize('options', [
    {},
    {'reduction': 'sum'},
    {'sparse_label': False, 'reduction': 'none'},
    {'ignore_label': -1},
    {'from_logits': True, 'label_smoothing': 1.0},  # onnxruntime computes a transposed matrix times a vector wrongly
    {'from_logits': True, 'label_smoothing': 0.2, 'sparse_label': False},
    IGNORED_NONE,
], ids=str)  # fmt: skip
@pytest.mark.parametrize('layout', cases.params(LAYOUTS))
def test_every_layout(layout, options, rank_known, opset, rng, tmp_path):
    settings = {'axis': layout.axis, 'batch_axis': layout.batch_axis, **options}
    arrays = arrays_for(rng, layout.shape, **settings)
    check(StableSoftmaxCrossEntropyLoss(**settings), arrays, rank_known, opset, tmp_path)


@kinds
@pytest.mark.parametrize('dtype', cases.LABEL_DTYPES)
def test_every_label_dtype(dtype, rank_known, rng, tmp_path):
    label = np.array([1, 4, 0, 2, 5, 200, 255], 'uint8').astype(
        dtype
    )  # int8 makes negative labels of the last two
    if label.dtype.kind == 'f':
        label[5:] = 1.5, np.nan
    loss = StableSoftmaxCrossEntropyLoss(ignore_label=1)
    values = check(loss, (rng.normal(0, 3, (7, 5)).astype('float32'), label), rank_known, 13, tmp_path)
    np.testing.assert_array_equal(np.isnan(values), [False] * 4 + [True] * 3)
    assert values[0] == 0


@opsets
def test_labels_beyond_float32(opset, rng, tmp_path):
    label = np.array([2**32 + 1, -(2**40), 2**62, 1], 'int64')  # the first is 1 in 32 bits
    values = check(
        StableSoftmaxCrossEntropyLoss(),
        (rng.normal(0, 3, (4, 5)).astype('float32'), label),
        True,
        opset,
        tmp_path,
    )
    np.testing.assert_array_equal(np.isnan(values), [True, True, True, False])


@opsets
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_extreme_logits(dtype, opset, tmp_path):
    pred = np.array([[3e4, -3e4, 0], [20, 0, 0], [1, 2, -np.inf], [1, 2, -np.inf], [np.nan, 1, 2]], dtype)
    values = check(
        StableSoftmaxCrossEntropyLoss(), (pred, np.array([1, 0, 2, 1, 0], 'float32')), True, opset, tmp_path
    )
    # log(1 + exp(-1)) and NaN for NaN; onnxruntime's own log_softmax in float32 gives exactly 0 where the truth is 4e-9
    assert_close(values, [6e4, 0, np.inf, 0.31326169, np.nan], tolerances.ONNX)


@opsets
def test_a_weight_of_0_removes_an_infinite_loss(opset, tmp_path):
    pred = np.array([[0, -np.inf], [0, -np.inf]], 'float32')
    arrays = pred, np.array([1, 1], 'float32'), np.array([[0], [1]], 'float32')
    np.testing.assert_array_equal(
        check(StableSoftmaxCrossEntropyLoss(), arrays, True, opset, tmp_path), [0, np.inf]
    )


def test_a_label_with_a_kept_axis(rng, tmp_path):
    pred, label = arrays_for(rng, (6, 5))
    check(StableSoftmaxCrossEntropyLoss(), (pred, label[:, None]), False, 13, tmp_path)


@opsets
@kinds
def test_dynamic_batch(rank_known, opset, rng, tmp_path):
    loss = StableSoftmaxCrossEntropyLoss(
        ignore_label=-1, label_smoothing=0.1, class_weight=cases.CLASS_WEIGHT
    )
    arrays = arrays_for(rng, (6, 4, 5))
    symbol, params = graph_of(loss, arrays, rank_known, tmp_path)
    feed = {'data0': arrays[0], 'data1': arrays[1]}
    dynamic = {'data0': (None, 4, 5), 'data1': (None, 4)}
    path = exported(
        symbol,
        params,
        feed,
        tmp_path,
        opset,
        dynamic=True,
        dynamic_input_shapes=[dynamic[name] for name in symbol.list_inputs() if name in dynamic],
    )
    for batch in (1, 6, 9):
        arrays = arrays_for(rng, (batch, 4, 5))
        assert_close(run(path, {'data0': arrays[0], 'data1': arrays[1]}, opset), eager(loss, arrays))


@opsets
def test_net_and_loss_in_one_graph(opset, rng, tmp_path):
    net = gluon.nn.HybridSequential()
    net.add(
        gluon.nn.Conv2D(4, 3, activation='relu'), gluon.nn.BatchNorm(), gluon.nn.Dense(16), gluon.nn.Dense(5)
    )
    block = WithLoss(net, StableSoftmaxCrossEntropyLoss(ignore_label=-1, class_weight=cases.CLASS_WEIGHT))
    block.initialize(mx.init.Xavier())
    block.hybridize()
    feed = {
        'data0': rng.normal(size=(5, 3, 6, 6)).astype('float32'),
        'data1': np.array([0, -1, 4, 9, 2], 'float32'),
    }
    want = eager(block, feed.values())
    block.export(str(tmp_path / 'block'))
    files = [str(tmp_path / name) for name in ('block-symbol.json', 'block-0000.params')]
    order = [name for name in mx.sym.load(files[0]).list_inputs() if name in feed]
    path = export_model(
        *files,
        [feed[name].shape for name in order],
        onnx_file_path=str(tmp_path / 'model.onnx'),
        opset_version=opset,
    )
    got = run(path, feed, opset)
    assert_close(got, want)
    np.testing.assert_array_equal(np.isnan(got), [False, False, False, True, False])


@pytest.fixture
def labelled(rng, tmp_path):
    """A net with its loss as files, as a graph and parameters, and shapes and dtypes of its inputs by name."""
    block = WithLoss(gluon.nn.Dense(5), StableSoftmaxCrossEntropyLoss(class_weight=cases.CLASS_WEIGHT))
    block.initialize()
    block.hybridize()
    eager(block, (rng.normal(size=(6, 7)).astype('float32'), rng.randint(0, 5, 6)))
    prefix = str(tmp_path / 'block')
    block.export(prefix)
    symbol, *params = mx.model.load_checkpoint(prefix, 0)
    return {
        'files': (f'{prefix}-symbol.json', f'{prefix}-0000.params'),
        'dict': (symbol, {**params[0], **params[1]}),
        'two dicts': (symbol, params),
        'shapes': {'data1': (6,), 'data0': (6, 7)},
        'types': {'data0': np.dtype('float32'), 'data1': np.dtype('int64')},
        'order': [name for name in symbol.list_inputs() if name.startswith('data')],
    }


@pytest.mark.parametrize('graph', ['files', 'dict', 'two dicts'])
@pytest.mark.parametrize('names', [('in_shapes', 'in_types'), ('input_shape', 'input_type')], ids=str)
def test_dicts_by_input_name_make_the_model_that_lists_in_order_make(graph, names, labelled, tmp_path):
    by_name = labelled['shapes'], labelled['types']
    in_order = [[values[name] for name in labelled['order']] for values in by_name]
    models = []
    for index, arguments in enumerate([in_order, by_name, (in_order[0], by_name[1])]):
        path = tmp_path / f'{index}.onnx'
        export_model(*labelled[graph], onnx_file_path=str(path), **dict(zip(names, arguments)))
        models.append(path.read_bytes())
    assert models == [models[0]] * 3
    inputs = {entry.name: entry.type.tensor_type for entry in onnx.load(str(path)).graph.input}
    assert inputs['data1'].elem_type == onnx.TensorProto.INT64
    assert [size.dim_value for size in inputs['data0'].shape.dim] == [6, 7]


def test_one_dtype_is_that_of_all_inputs_beside_shapes_by_name(labelled, tmp_path):
    path = export_model(
        *labelled['files'],
        labelled['shapes'],
        np.float32,
        str(tmp_path / 'net.onnx'),
        dynamic=True,
        dynamic_input_shapes={'data1': (None,), 'data0': (None, 7)},
    )
    feed = {'data0': np.ones((2, 7), 'float32'), 'data1': np.array([1, 9], 'float32')}
    np.testing.assert_array_equal(np.isnan(run(path, feed)), [False, True])


@pytest.mark.parametrize('graph', ['files', 'dict', 'two dicts'])
@pytest.mark.parametrize(('argument', 'values', 'message'), [
    ('in_shapes', {'data0': (6, 7)}, r"missing: \['data1'\], unknown: \[\]"),
    ('in_shapes', {'data0': (6, 7), 'data1': (6,), 'label': (6,)}, r"missing: \[\], unknown: \['label'\]"),
    ('in_types', {'data0': 'float32', 'y': 'int64'}, r"missing: \['data1'\], unknown: \['y'\]"),
    ('in_types', {}, r"missing: \['data\d', 'data\d'\], unknown: \[\]"),
    ('dynamic_input_shapes', {'data0': (None, 7)}, r"missing: \['data1'\]"),
])  # fmt: skip
def test_missing_and_unknown_input_names_are_named(argument, values, message, graph, labelled):
    arguments = {'in_shapes': labelled['shapes'], argument: values}
    with pytest.raises(ValueError, match=f'{argument}: expected a dict with the inputs .*{message}'):
        export_model(*labelled[graph], **arguments)


def test_a_parameter_without_value_is_a_missing_input(labelled):
    symbol, params = labelled['dict']
    params = {name: value for name, value in params.items() if not name.endswith('_bias')}
    with pytest.raises(ValueError, match=r"missing: \['\w+_bias'\]"):
        export_model(symbol, params, labelled['shapes'])


X, INDEX = mx.sym.var('x'), mx.sym.var('index')


@pytest.mark.skipif(not library.load(), reason='the fused operator is not built')
@pytest.mark.parametrize('is_file', [False, True], ids=['symbol', 'file'])
def test_a_graph_with_the_fused_operator_is_refused(is_file, tmp_path):
    graph, path = (
        StableSoftmaxCrossEntropyLoss(kernel='fused')(X, mx.sym.var('y')),
        str(tmp_path / 'net.json'),
    )
    graph.save(path)
    with pytest.raises(
        ValueError, match="^sym: expected a graph of MXNet's own operators, .* kernel='stock'$"
    ):
        export_model(path if is_file else graph, {}, {'x': (2, 3), 'y': (2,)})


def test_the_label_of_an_output_layer_is_no_input_by_name(tmp_path):
    symbol = mx.sym.LogisticRegressionOutput(mx.sym.var('x'), name='out')  # has an input out_label
    assert symbol.list_inputs() == ['x', 'out_label']
    path = export_model(symbol, {}, {'x': (2, 3)}, onnx_file_path=str(tmp_path / 'net.onnx'))
    np.testing.assert_array_equal(run(path, {'x': np.zeros((2, 3), 'float32')}), np.full((2, 3), 0.5))


@opsets
@pytest.mark.parametrize('symbol', [
    mx.sym.pick(X, INDEX, axis=1),
    mx.sym.pick(X, INDEX, axis=-2, keepdims=True),
    mx.sym.pick(X, mx.sym.expand_dims(INDEX, axis=1), axis=1),
    mx.sym.sum(X, axis=1, exclude=True),
    mx.sym.mean(X, axis=-1, exclude=True),
    mx.sym.mean(X, axis=(0,), exclude=True),
    mx.sym.mean(X, axis=(), exclude=True),
    mx.sym.sum(X, axis=(), exclude=True),
    mx.sym.sum(X, axis=1),
    mx.sym.mean(X, axis=(0, 2)),
    mx.sym.log_softmax(X, axis=1),
    mx.sym.log_softmax(X * 100),
    mx.sym.contrib.arange_like(X, axis=1),
    mx.sym.contrib.arange_like(X, axis=-2),
    mx.sym.contrib.arange_like(X),
    mx.sym.where(mx.sym.contrib.arange_like(X, axis=0), X, -X),
    mx.sym.where(X == X, 2 * X, X),
    mx.sym.one_hot(mx.sym.cast(INDEX, 'float64'), 3, on_value=-64) * 2,
    mx.sym.one_hot(INDEX - 1, 3, off_value=7, dtype='float64') * 2,
    mx.sym.reshape(X, shape=(-2, -3), reverse=True),
    mx.sym.reshape(X, shape=(0, -1)),
    X != 1,
], ids=lambda symbol: f'{symbol.name} {symbol.list_attr()}')  # fmt: skip
def test_operators_as_a_net_may_use_them(symbol, opset, rng, tmp_path):
    feed = {
        'x': rng.normal(0, 1, (2, 3, 4)).astype('float32'),
        'index': np.array([[0, 1, 2, 9], [-5, 0, 1, 2]], 'float32'),
    }
    feed = {name: feed[name] for name in symbol.list_inputs()}
    want = symbol.eval(**{name: mx.nd.array(array) for name, array in feed.items()})[0].asnumpy()
    got = run(exported(symbol, {}, feed, tmp_path, opset), feed, opset)
    assert got.shape == want.shape
    assert_close(got, want)


@pytest.mark.parametrize(('symbol', 'message'), [
    (
        mx.sym.pick(X, INDEX, axis=1, mode='wrap'),
        "pick: expected an axis, and mode 'clip', got axis 1 and mode 'wrap'",
    ),
    (mx.sym.contrib.arange_like(X, axis=-1, start=2), '_contrib_arange_like: expected a negative axis alone'),
    (mx.sym.sum(X, axis=(0, 1), exclude=True), 'sum: expected one axis with exclude=True'),
])  # fmt: skip
def test_what_has_no_converter_says_so(symbol, message, tmp_path):
    feed = {
        name: np.zeros((2, 4) if name == 'index' else (2, 3, 4), 'float32') for name in symbol.list_inputs()
    }
    with pytest.raises(NotImplementedError, match=message):
        exported(symbol, {}, feed, tmp_path)


@pytest.fixture
def registry(monkeypatch):
    """MXNet's converters by opset; a copy that lasts as long as the test."""
    from mxnet.onnx.mx2onnx._export_onnx import MXNetGraph

    monkeypatch.setattr(
        MXNetGraph, 'registry_', {version: dict(table) for version, table in MXNetGraph.registry_.items()}
    )
    return MXNetGraph.registry_


def state(registry):
    """All that an export touches, in order and by identity."""
    tables = [
        (version, id(table), [(op, id(converter)) for op, converter in table.items()])
        for version, table in registry.items()
    ]
    return tables, onnx.defs.onnx_opset_version, onnx.checker.DEFAULT_CONTEXT.opset_imports


@opsets
def test_everything_is_left_as_it_was(opset, registry, rng, tmp_path):
    before = state(registry)
    arrays = arrays_for(rng, (6, 5))
    loss, feed = StableSoftmaxCrossEntropyLoss(), {'data0': arrays[0], 'data1': arrays[1]}
    symbol, params = graph_of(loss, arrays, True, tmp_path)
    exported(symbol, params, feed, tmp_path, opset)
    assert state(registry) == before
    with pytest.raises(AttributeError, match='No conversion function registered for op type sort'):
        exported(mx.sym.sort(symbol), params, feed, tmp_path, opset)
    assert state(registry) == before
    with pytest.raises(
        AttributeError, match='No conversion function registered'
    ):  # MXNet's own exporter has learnt nothing
        mx.onnx.export_model(
            symbol,
            params,
            [feed[name].shape for name in symbol.list_inputs()],
            onnx_file_path=str(tmp_path / 'other.onnx'),
        )


@pytest.mark.parametrize(
    ('op', 'registered_for'), [('pick', 12), ('pick', 13), ('where', 13), ('_contrib_arange_like', 13)]
)
def test_a_users_converter_wins(op, registered_for, registry, rng, tmp_path):
    from mxnet.onnx.mx2onnx._export_onnx import MXNetGraph

    @MXNetGraph.register(op, registered_for)
    @functools.wraps(
        registry[13].get(op, registry[12].get(op, lambda: None))
    )  # which gives it the name and module of MXNet's own
    def converter(node, **kwargs):
        raise ZeroDivisionError(node['op'])

    arrays = arrays_for(rng, (6, 5))
    graph = graph_of(StableSoftmaxCrossEntropyLoss(), arrays, True, tmp_path)
    with pytest.raises(ZeroDivisionError, match=op):
        exported(*graph, {'data0': arrays[0], 'data1': arrays[1]}, tmp_path)
    assert registry[registered_for][op] is converter


def test_the_signature_is_mxnets():
    ours, mxnets = (
        list(inspect.signature(function).parameters.values())
        for function in (export_model, mx.onnx.export_model)
    )
    assert [(p.name, p.kind, p.default) for p in ours[:-1]] == [(p.name, p.kind, p.default) for p in mxnets]
    assert (ours[-1].name, ours[-1].kind, ours[-1].default) == (
        'opset_version',
        inspect.Parameter.KEYWORD_ONLY,
        13,
    )


@pytest.mark.parametrize('opset', [11, 14, '13', None])
def test_other_opsets_are_refused(opset):
    with pytest.raises(ValueError, match=f'opset_version: expected 12 or 13, got {opset!r}'):
        export_model('loss-symbol.json', 'loss-0000.params', [(6, 5)], opset_version=opset)


def test_what_is_missing_is_named(monkeypatch, registry):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'onnx', None)
        with pytest.raises(
            ImportError, match=r'needs the onnx package: pip install "gluon-stable-ce\[onnx\]"'
        ):
            export_model('loss-symbol.json', 'loss-0000.params')
    registry.clear()
    with pytest.raises(ImportError, match='restart Python'):
        export_model('loss-symbol.json', 'loss-0000.params')
    monkeypatch.delattr(mx, 'onnx')
    with pytest.raises(ImportError, match=r'needs MXNet 1\.9, .*; this is MXNet ' + mx.__version__):
        export_model('loss-symbol.json', 'loss-0000.params')
