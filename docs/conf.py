"""Sphinx: the documentation, from the pages in this folder and the package's docstrings (``make docs``)."""

import os
import re
import sys

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util.docutils import SphinxDirective

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import gluon_stable_ce  # noqa: E402

project = 'gluon_stable_ce'
author = 'The gluon_stable_ce authors'
copyright = author
version = release = gluon_stable_ce.__version__
extensions = ['sphinx.ext.autodoc', 'numpydoc', 'myst_nb', 'sphinx_copybutton']
highlight_language = 'none'  # of blocks that name none, such as commands
default_role = 'py:obj'  # a link if there is something to link to, else code
add_module_names = False
autodoc_typehints = 'none'  # the docstrings say shapes and dtypes, which types can't
autodoc_inherit_docstrings = False
numpydoc_show_class_members = False  # api.rst names them, so that gluon's do not appear
numpydoc_show_inherited_class_members = False
numpydoc_class_members_toctree = False
myst_heading_anchors = 4
myst_enable_extensions = ['dollarmath']
suppress_warnings = [
    'myst.xref_missing'
]  # MyST knows no sections of .rst pages; tests/test_docs.py checks all links
nb_execution_mode = 'off'  # the tests run the notebooks
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True
html_theme = 'furo'
html_title = 'gluon_stable_ce'
html_static_path = ['static']
html_css_files = ['site.css']
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = 'mathml'


class IfFile(SphinxDirective):
    """Show the content of the directive if a file exists, whose path is relative to this folder."""

    required_arguments = 1
    has_content = True

    def run(self):
        self.env.note_dependency(self.arguments[0])
        parent = nodes.Element()
        if os.path.exists(os.path.join(HERE, self.arguments[0])):
            self.state.nested_parse(self.content, self.content_offset, parent)
        return parent.children


def visit_math(translator, node):
    """Write a formula as MathML, which browsers show without a script from another server."""
    translator.body.append(mathml(node, 'inline'))
    raise nodes.SkipNode


def visit_displaymath(translator, node):
    """Write a formula that has a line of its own."""
    translator.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


def mathml(node, display):
    """Convert a formula, with the space around a function's name that the converter leaves out."""
    space, text = '<mspace width="0.167em"/>', convert(node.astext(), display=display)
    text = re.sub('(?<!<msup>)<mi>log</mi>', rf'\g<0>{space}', text)
    return text.replace('<msup><mi>log</mi>', f'{space}<msup><mi>log</mi>')


def inputs_before_parameters(app, what, name, obj, options, lines):
    """Move gluon's Inputs and Outputs to the front: numpydoc would take them for two more parameters."""
    text = '\n'.join(lines)
    found = re.search(r'^Inputs\n(?:(?: +.*)?\n)+(?:Outputs\n(?:(?: +.*)?(?:\n|\Z))+)?', text, re.M)
    if found:
        block = found.group().strip('\n').replace('\nOutputs\n', '\n\nOutputs\n')
        text = text[: found.start()].rstrip() + '\n\n' + text[found.end() :]
        lines[:] = re.sub(r'(?m)^(?=\S.*\n-{3,}$)', lambda _: block + '\n\n', text, count=1).split('\n')


def setup(app):
    app.add_directive('if-file', IfFile)
    app.add_html_math_renderer('mathml', (visit_math, None), (visit_displaymath, None))
    app.connect('autodoc-process-docstring', inputs_before_parameters, priority=100)  # numpydoc's is 500
