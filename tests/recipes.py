"""The recipes of the documentation as code."""

import re

import pages

INTRODUCTION, *SECTIONS = re.split(r'^(?=[^\n]+\n-+$)', pages.read('docs/recipes.rst'), flags=re.M)
RECIPES = {section.splitlines()[0]: section for section in SECTIONS}


def blocks_in(section):
    """The code blocks, without their indentation."""
    found = re.findall(r'^\.\. code-block:: python\n\n((?: {3}.*\n|\n)+)', section + '\n', re.M)
    return [re.sub('^ {3}', '', block, flags=re.M).strip('\n') + '\n' for block in found]


def recipe(title):
    """The names that the blocks of a section define, after the imports of the page."""
    names = {}
    for block in (*blocks_in(INTRODUCTION), *blocks_in(RECIPES[title])):
        exec(compile(block, title, 'exec'), names)
    return names
