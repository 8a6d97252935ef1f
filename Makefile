# SPDX-License-Identifier: Apache-2.0
# Each target does its own set-up in .venv; a machine needs python3, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
export PIP_ROOT_USER_ACTION := ignore

# hotloop._cuda is built by `make wheel` wherever nvcc is; a development build leaves it out where no GPU
# would run it.
HOTLOOP_CUDA ?= $(if $(shell command -v nvidia-smi),AUTO,OFF)
# ON in .ci/run: warnings of the compilers are errors. One flag for module, C++ tests and wheel, so that ccache serves all.
HOTLOOP_WERROR ?= OFF
export HOTLOOP_WERROR
# TensorFlow 2.16, which the latest TFRA needs, has wheels for Python 3.9 to 3.12.
TFRA_BASE ?= python3.11
TFRA := .venv-tfra
# Python files are not here: the install is editable, so that edits of them are live.
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc kernels -type f -not -name '*.py*' -not -name commit.txt 2>/dev/null)

.PHONY: help tidy dev demo demo-online test test-python test-cpp test-sanitized test-slow peers rivals bench lint format docs site stubs wheel clean
help:
	@echo "make dev              build and install editable: edits of Python are live, after edits of C++ run it again"
	@echo "make demo [TEXT=DIR]  a small model learns from preferences on real text (out/demo/report.png)"
	@echo "make demo-online      clicks of a real log learned in one pass at equal memory (out/online/report.png)"
	@echo "make test             the quick tests, C++ and Python; ends with one line of counts"
	@echo "make test-cpp | test-python     one half of them; PYTEST_ARGS='-k dpo' for a part"
	@echo "make test-sanitized   the C++ tests under the address, undefined-behaviour and thread sanitizers"
	@echo "make test-slow        the sweeps that take longer than a few seconds each"
	@echo "make peers            against TRL, Liger, CCE and transformers themselves"
	@echo "make bench [OPS=...]  measure against the rivals (out/bench)"
	@echo "make rivals           install the rivals of the table benches (bench/README.md)"
	@echo "make lint | format    ruff, mypy, stubtest, clang-format"
	@echo "make tidy             clang-tidy over the C++ files: minutes"
	@echo "make wheel            build, repair and test the wheel (wheelhouse)"
	@echo "make stubs            rewrite the type stubs of the compiled modules"
	@echo "make docs             rewrite what is generated from the catalogue and from bench/results"
	@echo "make site             the documentation as pages, one of every room (out/site)"
	@echo ".ci/run               these tests, the two longest shortened, lint, the CUDA build and the wheel"

# torch first and pinned: anything looser fetches gigabytes of CUDA libraries.
$(VENV)/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) torch==2.13.0
	$(PIP) 'numpy>=1.23' --group dev --group lint
	@touch $@

$(VENV)/built: $(VENV)/dev $(SOURCES)
	@echo "building hotloop (one to three minutes the first time; cached in build/)"
	$(PIP) --no-build-isolation --no-deps --force-reinstall \
	  -C cmake.define.HOTLOOP_CUDA=$(HOTLOOP_CUDA) -C cmake.define.HOTLOOP_WERROR=$(HOTLOOP_WERROR) -e .
	@touch $@

$(VENV)/peers: $(VENV)/dev
	$(PIP) torch==2.13.0 trl==1.16.0 transformers==5.23.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	@touch $@

# Without their dependencies: those would bring another torch and gigabytes of CUDA. 1.8.0 is the
# release that goes with torch 2.13.
$(VENV)/rivals: $(VENV)/dev
	$(PIP) --no-deps fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0 tensordict==0.15.3 'pyvers>=0.2,<0.3' torchmetrics==1.0.3 \
	  lightning-utilities pyre-extensions typing-inspect mypy-extensions cloudpickle packaging tqdm
	$(BIN)/python -W ignore -c 'import torch, torchrec; assert torch.__version__.startswith("2.13.0")'
	@touch $@

$(TFRA)/rivals:
	$(TFRA_BASE) -m venv $(TFRA)
	$(TFRA)/bin/python -m pip install -q tensorflow-cpu==2.16.2 tensorflow-recommenders-addons==0.8.1
	@touch $@

rivals: $(VENV)/rivals
	@$(MAKE) --no-print-directory $(TFRA)/rivals || echo "no TFRA: its benches will be skipped"
	@printf '#include <libcuckoo/cuckoohash_map.hh>\n#include <absl/container/flat_hash_map.h>\n' \
	  | c++ -std=c++17 -fsyntax-only -x c++ - 2> /dev/null \
	  || echo "libcuckoo, absl: apt install libcuckoo-dev libabsl-dev pkg-config; skipped until then"

dev: $(VENV)/built

demo: $(VENV)/built
	$(BIN)/python -m examples.learn_from_preferences $(if $(TEXT),--text '$(TEXT)') $(DEMO_ARGS)

# For the log it carries: its dependencies would bring another torch, and its code is not run.
$(VENV)/obp: $(VENV)/dev
	$(PIP) --no-deps obp==0.4.1
	@touch $@

demo-online: $(VENV)/built $(VENV)/obp
	$(BIN)/python -m examples.online_recommender $(DEMO_ARGS)

test: $(VENV)/built
	@$(BIN)/python tools/run_tests.py cpp python

test-python: $(VENV)/built
	@$(BIN)/python tools/run_tests.py python

test-cpp: $(VENV)/dev
	@$(BIN)/python tools/run_tests.py cpp

test-sanitized: $(VENV)/dev
	@$(BIN)/python tools/run_tests.py sanitized

test-slow: $(VENV)/built
	@$(BIN)/python tools/run_tests.py slow

peers: $(VENV)/built $(VENV)/peers
	@$(BIN)/python tools/run_tests.py peers

bench: $(VENV)/built $(VENV)/peers
	$(BIN)/python -m bench run $(or $(OPS),all) --out out/bench/rows.jsonl $(BENCH_ARGS)
	$(BIN)/python -m bench plot out/bench/rows.jsonl

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/lint_cpp.py
	$(BIN)/python tools/spdx.py
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest hotloop._core --mypy-config-file pyproject.toml --allowlist tools/stubtest.txt

# clang-tidy: minutes, and no part of `make lint`.
tidy: $(VENV)/built
	$(BIN)/python tools/lint_cpp.py --tidy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/lint_cpp.py --fix

stubs: $(VENV)/built
	$(BIN)/python tools/write_stubs.py

docs: $(VENV)/built
	$(BIN)/python tools/write_docs.py

$(VENV)/site: $(VENV)/dev
	$(PIP) --group site
	@touch $@

site: $(VENV)/built $(VENV)/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

wheel: $(VENV)/dev
	tools/make_wheel.sh

clean:
	rm -rf build dist wheelhouse out $(VENV) $(TFRA) .venv-wheel
