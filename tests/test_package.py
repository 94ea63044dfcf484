"""The package around the code: what it needs, how it says so, and how its rooms hang together."""
import ast
import configparser
import os
import re
import subprocess
import sys

import gluon_stable_ce

PACKAGE = os.path.dirname(gluon_stable_ce.__file__)
ROOT = os.path.dirname(PACKAGE)


def import_with(tmp_path, mxnet):
    """Import the package where `mxnet` is the source of the module of that name; the last line on stderr."""
    (tmp_path / 'mxnet.py').write_text(mxnet)
    done = subprocess.run([sys.executable, '-c', 'import gluon_stable_ce'], capture_output=True, text=True, cwd=str(tmp_path),
                          env={**os.environ, 'PYTHONPATH': os.pathsep.join((str(tmp_path), ROOT))})
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_without_mxnet_one_sentence_says_what_to_install(tmp_path):
    message = import_with(tmp_path, 'raise ImportError("No module named mxnet")')
    assert message == ('ImportError: gluon_stable_ce needs MXNet 1.6 to 1.9: pip install "gluon-stable-ce[cpu]", or a CUDA wheel of MXNet')


def test_with_a_numpy_that_breaks_mxnet_one_sentence_says_so(tmp_path):
    message = import_with(tmp_path, 'raise AttributeError("module \'numpy\' has no attribute \'bool\'")')
    assert message == 'ImportError: MXNet 1.x cannot be imported with NumPy 1.24 or later: pip install "numpy<1.24"'


def test_metadata():
    config = configparser.ConfigParser()
    config.read(os.path.join(ROOT, 'setup.cfg'))
    assert config['options']['python_requires'] == '>=3.8,<3.12'
    assert 'mxnet' not in config['options']['install_requires']
    extras = config['options.extras_require']
    assert {'cpu', 'demo', 'onnx', 'test', 'dev'} <= set(extras)
    assert 'mxnet' in extras['cpu']
    assert os.path.exists(os.path.join(PACKAGE, 'py.typed'))
    with open(os.path.join(ROOT, 'CHANGELOG.md')) as file:
        assert f'## {gluon_stable_ce.__version__}' in file.read()


def imports_of(name):
    with open(os.path.join(PACKAGE, name)) as file:
        tree = ast.parse(file.read())
    return {(node.module or alias.name).lstrip('.') for node in tree.body if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names}


def test_data_flows_one_way_and_rooms_stay_small():
    """Nothing lower imports anything higher; the operators' API is known in one file; no file grows beyond 250 lines."""
    order = ['_ops', 'functional', '_door', '_sums', 'kvstore', '_deferred', '_class_weight', 'metric', 'loss', 'audit',
             'demo', '__main__', '__init__', 'onnx']
    files = [name for name in os.listdir(PACKAGE) if name.endswith('.py')]
    assert sorted(name[:-3] for name in files) == sorted({*order} - {'audit'})  # which is a folder
    for name in files:
        for imported in imports_of(name) - {'__version__'}:
            assert order.index(imported) < order.index(name[:-3]), (name, imported)
        with open(os.path.join(PACKAGE, name)) as file:
            text = file.read()
        assert text.count('\n') <= 250, name
        if name != '_ops.py':
            assert not re.search(r'is_np_array|mx\.npx?\.|as_np_ndarray|as_nd_ndarray', text), name


def test_nothing_is_in_the_repository_that_should_not_be():
    """No machine's paths or hosts, no unfinished business."""
    looking = ('tests/test_package.py', 'tests/test_notebooks.py')  # these name what they look for
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        if name.endswith(('.py', '.md', '.cfg', '.toml', 'Makefile', 'run', '.rst')) and name not in looking:
            with open(os.path.join(ROOT, name), encoding='utf-8') as file:
                assert not re.search(r'TODO|FIXME|XXX|/home/|/root/|/work/', file.read()), name
