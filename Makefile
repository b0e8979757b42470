# Everything a fresh machine with Python 3.11 and a package index needs is set up by the targets themselves.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# torch is installed first and by exact version: a bare requirement may resolve to a build of several gigabytes.
TORCH ?= torch==2.13.0
# pytest-xdist workers; two of them on the two cores the suite is sized for.
WORKERS ?= 2

.PHONY: demo test lint format clean

$(VENV)/.ready: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,demo]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python scripts/benchmark_decode.py --geometry mini --context 2048 --prefill 512

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
