"""How the fused operator is compiled, verified and put in place."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from itertools import product
from pathlib import Path

import mxnet as mx
import pytest
from fused_operator import ROOT, needs_operator, supported

from gluon_stable_ce.commands import build as command
from gluon_stable_ce.kernels import build, library

FORCE = Namespace(force=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder, which does not exist yet; nothing can be written beside the sources."""
    folder = tmp_path / 'cache'
    monkeypatch.setattr(library, 'cache_folder', lambda: str(folder))
    monkeypatch.setattr(library, 'HERE', str(tmp_path / 'read-only'))
    return folder


def compiler_script(path, script):
    path.write_bytes(b'#!/bin/sh\n' + script)
    path.chmod(0o755)
    return str(path)


def test_writable_folder_is_private(cache):
    assert build.writable_folder() == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(build.BuildError, match='only this user may write'):
            build.writable_folder()


def test_other_versions_of_mxnet_are_refused(monkeypatch):
    monkeypatch.setattr(mx, '__version__', '1.8.0')
    with pytest.raises(build.BuildError, match='needs MXNet 1.9, got 1.8.0'):
        build.build()


@supported
@pytest.mark.parametrize('compiler', ['no-such-compiler', 'false', 'g++ "'])
def test_without_a_compiler_the_command_prints_an_error_in_one_line(compiler, cache, monkeypatch, capsys):
    monkeypatch.setenv('CXX', compiler)
    assert command.run(FORCE) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.count('\n') == 1
    assert compiler in printed.err
    assert not printed.err.endswith(': \n')
    assert list(cache.iterdir()) == []


@supported
def test_messages_of_a_compiler_may_have_any_encoding(cache, monkeypatch, tmp_path, capsys):
    script = compiler_script(tmp_path / 'compiler', b'echo "error: \xe9\xff" >&2\nexit 1\n')
    monkeypatch.setenv('CXX', script)
    assert command.run(FORCE) == 2
    assert 'failed: error: ' in capsys.readouterr().err


@needs_operator
def test_the_command_prints_the_path_of_the_library(capsys):
    assert command.run(Namespace(force=False)) == 0
    assert capsys.readouterr().out == f'{library.find()}\n'


@needs_operator
@pytest.mark.build
@pytest.mark.slow
def test_a_killed_build_leaves_no_library_and_two_at_once_leave_one(tmp_path):
    """The compiler only copies what has been compiled: it is where the result is put that matters."""
    folder = tmp_path / 'cache'
    folder.mkdir(mode=0o700)
    script = f'for last; do :; done\ncp {library.find()} "$last"\nsleep $PAUSE\n'.encode()
    environment = {**os.environ, 'PYTHONPATH': ROOT, 'CXX': compiler_script(tmp_path / 'compiler', script)}
    code = f"""
from gluon_stable_ce.kernels import build
build.writable_folder = lambda: {str(folder)!r}
build.build(force=True)
"""

    def start(pause):
        command = [sys.executable, '-c', code]
        return subprocess.Popen(command, env={**environment, 'PAUSE': pause}, start_new_session=True)

    killed = start('60')
    deadline = time.time() + 60
    while not list(folder.iterdir()) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / library.file_name()).exists()
    builds = [start('0') for _ in range(2)]
    assert [process.wait(300) for process in builds] == [0, 0]
    assert (folder / library.file_name()).exists()


def test_what_killed_builds_left_is_removed(tmp_path):
    for name, age in (('building-a.so', 7200), ('building-b.so', 0), ('fused-c.so', 7200)):
        path = tmp_path / name
        path.write_bytes(b'')
        os.utime(path, (time.time() - age,) * 2)
    build.remove_stale(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['building-b.so', 'fused-c.so']


def test_what_was_built_from_other_sources_is_removed_beside_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(library, 'HERE', str(tmp_path))
    for name in ('fused-other.so', library.file_name()):
        (tmp_path / name).write_bytes(b'')
    build.remove_stale(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [library.file_name()]


def version_of_gcc():
    done = subprocess.run(['g++', '-dumpversion'], capture_output=True, text=True, check=False)
    return int(done.stdout.split('.')[0] or 0)


@needs_operator
@pytest.mark.build
@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which('g++') or version_of_gcc() < 12 or platform.machine() != 'x86_64',
    reason='it reads the reports of g++ 12 on x86_64',
)
def test_each_loop_becomes_vector_code_for_float_and_double(tmp_path, monkeypatch):
    """Nothing else would notice a loop of single numbers, which takes ten times as long."""
    report, source = tmp_path / 'report', Path(library.SOURCES) / 'loops.h'
    monkeypatch.setattr(library, 'FLAGS', (*library.FLAGS, f'-fopt-info-vec-optimized={report}'))
    build.compile_to(str(tmp_path / 'library.so'))
    message = 'loops.h:([0-9]+):.*vectorized using ([0-9]+) byte vectors'
    vectorized = Counter((int(line), int(size)) for line, size in re.findall(message, report.read_text()))
    lines = enumerate(source.read_text().splitlines(), start=1)
    marked = [number for number, line in lines if line.startswith(('#pragma omp simd', '#pragma GCC ivdep'))]
    assert len(marked) > 10
    for number, size in product(marked, (32, 64)):  # AVX2 and AVX-512
        # the report names the loop's line, or one of its body
        assert sum(vectorized[number + i, size] for i in (1, 2)) > 1, f'loops.h:{number}, {size} bytes'


@needs_operator
@pytest.mark.build
@pytest.mark.slow
@pytest.mark.parametrize(
    ('file', 'right', 'wrong'),
    [
        ('loops.h', 'if (i < n) {', 'if (false) {'),
        ('loops.h', 'g_nll * expm1_of<T>(-nll)', 'g_nll * (float(exp_of<T>(-nll)) - 1)'),
        ('operator.cc', 'if (y > 0) others.add(x, int(y));', ''),
        ('exp_log.h', 'x = x < lowest ? lowest : x;', 'x = x > lowest ? x : lowest;'),
    ],
    ids=['no tail', 'p - 1', 'no classes before the label', 'NaN hidden'],
)
def test_a_broken_kernel_is_not_installed(file, right, wrong, tmp_path, monkeypatch):
    sources, folder = tmp_path / 'fused', tmp_path / 'folder'
    shutil.copytree(library.SOURCES, sources)
    folder.mkdir()
    source = (sources / file).read_text()
    assert right in source
    (sources / file).write_text(source.replace(right, wrong))
    monkeypatch.setattr(library, 'SOURCES', str(sources))
    monkeypatch.setattr(library, 'FLAGS', (*library.FLAGS, '-O1', '-DKERNEL=static'))  # compiles faster
    monkeypatch.setattr(build, 'writable_folder', lambda: str(folder))
    with pytest.raises(build.BuildError, match='is wrong'):
        build.build(force=True)
    assert list(folder.iterdir()) == []
