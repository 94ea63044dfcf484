"""The pages of the documentation and the README: their blocks, their links, and the parts that tests write.

``UPDATE_README=1`` writes these parts.
"""

import os
import re
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCS = os.path.join(ROOT, 'docs')
PAGES = ['README.md', *sorted(f'docs/{name}' for name in os.listdir(DOCS) if name.endswith('.md'))]


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        return file.read()


def blocks_of(path, *languages):
    """The blocks of a Markdown file in some languages."""
    found = [Block(*groups) for groups in re.findall(r'^```([^\n]*)\n(.*?)^```$', read(path), re.S | re.M)]
    return [block for block in found if block.language in languages]


def check_section(path, name, text):
    """The text of a file between the markers of `name` is `text`."""
    path = os.path.join(ROOT, path)
    whole = read(path)
    begin = re.search(f'<!-- {re.escape(name)}: .*?-->\n', whole).end()
    end = whole.index(f'<!-- end of {name} -->')
    if os.environ.get('UPDATE_README'):
        with open(path, 'w', encoding='utf-8') as file:
            file.write(whole[:begin] + text + whole[end:])
    else:
        assert whole[begin:end] == text


def links_of(path):
    """The relative links of a Markdown file, as (file, anchor) each."""
    text = re.sub(r'^```.*?^```$', '', read(path), flags=re.S | re.M)
    return [
        (target.partition('#')[0], target.partition('#')[2])
        for target in re.findall(r'\]\(([^)\s]+)\)', text)
        if '://' not in target
    ]


def anchors_of(path):
    """The anchors of the headings of a file, as GitHub and the documentation make them."""
    heading = r'^#+ (.+)$' if path.endswith('.md') else r'^(.+)\n[=-]+$'
    titles = re.findall(heading, read(path), re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def table(rows):
    """A Markdown table; the first row is its head."""
    lines = [f'| {" | ".join(row)} |'.replace('|  |', '| |') for row in rows]
    return '\n'.join([lines[0], '|---' * len(rows[0]) + '|', *lines[1:]]) + '\n'


def tables_of(docstring):
    """The simple tables of a docstring, as lists of rows."""
    tables = []
    ruled = r'^( *)(=+(?: +=+)+)\n((?:\1.*\n)+?)\1\2\n((?:\1.*\n)+?)\1\2$'
    for indent, rule, *parts in re.findall(ruled, docstring, re.M):
        starts = [match.start() for match in re.finditer('=+', rule)]
        lines = [line[len(indent) :] for part in parts for line in part.splitlines()]
        cuts = list(zip(starts, [*starts[1:], None]))
        tables.append([tuple(line[start:stop].strip() for start, stop in cuts) for line in lines])
    return tables


class Measured(NamedTuple):
    """One row of benchmarks/results.md, as it is written there."""

    both: str  # ms, forward and backward, without its quartiles
    error: str  # nats


def results():
    """The rows of the first table of benchmarks/results.md, by problem and contender."""
    head, _, *rows = (
        re.search(r'^\| logits \|.*?(?=\n\n)', read('benchmarks/results.md'), re.S | re.M).group().split('\n')
    )
    columns = [name.strip() for name in head.strip('|').split('|')]
    both, error = columns.index('forward + backward, ms'), columns.index('largest error, nats')
    found = {}
    for row in rows:
        cells = [cell.strip() for cell in row.strip('|').split('|')]
        found.setdefault(cells[0], {})[cells[1]] = Measured(cells[both].split(' (')[0], cells[error])
    return found
