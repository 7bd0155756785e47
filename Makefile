# `make demo` and `make test` need nothing but Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-slow lint format bench docs clean

demo: $(READY)  ## set up, then run the whole path once and write demo-out/index.html
	$(BIN)/edge-anomaly demo --out demo-out --force

test: $(READY)  ## set up, then run the test suite
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(READY)  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## the figures of docs/results.md: accuracy on ELPV, INT8 against FP32, memory
	$(BIN)/python benchmarks/elpv.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/footprint.py

docs: $(READY)  ## check that every command in README and docs exists, and the links between the pages
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) demo-out dist

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	touch $(READY)
