"""The documentation and the README: blocks run, links lead somewhere, and it builds without a warning."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib import import_module

import pages
import pytest
from digits import WithLoss
from modes import VERSION

import gluon_stable_ce
from gluon_stable_ce import distributed, onnx

pytestmark = pytest.mark.xdist_group('pages')  # with UPDATE_README they write the same files
PUBLIC = [
    (module, name)
    for module in (gluon_stable_ce, distributed, onnx)
    for name in module.__all__
    if name != '__version__'
]
SECTIONS = {
    'Parameters',
    'Returns',
    'Raises',
    'Warns',
    'See Also',
    'Notes',
    'References',
    'Examples',
    'Attributes',
}
# What a block may import that a machine may lack.
LIBRARIES = ('horovod.mxnet', 'onnx', 'onnxruntime')


def documented():
    """Each public object, and each public method of a class, by its name."""
    objects = {name: getattr(module, name) for module, name in PUBLIC}
    for name, cls in list(objects.items()):
        if inspect.isclass(cls):
            for method, value in vars(cls).items():
                if not method.startswith('_') and (callable(value) or isinstance(value, property)):
                    objects[f'{name}.{method}'] = value
    return objects


@pytest.mark.parametrize('name', documented())
def test_sections_of_docstrings_are_read_as_sections(name):
    """Each title stands between an empty line and its dashes, and is one that numpydoc knows, once."""
    lines = inspect.getdoc(documented()[name]).splitlines()
    rules = [index for index, line in enumerate(lines) if '---' in line]
    titles = [lines[index - 1] for index in rules]
    assert set(titles) <= SECTIONS
    assert len(titles) == len(set(titles))
    for index, title in zip(rules, titles):
        assert lines[index] == '-' * len(title)
        assert not lines[index - 2]


@pytest.mark.parametrize('page', ['docs/start.md', 'docs/export.md'])
def test_with_loss_is_that_of_the_digits_example(page):
    pages.check_section(page, 'WithLoss', f'```python\n{inspect.getsource(WithLoss)}```\n')


def test_distributed_script_is_the_one_that_runs():
    pages.check_section(
        'docs/metrics.md', 'dist_train.py', f'```python\n{pages.read("tests/dist_train.py")}```\n'
    )


def needs(block):
    """The name of what this machine lacks to run a block, or None."""
    if 'of MXNet 1.9' in block.text and VERSION < (1, 9):
        return 'MXNet 1.9'
    for library in LIBRARIES:
        if re.search(rf'^(import|from) (gluon_stable_ce\.)?{re.escape(library)}\b', block.text, re.M):
            if library == 'onnx' and VERSION < (1, 9):
                return 'MXNet 1.9'
            try:
                import_module(library)
            except ImportError:
                return library
    return None


@pytest.mark.parametrize('page', [page for page in pages.PAGES if pages.blocks_of(page, 'python')])
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, lacking, ran = {'__name__': page}, {}, 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for index, block in enumerate(pages.blocks_of(page, 'python')):
            if needs(block):
                lacking[index] = needs(block)
                continue
            exec(compile(block.text, f'{page}, block {index}', 'exec'), namespace)
            ran += 1
    if lacking:
        names = ', '.join(f'block {index} needs {name}' for index, name in lacking.items())
        pytest.skip(f'{ran} blocks ran; {names}')


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (1, 9), reason='the page is of MXNet 1.9')
def test_start_page_is_a_script_that_warns_of_nothing(tmp_path):
    script = '\n'.join(block.text for block in pages.blocks_of('docs/start.md', 'python'))
    command = [sys.executable, '-c', script]
    done = subprocess.run(
        command,
        cwd=str(tmp_path),
        env={**os.environ, 'PYTHONPATH': pages.ROOT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, '')


def run_shell(block, folder, **variables):
    """Run a block of the shell with this Python as `python`; what it printed."""
    (folder / 'bin').mkdir()
    (folder / 'bin' / 'python').symlink_to(sys.executable)
    environment = {
        **os.environ,
        'PATH': os.pathsep.join([str(folder / 'bin'), os.environ['PATH']]),
        'PYTHONPATH': os.pathsep.join([pages.ROOT, *filter(None, [os.environ.get('PYTHONPATH')]), *sys.path]),
        **variables,
    }
    done = subprocess.run(
        ['bash', '-e', '-c', block.text],
        cwd=str(folder),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_audit_of_the_page_prints_its_output(tmp_path):
    (block,) = pages.blocks_of('docs/audit.md', 'sh')
    pages.check_section('docs/audit.md', 'report', f'```text\n{run_shell(block, tmp_path)}```\n')


@pytest.mark.dist
def test_commands_of_the_metrics_page_start_a_job(tmp_path):
    pytest.importorskip('sklearn', reason='the example trains on digits that come with scikit-learn')
    (block,) = pages.blocks_of('docs/metrics.md', 'sh')
    shutil.copy(os.path.join(pages.ROOT, 'tests', 'dist_train.py'), str(tmp_path))
    printed = run_shell(block, tmp_path, OMP_NUM_THREADS='1')  # the workers' lines may be mixed up
    values = re.findall(r'epoch \d: \S+ nats over 357 digits', printed)
    assert len(values) == 6
    assert len(set(values)) == 3  # the same on both workers
    assert (tmp_path / 'digits.params').exists()


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The folder of the built documentation."""
    for module in ('furo', 'latex2mathml', 'myst_nb', 'numpydoc', 'sphinx_copybutton'):
        pytest.importorskip(module, reason='the documentation needs the docs extra')
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html', pages.DOCS]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_reference_has_all_public_names(site):
    page = (site / 'api.html').read_text(encoding='utf-8')
    for module, name in PUBLIC:
        assert f'id="{module.__name__}.{getattr(module, name).__name__}"' in page


@pytest.mark.slow
def test_pages_load_nothing_from_other_servers(site):
    for path in site.glob('**/*.html'):
        text = path.read_text(encoding='utf-8')
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', text), path.name
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preload)"[^>]+href="(?:https?:)?//', text), (
            path.name
        )


@pytest.mark.parametrize('page', pages.PAGES)
def test_links_lead_to_sections(page):
    for target, anchor in pages.links_of(page):
        path = os.path.join(pages.ROOT, os.path.dirname(page), target) if target else page
        assert os.path.exists(os.path.join(pages.ROOT, path)), target
        if anchor:
            assert anchor in pages.anchors_of(path), f'{target}#{anchor}'


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    texts = {path: path.read_text(encoding='utf-8') for path in site.glob('**/*.html')}
    ids = {path: set(re.findall(r'id="([^"]+)"', text)) for path, text in texts.items()}
    for path, text in texts.items():
        for link in re.findall(r'href="([^":]+)"', text):
            name, _, anchor = re.sub(r'\?[^#]*', '', link).partition('#')
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f'{path.name}: {link}'
            assert not anchor or target not in ids or anchor in ids[target], f'{path.name}: {link}'
