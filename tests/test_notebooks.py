"""The notebooks: they run, and what is committed is what they show."""

import os
import re
import shutil
import sys

import pytest
from modes import VERSION

import gluon_stable_ce

nbformat = pytest.importorskip('nbformat', reason='notebooks need the test extra')
nbclient = pytest.importorskip('nbclient', reason='notebooks need the test extra')
pytest.importorskip('ipykernel', reason='notebooks need the test extra')
from jupyter_client import AsyncKernelManager  # noqa: E402
from jupyter_client.kernelspec import KernelSpec  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, 'notebooks')
NOTEBOOKS = sorted(name for name in os.listdir(FOLDER) if name.endswith('.ipynb'))
OF_A_MACHINE = r'site-packages|/tmp\b|/home/|/root/|/Users/|Warning'

runs = pytest.mark.skipif(VERSION < (1, 9), reason='the notebooks show MXNet 1.9: ONNX export came with it')


class ThisPython(AsyncKernelManager):
    """Starts this very interpreter, and not what the machine calls "python3"."""

    kernel_spec = KernelSpec(
        argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], language='python'
    )


def read(name):
    return nbformat.read(os.path.join(FOLDER, name), as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def shown(cell):
    """What a cell shows: kinds of output, without what libraries say on stderr."""
    return {output.output_type for output in cell.outputs if output.get('name') != 'stderr'}


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a notebook in a copy of its folder, next to copies of the benchmarks and examples: the checkout is left as it is."""
    for name in ('notebooks', 'benchmarks', 'examples'):
        shutil.copytree(os.path.join(ROOT, name), str(tmp_path / name))
    for name in ('JUPYTER_RUNTIME_DIR', 'IPYTHONDIR', 'TMPDIR'):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    under_test = os.path.dirname(os.path.dirname(os.path.abspath(gluon_stable_ce.__file__)))
    monkeypatch.setenv('PYTHONPATH', under_test, prepend=os.pathsep)
    monkeypatch.delenv('MPLBACKEND', raising=False)  # a notebook's figures go into the notebook

    def run(notebook):
        return nbclient.NotebookClient(
            notebook,
            timeout=120,
            kernel_name='python3',
            kernel_manager_class=ThisPython,
            resources={'metadata': {'path': str(tmp_path / 'notebooks')}},
        ).execute()

    return run


@pytest.mark.slow
@runs
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_it_runs_and_shows_what_is_committed(name, execute, tmp_path):
    source = '\n'.join(cell.source for cell in code_of(read(name)))
    for module in ('matplotlib', 'sklearn', 'onnx', 'onnxruntime'):
        if re.search(rf'\b{module}\b', source):
            pytest.importorskip(module, reason=f'{name} needs {module}')
    executed = execute(read(name))
    assert [shown(cell) for cell in code_of(executed)] == [shown(cell) for cell in code_of(read(name))]
    assert sorted(os.listdir(str(tmp_path / 'notebooks'))) == sorted(os.listdir(FOLDER)), (
        'it writes next to itself'
    )
    assert [name for name in os.listdir(str(tmp_path / 'TMPDIR')) if name.startswith('tmp')] == [], (
        'it leaves temporary files'
    )


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_it_is_committed_with_its_outputs(name):
    cells = code_of(read(name))
    for cell in cells:
        outputs = str([dict(output) for output in cell.outputs if 'image/png' not in output.get('data', {})])
        assert cell.execution_count
        assert shown(cell) or not re.search(r'\bprint\(|\.show\(', cell.source)
        assert all(
            output.output_type != 'error' and output.get('name') != 'stderr' for output in cell.outputs
        )
        assert not re.search(OF_A_MACHINE, outputs)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_pictures_have_a_text(name):
    for cell in code_of(read(name)):
        has_picture = any('image/png' in output.get('data', {}) for output in cell.outputs)
        assert has_picture == bool(cell.metadata.get('mystnb', {}).get('image', {}).get('alt'))
