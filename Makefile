# Every target sets up what it needs: a virtual environment in .venv, the build, the installation.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv
LOWEST := $(VENV)-lowest
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)
OUTPUT ?= demo
TABLES ?= all

.DEFAULT_GOAL := help
.PHONY: help demo test test-rust test-python test-slow test-lowest test-aarch64 mutants lint format api wheel bench \
  tables test-peers bench-peers clean

help:  ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	@command -v cargo >/dev/null || { echo "Rust 1.89 or newer is needed (cargo is not on the PATH)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	@touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python 'maturin>=1.14,<2'
	$(UV) pip install --quiet --python $(BIN)/python -r pyproject.toml
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(UV) pip install --quiet --python $(BIN)/python --group test
	@touch $@

$(VENV)/.test-slow: $(VENV)/.test
	$(UV) pip install --quiet --python $(BIN)/python --group test-slow
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(UV) pip install --quiet --python $(BIN)/python --group lint
	@touch $@

$(VENV)/.installed: $(VENV)/.runtime $(RUST_SOURCES)
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --uv --quiet
	@touch $@

demo: $(VENV)/.installed  ## Generate a small inspection set, fit, inspect, write a report with pictures
	$(BIN)/patchcore-rs demo --output $(OUTPUT)

test: test-rust test-python  ## Run the Rust tests and pytest

test-rust:  ## Run the Rust tests
	cargo test --workspace --quiet

test-python: $(VENV)/.installed $(VENV)/.test  ## Run pytest
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed $(VENV)/.test-slow  ## Run the suites that take minutes too
	$(BIN)/python -m pytest --run-slow

test-lowest: $(VENV)/.test  ## Run pytest with the lowest versions that are declared, in an environment of its own (5 GB)
	$(BIN)/maturin build --release --out dist
	$(UV) venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(UV) pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -r pyproject.toml --group test
	$(UV) pip install --quiet --python $(LOWEST)/bin/python --no-deps --find-links dist --no-index patchcore-rs
	$(LOWEST)/bin/python -m pytest

test-aarch64:  ## Run the Rust tests for aarch64 under emulation
	./rust/test-aarch64.sh

mutants:  ## Change what answers depend on line by line, and see that a test fails each time: hours
	@command -v cargo-mutants >/dev/null || cargo install --locked --quiet cargo-mutants
	RUSTFLAGS="--cfg scalar_only" cargo mutants --config rust/mutants.toml --jobs 2 --output target

lint: $(VENV)/.installed $(VENV)/.lint  ## Check formatting, clippy, the documentation's links, ruff, types and stubs
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps --quiet
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest patchcore_rs._native

format: $(VENV)/.lint  ## Format all sources
	cargo fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

api: $(VENV)/.installed $(VENV)/.test  ## Accept the public names and signatures as they are now
	$(BIN)/python tests/test_public_api.py

wheel: $(VENV)/.test  ## Build the abi3 wheel, install it in an empty environment and predict with it
	$(BIN)/maturin build --release --out dist
	$(BIN)/python tests/wheel_smoke.py dist

bench: $(VENV)/.installed $(VENV)/.test  ## Time the stages against pure torch (answers are checked first)
	$(BIN)/python -m pytest benches --benchmark-enable --benchmark-only --benchmark-group-by=group

tables: $(VENV)/.installed $(VENV)/.test  ## Make the tables of benches/ and a dated record: hours
	$(BIN)/python -m benches.tables $(TABLES)

test-peers: $(VENV)/.test  ## Test against anomalib and patchcore-inspection, in environments of their own (5 GB, an hour)
	$(BIN)/maturin build --release --out dist
	$(BIN)/python tests/peers/run.py --wheel dist $(PEERS)

bench-peers: $(VENV)/.test  ## Time anomalib plain and accelerated, in an environment of its own (5 GB)
	$(BIN)/maturin build --release --out dist
	$(BIN)/python tests/peers/run.py --wheel dist --bench $(PEERS)

clean:  ## Remove everything that was built
	rm -rf $(VENV) $(LOWEST) dist target python/patchcore_rs/_native*.so
