"""Sphinx: the API reference, from the package's docstrings (``make docs``)."""

import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import gluon_stable_ce  # noqa: E402

project = 'gluon_stable_ce'
author = 'The gluon_stable_ce authors'
copyright = author
version = release = gluon_stable_ce.__version__
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.mathjax', 'numpydoc']
default_role = 'py:obj'  # a link if there is something to link to, else code
add_module_names = False
autodoc_typehints = 'none'  # the docstrings say shapes and dtypes, which types can't
autodoc_inherit_docstrings = False
numpydoc_show_class_members = False  # index.rst names them, so that gluon's do not appear
numpydoc_show_inherited_class_members = False
numpydoc_class_members_toctree = False
html_theme = 'alabaster'
html_theme_options = {
    'page_width': '1100px',
    'description': 'Cross entropy for MXNet Gluon that is accurate for probabilities near 0 and near 1',
}
html_show_sourcelink = False
html_copy_source = False


def inputs_before_parameters(app, what, name, obj, options, lines):
    """Move gluon's Inputs and Outputs to the front: numpydoc would take them for two more parameters."""
    text = '\n'.join(lines)
    found = re.search(r'^Inputs\n(?:(?: +.*)?\n)+(?:Outputs\n(?:(?: +.*)?(?:\n|\Z))+)?', text, re.M)
    if found:
        block = found.group().strip('\n').replace('\nOutputs\n', '\n\nOutputs\n')
        text = text[: found.start()].rstrip() + '\n\n' + text[found.end() :]
        lines[:] = re.sub(r'(?m)^(?=\S.*\n-{3,}$)', lambda _: block + '\n\n', text, count=1).split('\n')


def setup(app):
    app.connect('autodoc-process-docstring', inputs_before_parameters, priority=100)  # numpydoc's is 500
