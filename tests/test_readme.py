"""The README: its generated parts are up to date, and its Python blocks run where it was installed as it says.

``UPDATE_README=1`` writes what is generated, here and in the documentation.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys

import mxnet as mx
import numpy as np
import pages
import pytest
import reference
from modes import VERSION

from gluon_stable_ce import StableCrossEntropy, StableSoftmaxCELoss

pytestmark = pytest.mark.xdist_group('pages')  # with UPDATE_README they write the same files
# Columns of the README's measurements
STATIC, SHOWN = 'gluon, static_alloc', ('ours, stock', 'ours, fused', 'PyTorch F.cross_entropy')
PROBLEMS = ('64 x 10', '512 x 50257', '2 x 150 x 128 x 128, axis 1', '128 x 50257, float16')
LARGE = ('128 x 1000', '256 x 10000', '512 x 50257')  # float32, with the classes last
INSTALL = 'pip install -e ".[cpu]"'


@pytest.mark.skipif(VERSION != (1, 9), reason='the table is of MXNet 1.9')
def test_first_table_is_what_is_measured():
    nd, stock_loss = mx.nd, mx.gluon.loss.SoftmaxCrossEntropyLoss()
    # the same on every machine, also where the fused kernel was built
    loss_fn = StableSoftmaxCELoss(kernel='stock')
    stock_metric, metric = mx.metric.CrossEntropy(), StableCrossEntropy()
    probs = np.array([[1e-43, 1]], 'float32')
    for m in (stock_metric, metric):
        m.update([nd.array([0])], [nd.array(probs)])
    sure, padded = np.array([[20, 0]], 'float32'), np.array([[1, 2, 3]], 'float32')

    def value(loss, pred, label):
        return float(loss(nd.array(pred), nd.array([label])).asscalar())

    half, label = np.random.RandomState(0).normal(0, 3, (16, 50257)).astype('float16'), np.arange(16)
    truth = reference.loss_and_gradient(half, label)[0]
    off = [
        np.abs(loss(nd.array(half, dtype='float16'), nd.array(label)).asnumpy() - truth).max()
        for loss in (stock_loss, loss_fn)
    ]
    rows = [
        ('value', f'MXNet {mx.__version__}', 'this package', 'exact'),
        (
            '`mx.metric.CrossEntropy` of a probability of 1e-43',
            f'{stock_metric.get()[1]:.2f}',
            f'{metric.get()[1]:.2f}',
            f'{-np.log(probs.astype("float64")[0, 0]):.2f}',
        ),
        (
            'the loss of logits [20, 0], label 0',
            f'{value(stock_loss, sure, 0):.2e}',
            f'{value(loss_fn, sure, 0):.1e}',
            f'{float(reference.nll(sure[0], 0)):.1e}',
        ),
        (
            'the loss of logits [1, 2, 3], label -1 (padding)',
            f'{value(stock_loss, padded, -1):.2f}, trains class 0',
            f'{value(loss_fn, padded, -1)}, gradient 0',
            'not a class',
        ),
        (
            'the loss of 50,257 float16 logits',
            f'off by {off[0]:.1f}',
            f'off by less than {10.0 ** np.ceil(np.log10(off[1])):.0e}',  # the last digits depend on the processor
            '',
        ),
    ]
    pages.check_section('README.md', 'truth', pages.table(rows))


def test_measurements_are_those_of_the_benchmark():
    rows = [('logits', f'{STATIC}, ms', *(f'{name}, ratio' for name in SHOWN))]
    for problem in PROBLEMS:
        found = pages.results()[problem]
        base = float(found[STATIC].both)
        rows.append(
            (problem, found[STATIC].both, *(f'{float(found[name].both) / base:.2g}' for name in SHOWN))
        )
    pages.check_section('README.md', 'speed', pages.table(rows))


def test_cost_of_accuracy_is_that_of_the_benchmark():
    ours = 'ours, stock'
    rows = [('logits', f'{ours}, ms', f'{STATIC}, ms', 'ratio')]
    for problem in LARGE:
        times = [pages.results()[problem][name].both for name in (ours, STATIC)]
        rows.append((problem, *times, f'{float(times[0]) / float(times[1]):.2f}'))
    pages.check_section('docs/speed.md', 'accuracy', pages.table(rows))


@pytest.mark.parametrize('name', ['float16', 'axis 1'])
def test_measurements_of_one_kind_are_those_of_the_benchmark(name):
    rows = [('logits', 'contender', 'forward + backward, ms', 'largest error, nats')]
    for problem, found in pages.results().items():
        rows += [
            (problem, contender, measured.both, measured.error)
            for contender, measured in found.items()
            if name in problem and not contender.startswith('*')
        ]
    assert len(rows) > 3
    pages.check_section('docs/speed.md', name, pages.table(rows))


def test_bounds_are_those_of_the_docstring():
    stated, *_ = pages.tables_of(StableSoftmaxCELoss.__doc__)
    assert len(stated) > 2
    pages.check_section('docs/accuracy.md', 'bounds', pages.table(stated))


def test_options_are_those_of_the_loss():
    section = re.search(r'^## Options$.*?(?=^## )', pages.read('README.md'), re.S | re.M).group()
    documented = dict(re.findall(r'^\| `(\w+)` \| `?([^|`]+)`? \|', section, re.M))
    parameters = inspect.signature(StableSoftmaxCELoss.__init__).parameters.values()
    assert documented == {p.name: repr(p.default) for p in parameters if p.default is not p.empty}


def run(*command, cwd):
    """Run a command where this checkout is not on the path; its exit code and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=str(cwd),
        env=environment,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The Python of an environment where only the README's install line was run."""
    assert INSTALL in pages.read('README.md')
    folder = tmp_path_factory.mktemp('installed')
    source, python = folder / 'source', folder / 'venv' / 'bin' / 'python'
    source.mkdir()
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(os.path.join(pages.ROOT, name), str(source))
    shutil.copytree(os.path.join(pages.ROOT, 'gluon_stable_ce'), str(source / 'gluon_stable_ce'))
    run(sys.executable, '-m', 'venv', folder / 'venv', cwd=folder)
    code, printed = run(python, '-m', *INSTALL.replace('"', '').split(), cwd=source)
    if code and 'No matching distribution' in printed:
        pytest.skip('pip reaches no package index')
    assert code == 0, printed
    return python


@pytest.mark.slow
def test_python_blocks_run_where_only_the_install_line_was_run(installed, tmp_path):
    (tmp_path / 'readme.py').write_text(python_of('README.md'), encoding='utf-8')
    code, printed = run(installed, 'readme.py', cwd=tmp_path)
    assert code == 0, printed


def python_of(page):
    return '\n'.join(block.text for block in pages.blocks_of(page, 'python'))


@pytest.fixture(params=['mypy', 'pyright'])
def check_types(request, installed, tmp_path):
    """A function that runs a type checker on scripts, as an editor does for the installed package."""
    pytest.importorskip(request.param, reason=f'types need {request.param}, of the test extra')
    options = {'mypy': ('--ignore-missing-imports', '--python-executable'), 'pyright': ('--pythonpath',)}
    if request.param == 'pyright' and not shutil.which('node'):
        pytest.skip('pyright needs node')

    def check(**scripts):
        for name, script in scripts.items():
            (tmp_path / f'{name}.py').write_text(script, encoding='utf-8')
        names = [f'{name}.py' for name in scripts]
        return run(
            sys.executable, '-m', request.param, *options[request.param], installed, *names, cwd=tmp_path
        )

    return check


@pytest.mark.slow
def test_type_checkers_accept_right_code(check_types):
    code, printed = check_types(
        typed=pages.read('tests/typed_script.py'),
        readme=python_of('README.md'),
        start=python_of('docs/start.md'),
    )
    assert code == 0, printed


@pytest.mark.slow
def test_type_checkers_reject_each_wrong_choice(check_types):
    script = pages.read('tests/typed_script.py')
    choices = ("'sum'", "'raise'", "'stock'", "'logits'", "'log_probs'", "'probs'")
    assert all(script.count(choice) == 1 for choice in choices)
    _, printed = check_types(script=re.sub('|'.join(choices), "'avg'", script))
    assert len(re.findall('error: .*avg', printed)) == len(choices), printed
