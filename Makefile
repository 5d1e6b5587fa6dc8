# The daily verbs. `make test` and `make bench` do all of their own set-up, from a fresh clone on; the variables below
# can be set on the command line, for example `make test TORCH="torch==2.13.0" VENV=.venv-cpu`.

# PYTHON makes the virtual environment VENV. TORCH names which torch goes into it, as pip's arguments: by default the
# newest, with the torchvision, timm and ONNX that fit it; beside a torch of your choice they are left out (their tests
# skip).
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
# `make gpu` leaves its record in the folder gpu of this one.
OUT ?= benchmarks/results

# Builds made here are for the GPUs of this machine (for one architecture where there are none).
export TORCH_CUDA_ARCH_LIST ?= native
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet
# The packages of an extra of pyproject.toml, each still in its quotes.
extra = $(shell sed -n 's/^$(1) = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
PACKAGES := setuptools wheel ninja pybind11 $(call extra,test) $(call extra,wheels) \
  $(if $(TORCH),$(foreach argument,$(TORCH),"$(argument)") rich,torch $(call extra,bench) $(call extra,onnx))
# One stamp for each choice of torch, so that another choice installs anew.
INSTALLED := $(VENV)/.installed-$(firstword $(shell echo '$(TORCH)' | cksum))
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install build test test-all test-emulator test-mutations fuzz bench train-digits docs docs-data lint
.PHONY: format clean wheels wheel-test
help:
	@echo "make test | test-all | bench | train-digits | test-emulator | test-mutations | fuzz | build"
	@echo "make wheels | wheel-test"
	@echo "make docs | docs-data | lint | format | clean"
	@echo "make gpu gpu-peers (alone: gpu-build gpu-test gpu-sanitize gpu-bench): on a machine with a GPU, with its python3"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	@echo "Installing torch and its companions into $(VENV): some minutes the first time"
	$(PIP) $(PACKAGES)
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(PIP) $(call extra,lint)
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(PIP) $(call extra,docs)
	@touch $@

install: $(INSTALLED)

# Always asked: ninja knows what is up to date, and the one _C of the tree may be another environment's. They share the
# objects of kernels, so one builds at a time.
build: $(INSTALLED)
	flock setup.py $(PY) setup.py --quiet build_ext --inplace

# The emulated tests stay in one process, which compiles once and runs their cases on all cores; other processes take
# the rest meanwhile. A process that dies ends the run and names its test, and so does a test that hangs.
IN_PARALLEL := -n auto --maxprocesses 4 --dist loadgroup --max-worker-restart 0 --timeout 1200 --timeout-method thread

# Without ARGS everything but what is marked slow, the emulated cases with few seeds.
test: build
	$(PY) -m pytest $(or $(ARGS),$(IN_PARALLEL) -m "not slow")

# The long lists too: planted faults, and four times as many seeds for the emulated cases.
test-all: build
	SEEDS=$(or $(SEEDS),8) $(PY) -m pytest $(IN_PARALLEL) $(ARGS)

test-emulator: build
	SEEDS=$(or $(SEEDS),8) $(PY) -m pytest -m emulated $(ARGS)

# Plants every fault of tests/emulator/mutate.py in the CUDA kernels; `make test-all` takes a sample of them.
test-mutations: build
	MUTANTS=all $(PY) -m pytest -s tests/test_mutations.py $(ARGS)

# Random calls for FUZZ_SECONDS: one half of them of the CPU kernels alone, under AddressSanitizer, the other of the
# package as users call it. Each failure prints the line that repeats it; FUZZ_FIRST is the first call's number.
FUZZ_SECONDS ?= 600
FUZZ_SANITIZE ?= address
# The sanitizer's checks as calls compile in half of the time of checks in line, and kernels without optimisation in a
# fifth of what -O1 takes. The rest, which computes the definition, is small.
FUZZ_CXXFLAGS := -Icsrc -std=c++20 -g1 -fno-omit-frame-pointer -fsanitize=$(FUZZ_SANITIZE) -ffp-contract=fast \
  --param=asan-instrumentation-with-call-threshold=0 -fno-math-errno -DEMULATOR_ASAN -Wno-psabi -pthread
build/fuzz/csrc/%: FUZZ_OPTIMISE := -O0
build/fuzz/tests/%: FUZZ_OPTIMISE := -O2
FUZZ_OBJECTS := $(patsubst %.cpp,build/fuzz/%.o,$(filter-out %bindings.cpp,$(sort $(shell find csrc/cpu -name '*.cpp'))) \
  $(wildcard tests/fuzz/*.cpp) tests/emulator/reference.cpp tests/emulator/tensor.cpp)

build/fuzz/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(FUZZ_CXXFLAGS) $(FUZZ_OPTIMISE) -MMD -MP -c $< -o $@

build/fuzz/kernels: $(FUZZ_OBJECTS)
	$(CXX) -fsanitize=$(FUZZ_SANITIZE) -pthread $^ -o $@

-include $(FUZZ_OBJECTS:.o=.d)

fuzz: build
	$(MAKE) --no-print-directory -j$(shell nproc) build/fuzz/kernels
	build/fuzz/kernels planted
	build/fuzz/kernels $$(($(FUZZ_SECONDS) / 2)) $(FUZZ_FIRST)
	OMP_WAIT_POLICY=passive $(PY) tests/fuzz/calls.py $$(($(FUZZ_SECONDS) / 2)) $(FUZZ_FIRST)

bench: build
	$(PY) -m benchmarks $(ARGS)

train-digits: build
	$(PY) examples/train_digits.py $(ARGS)

# Packages that need no compiler, in dist/ (tests/wheels.py): for the CPU, and with CUDA where it can be built, for all
# architectures. WHEELS names others: cpu, cuda. An empty MANYLINUX leaves out the check against that policy.
MANYLINUX ?= manylinux_2_28
WHEEL_ARCHS ?=
wheels: export TORCH_CUDA_ARCH_LIST := $(WHEEL_ARCHS)
wheels: $(INSTALLED)
	$(PY) tests/wheels.py build --policy "$(MANYLINUX)" $(WHEELS)

# In a fresh environment without a compiler, beside the torch of VENV or beside what WHEEL_TORCH tells pip to install.
WHEEL_TORCH ?=
wheel-test:
	$(PY) tests/wheels.py test --torch "$(WHEEL_TORCH)" dist/*.whl

# The site, in build/site. A warning fails it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# What the pages show of the plan and of the records.
docs-data: build
	$(PY) -m docs.what_runs_where
	$(PY) -m docs.plots

# mypy reads torch's own types, so torch is there first.
lint: $(INSTALLED) $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info sepconv_ext/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .emulator-cache

# On a machine with a GPU where nothing can be downloaded: the system's python3 holds torch and what the tests need.
# Each part has its time limit, in seconds, and can be run alone.
GPU_PYTHON ?= python3
GPU_BUILD_LIMIT ?= 300
GPU_TEST_LIMIT ?= 420
GPU_SANITIZE_LIMIT ?= 240
GPU_BENCH_LIMIT ?= 420
SANITIZER ?= $(firstword $(wildcard $(CUDA_HOME)/bin/compute-sanitizer) $(shell which compute-sanitizer 2>/dev/null) \
  $(wildcard /usr/local/cuda/bin/compute-sanitizer))
RECORD := $(OUT)/gpu
logged = set -o pipefail; mkdir -p $(RECORD); timeout -k 10 $(1) $(2) 2>&1 | tee $(RECORD)/$(3)

.PHONY: gpu gpu-peers gpu-build gpu-test gpu-sanitize gpu-memcheck gpu-racecheck gpu-bench
# In nine minutes, step by step with limits; then who else is there, and compute-sanitizer (tests/gpu_record.py). The
# record is one file, OUT/gpu.tar.gz: the easier to bring back.
gpu:
	$(GPU_PYTHON) tests/gpu_record.py --out build/gpu --packed $(OUT)/gpu.tar.gz
gpu-peers:
	$(GPU_PYTHON) tests/gpu_record.py --out build/gpu --packed $(OUT)/gpu.tar.gz --peers

gpu-build:
	SEPCONV_CUDA=1 timeout -k 10 $(GPU_BUILD_LIMIT) $(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-test: SHELL := /bin/bash
gpu-test:
	$(call logged,$(GPU_TEST_LIMIT),$(GPU_PYTHON) -m pytest -m cuda -q $(ARGS),test.txt)

ifneq ($(SANITIZER),)
gpu-sanitize: gpu-memcheck gpu-racecheck
else
gpu-sanitize:
	@echo "gpu-sanitize: compute-sanitizer not found (CUDA_HOME/bin, PATH, /usr/local/cuda/bin): not run"
endif

# Without torch's cache each tensor is an allocation of its own, so that memcheck sees reads past its end.
gpu-memcheck gpu-racecheck: SHELL := /bin/bash
gpu-memcheck gpu-racecheck: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-memcheck gpu-racecheck: gpu-%:
	$(call logged,$(GPU_SANITIZE_LIMIT),$(SANITIZER) --tool $* --error-exitcode 1 \
	  $(GPU_PYTHON) tests/sanitize_cases.py,$*.txt)

gpu-bench:
	timeout -k 10 $(GPU_BENCH_LIMIT) $(GPU_PYTHON) -m benchmarks --device cuda --out $(RECORD) $(ARGS)
