"""The notebooks: they run, what is committed is what they show, and each ends with the assertions of its claim."""
import os
import re

import pytest
from modes import VERSION

nbformat = pytest.importorskip('nbformat', reason='notebooks need the test extra')
nbclient = pytest.importorskip('nbclient', reason='notebooks need the test extra')
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'notebooks')
NOTEBOOKS = sorted(name for name in os.listdir(FOLDER) if name.endswith('.ipynb'))


def read(name):
    return nbformat.read(os.path.join(FOLDER, name), as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


@pytest.mark.skipif(VERSION != (1, 9), reason='the notebooks show MXNet 1.9')
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_it_runs(name, tmp_path, monkeypatch):
    if 'onnx' in ''.join(cell.source for cell in code_of(read(name))):
        pytest.importorskip('onnxruntime')
    monkeypatch.setenv('JUPYTER_DATA_DIR', str(tmp_path))  # so that "python3" is this Python, and not what the user calls so
    monkeypatch.setenv('PYTHONPATH', os.path.dirname(FOLDER))
    nbclient.NotebookClient(read(name), timeout=120, resources={'metadata': {'path': FOLDER}}).execute()


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_it_is_committed_with_its_outputs(name):
    cells = code_of(read(name))
    for cell in cells:
        outputs = str([dict(output) for output in cell.outputs])
        assert cell.execution_count
        assert 'print(' not in cell.source or cell.outputs
        assert not any(output.output_type == 'error' for output in cell.outputs)
        assert not re.search(r'site-packages|/tmp/|/home/|/root/|Warning', outputs)
    assert cells[-1].source.startswith(('assert', 'nll = '))
    assert cells[-1].source.count('assert') >= 2


def test_there_are_four():
    assert [name[:2] for name in NOTEBOOKS] == ['1_', '2_', '3_', '4_']
