"""The files of the audit, good and bad, read through the command as its users run it."""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import mxnet as mx
import numpy as np
import pytest
from audit_cases import command, distributions, labels_for, strict_json

import gluon_stable_ce
from gluon_stable_ce import audit
from gluon_stable_ce.__main__ import main
from gluon_stable_ce.auditing.files import read_files
from gluon_stable_ce.commands import audit as command_module

ROOT = os.path.dirname(os.path.dirname(gluon_stable_ce.__file__))


# --- good files


@pytest.fixture
def files(tmp_path):
    """A folder with the same predictions and labels in every format."""
    pred, label = distributions(300, 6), labels_for(300, 6)
    np.save(tmp_path / 'pred.npy', pred)
    np.save(tmp_path / 'label.npy', label)
    np.save(tmp_path / 'fortran.npy', np.asfortranarray(pred))
    np.savez(tmp_path / 'both.npz', pred=pred, label=label, other=label)
    np.savez_compressed(tmp_path / 'compressed.npz', pred=pred, label=label[:, None])
    np.savez(tmp_path / 'fortran.npz', pred=np.asfortranarray(pred), label=label)
    return tmp_path


GOOD_FILES = [
    ['pred.npy', 'label.npy'],
    ['fortran.npy', 'label.npy'],
    ['both.npz'],
    ['compressed.npz'],
    ['fortran.npz'],
]


@pytest.mark.parametrize('names', GOOD_FILES, ids=' '.join)
def test_every_format_gives_the_same_result(files, names, capsys):
    assert command(*(files / name for name in names), '--json') == 0
    out, err = capsys.readouterr()
    assert strict_json(out) == audit(distributions(300, 6), labels_for(300, 6)).as_dict()
    assert not err


def test_npy_files_are_memory_mapped(files):
    pred, label = read_files([str(files / 'pred.npy'), str(files / 'label.npy')])
    assert isinstance(pred, np.memmap)
    assert isinstance(label, np.memmap)


# --- the command


def test_flags_reach_the_function(tmp_path, capsys):
    pred, label = np.random.RandomState(0).randn(5, 40).astype('float32'), labels_for(40, 5)
    np.savez(tmp_path / 'a.npz', pred=pred, label=label)
    flags = ['--json', '--pred-type', 'logits', '--axis', '0', '--ignore-label', '2', '--eps', '0.25']
    assert command(tmp_path / 'a.npz', *flags) == 0
    found = audit(pred, label, pred_type='logits', axis=0, ignore_label=2, eps=0.25)
    assert strict_json(capsys.readouterr().out) == found.as_dict()
    assert found.ignored == (label == 2).sum() > 0


@pytest.mark.parametrize(('p', 'bound', 'code'), [
    pytest.param(0.5, '0.01', 0, id='equal'),
    pytest.param(1e-20, '0.01', 1, id='stock 27.63, exact 46.05'),
    pytest.param(1e-20, '0.39', 1, id='just above the bound'),
    pytest.param(1e-20, '0.41', 0, id='just below the bound'),
    pytest.param(0.0, '0.01', 1, id='exact is infinite'),
    pytest.param(float('nan'), '0.01', 1, id='nothing to compare'),
])  # fmt: skip
def test_max_error_sets_the_exit_code(tmp_path, capsys, p, bound, code):
    np.savez(tmp_path / 'a.npz', pred=np.array([[p, 1 - p]] * 3), label=np.zeros(3, int))
    assert command(tmp_path / 'a.npz') == 0
    assert not capsys.readouterr().err
    assert command(tmp_path / 'a.npz', '--max-error', bound) == code
    assert (f'--max-error is {bound}' in capsys.readouterr().err) == code


def test_command_prints_the_table_and_saves_the_plot(files, capsys):
    names = [files / 'pred.npy', files / 'label.npy', '--plot', files / 'a.png', '--max-error', '1e-6']
    assert command(*names) == 1
    table = audit(distributions(300, 6), labels_for(300, 6)).table()
    assert capsys.readouterr().out == table + '\n'
    assert (files / 'a.png').stat().st_size > 10000


@pytest.mark.slow
def test_example_in_the_help_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['audit', '--help'])
    text = capsys.readouterr().out
    lines = text[text.index('example:') :].splitlines()[1:3]
    script = '\n'.join(line.strip().replace('python', f'"{sys.executable}"', 1) for line in lines)
    environment = {**os.environ, 'PYTHONPATH': ROOT}
    done = subprocess.run(
        script, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, '71.6% too low' in done.stderr) == (1, True)
    assert 'samples with p < eps' in done.stdout


@pytest.fixture
def no_reading(monkeypatch):
    """Fail if the command reads a file."""

    def fail(paths):
        raise AssertionError('a file was read')

    monkeypatch.setattr(command_module, 'read_files', fail)


def test_plot_without_matplotlib_fails_before_anything_is_read(no_reading, files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert command(files / 'both.npz', '--plot', files / 'a.png') == 2
    out, err = capsys.readouterr()
    assert (out, err) == ('', 'audit: a plot needs matplotlib: pip install "matplotlib<3.9"\n')


@pytest.mark.parametrize(('path', 'message'), [('a.xyz', 'got xyz'), ('nowhere/a.png', 'No such file')])
def test_plot_that_cannot_be_saved_fails_before_anything_is_read(no_reading, files, path, message, capsys):
    assert command(files / 'both.npz', '--plot', path) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err


def test_an_unexpected_error_exits_2_with_one_line(files, monkeypatch, capsys):
    monkeypatch.setattr(command_module, 'read_files', lambda paths: {}['a\nb'])
    assert command(files / 'both.npz') == 2
    assert capsys.readouterr().err == "audit: unexpected KeyError: 'a\\nb'\n"


# --- bad files


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self):
        return open, ('exploded', 'w')


def save(path, content):
    """Write bytes, an array, or the arrays of an archive."""
    with open(path, 'wb') as file:
        if isinstance(content, bytes):
            file.write(content)
        elif isinstance(content, dict):
            np.savez(file, **content)
        else:
            np.save(file, content, allow_pickle=True)


def npz(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        for name, content in members.items():
            archive.writestr(name + '.npy', content)
    return stream.getvalue()


def npy(array, header=None, body=None):
    """Bytes of an .npy file, of another header or body than its array's if given."""
    stream = io.BytesIO()
    np.save(stream, array)
    if header is None:
        header = stream.getvalue()[10:][: -array.nbytes].decode()
    if body is None:
        body = array.tobytes()
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header.encode() + body


def shaped(shape, dtype='<f8'):
    return f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n"


GOOD, LABEL = np.full((4, 2), 0.5), np.zeros(4, int)
BOTH = {'pred': GOOD, 'label': LABEL}
BOTH_OF_MXNET = {name: mx.nd.array(array) for name, array in BOTH.items()}
GOOD_NPZ = npz(pred=npy(GOOD), label=npy(LABEL))
BOMBS = np.array([Bomb()] * 4)
FILES = ['a.npy', 'b.npy']


def in_npy(pred, label, message='audit: '):
    """A case of two files."""
    return FILES, {'a.npy': pred, 'b.npy': label}, message


def in_npz(pred, label=None, message='audit: '):
    """A case of one archive; predictions may be the bytes of its member, beside labels that are right."""
    content = npz(pred=pred, label=npy(LABEL)) if isinstance(pred, bytes) else {'pred': pred, 'label': label}
    return ['a.npz'], {'a.npz': content}, message


SHAPES = {
    '2**63 rows': (2**63, 2),
    '2**53 + 1 classes': (1, 2**53 + 1),
    '2**53 + 1 classes, no rows': (0, 2**53 + 1),
    'a size that overflows to 0': (2**32, 2**32),
    'a size that overflows to 8': (2**63 + 4, 2),
    'negative rows': (-1, 4),
    'negative rows and classes': (-4, -2),
    'no rows': (0, 2),
    'no classes': (4, 0),
    'a petabyte': (2**47, 1),
    'too many axes': (1,) * 40,
    'a nested shape': ((4,), 2),
    'a float': (4.0, 2),
}
BAD_FILES = {
    'not there': (['a.npz'], {}, 'No such file'),
    'not there, npy': (FILES, {'a.npy': GOOD}, 'No such file'),
    'one npy': (['a.npy'], {'a.npy': GOOD}, 'two .npy'),
    'two npz': (['a.npz', 'b.npz'], {}, 'expected one .npz'),
    'other suffix': (['a.txt'], {'a.txt': b'1 2 3'}, 'expected one .npz'),
    'three files': (['a.npy', 'a.npy', 'a.npy'], {'a.npy': GOOD}, 'two .npy'),
    'no zip': (['a.npz'], {'a.npz': b'PK' * 40}, 'not a zip'),
    'empty npz': (['a.npz'], {'a.npz': b''}, 'not a zip'),
    'npy as npz': (['a.npz'], {'a.npz': GOOD}, 'not a zip'),
    'npz as npy': in_npy(GOOD_NPZ, LABEL, 'a.npy: cannot be read'),
    'empty npy': (['a.npy', 'a.npy'], {'a.npy': b''}, 'a.npy: cannot be read'),
    'random bytes npy': (['a.npy', 'a.npy'], {'a.npy': bytes(range(256)) * 9}, 'a.npy: cannot be read'),
    'random bytes npz': (['a.npz'], {'a.npz': bytes(range(256)) * 9}, 'not a zip'),
    'a pickle': (['a.npy', 'a.npy'], {'a.npy': pickle.dumps(Bomb())}, 'a.npy: cannot be read'),
    'a negative size in the label': in_npy(GOOD, npy(LABEL, shaped((-1,), '<i8')), 'sizes, got (-1,)'),
    'version 3': in_npy(npy(GOOD).replace(b'Y\x01\x00', b'Y\x03\x00'), LABEL, 'version 1 or 2'),
    'pickled npy': in_npy(GOOD, BOMBS, 'Python objects'),
    'pickled npz': in_npz(GOOD, BOMBS, 'allow_pickle=False'),
    'pickled npz, axis 0': (['a.npz', '--axis', '0'], in_npz(BOMBS, LABEL)[1], 'allow_pickle'),
    'pickled member': in_npz(pickle.dumps(Bomb()), message='.npy format'),
    'wrong keys': (['a.npz'], {'a.npz': {'x': GOOD, 'label': LABEL}}, "'pred' and 'label', got 'label', 'x'"),
    'cut npy': in_npy(npy(GOOD)[:-8], LABEL, 'a.npy: cannot be read'),
    'cut member': in_npz(npy(GOOD)[:-8], message='a.npz: cannot be read'),
    'header keys': in_npz(npy(GOOD, '{}\n'), message='a.npz: cannot be read'),
    'deep header': in_npy(npy(GOOD, '-' * 60000 + '1'), LABEL, 'a.npy: cannot be read'),
    'checksum': (['a.npz'], {'a.npz': GOOD_NPZ.replace(b'\xe0?', b'\xf0?', 1)}, 'CRC'),
    'python 2 header': in_npy(npy(GOOD, shaped('(4L, x)')), LABEL, 'a.npy: cannot be read'),
    'dtype': in_npz(GOOD.astype(int), LABEL, 'pred: expected float16'),
    'label dtype': in_npz(GOOD, np.array(list('abcd')), 'label: expected integers'),
    'records': in_npy(np.zeros(4, 'f4,i4'), LABEL, 'pred: expected float16'),
    'shape': in_npz(GOOD, np.zeros(3), 'label: expected shape (4,)'),
    'one-hot': in_npz(GOOD, GOOD, 'if the labels are one-hot, pass their argmax'),
    'swapped': in_npy(LABEL, GOOD, 'pred: expected float16'),
    'scalar': in_npz(np.float32(1), LABEL, 'at least 2 axes'),
    'no numbers, npy': in_npy(np.zeros((0, 2)), np.zeros(0), 'at least one number, got shape (0, 2)'),
    'no numbers, npz': in_npz(np.zeros((0, 2)), np.zeros(0), 'at least one number'),
    'all ignored': (['a.npz', '--ignore-label', '0'], {'a.npz': BOTH}, 'got 0 invalid and 4 ignored'),
    'all invalid': in_npz(GOOD, LABEL + 2, 'got 4 invalid and 0 ignored'),
    'axis': (['a.npz', '--axis', '7'], {'a.npz': BOTH}, 'axis 7'),
    'eps': (['a.npz', '--eps', '-1'], {'a.npz': BOTH}, 'eps: expected a number'),
    'max-error': (['a.npz', '--max-error', 'nan'], {'a.npz': BOTH}, '--max-error: expected a number'),
    'plot suffix': (['a.npz', '--plot', 'a.xyz'], {'a.npz': BOTH}, 'xyz'),
    'plot folder': (['a.npz', '--plot', 'nowhere/a.png'], {'a.npz': BOTH}, 'No such file'),
    'a folder': (['.'], {}, 'expected one .npz'),
}  # fmt: skip
for dtype in ('|V0', '|S0', '<U0', ('<f4', (0,))):
    BAD_FILES[f'npy, no bytes in {dtype}'] = in_npy(npy(GOOD, shaped((4, 2), dtype)), LABEL)
    BAD_FILES[f'npy, a negative size and no bytes in {dtype}'] = in_npy(
        npy(GOOD, shaped((-1,), dtype)), LABEL
    )
    BAD_FILES[f'npz, a negative size and no bytes in {dtype}'] = in_npz(npy(GOOD, shaped((-1,), dtype)))
BAD_FILES.update({f'npy, {name}': in_npy(npy(GOOD, shaped(shape)), LABEL) for name, shape in SHAPES.items()})
BAD_FILES.update({f'npz, {name}': in_npz(npy(GOOD, shaped(shape))) for name, shape in SHAPES.items()})


def check_exit_2_with_one_line(arguments, message, capsys):
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith('audit: ')
    assert 'unexpected' not in err
    assert err.count('\n') == 1
    assert not out


@pytest.mark.parametrize('case', BAD_FILES)
def test_bad_files_give_one_line_and_exit_2(case, tmp_path, monkeypatch, capsys, recwarn):
    arguments, contents, message = BAD_FILES[case]
    monkeypatch.chdir(tmp_path)
    for name, content in contents.items():
        save(name, content)
    check_exit_2_with_one_line(arguments, message, capsys)
    assert not os.path.exists('exploded')
    assert not [
        warning for warning in recwarn if warning.category in (UserWarning, SyntaxWarning, RuntimeWarning)
    ]


def test_headers_that_are_right_are_read(tmp_path, monkeypatch, capsys):
    """So that each bad case above fails by what it changes, and not by something else."""
    monkeypatch.chdir(tmp_path)
    save('a.npy', npy(GOOD, shaped((4, 2))))
    save('b.npy', LABEL)
    assert command('a.npy', 'b.npy') == 0


@pytest.mark.parametrize('suffix', ['params', 'nd'])
def test_the_message_about_mxnets_files_has_the_line_that_saves_their_arrays(
    suffix, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    mx.nd.save(f'a.{suffix}', BOTH_OF_MXNET)
    assert command(f'a.{suffix}') == 2
    line = re.search(r'numpy\.savez\(.*\)', capsys.readouterr().err).group()
    exec(line, {'numpy': np, **BOTH_OF_MXNET})
    assert command('predictions.npz', '--json') == 0
    assert strict_json(capsys.readouterr().out)['samples'] == 4


def test_unpickling_a_bomb_would_leave_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save('b.npy', BOMBS)
    np.load('b.npy', allow_pickle=True)
    assert os.path.exists('exploded')


@pytest.mark.parametrize('suffix', ['npy', 'npz'])
@pytest.mark.parametrize('make', [os.mkdir, getattr(os, 'mkfifo', None)], ids=['folder', 'fifo'])
def test_a_folder_or_a_fifo_in_place_of_a_file_is_refused(make, suffix, tmp_path, monkeypatch, capsys):
    if make is None:
        pytest.skip('this system has no FIFOs')
    monkeypatch.chdir(tmp_path)
    make('a.' + suffix)
    names = ['a.npy', 'a.npy'] if suffix == 'npy' else ['a.' + suffix]
    check_exit_2_with_one_line(names, f'a.{suffix}: expected a regular file', capsys)


@pytest.mark.parametrize('name', ['pred.npy', 'both.npz'])
def test_every_truncated_file_is_refused(files, name, capsys):
    data = (files / name).read_bytes()
    cut = files / f'cut.{name.split(".")[1]}'
    arguments = [cut, files / 'label.npy'] if name == 'pred.npy' else [cut]
    for end in range(0, len(data), max(1, len(data) // 40)):
        cut.write_bytes(data[:end])
        check_exit_2_with_one_line(arguments, 'cannot be read: ', capsys)
