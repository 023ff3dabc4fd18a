# make demo          build the bundled sample, serve it, ask it, keep serving until Ctrl-C
# make demo ONCE=1   the same, but print one answer and exit
# make test          everything that CI runs: lint, types, import rules, tests
#
# PYTHON=python3.12 chooses the interpreter of a new .venv; the default is the newest of 3.13, 3.12, 3.11 that works.
# TORCH='torch>=2.4' chooses the torch that training is tested with; the default is a build without CUDA.

VENV ?= .venv
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
DEMO_DIR ?= build/demo
ONCE ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# On Linux a plain `torch` is a CUDA build of gigabytes; this one is only there where the index of pip has it.
TORCH ?= $(if $(filter Darwin,$(shell uname -s)),torch>=2.4,torch==2.13.0+cpu)
PROTOS := $(wildcard protos/recall/v1/*.proto)

# A stamp per kind of install, older than pyproject.toml when that has changed. The development install holds all that
# the plain one does, so it stamps both and neither undoes the other.
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

# Both are tried, and done without: hnswlib has no wheels, and not every index has a torch without CUDA.
SAY_NO_HNSWLIB = echo "hnswlib was not installed: it needs a C++ compiler ($(VENV)/hnswlib.log). faiss's HNSW takes its place."
SAY_NO_TORCH = echo "$(TORCH) was not installed ($(VENV)/torch.log): the tests of training are skipped."

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint format proto clean

help:
	@sed -n 's/^# \(make .*\)/  \1/p' Makefile
	@echo "  make lint          lint, types and import rules, without the tests"
	@echo "  make format        let ruff rewrite what it can"
	@echo "  make proto         write the protobuf code anew"
	@echo "  make clean         remove $(VENV), what the demo built, and caches"

demo: $(RUN_STAMP)
	@$(BIN)/recall demo --dir $(DEMO_DIR) $(if $(filter-out 0,$(ONCE)),--once)

# The kernels first, on all cores: otherwise each worker compiles those that its tests happen to call. A file's tests stay
# on one worker, so that what they share is made once. Without bytecode on disk every process that a test starts would
# compile the package anew, and every worker the tests.
test: export PYTHONDONTWRITEBYTECODE =
test: lint
	@$(BIN)/python -c 'from engine.online.kernels import compile_all; compile_all(lambda: None)'
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -W error $(PYTEST_ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(DEV_STAMP)
	$(BIN)/python -m grpc_tools.protoc -Iprotos \
	  --python_out=protos --pyi_out=protos --grpc_python_out=protos $(PROTOS)

$(RUN_STAMP): pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes about half a minute."
	@$(PIP) install --quiet --no-compile --editable .
	@touch $@

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	@echo "Installing the development tools into $(VENV)."
	@$(PIP) install --quiet --editable '.[dev,hnsw]' 2>$(VENV)/hnswlib.log || { \
	  $(PIP) install --quiet --editable '.[dev]' && $(SAY_NO_HNSWLIB); }
	@$(PIP) install --quiet '$(TORCH)' 2>$(VENV)/torch.log && $(PIP) install --quiet --editable '.[train]' || $(SAY_NO_TORCH)
	@touch $(RUN_STAMP) $@

# A candidate is tried, not only looked up: it may be a shim for a version that is not there, or lack venv.
$(BIN)/python:
	@for python in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3 python); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	      >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$python" --version)."; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "recall-engine needs Python 3.11, 3.12 or 3.13 with its venv module, and found none that works." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv), or name it: make PYTHON=/path/to/python" >&2; \
	exit 1

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
