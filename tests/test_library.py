"""How the library of the fused operator is named, found, guarded and loaded."""

import os
import shutil
import subprocess
import sys

import mxnet as mx
import pytest
from fused_operator import ROOT, needs_operator, supported

from gluon_stable_ce.kernels import library


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A private cache folder that is empty, in the place of the package's own folder and of the user's."""
    folder = tmp_path / 'cache'
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(library, 'cache_folder', lambda: str(folder))
    monkeypatch.setattr(library, 'HERE', str(tmp_path / 'read-only'))
    return folder


LIBRARY = library.sealed(b'ELF')


def put_library(folder, content=LIBRARY, mode=0o755):
    path = folder / library.file_name()
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources, in the place of the package's."""
    folder = tmp_path / 'fused'
    shutil.copytree(library.SOURCES, folder)
    monkeypatch.setattr(library, 'SOURCES', str(folder))
    return folder


@needs_operator
@pytest.mark.slow
def test_load_is_silent_and_leaves_the_functions_of_mxnet():
    code = """
import mxnet as mx
before = mx.nd.log_softmax, mx.sym.pick
from gluon_stable_ce.kernels import library
assert library.load() and library.load()
assert (mx.nd.log_softmax, mx.sym.pick) == before
"""
    environment = {**os.environ, 'PYTHONPATH': ROOT}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


@needs_operator
@pytest.mark.slow
def test_a_path_that_the_locale_has_no_characters_for(tmp_path):
    """As with LC_ALL=C in a container: the library is loaded all the same."""
    code = """
import os, sys
import mxnet as mx
from gluon_stable_ce.kernels import library
library.HERE, library.cache_folder = '/nowhere', lambda: sys.argv[1]
from gluon_stable_ce import StableSoftmaxCELoss
print(StableSoftmaxCELoss(kernel='fused')(mx.nd.zeros((1, 2)), mx.nd.zeros(1)).asscalar())
"""
    folder = tmp_path / 'Bücher'
    folder.mkdir(mode=0o700)
    shutil.copy(library.find(), folder)
    environment = {
        **os.environ, 'PYTHONPATH': ROOT, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0',
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, '-c', code, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout[:6]) == (0, '0.6931'), done.stderr


def test_find_refuses_what_others_may_write(cache):
    assert library.find() is None
    path = put_library(cache)
    assert library.find() == str(path)
    for writable, mode in ((path, 0o775), (path, 0o757), (cache, 0o777)):
        path.chmod(0o755)
        writable.chmod(mode)
        with pytest.warns(RuntimeWarning, match='other users may write it'):
            assert library.find() is None


def test_a_library_beside_the_sources_may_be_written_by_those_who_may_write_these(
    tmp_path, sources, monkeypatch
):
    """As after an installation with umask 002."""
    sources.chmod(0o775)
    monkeypatch.setattr(library, 'HERE', str(tmp_path))
    path = put_library(tmp_path, mode=0o775)
    assert library.find() == str(path)
    path.chmod(0o777)
    with pytest.warns(RuntimeWarning, match='other users may write it'):
        assert library.find() is None


@pytest.mark.parametrize('damage', [
    lambda content: content[:-1],
    lambda content: content[:-40],
    lambda content: b'',
    lambda content: content[:1] + b'\0' + content[2:],
    lambda content: content + b'\n',
], ids=['cut-off', 'without-end', 'empty', 'zeroed', 'longer'])  # fmt: skip
def test_a_damaged_library_is_not_loaded(cache, damage):
    put_library(cache, damage(library.sealed(b'ELF and more')))
    with pytest.warns(RuntimeWarning, match='damaged. To rebuild it: python -m gluon_stable_ce build$'):
        assert library.find() is None


def test_a_library_that_cannot_be_read_is_not_loaded(cache, monkeypatch):
    (cache / library.file_name()).mkdir()
    assert library.find() is None
    monkeypatch.setattr(library.os.path, 'isfile', os.path.exists)  # a root may read all files, but no folder
    with pytest.warns(
        RuntimeWarning, match='cannot be read .*To rebuild it: python -m gluon_stable_ce build$'
    ):
        assert library.find() is None


def test_without_the_sources_no_library_is_found(cache, monkeypatch):
    monkeypatch.setattr(library, 'SOURCES', str(cache / 'fused'))
    assert library.find() is None


def test_name_tells_the_version_and_each_source(sources):
    names = {library.file_name()}
    assert mx.__version__ in library.file_name()
    files = sorted(sources.iterdir())
    for file in files:
        file.write_text('// something else')
        names.add(library.file_name())
    assert len(names) == len(files) + 1


@pytest.mark.parametrize('version', ['1.6.0', '1.8.0', '2.0.0'])
def test_other_versions_of_mxnet_are_refused_by_name(version, monkeypatch):
    monkeypatch.setattr(mx, '__version__', version)
    assert library.why_unsupported() == f'it needs MXNet 1.9, got {version}'


@supported
def test_a_library_that_does_not_load_is_a_warning(cache, monkeypatch):
    monkeypatch.setattr(library, '_is_loaded', None)
    put_library(cache, library.sealed(b'no library'))
    with pytest.warns(RuntimeWarning, match='python -m gluon_stable_ce build --force'):
        assert library.load() is False
    assert library.load() is False
