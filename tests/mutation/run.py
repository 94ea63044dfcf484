"""Break the code in one small way after another, and list what no test notices.

Survivors are printed in the format of `equivalent.txt`, which names those that no test could notice, and why.
"""

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from typing import List, NamedTuple, Set, Tuple

from mutants import mutants_of
from trial import KILLED, ROOT, SURVIVED, Copy, read

EQUIVALENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'equivalent.txt')
FUSED = 'kernels/fused'

# The tests of each file, the most likely to fail first, as arguments of pytest. Each line runs if those before pass.
STOCK = ['-k', 'not fused']
SHARED = [
    [*STOCK, 'test_values.py'],
    [*STOCK, 'test_kernels.py', 'test_labels.py'],
    [*STOCK, 'test_shapes_in_graphs.py', 'test_parity.py', 'test_class_weight.py'],
    [*STOCK, 'test_loss.py', 'test_metric.py', 'test_half_precision.py', 'test_onnx.py'],
]
PLAN = [
    ['test_plan.py', 'test_array_checks.py', 'test_options.py', 'test_signature.py'],
    ['test_gradient_requests.py', 'test_graphs.py', 'test_metric.py', 'test_class_weight.py'],
]
OPERATOR = [
    ['-k', 'fused', 'test_fused.py'],
    ['-k', 'fused', 'test_values.py', 'test_kernels.py', 'test_labels.py'],
]
THREADS = [['-m', 'slow', '-k', 'thread or processors or affinity or forked', 'test_fused.py']]
DENSE = ['-k', 'dense_layer', 'test_graphs.py']
TESTS = {
    'call.py': [*PLAN, *SHARED],
    'labels.py': [[*STOCK, 'test_labels.py'], *SHARED],
    'pipeline.py': [['test_array_checks.py', '-k', 'keep_the_class_axis'], *SHARED],
    'formula.py': [['test_reduction.py'], *SHARED],
    'reduction.py': [['test_reduction.py'], *SHARED],
    'kernels/stock.py': [[*STOCK, '-m', 'not slow', 'test_exactness.py'], DENSE, *SHARED],
    'metric_values.py': [['test_metric.py']],
    'plan.py': [*PLAN, *SHARED],
    'array_checks.py': [
        ['test_array_checks.py', 'test_plan.py'],
        ['test_half_precision.py', 'test_labels.py'],
        *SHARED,
    ],
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

    def is_in(self, records: Set['Record']) -> bool:
        return self in records or self._replace(new='*') in records


def read_records(path: str) -> Set[Record]:
    """The records of a file; '+ *' stands for all mutants of a line. A line of `=` says why."""
    with open(path) as file:
        lines = file.read().splitlines()
    return {
        Record(lines[i - 1], line[2:], lines[i + 1][2:])
        for i, line in enumerate(lines)
        if line.startswith('- ')
    }


def read_mutants(file: str) -> List[Tuple[Record, bytes]]:
    """The mutants of a file, each with its source."""
    source, mutants = read(ROOT, file), []
    for begin, end, text in mutants_of(file, source):
        first, last = source.rfind(b'\n', 0, begin) + 1, source.find(b'\n', end)
        old, new = source[first:last], source[first:begin] + text.encode() + source[end:last]
        record = Record(file, *(' '.join(lines.decode().split()) for lines in (old, new)))
        mutants.append((record, source[:begin] + text.encode() + source[end:]))
    return mutants


def report(mutants: List[Tuple[Record, bytes]], copy: Copy) -> Counter:
    """Try mutants, print those that survive, and count the outcomes."""
    counts, equivalent = Counter(), read_records(EQUIVALENT)
    for record, source in mutants:
        outcome = 'equivalent' if record.is_in(equivalent) else copy.try_source(record.file, source)
        counts[outcome] += 1
        if outcome == SURVIVED:
            print(f'\n{record}', flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('files', nargs='*', default=list(TESTS), help='files of the package')
    parser.add_argument('--sample', type=int, help='so many mutants of each file at most, at random')
    parser.add_argument('--seed', type=int, default=0, help='of the sample')
    parser.add_argument('--only', help='only the mutants that are in this output of an earlier run')
    arguments = parser.parse_args()
    scores, survivors = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(folder, TESTS)
        for file in arguments.files:
            if copy.run_tests(file, is_silent=False) != SURVIVED:
                raise SystemExit(f'{file}: expected tests that pass')
            mutants = read_mutants(file)
            if arguments.only:
                only = read_records(arguments.only)
                mutants = [mutant for mutant in mutants if mutant[0].is_in(only)]
            if arguments.sample and arguments.sample < len(mutants):
                mutants = random.Random(arguments.seed).sample(mutants, arguments.sample)
            counts = report(mutants, copy)
            scores.append(
                f'{file}: {counts[KILLED]} of {counts[KILLED] + counts[SURVIVED]} killed; {dict(counts)}'
            )
            print(f'\n{scores[-1]}', flush=True)
            survivors += counts[SURVIVED]
    print('\n'.join(['', *scores]))
    return int(survivors > 0)


if __name__ == '__main__':
    sys.exit(main())
