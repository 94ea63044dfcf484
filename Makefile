# make demo and make test are all that most people need; both make .venv first, and are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test bench docs test-matrix clean

help:
	@echo 'make demo         train on real digits, and see what an epsilon hides'
	@echo 'make test         linter, types, doctests and tests'
	@echo 'make bench        measure speed, memory and accuracy (WITH=torch adds PyTorch)'
	@echo 'make docs         the API reference as HTML'
	@echo 'make test-matrix  the tests on every supported MXNet'
	@echo 'make clean        remove all environments'

demo: $(VENV)/.cpu-demo
	$(BIN)/python -m gluon_stable_ce demo $(ARGS)

test: $(VENV)/.cpu-demo-onnx-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

# Nothing else should run meanwhile. PyTorch has an environment of its own, since it wants another NumPy.
bench: $(VENV)/.cpu-demo $(if $(filter torch,$(WITH)),.venv-torch/bin/torch-is-here)
	$(BIN)/python benchmarks/run.py $(if $(filter torch,$(WITH)),--with-torch .venv-torch/bin/python) $(ARGS)

.venv-torch/bin/torch-is-here:
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/pip install --quiet numpy torch==2.13.0
	touch $@

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
