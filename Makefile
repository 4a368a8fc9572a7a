# On a machine with Python 3.10 or newer and nothing else:
#   make demo    install, then run the main job
#   make test    install with the development tools, then lint, types and every test
#   make quick   lint, types and one fast test of each file
#   make wheel   build the wheel, install it in an environment of its own, and run the demo there
#   make levels  the engines' tests under every level of int8 kernels that this CPU offers
#   make gpu     all that needs a GPU, in under four minutes; with the torch that is installed
#   make fuzz    random models for SECONDS=600, from SEED=... (printed)
#   make mutants change one token of the code that judges, COUNT=300 times from SEED=1; do tests fail?
# PYTHON=... picks the interpreter that .venv is made from.

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.DELETE_ON_ERROR:
.PHONY: demo fuzz gpu levels mutants quick test wheel

demo: .venv/demo.stamp
	$(BIN)/fxqfix demo

LINT = $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test: .venv/test.stamp
	$(LINT)
	$(BIN)/pytest -n 2 --dist worksteal

quick: .venv/test.stamp
	$(LINT)
	$(BIN)/pytest -n 2 --dist worksteal --quick

# The sources are out of reach there: what runs is what the wheel holds, assets of the page included.
WHEEL := .wheel
wheel:
	rm -rf build dist $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(WHEEL)/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[examples,progress]"
	cd $(WHEEL) && bin/python -Ic 'import fxqfix; print(fxqfix.__file__); fxqfix.Report(rows=()).to_html()'
	cd $(WHEEL) && bin/fxqfix demo
	rm -rf build dist $(WHEEL)

levels: .venv/test.stamp
	$(BIN)/python tests/levels.py

# PY: a Python whose torch has CUDA; fxqfix itself need not be installed.
PY ?= $(BIN)/python

gpu:
	PYTHONPATH=. $(PY) -m pytest -m gpu -p no:cacheprovider tests/test_devices.py tests/routes/test_inductor.py tests/test_as_deployed.py
	PYTHONPATH=.:benchmarks $(PY) benchmarks/gpu.py
	PYTHONPATH=.:benchmarks $(PY) benchmarks/gpu_speed.py

SECONDS ?= 600
fuzz: .venv/test.stamp
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

COUNT ?= 300
mutants: .venv/test.stamp
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --count $(COUNT) --seed $(or $(SEED),1) $(foreach place,$(ONLY),--only $(place))

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
