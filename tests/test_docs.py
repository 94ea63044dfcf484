"""The API reference: no public name lacks what a reader needs, and it builds without a warning."""

import os
import subprocess
import sys

import pytest

import gluon_stable_ce
from gluon_stable_ce import distributed, functional, onnx

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(gluon_stable_ce.__file__)))
PUBLIC = [(module, name) for module in (gluon_stable_ce, distributed, onnx) for name in module.__all__]


@pytest.mark.parametrize(('module', 'name'), PUBLIC, ids=[name for _, name in PUBLIC])
def test_a_public_name_has_shapes_errors_and_an_example(module, name):
    doc = getattr(module, name).__doc__
    assert doc.splitlines()[0].endswith(('.', ')', ':'))
    elsewhere = 'are those of `StableCrossEntropy`' in doc  # which has them
    assert elsewhere or 'Parameters\n' in doc or 'Attributes\n' in doc
    assert elsewhere or 'Raises\n' in doc or name == 'Audit'
    assert '>>> ' in doc


def test_functions_for_hybrid_blocks_say_their_shapes():
    assert '>>> ' in functional.__doc__
    for name in functional.__all__:
        doc = getattr(functional, name).__doc__
        assert (
            '(positions...' in doc
            or '(...' in doc
            or '(C,)' in doc
            or 'loss, counted' in doc
            or name in ('weighted', 'class_axis_last')
        )


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path):
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
