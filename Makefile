# On a machine with Python 3.10 or newer and nothing else:
#   make demo    install, then run the main job
#   make test    install with the development tools, then lint, types and every test
# PYTHON=... picks the interpreter that .venv is made from.

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.DELETE_ON_ERROR:
.PHONY: demo test

demo: .venv/demo.stamp
	$(BIN)/fxqfix demo

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

.venv/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) ".[examples,progress]"
	touch $@

# The tools' environment holds the demo's.
.venv/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) ".[dev]"
	touch .venv/demo.stamp $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fxqfix needs Python 3.10 or newer: make PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
