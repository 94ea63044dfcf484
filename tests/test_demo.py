"""The demo, as people run it: a short training, its checks, its picture, and what it says of bad data."""
import gzip
import os
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest

from gluon_stable_ce import demo
from gluon_stable_ce.__main__ import main

pytest.importorskip('sklearn', reason='the demo needs its extra: pip install "gluon-stable-ce[demo]"')
IMAGES = {'train-images-idx3-ubyte.gz': (200, 28, 28), 't10k-images-idx3-ubyte.gz': (60, 28, 28)}
LABELS = {'train-labels-idx1-ubyte.gz': (200,), 't10k-labels-idx1-ubyte.gz': (60,)}


@pytest.fixture
def idx_files(tmp_path):
    """A folder of four files in Fashion-MNIST's format, with little in them."""
    rng = np.random.RandomState(0)
    for name, shape in {**IMAGES, **LABELS}.items():
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, '>i4').tobytes()
        with gzip.open(tmp_path / name, 'wb') as file:
            file.write(header + rng.randint(0, 256 if len(shape) == 3 else 10, shape).astype('uint8').tobytes())
    return tmp_path


def test_the_demo_as_people_run_it(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'gluon_stable_ce', 'demo', '--epochs', '5', '--out', str(tmp_path / 'out')], text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': os.path.dirname(os.path.dirname(demo.__file__))})
    assert done.returncode == 0, done.stderr
    for row in ('held out', 'rotated by 30 degrees', 'with noise'):
        line = next(line for line in done.stdout.splitlines() if line.startswith(row))
        stock, ours, exact = map(float, line[24:].split()[:3])
        assert abs(ours - exact) <= 1e-5 * exact
        assert stock > 0
    assert 'largest difference 0.0e+00' in done.stdout
    assert (tmp_path / 'out' / 'nll.png').read_bytes().startswith(b'\x89PNG')
    assert (tmp_path / 'out' / 'net-symbol.json').exists()


def test_a_number_that_is_off_fails_the_demo(tmp_path, monkeypatch, capsys):
    exact = demo.exact_nll
    monkeypatch.setattr(demo, 'exact_nll', lambda *args: exact(*args) * 1.00002)
    assert main(['demo', '--epochs', '1', '--out', str(tmp_path)]) == 1
    assert 'our NLL is off by 2.0e-05 (at most 1e-05)' in capsys.readouterr().err


def test_fashion_mnist_files(idx_files, tmp_path, capsys):
    (images, labels), (test_images, _) = demo.fashion_mnist(idx_files)
    assert (images.shape, labels.shape, test_images.shape) == ((200, 1, 28, 28), (200,), (60, 1, 28, 28))
    assert (images.max(), labels.max()) == (1, 9)
    assert main(['demo', '--epochs', '1', '--out', str(tmp_path / 'out'), '--fashion-mnist', str(idx_files)]) == 0
    assert 'of 60' in capsys.readouterr().out


@pytest.mark.parametrize(('name', 'damage', 'message'), [
    ('train-images-idx3-ubyte.gz', None, 'No such file'),
    ('train-images-idx3-ubyte.gz', lambda data: data[:100], 'the file ends too early'),
    ('train-images-idx3-ubyte.gz', lambda data: b'not gzip', 'Not a gzipped file'),
    ('t10k-labels-idx1-ubyte.gz', lambda data: gzip.compress(b'\0\0\x08\x03' + bytes(20)), 'expected an idx file of bytes with 1 axes'),
    ('t10k-labels-idx1-ubyte.gz', lambda data: gzip.compress(gzip.decompress(data)[:-1]), 'expected an idx file of bytes with 1 axes'),
    ('t10k-labels-idx1-ubyte.gz', lambda data: gzip.compress(b'\0\0\x08\x01' + bytes([0, 0, 0, 2, 1, 1])), '60 t10k images do not fit 2 labels'),
])
def test_damaged_files_give_one_line(name, damage, message, idx_files, tmp_path, capsys):
    path = idx_files / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    assert main(['demo', '--out', str(tmp_path / 'out'), '--fashion-mnist', str(idx_files)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith('demo: ')
    assert err.count('\n') == 1


def test_no_epochs(capsys, tmp_path):
    assert main(['demo', '--epochs', '0', '--out', str(tmp_path)]) == 2
    assert capsys.readouterr().err == 'demo: --epochs: expected at least 1, got 0\n'


def test_the_exact_nll_is_exact():
    logits = np.array([[0, 100.0], [20, 0]], 'float32')
    np.testing.assert_allclose(demo.exact_nll(logits, np.array([0, 0])), [100, np.log1p(np.exp(-20))], rtol=1e-6)  # 20 + 2e-9 has that many digits


def test_version(capsys):
    with pytest.raises(SystemExit) as info:
        main(['--version'])
    assert info.value.code == 0
    assert capsys.readouterr().out.strip().count('.') == 2
    assert mx.__version__
