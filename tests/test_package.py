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
        'ImportError: gluon_stable_ce needs MXNet 1.6 to 1.9: pip install -e ".[cpu]" in the clone, or a CUDA wheel of MXNet'
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


# No module imports one that stands after it, not even inside a function.
ORDER = [
    'version', 'array_api', 'options', 'call', 'graph_checks', 'labels', 'class_weight', 'exact_sums',
    'device_errors', 'distributed', 'metric_queue', 'class_terms', 'kernels.stock', 'kernels.fused', 'kernels.library',
    'kernels.choice', 'kernels.signature', 'kernels', 'formula', 'reduction', 'pipeline', 'array_checks', 'plan', 'graphs', 'metric_values', 'metric', 'loss', 'auditing.files',
    'auditing.arrays', 'auditing.report', 'auditing.computation', 'auditing', 'traced_dtypes',
    'patching', '__init__',
    'kernels.build', 'onnx', 'commands', 'commands.audit', 'commands.build', 'commands.run', '__main__',
]  # fmt: skip


def path_of(module):
    path = os.path.join(PACKAGE, *module.split('.'))
    return f'{path}.py' if os.path.exists(f'{path}.py') else os.path.join(path, '__init__.py')


def imports_of(module):
    """The modules of the package that a module imports, in functions too."""
    parents = ['gluon_stable_ce', *module.split('.')]
    if not path_of(module).endswith('__init__.py') or module == '__init__':
        parents.pop()
    with open(path_of(module)) as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            base = [*base, *(node.module or '').split('.')] if node.module else base
            if base[:1] == ['gluon_stable_ce']:
                yield from (module_of([*base[1:], alias.name]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                module_of(alias.name.split('.')[1:])
                for alias in node.names
                if alias.name == 'gluon_stable_ce'
            )


def module_of(names):
    """The module that ``from a.b import c`` reads: a.b.c, or a.b if c is in it."""
    while names and not os.path.exists(path_of('.'.join(names))):
        names = names[:-1]
    return '.'.join(names) or '__init__'


def test_order_names_every_module():
    found = {
        os.path.relpath(os.path.join(folder, name), PACKAGE)
        for folder, _, names in os.walk(PACKAGE)
        for name in names
        if name.endswith('.py')
    }
    assert found == {os.path.relpath(path_of(module), PACKAGE) for module in ORDER}


@pytest.mark.parametrize('module', ORDER)
def test_imports_nothing_higher(module):
    higher = ORDER[ORDER.index(module) :]
    assert not [name for name in imports_of(module) if name in higher]


def test_array_api_is_known_in_one_file():
    for folder, _, names in os.walk(PACKAGE):
        for name in names:
            if name.endswith('.py') and name != 'array_api.py':
                with open(os.path.join(folder, name)) as file:
                    assert not re.search(r'as_np_ndarray|as_nd_ndarray', file.read()), name
