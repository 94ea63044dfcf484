"""The command run: scripts that know nothing of this package do what they did, with its loss and metrics."""

import logging
import os
import re
import runpy
import subprocess
import sys

import pytest
import tolerances
from tolerances import assert_close

from gluon_stable_ce.__main__ import main

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = os.path.join(HERE, 'scripts')
SCRIPT_NAMES = ['bucketing.py', 'segmentation.py', 'seq2seq.py']


def run_in_new_process(*args, folder=None):
    """Run the command as a user does. Return what it printed on stdout and stderr."""
    command = [sys.executable, '-W', 'ignore::DeprecationWarning', '-m', 'gluon_stable_ce', 'run', *args]
    env = dict(os.environ, PYTHONPATH=os.path.dirname(HERE))
    done = subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def run(capfd):
    """Run the command in this process. Return its exit code, and what it printed on stdout and stderr."""

    def run(*args):
        try:
            code = main(['run', *args])
        except SystemExit as error:
            code = error.code
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def write(tmp_path):
    def write(text, name='script.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def numbers(text):
    """The lines, with each number apart from the words around it."""
    pattern = re.compile(r'-?\d+\.\d+')
    return pattern.sub('#', text), [float(number) for number in pattern.findall(text)]


def test_all_scripts_are_run_and_none_names_this_package():
    pytest_files = {'__init__.py', 'conftest.py'}
    assert {name for name in os.listdir(SCRIPTS) if name.endswith('.py')} == pytest_files.union(SCRIPT_NAMES)
    for name in SCRIPT_NAMES:
        with open(os.path.join(SCRIPTS, name), encoding='utf-8') as script:
            assert not re.search('stable', script.read(), re.IGNORECASE)


@pytest.mark.slow
@pytest.mark.parametrize('name', SCRIPT_NAMES)
def test_scripts_print_the_same_numbers(run, capfd, name, monkeypatch):
    """To a relative 1e-4, with MXNet's own kernel: what is trained further apart than its error is another net."""
    monkeypatch.setenv('GLUON_STABLE_CE_KERNEL', 'stock')
    monkeypatch.setattr(sys, 'argv', [name])
    monkeypatch.setattr(logging.getLogger(), 'level', logging.WARNING)
    script = os.path.join(SCRIPTS, name)
    runpy.run_path(script, run_name='__main__')
    words, expected = numbers(capfd.readouterr().out)
    _, out, err = run(script)
    words_again, values = numbers(out)
    assert words_again == words
    assert len(expected) >= 3
    assert_close(values, expected, tolerances.PRINTED)
    losses, metrics = map(int, re.search(r'(\d+) loss(?:es)? and (\d+) metrics? were replaced', err).groups())
    assert losses >= 1
    assert metrics >= 1


SAY = """
import os, sys
import mxnet as mx
print(sys.argv)
print(sys.path[0])
print(__name__, os.path.basename(__file__), sys.modules['__main__'].__dict__ is globals())
print(type(mx.gluon.loss.SoftmaxCELoss()).__mro__[2].__name__)
"""


def test_the_script_gets_its_arguments_and_path(run, write, tmp_path):
    script = write(SAY)
    args = ['--ignore-label', '7', '-m', '--l', '--help', '--', 'last', '--version', '-1']
    before = sys.argv, sys.path[:]
    code, out, err = run('--ignore-label', '-1', script, *args)
    assert (sys.argv, sys.path) == before
    assert code == 0
    assert out.splitlines() == [
        str([script, *args]),
        str(tmp_path.resolve()),
        '__main__ script.py True',
        'StableSoftmaxCrossEntropyLoss',
    ]
    first, last = [line for line in err.splitlines() if line.startswith('gluon_stable_ce: ')]
    assert 'mxnet.gluon.loss.SoftmaxCELoss' in first
    assert "{'ignore_label': -1}" in first
    assert last == 'gluon_stable_ce: 1 loss and 0 metrics were replaced'


@pytest.mark.slow
def test_a_module_runs_from_the_current_folder(write, tmp_path):
    write('', 'package/__init__.py')
    write(SAY, 'package/job.py')
    out, _ = run_in_new_process('--label-smoothing', '0.1', '-m', 'package.job', '-m', 'x', folder=tmp_path)
    assert out.splitlines() == [
        str([str(tmp_path / 'package' / 'job.py'), '-m', 'x']),
        str(tmp_path),
        '__main__ job.py True',
        'StableSoftmaxCrossEntropyLoss',
    ]


@pytest.mark.parametrize('dashes', [[], ['--']], ids=['plain', '--'])
def test_a_folder_and_its_modules(run, write, tmp_path, dashes, monkeypatch):
    monkeypatch.delitem(sys.modules, 'sibling', raising=False)
    write('from sibling import x\nprint(x)', 'app/__main__.py')
    write('x = 5', 'app/sibling.py')
    assert run(*dashes, str(tmp_path / 'app'))[:2] == (0, '5\n')


@pytest.mark.parametrize(
    ('end', 'code'), [('sys.exit(3)', 3), ('sys.exit()', None), ("sys.exit('gone')", 'gone')]
)
def test_exit_codes_pass_through(run, write, end, code):
    got, _, err = run(write(f'import sys, mxnet as mx\nmx.metric.Loss()\n{end}\n'))
    assert got == code
    assert err.endswith('gluon_stable_ce: 0 losses and 1 metric were replaced\n')


def test_an_exception_passes_through(run, write):
    with pytest.raises(KeyError, match='gone'):
        run(write("raise KeyError('gone')"))


@pytest.mark.parametrize('end', ['', 'raise SystemExit'])
def test_threads_of_the_script_end_before_the_names_are_restored(run, write, end):
    script = """
import threading, time
import mxnet as mx
def work():
    time.sleep(0.1)
    print(mx.metric.Loss().name, type(mx.metric.Loss()).__mro__[2].__name__)
threading.Thread(target=work).start()
"""
    _, out, err = run(write(script + end))
    assert out == 'loss StableLoss\n'
    assert '0 losses and 2 metrics' in err


@pytest.mark.slow
def test_a_script_that_forks_is_reported_once(write):
    script = 'import os, sys\npid = os.fork()\nif not pid:\n    sys.exit()\nos.waitpid(pid, 0)\n'
    assert run_in_new_process(write(script))[1].count('were replaced') == 1


@pytest.mark.parametrize(('args', 'message'), [
    (['no-such-file.py'], "script: expected a file, got 'no-such-file.py'"),
    (['--label-smoothing', '2', __file__], 'label_smoothing: expected a number from 0 to 1, got 2'),
    ([], 'the following arguments are required: script'),
    (['--ignore', '1', __file__], 'error:'),
], ids=['file', 'option', 'nothing', 'abbreviation'])  # fmt: skip
def test_refuses(run, args, message):
    code, out, err = run(*args)
    assert (code, out) == (2, '')
    assert message in err


LOSSES = """
import mxnet as mx
pred, label = mx.nd.array([[0, 0], [0, 9]]), mx.nd.array([0, 7])
print(mx.gluon.loss.SoftmaxCELoss()(pred, label).asnumpy().tolist())
"""


@pytest.mark.parametrize(('option', 'losses'), [
    (['--ignore-label', '7'], r'0\.69\d*, 0\.0'),
    (['--invalid-label', 'clip'], r'0\.69\d*, 0\.0001\d*'),
    (['--class-weight', '2,1'], r'1\.38\d*, nan'),
    (['--lse-square-scale', '1'], r'1\.17\d*, nan'),
    (['--reduction', 'sum', '--label-smoothing', '0.5'], r'0\.69\d*, nan'),
], ids=lambda value: value[0][2:] if isinstance(value, list) else '')  # fmt: skip
def test_options_reach_the_losses_of_the_script(run, write, option, losses):
    assert re.search(losses, run(*option, write(LOSSES))[1])
