# Every target does its own set-up: a new machine needs Python 3.11 to 3.13, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Two training processes on two cores: more threads than cores make OpenMP spin.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-slurm lint bench clean

help:
	@echo "make demo   distil a small student on this machine, before and after, in about 5 minutes"
	@echo "make test   all tests"
	@echo "make test-slurm  the tests on a real Slurm of two nodes, on this machine; needs root once"
	@echo "make lint   format check, lint, types"
	@echo "make bench  benchmarks; results go to benchmarks/results, their tables to docs/performance.md"

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/fd-scale demo

test: $(READY)
	@tests/cluster/install.sh || true
	@tests/diagnose/install.sh || true
	$(BIN)/pytest -n 2 --dist loadfile

test-slurm: $(READY)
	tests/cluster/install.sh
	$(BIN)/pytest tests/cluster tests/slurm

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	@for script in $$(grep -l __main__ benchmarks/*.py | grep -v -e gpu.py -e tables.py -e plots.py); do \
		echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.plots

clean:
	rm -rf $(VENV) build dist *.egg-info demo_out diagnose_out
