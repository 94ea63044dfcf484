"""The command run: scripts that know nothing of this package do what they did, with its loss and metrics."""

import atexit
import logging
import os
import py_compile
import re
import runpy
import subprocess
import sys
import threading
import zipfile
from multiprocessing import spawn

import mxnet as mx
import pytest
import tolerances
from tolerances import assert_close

from gluon_stable_ce import unpatch
from gluon_stable_ce.__main__ import main
from gluon_stable_ce.commands import run as command_module
from gluon_stable_ce.patching import STOCK

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
SCRIPTS = os.path.join(HERE, 'scripts')
NOTEBOOK = os.path.join(ROOT, 'docs', 'notebooks', '1_the_epsilon.ipynb')
SCRIPT_NAMES = ['bucketing.py', 'segmentation.py', 'seq2seq.py']


RUN = ['-m', 'gluon_stable_ce', 'run']


def in_new_process(*args, path=ROOT, **kwargs):
    """Run Python as a user does. Return its exit code, and what it printed on stdout and stderr."""
    command = [sys.executable, '-W', 'ignore', *args]
    env = dict(os.environ, PYTHONPATH=path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **kwargs)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(capfd, monkeypatch):
    """Run the command in this process. Return its exit code, and what it printed on stdout and stderr."""
    at_exit = []
    monkeypatch.setattr(atexit, 'register', lambda *call: at_exit.append(call))
    monkeypatch.setattr(spawn, 'get_preparation_data', spawn.get_preparation_data)
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    for name in ('__main__', '__mp_main__'):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    for stock in STOCK.values():
        monkeypatch.setattr(stock, '__init__', stock.__init__)
    for name in command_module.NOT_REPLACED:
        for module in (mx.nd, mx.sym):
            monkeypatch.setattr(module, name, getattr(module, name, None), raising=False)

    def run(*args):
        try:
            code = main(['run', *args])
        except SystemExit as error:
            code = error.code
        end()
        return (code, *capfd.readouterr())

    def end():
        for function, *arguments in at_exit:
            function(*arguments)
        if at_exit:
            unpatch()
        at_exit.clear()

    yield run
    end()


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
    code, out, err = run('--ignore-label', '-1', script, *args)
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
    assert '1 loss and 0 metrics were replaced' in last


# What `python script.py` does, `run script.py` does: each of these prints the same in both.
SAME = {
    'module': """# coding: latin-1
import os, pickle, sys
path = __file__ if sys.version_info >= (3, 9) else os.path.abspath(__file__)
print(__name__, path, __spec__, __package__, sys.argv, sys.path[0])
main = sys.modules['__main__']
print(type(__builtins__), __doc__, main.__dict__ is globals(), main.__file__ is __file__, sys.modules.get('__mp_main__', main) is main)
class A: pass
print(type(pickle.loads(pickle.dumps(A()))) is A, ascii("\xe4"))
x: int = 1
print(__annotations__)
""",
    'exit code': 'import sys; sys.exit(3)',
    'exit message': "import sys; sys.exit('gone')",
    'exit without code': 'raise SystemExit',
    'exception': "raise KeyError('gone')",
    'syntax error': 'def',
    'no exit': 'import os; os._exit(4)',
    'interrupt': """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background does not have
os.kill(os.getpid(), signal.SIGINT)
time.sleep(9)
""",
    'terminated': 'import os, signal; os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(9)',
    'hook': "import sys; sys.excepthook = lambda *_: print('hook'); raise KeyError",
    'at exit': "import atexit; atexit.register(print, 'end'); print('start')",
    'open executor': """
import mxnet
from concurrent.futures import ThreadPoolExecutor
executor = ThreadPoolExecutor(2)
executor.submit(print, 'work')
""",
    'thread of a thread': """
import threading, time
def inner():
    time.sleep(0.3)
    print('inner')
threading.Thread(target=lambda: threading.Thread(target=inner).start()).start()
""",
    'daemon': 'import threading, time; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()',
    'fork': """
import os, sys
pid = os.fork()
if not pid:
    sys.exit(print('child'))
print(os.waitpid(pid, 0)[1])
""",
    'pools': """
import multiprocessing
class Result:
    def __init__(self, value):
        self.value = value
def work(value):
    return Result(value + 1)
if __name__ == '__main__':
    for method in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, [result.value for result in pool.map(work, [1, 2])])
""",
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SAME)
def test_what_python_does(name, tmp_path):
    (tmp_path / 'script.py').write_text(SAME[name], encoding='latin-1')
    expected, got = (in_new_process(*command, 'script.py', 'a', '-b', cwd=tmp_path) for command in ([], RUN))
    assert got[:2] == expected[:2]
    assert got[2].count('were replaced') == ('_exit' not in SAME[name] and name != 'terminated')
    last_line = expected[2].splitlines()[-1:]
    assert set(last_line) <= set(got[2].splitlines())


KINDS = {
    'pipe': '/dev/stdin',
    'FIFO': 'fifo',
    'folder': 'folder',
    'zip file': 'app.zip',
    'bytecode': 'script.pyc',
    'link': 'link',
    'module': ('-m', 'folder.job'),
    'package': ('-m', 'folder'),
    'no module': ('-m', 'nothing'),
    'empty folder': 'empty',
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_what_python_runs(kind, tmp_path):
    """Python itself is given the same path, file or module."""
    code = 'import os, sys; print(__name__, *map(os.path.abspath, [__file__, *sys.argv, sys.path[0]]))'
    for name in ('empty', 'folder'):
        (tmp_path / name).mkdir()
    for name in ('folder/__main__.py', 'folder/job.py', 'script.py'):
        (tmp_path / name).write_text(code)
    (tmp_path / 'link').symlink_to('folder/job.py')
    py_compile.compile(str(tmp_path / 'script.py'), str(tmp_path / 'script.pyc'))
    with zipfile.ZipFile(tmp_path / 'app.zip', 'w') as archive:
        archive.write(tmp_path / 'script.py', '__main__.py')
    os.mkfifo(tmp_path / 'fifo')
    script = KINDS[kind] if isinstance(KINDS[kind], tuple) else (KINDS[kind],)

    def run(*command):
        if kind == 'FIFO':
            threading.Thread(target=(tmp_path / 'fifo').write_text, args=(code,)).start()
        return in_new_process(*command, *script, 'x', cwd=tmp_path, input=code if kind == 'pipe' else None)

    expected, got = run(), run(*RUN)
    folder_of_process = re.compile(r'/proc/\w+')
    assert got[0] == expected[0]
    assert folder_of_process.sub('', got[1]) == folder_of_process.sub('', expected[1])
    assert expected[2].split(" in '")[0] in got[2]  # before 3.9, the path in the message is relative


SPAWNED = """
import multiprocessing, os, sys
import mxnet as mx
def work(_):
    return mx.gluon.loss.SoftmaxCELoss()._options.ignore_label
if __name__ == '__main__':
    os.chdir(sys.argv[1])
    for method in ('spawn', 'forkserver', 'fork'):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.map(work, [0]))
"""


@pytest.mark.slow
def test_processes_of_the_script_are_patched(write, tmp_path):
    """Also where the package is in the folder that the command was called in, and the script leaves it."""
    command = [*RUN, '--ignore-label', '-7', write(SPAWNED), str(tmp_path)]
    code, out, _ = in_new_process(*command, cwd=ROOT, path='')
    assert (code, out) == (0, '[-7]\n' * 3)


@pytest.mark.slow
def test_threads_and_exit_handlers_of_the_script_are_patched_and_counted(write):
    script = """
import atexit, threading, time
import mxnet as mx
def work():
    time.sleep(0.3)
    mx.metric.Loss()
threading.Thread(target=lambda: threading.Thread(target=work).start()).start()
atexit.register(mx.metric.CrossEntropy)
"""
    _, _, err = in_new_process(*RUN, write(script))
    assert re.search('0 losses and 2 metrics were replaced: Loss 1, CrossEntropy 1', err)


def test_report(run, write):
    script = """
import mxnet as mx
class Mine(mx.metric.Loss): pass
mx.gluon.loss.SoftmaxCELoss(), mx.gluon.loss.SoftmaxCrossEntropyLoss(), Mine(), mx.metric.create('nll_loss')
from mxnet.gluon.contrib.estimator.estimator import metric_loss  # MXNet imported it before
metric_loss()
mx.sym.SoftmaxOutput(mx.sym.var('x'))
mx.nd.SoftmaxOutput(mx.nd.ones((1, 2)), mx.nd.ones(1))
"""
    _, _, err = run('--kernel', 'stock', '--ignore-label', '-1', write(script))
    assert 'kernel: stock' in err
    assert 'SoftmaxCrossEntropyLoss 2, Loss 1, NegativeLogLikelihood 1' in err
    assert "MXNet's own: mxnet.metric.Loss 1, SoftmaxOutput 2" in err
    assert 'mxnet.metric.Loss averages' in err  # the zeros of ignored samples


CLIPPED = """
import sys
import mxnet as mx
for metric in (mx.metric.create('ce'), mx.metric.create('nll_loss'), mx.metric.Perplexity(None)):
    metric.update([mx.nd.array([0, -1])], [mx.nd.array([[0.5, 0.5], [0.25, 0.75]])])
    try:
        print(round(metric.get()[1], 2))
    except ValueError as error:
        print('invalid')
        print(error, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ('options', 'values', 'told'),
    [
        ([], ['invalid'] * 3, 3),
        (['--ignore-label', '-1'], ['0.69', '0.69', '2.0'], 0),
        (['--invalid-label', 'clip'], ['1.04', '1.04', '2.83'], 0),
    ],
    ids=['default', 'ignored', 'clipped'],
)
def test_labels_outside_the_classes_in_metrics(run, write, options, values, told):
    _, out, err = run(*options, write(CLIPPED))
    assert out.split() == values
    assert err.count('--ignore-label -1') == told


CROSSED = """
import mxnet as mx
loss_fn = mx.gluon.loss.SoftmaxCELoss()
for _ in range(2):
    loss_fn(mx.nd.ones({shape}), mx.nd.ones({label}), mx.nd.ones({weight}))
"""


@pytest.mark.parametrize(
    ('shape', 'label', 'weight', 'told'),
    [
        ((4, 3), (4,), (4,), 1),
        ((4, 3), (4,), (4, 1), 0),
        ((1, 3), (1,), (1,), 0),
        ((4, 4, 3), (4, 4), (4,), 1),
        ((4, 4, 3), (4, 4), (4, 1), 1),
        ((4, 4, 3), (4, 4), (4, 4), 1),
        ((4, 1, 3), (4, 1), (4, 1), 1),
        ((4, 2, 3), (4, 2), (2, 1), 0),
    ],
    ids=['crossed', 'keepdims', 'one sample', '3-D', 'samples or steps', 'square', 'one step', 'steps'],
)
def test_tells_once_where_gluon_multiplies_samples_by_the_weights_of_others(
    run, write, shape, label, weight, told
):
    _, _, err = run(write(CROSSED.format(shape=shape, label=label, weight=weight)))
    assert err.count('sample_weight') == told


NP_MODE = """
import mxnet as mx
mx.npx.set_np()
loss_fn = mx.gluon.loss.SoftmaxCELoss({options})
for _ in range(2):
    print(loss_fn(mx.np.ones({shape}), mx.np.zeros({shape}[:-1])).shape)
mx.npx.reset_np()
"""


@pytest.mark.parametrize(
    ('options', 'shape', 'loss_shape', 'told'),
    [
        ('', (4, 2, 3), '(4,)', 0),
        ('batch_axis=1', (4, 2, 3), '(2,)', 1),
        ('batch_axis=None', (3,), '(1,)', 0),  # a single sample has no other axis
    ],
)
def test_tells_once_that_gluon_ignores_batch_axis_in_np_mode(run, write, options, shape, loss_shape, told):
    _, out, err = run(write(NP_MODE.format(options=options, shape=shape)))
    assert out.splitlines() == [loss_shape] * 2
    assert err.count('batch_axis') == told


@pytest.mark.parametrize(('args', 'message'), [
    (['no-such-file.py'], "script: expected a file, got 'no-such-file.py'"),
    (['--label-smoothing', '2', __file__], 'label_smoothing: expected a number from 0 to 1, got 2'),
    ([], 'the following arguments are required: script'),
    (['--ignore', '1', __file__], 'unrecognized arguments: --ignore'),
    (['--kernel', 'fast', __file__], "kernel: expected one of 'auto', 'stock', 'fused', got 'fast'"),
    ([NOTEBOOK], 'jupyter nbconvert --to script'),
], ids=['file', 'option', 'nothing', 'abbreviation', 'kernel', 'notebook'])  # fmt: skip
def test_refuses(run, args, message):
    code, out, err = run(*args)
    assert (code, out) == (2, '')
    assert message in err
    assert 'usage: ' in err.splitlines()[0]
    assert 'gluon_stable_ce run' in err.splitlines()[0]


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
