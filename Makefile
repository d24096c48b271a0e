VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: quickstart test notebooks lint clean

quickstart: $(VENV)/.installed
	$(BIN)/cvae-lightning quickstart

# OMP_NUM_THREADS=1: forking (the two-process tests) after a multi-threaded matmul hangs.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Runs them whole, in a kernel; `make test` runs a few steps of each.
notebooks: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[notebooks]"
	OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks/run.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@
