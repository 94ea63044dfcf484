"""A copy of the package in which one file is broken at a time, and the run of its tests."""

import importlib
import os
import resource
import shutil
import subprocess
import sys
import time
from typing import Dict, List

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CPU_SECONDS, SECONDS = 300, 900  # of one mutant, after which it hangs
KILLED, SURVIVED, INVALID = 'killed', 'survived', 'invalid'  # C++ that does not compile is invalid
NO_TESTS = 5  # what pytest returns if -k leaves none


class Copy:
    """A copy of the package and of its tests."""

    def __init__(self, folder: str, tests: Dict[str, List[List[str]]]) -> None:
        self.folder = folder
        self.tests = tests
        self.changes = 0
        ignore = shutil.ignore_patterns('__pycache__', '*.so')
        for name in ('gluon_stable_ce', 'tests', 'examples'):
            shutil.copytree(os.path.join(ROOT, name), os.path.join(folder, name), ignore=ignore)
        shutil.copy(os.path.join(ROOT, 'setup.cfg'), folder)
        for name in (
            'mxnet',
            'pytest',
            '_pytest.doctest',
            'hypothesis',
            'matplotlib.figure',
            'sklearn.datasets',
        ):
            importlib.import_module(name)  # a fork has them at once

    def try_source(self, file: str, source: bytes) -> str:
        """Run the tests with another source of a file: 'killed' if one fails, 'survived' or 'invalid'."""
        original = read(self.folder, file)
        self._write(file, source)
        try:
            return self.run_tests(file)
        finally:
            self._write(file, original)

    def _write(self, file: str, source: bytes) -> None:
        path = os.path.join(self.folder, 'gluon_stable_ce', file)
        with open(path, 'wb') as opened:
            opened.write(source)
        self.changes += 1
        os.utime(path, (self.changes, self.changes))  # or Python might take compiled code of the same second

    def run_tests(self, file: str, is_silent: bool = True) -> str:
        """Run the tests of a file in a fork of this process."""
        child = os.fork()
        if child:
            return self._wait(child)
        outcome = KILLED
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            if is_silent:
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
            outcome = self._outcome(file)
        finally:
            os._exit((SURVIVED, KILLED, INVALID).index(outcome))

    @staticmethod
    def _wait(child: int) -> str:
        deadline = time.time() + SECONDS
        while time.time() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
                return {0: SURVIVED, 2: INVALID}.get(code, KILLED)
            time.sleep(0.02)
        os.killpg(child, 9)
        os.waitpid(child, 0)
        return KILLED

    def _outcome(self, file: str) -> str:
        import pytest

        os.chdir(self.folder)
        sys.path[:0] = [self.folder, os.path.join(self.folder, 'tests')]
        from gluon_stable_ce.kernels import library

        assert library.HERE.startswith(self.folder)
        if not library.find() and not self._compile(library):
            return INVALID
        if not library.load():  # tests would skip it, but `build` refuses it
            return KILLED
        for words in self.tests[file]:
            words = [f'tests/{word}' if word.endswith('.py') else word for word in words]
            markers = [] if '-m' in words else ['-m', 'not slow and not dist']
            if pytest.main(['-x', '-q', '-p', 'no:warnings', *markers, *words]) not in (0, NO_TESTS):
                return KILLED
        return SURVIVED

    def _compile(self, library) -> bool:
        """Compile the operator in the fastest way, for one instruction set."""
        mxnet = os.path.dirname(sys.modules['mxnet'].__file__)
        kernel = '-DKERNEL=__attribute__((noinline)) static'
        compiler = ['g++', '-O1', *library.FLAGS[1:], kernel, f'-I{mxnet}/include']
        lib_api = os.path.join(self.folder, 'lib_api.o')  # MXNet's part is the same each time
        if not os.path.exists(lib_api):
            subprocess.run([*compiler, '-c', f'{mxnet}/src/lib_api.cc', '-o', lib_api], check=True)
        path = os.path.join(library.HERE, library.file_name())
        sources = [os.path.join(library.SOURCES, name) for name in ('operator.cc', 'signature.cc')]
        if subprocess.run([*compiler, *sources, lib_api, '-o', path], check=False).returncode:
            return False
        with open(path, 'rb+') as file:
            sealed = library.sealed(file.read())
            file.seek(0)
            file.write(sealed)
        return True


def read(root: str, file: str) -> bytes:
    """The source of a file of the package."""
    with open(os.path.join(root, 'gluon_stable_ce', file), 'rb') as opened:
        return opened.read()
