"""The API reference: public names have docstrings, and it builds without a warning."""

import os
import subprocess
import sys

import pytest

import gluon_stable_ce
from gluon_stable_ce import distributed, functional, onnx

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(gluon_stable_ce.__file__)))
PUBLIC = [
    (module, name) for module in (gluon_stable_ce, distributed, functional, onnx) for name in module.__all__
]


@pytest.mark.parametrize(('module', 'name'), PUBLIC, ids=[name for _, name in PUBLIC])
def test_public_names_have_docstrings(module, name):
    assert getattr(module, name).__doc__


@pytest.mark.slow
def test_reference_builds_without_a_warning(tmp_path):
    pytest.importorskip('numpydoc', reason='the reference needs the docs extra')
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'sphinx',
            '-W',
            '--keep-going',
            '-q',
            '-b',
            'html',
            os.path.join(ROOT, 'docs'),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'index.html').read_text()
    for module, name in PUBLIC:
        assert f'id="{module.__name__}.{getattr(module, name).__name__}"' in page
