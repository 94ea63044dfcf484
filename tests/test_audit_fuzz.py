"""Damaged files for the audit: whatever the bytes are, it exits with 0 or 2, and with at most one line on stderr."""

import contextlib
import io
import os
import re
import struct
import tempfile
import zipfile

import numpy as np
from audit_cases import command
from hypothesis import example, given, settings
from hypothesis import strategies as st

PRED, LABEL = np.array([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]], 'float32'), np.array([0, 1, 1])
WORDS = [struct.pack('<Q', word) for word in (0, 1, 2, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64 - 1)]


def saved(save, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'a.' + suffix)
        save(path)
        with open(path, 'rb') as file:
            return file.read()


SEEDS = {
    'npy': [
        saved(lambda path: np.save(path, PRED), 'npy'),
        saved(lambda path: np.save(path, PRED.T.astype('f8')), 'npy'),
    ],
    'npz': [
        saved(lambda path: np.savez(path, pred=PRED, label=LABEL), 'npz'),
        saved(lambda path: np.savez_compressed(path, pred=PRED.T.astype('f2').T, label=LABEL), 'npz'),
    ],
}
LABEL_FILE = saved(lambda path: np.save(path, LABEL), 'npy')


@st.composite
def damaged(draw, data):
    """Bytes with some flipped, deleted, inserted, overwritten with a word, or cut off at the end."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        kind, at = (
            draw(st.sampled_from(['flip', 'delete', 'insert', 'word', 'cut'])),
            draw(st.integers(0, len(data))),
        )
        if kind == 'flip' and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == 'delete':
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == 'insert':
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == 'word':  # counts and sizes stand at multiples of 4
            data[at // 4 * 4 : at // 4 * 4 + 8] = draw(st.sampled_from(WORDS))
        elif kind == 'cut':
            del data[at:]
    return bytes(data)


NUMBERS = st.one_of(
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64, -(2**63), 10**30, 0.5, True, None, 'x']),
)
DTYPES = st.sampled_from([
    '<f2', '<f4', '>f4', '<f8', '<f16', '<i8', '|u1', '|b1', '<c8', '|O', '|V0', '|V8', '<U1', '|S0', '<U0',
    '<M8[s]', '<f3', '', 'f4,f4', '(2,)<f4', '\n', '\\', None, 4, [], [('a', '<f4')], [('a', '|O')],
    ('<f4', (0,)), ('<f4', (2,)), ('<f4', (2**62,)),
])  # fmt: skip


@st.composite
def npy_files(draw):
    """An .npy file whose header says something else than its body."""
    header = {
        'descr': draw(DTYPES),
        'fortran_order': draw(st.sampled_from([False, True, None, 2])),
        'shape': draw(st.one_of(st.lists(NUMBERS, max_size=4).map(tuple), NUMBERS)),
    }
    header.pop(draw(st.sampled_from(['', '', '', '', '', *header])), None)
    text = (repr(header) + ' ' * draw(st.integers(0, 70)) + '\n').encode()
    version = draw(st.sampled_from([b'\x01\x00', b'\x01\x00', b'\x02\x00', b'\x03\x00', b'\x04\x00']))
    length = struct.pack('<H' if version == b'\x01\x00' else '<I', len(text))
    return b'\x93NUMPY' + version + length + text + PRED.tobytes()[: draw(st.integers(0, 24))]


def zipped(pred):
    """An .npz of the bytes of its first array, with a checksum that fits."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        archive.writestr('pred.npy', pred)
        archive.writestr('label.npy', LABEL_FILE)
    return stream.getvalue()


@st.composite
def files(draw):
    """A suffix, and bytes that such a file should not have."""
    suffix = draw(st.sampled_from(['npy', 'npz']))
    seed = st.sampled_from(SEEDS[suffix]).flatmap(damaged)
    if suffix == 'npy':
        return suffix, draw(st.one_of(seed, npy_files(), st.binary(max_size=100)))
    members = st.one_of(npy_files(), st.sampled_from(SEEDS['npy']).flatmap(damaged))
    return suffix, draw(st.one_of(seed, members.map(zipped)))


@settings(max_examples=int(os.environ.get('FUZZ_EXAMPLES', 200)), deadline=None)
@given(files(), st.sampled_from(['probs', 'logits', 'log_probs']), st.integers(-2, 1))
@example(('npz', b'PK\x05\x06' + b'\0' * 18), 'probs', -1)  # an archive without members
def test_damaged_files_exit_with_0_or_2_and_at_most_one_line(file, pred_type, axis):
    suffix, data = file
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, 'a.' + suffix)]
        with open(paths[0], 'wb') as target:
            target.write(data)
        if suffix == 'npy':
            paths.append(os.path.join(folder, 'label.npy'))
            with open(paths[1], 'wb') as target:
                target.write(LABEL_FILE)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command(*paths, '--pred-type', pred_type, '--axis', axis)
    assert code in (0, 2)
    if code == 0:
        assert not err.getvalue()
        assert int(re.search('samples counted +([0-9]+)', out.getvalue()).group(1)) > 0
    else:
        assert not out.getvalue()
        assert re.fullmatch('audit: (?!unexpected).+\n', err.getvalue())
