"""Break the code in one small way after another, and list what no test notices.

Each mutant is written into a copy of the package and tested in a fork of this process. Survivors are printed
in the format of `equivalent.txt`, which names those that change nothing that a test could see, and why.
"""

import argparse
import importlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Dict, Iterable, List, NamedTuple, Set

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
FUSED = 'kernels/fused'
CPU_SECONDS, SECONDS = 150, 400  # of one mutant, after which it hangs
KILLED, SURVIVED, INVALID = 'killed', 'survived', 'invalid'  # one that does not compile is none

# The tests for each file, the most likely to fail first. Later ones run if the earlier ones pass.
STOCK = ['-k', 'not fused']
SHARED = [
    [*STOCK, 'test_values.py'],
    [*STOCK, 'test_kernels.py', 'test_labels.py'],
    [*STOCK, 'test_shapes_in_graphs.py', 'test_parity.py', 'test_class_weight.py'],
    [*STOCK, 'test_loss.py', 'test_metric.py', 'test_amp.py', 'test_onnx.py'],
]
PLAN = [
    ['test_plan.py', 'test_inputs.py'],
    ['test_gradient_requests.py', 'test_graphs.py', 'test_metric.py', 'test_class_weight.py'],
]
OPERATOR = [
    ['-k', 'fused', 'test_fused.py'],
    ['-k', 'fused', 'test_values.py', 'test_kernels.py', 'test_labels.py'],
]
THREADS = [['-m', 'slow', '-k', 'thread or processors or affinity or forked', 'test_fused.py']]
TESTS = {
    'call.py': [*PLAN, *SHARED],
    'labels.py': [[*STOCK, 'test_labels.py'], *SHARED],
    'pipeline.py': [['test_pipeline.py'], *SHARED],
    'kernels/stock.py': SHARED,
    'plan.py': [*PLAN, *SHARED],
    'inputs.py': [['test_inputs.py', 'test_plan.py'], *SHARED],
    f'{FUSED}/exp_log.h': OPERATOR,
    f'{FUSED}/float16.h': OPERATOR,
    f'{FUSED}/loops.h': OPERATOR,
    f'{FUSED}/operator.cc': OPERATOR,
    f'{FUSED}/threads.h': [*THREADS, *OPERATOR],
}


class Record(NamedTuple):
    """A mutant as the lines that it changes."""

    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return f'{self.file}\n- {self.old}\n+ {self.new}'


class Mutant(NamedTuple):
    record: Record
    source: bytes


def mutants_of(file: str) -> List[Mutant]:
    from mutants import mutants_of as edits_of

    with open(os.path.join(ROOT, 'gluon_stable_ce', file), 'rb') as opened:
        source = opened.read()
    mutants = []
    for begin, end, text in edits_of(file, source):
        first, last = source.rfind(b'\n', 0, begin) + 1, source.find(b'\n', end)
        old, new = source[first:last], source[first:begin] + text.encode() + source[end:last]
        record = Record(file, *(' '.join(lines.decode().split()) for lines in (old, new)))
        mutants.append(Mutant(record, source[:begin] + text.encode() + source[end:]))
    return mutants


def read_records(path: str) -> Set[Record]:
    """The records of a file; '+ *' stands for all mutants of a line. A line of `=` says why."""
    with open(path) as file:
        lines = [line.rstrip('\n') for line in file]
    return {
        Record(lines[i - 1], lines[i][2:], lines[i + 1][2:])
        for i in range(len(lines))
        if lines[i].startswith('- ')
    }


def is_in(record: Record, records: Set[Record]) -> bool:
    return record in records or record._replace(new='*') in records


class Copy:
    """A copy of the package and of its tests, in which a file may be broken."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        ignore = shutil.ignore_patterns('__pycache__', '*.so')
        for name in ('gluon_stable_ce', 'tests', 'examples'):
            shutil.copytree(os.path.join(ROOT, name), os.path.join(folder, name), ignore=ignore)
        shutil.copy(os.path.join(ROOT, 'setup.cfg'), folder)
        self.changes = 0

    def write(self, file: str, source: bytes) -> None:
        path = os.path.join(self.folder, 'gluon_stable_ce', file)
        with open(path, 'wb') as opened:
            opened.write(source)
        self.changes += 1
        os.utime(path, (self.changes, self.changes))  # or Python might take compiled code of the same second

    def try_mutant(self, mutant: Mutant) -> str:
        """Whether a test fails."""
        path = os.path.join(self.folder, 'gluon_stable_ce', mutant.record.file)
        with open(path, 'rb') as opened:
            original = opened.read()
        self.write(mutant.record.file, mutant.source)
        try:
            return self.run(TESTS[mutant.record.file])
        finally:
            self.write(mutant.record.file, original)

    def run(self, stages: Iterable[List[str]], is_verbose: bool = False) -> str:
        child = os.fork()
        if not child:
            try:
                os.setpgid(0, 0)
                status = self._run_in_child(stages, is_verbose)
            except BaseException:
                status = 1
            os._exit(status)
        deadline = time.time() + SECONDS
        while time.time() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
                return {0: SURVIVED, 2: INVALID}.get(code, KILLED)
            time.sleep(0.02)
        os.killpg(child, 9)
        os.waitpid(child, 0)
        return KILLED

    def _run_in_child(self, stages: Iterable[List[str]], is_verbose: bool) -> int:
        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        os.chdir(self.folder)
        sys.path[:0] = [self.folder, os.path.join(self.folder, 'tests')]
        if not is_verbose:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
        import gluon_stable_ce

        assert gluon_stable_ce.__file__.startswith(self.folder)
        if not self._compile():
            return 2
        for stage in stages:
            arguments = [f'tests/{word}' if word.endswith('.py') else word for word in stage]
            markers = [] if '-m' in stage else ['-m', 'not slow and not dist']
            # 5: no tests are left by -k
            if pytest.main(['-x', '-q', '-p', 'no:warnings', '--tb=short', *markers, *arguments]) not in (
                0,
                5,
            ):
                return 1
        return 0

    def _compile(self) -> bool:
        """Compile the operator in the fastest way, for one instruction set, unless it is there."""
        import mxnet as mx

        from gluon_stable_ce.kernels import library

        if library.find():
            return True
        root = os.path.dirname(mx.__file__)
        kernel = '-DKERNEL=__attribute__((noinline)) static'
        compiler = ['g++', '-O1', *library.FLAGS[1:], kernel, f'-I{root}/include']
        lib_api = os.path.join(self.folder, 'lib_api.o')  # MXNet's part is the same each time
        if not os.path.exists(lib_api):
            subprocess.run([*compiler, '-c', f'{root}/src/lib_api.cc', '-o', lib_api], check=True)
        path = os.path.join(library.HERE, library.file_name())
        command = [*compiler, os.path.join(library.SOURCES, 'operator.cc'), lib_api, '-o', path]
        if subprocess.run(command, check=False).returncode:
            return False
        with open(path, 'ab') as file:
            file.write(library.END)
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('files', nargs='*', default=list(TESTS), help='files of the package')
    parser.add_argument('--sample', type=int, help='as many mutants of each file at most, by random')
    parser.add_argument('--seed', type=int, default=0, help='of the sample')
    parser.add_argument('--only', help='only the mutants in this output of an earlier run')
    arguments = parser.parse_args()
    equivalent = read_records(os.path.join(HERE, 'equivalent.txt'))
    only = read_records(arguments.only) if arguments.only else None
    import_what_does_not_change()
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(folder)
        for file in arguments.files:
            if copy.run(TESTS[file], is_verbose=True) != SURVIVED:
                raise SystemExit(f'{file}: expected tests that pass')
        survivors = 0
        for file in arguments.files:
            mutants = [mutant for mutant in mutants_of(file) if only is None or is_in(mutant.record, only)]
            if arguments.sample is not None and arguments.sample < len(mutants):
                mutants = random.Random(arguments.seed).sample(mutants, arguments.sample)
            survivors += report(file, mutants, copy, equivalent)
    return int(survivors > 0)


def import_what_does_not_change() -> None:
    """A fork has at once what this process has imported."""
    for name in ('mxnet', 'pytest', '_pytest.doctest', 'hypothesis', 'matplotlib.figure', 'sklearn.datasets'):
        importlib.import_module(name)


def report(file: str, mutants: List[Mutant], copy: Copy, equivalent: Set[Record]) -> int:
    """Try the mutants of a file, print its survivors and its score, and return how many survive."""
    counts: Dict[str, int] = {KILLED: 0, SURVIVED: 0, INVALID: 0, 'equivalent': 0}
    for mutant in mutants:
        outcome = 'equivalent' if is_in(mutant.record, equivalent) else copy.try_mutant(mutant)
        counts[outcome] += 1
        if outcome == SURVIVED:
            print(f'\n{mutant.record}', flush=True)
    tried = counts[KILLED] + counts[SURVIVED]
    named = ', '.join(f'{count} {outcome}' for outcome, count in counts.items())
    print(f'\n{file}: {counts[KILLED]} of {tried} killed ({named})', flush=True)
    return counts[SURVIVED]


if __name__ == '__main__':
    sys.exit(main())
