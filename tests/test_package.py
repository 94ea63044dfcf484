"""The package as a whole: errors of its import, and which modules import which."""

import ast
import os
import re
import subprocess
import sys

import pytest

import gluon_stable_ce

PACKAGE = os.path.dirname(gluon_stable_ce.__file__)
ROOT = os.path.dirname(PACKAGE)


def import_with(tmp_path, mxnet):
    """Import the package where `mxnet` is the source of the module of that name; the last line on stderr."""
    (tmp_path / 'mxnet.py').write_text(mxnet)
    done = subprocess.run(
        [sys.executable, '-c', 'import gluon_stable_ce'],
        capture_output=True,
        text=True,
        cwd=str(tmp_path),
        env={**os.environ, 'PYTHONPATH': os.pathsep.join((str(tmp_path), ROOT))},
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_import_without_mxnet_says_what_to_install(tmp_path):
    message = import_with(tmp_path, 'raise ImportError("No module named mxnet")')
    assert message == (
        'ImportError: gluon_stable_ce needs MXNet 1.6 to 1.9: pip install "gluon-stable-ce[cpu]", or a CUDA wheel of MXNet'
    )


def test_mxnet_2_is_refused_in_one_sentence(tmp_path):
    message = import_with(tmp_path, '__version__ = "2.0.0b1"')
    assert message == 'ImportError: gluon_stable_ce needs MXNet 1.6 to 1.9, this is 2.0.0b1'


def test_import_with_a_numpy_that_breaks_mxnet_says_so(tmp_path):
    message = import_with(tmp_path, "raise AttributeError(\"module 'numpy' has no attribute 'bool'\")")
    assert (
        message
        == 'ImportError: MXNet 1.x cannot be imported with NumPy 1.24 or later: pip install "numpy<1.24"'
    )


def imports_of(name):
    with open(os.path.join(PACKAGE, name)) as file:
        tree = ast.parse(file.read())
    return {
        (node.module or alias.name).lstrip('.')
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }


CORE = [
    'array_api',
    'options',
    'kernels.stock',
    'kernels.fused',
    'kernels',
    'functional',
    '_signature',
    'graphs',
    'class_weight',
    '_running_mean',
    'metric',
    'loss',
]


@pytest.mark.parametrize('module', CORE)
def test_core_imports_nothing_higher(module):
    """What is imported while a module is imported stands before it in CORE, so no periphery is."""
    path = module.replace('.', '/') + ('/__init__' if module == 'kernels' else '') + '.py'
    lower = set(CORE[: CORE.index(module)]) | {'stock', 'fused'}
    assert {
        name.split('.')[-1] if name != 'kernels.stock' else name for name in imports_of(path)
    } <= lower | {name.split('.')[-1] for name in lower}


def test_array_api_is_known_in_one_file():
    for folder, _, names in os.walk(PACKAGE):
        for name in names:
            if name.endswith('.py') and name != 'array_api.py':
                with open(os.path.join(folder, name)) as file:
                    assert not re.search(r'as_np_ndarray|as_nd_ndarray', file.read()), name
