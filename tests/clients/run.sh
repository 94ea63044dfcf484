#!/bin/sh
# Test this package against the real client packages, in an environment of its own (.venv-clients).
#
#   tests/clients/run.sh [pytest arguments]
#
# The clients are installed without their dependencies, since their pins exclude each other: sockeye wants mxnet 1.8.0,
# d2l numpy 1.21.5, and gluonts pandas 1. The list below is the smallest one with which all of them can be imported.
set -eu

cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
ENVIRONMENT=.venv-clients

if ! [ -e "$ENVIRONMENT/.ready" ] || [ tests/clients/run.sh -nt "$ENVIRONMENT/.ready" ]; then
    test -x "$ENVIRONMENT/bin/python" || "$PYTHON" -m venv "$ENVIRONMENT"
    pip="$ENVIRONMENT/bin/python -m pip --quiet --disable-pip-version-check"
    $pip install 'setuptools<81' wheel 'cython<3' 'numpy<1.24' 'mxnet==1.9.1' pytest hypothesis \
        packaging requests 'pandas<2' 'matplotlib<3.9' 'scipy<1.12' tqdm pillow pyyaml portalocker yacs autocfg \
        'opencv-python-headless<4.9' 'pydantic<2' 'toolz<1' 'typing-extensions<5' 'sacrebleu==1.4.14' ipython
    # The C file in gluonnlp's archive does not compile for Python 3.11. Cython writes it anew if the source is newer.
    sources=$(mktemp -d)
    "$ENVIRONMENT/bin/python" -m pip --quiet download --no-deps --no-build-isolation --dest "$sources" 'gluonnlp==0.10.0'
    tar -xzf "$sources"/gluonnlp-0.10.0.tar.gz -C "$sources"
    touch "$sources"/gluonnlp-0.10.0/src/gluonnlp/data/*.pyx
    $pip install --no-deps --no-build-isolation "$sources/gluonnlp-0.10.0"
    rm -rf "$sources"
    $pip install --no-deps 'gluoncv==0.10.5' 'd2l==0.17.6' 'sockeye==2.3.24' 'gluonts==0.11.12'
    touch "$ENVIRONMENT/.ready"
fi

PYTHONPATH=. exec "$ENVIRONMENT/bin/python" -m pytest -p no:cacheprovider -rs "$@" tests/clients
