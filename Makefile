# `make demo` and `make test` each work alone on a fresh clone with nothing installed but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The tests start hundreds of Python processes: without this, each would compile the package again where somebody has set it.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-long install lint package clean

demo: install
	$(BIN)/cloven demo slip

test: install lint
	$(BIN)/python -m pytest -m "not long" -n 4 --dist loadfile
	$(BIN)/python scripts/check_package.py

test-long: install lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/ruff check src tests scripts
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(STAMP)

# Runs again when the dependencies or the kernels change.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/cloven/*/native/*.?pp)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cloven needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
