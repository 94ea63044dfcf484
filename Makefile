# make demo and make test are all that most people need; both make .venv first, and are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests run in as many processes as there are cores, each with one thread. ARGS='-n 0' is one process.
PYTEST := python -m pytest -n auto --dist loadgroup
MATRIX := 1.8.0.post0 1.7.0.post2 1.6.0
# `make test` runs on one Python, and `make test-matrix` on the others.
PYTHONS := $(filter-out $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'),3.8 3.9 3.10 3.11)

.PHONY: help demo test quick fuzz mutation bench docs kernel wheel test-build test-clients test-matrix \
    $(PYTHONS:%=test-python%) test-horovod clean

help:
	@echo 'make demo         train on real digits, and compare the metrics (examples/digits.py)'
	@echo 'make test         linter, formatter, types, doctests and tests'
	@echo 'make quick        a sample of the tests that are neither slow nor distributed, in less than a minute'
	@echo 'make fuzz         random problems against the reference (EXAMPLES=20000)'
	@echo 'make mutation     break the code in small ways, and list what no test notices (ARGS=kernels/stock.py)'
	@echo 'make bench        measure speed, memory and accuracy (WITH=torch adds PyTorch)'
	@echo 'make wheel        a wheel for this MXNet and this kind of processor, with the fused kernel in it'
	@echo 'make docs         the documentation as HTML'
	@echo 'make test-build   the tests that compile the fused kernel, for each instruction set and with defects'
	@echo 'make test-clients the losses, metrics and loops of other packages, patched and beside stock'
	@echo 'make test-matrix  the tests on every supported MXNet, and make quick on every supported Python'
	@echo 'make test-horovod the tests of all_reduce over Horovod, which it compiles first'
	@echo 'make clean        remove all environments'

demo: $(VENV)/.cpu-demo kernel
	$(BIN)/python examples/digits.py $(ARGS)

test: $(VENV)/.cpu-docs-onnx-test kernel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/$(PYTEST) -m 'not build' $(ARGS)

test-build: $(VENV)/.cpu-docs-onnx-test kernel
	$(BIN)/$(PYTEST) -m build $(ARGS)

# Without a compiler, all goes on with the stock kernel. An environment comes first.
kernel:
	@$(BIN)/python -m gluon_stable_ce build || echo 'going on without the fused kernel'

wheel: $(VENV)/.cpu-dev kernel
	rm -rf build/lib build/bdist*
	$(BIN)/python -m build --wheel --outdir dist -C--build-option=--plat-name=$$($(BIN)/python -c \
	    'import sysconfig; print(sysconfig.get_platform())')

quick: $(VENV)/.cpu-docs-onnx-test kernel
	QUICK=1 $(BIN)/$(PYTEST) -m 'not slow and not dist' $(ARGS)

fuzz: $(VENV)/.cpu-docs-onnx-test kernel
	FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(BIN)/$(PYTEST) tests/test_fuzz.py tests/test_audit_fuzz.py \
	    tests/test_properties.py $(ARGS)

# One mutant at a time, each in a process of one thread.
mutation: $(VENV)/.cpu-docs-onnx-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/run.py $(ARGS)

# Nothing else should run meanwhile. PyTorch has an environment of its own, since it wants another NumPy.
bench: $(VENV)/.cpu-demo kernel $(if $(filter torch,$(WITH)),.venv-torch/bin/torch-is-here)
	$(if $(ARGS),,$(BIN)/python benchmarks/accuracy.py $(if $(filter torch,$(WITH)),--with-torch .venv-torch/bin/python))
	$(BIN)/python benchmarks/run.py $(if $(filter torch,$(WITH)),--with-torch .venv-torch/bin/python) $(ARGS)

.venv-torch/bin/torch-is-here:
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/pip install --quiet numpy torch==2.13.0
	touch $@

# d2l, gluonnlp, gluoncv, sockeye and gluonts, in an environment of their own.
test-clients:
	PYTHON=$(PYTHON) tests/clients/run.sh $(ARGS)

# Each older MXNet and each other Python in an environment of its own; what they can't do is skipped by name.
test-matrix: $(MATRIX:%=.venv-%/.ready)
	for version in $(MATRIX); do .venv-$$version/bin/$(PYTEST) -q -rs -k 'not gpu' $(ARGS) || exit 1; done
	for version in $(PYTHONS); do $(MAKE) test-python$$version || exit 1; done

# A Python on the PATH or of pyenv. One that is on the PATH need not run: pyenv puts there those that are switched off.
$(PYTHONS:%=test-python%): test-python%:
	@for python in python$* $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$*.*/bin/python; do \
	    if $$python -c '' 2>/dev/null; then exec $(MAKE) quick VENV=.venv-py$* PYTHON=$$python; fi; \
	done; echo 'skipped: this machine has no Python $*'

.venv-%/.ready: setup.cfg
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --editable '.[test]' 'mxnet==$*'
	touch $@

# Horovod is compiled for this MXNet, with g++, which takes some minutes once. pip must not take a wheel of another build
# from its cache. Its packages are listed here, as its metadata names none of them for MXNet.
test-horovod: .venv-horovod/.ready
	.venv-horovod/bin/python -m pytest -rs tests/horovod $(ARGS)

HOROVOD := HOROVOD_WITH_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 \
    MAKEFLAGS=-j$$(nproc)

.venv-horovod/.ready: setup.cfg
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet 'mxnet==1.9.1' 'numpy<1.24' 'setuptools<81' wheel 'cmake<4' \
	    cffi cloudpickle packaging platformdirs psutil pyyaml hypothesis pytest
	PATH="$(CURDIR)/$(@D)/bin:$$PATH" $(HOROVOD) $(@D)/bin/pip install --no-cache-dir --no-build-isolation --no-deps \
	    'horovod==0.28.1'
	$(@D)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

docs: $(VENV)/.cpu-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo 'build/docs/index.html'

# One environment a set of extras: a single resolve finds versions that work together. Onnxruntime's metadata asks for a newer NumPy
# than MXNet can live with, though it runs on this one: so it comes without its dependencies, which are listed in setup.cfg.
$(VENV)/.%: setup.cfg
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 8) <= v < (3, 12) else \
	    "gluon_stable_ce needs Python 3.8 to 3.11, and $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$(subst -,$(comma),$*)]'
	$(if $(findstring onnx,$*),$(BIN)/pip install --quiet --no-deps 'onnxruntime==1.16.3')
	touch $@

comma := ,

clean:
	rm -rf $(VENV) .venv-*
