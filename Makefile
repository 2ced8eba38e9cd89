# Plain `make` lists the targets. Set-up is part of every target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKED := $(BIN)/python -m pip install --disable-pip-version-check --require-hashes --no-deps
TRITON := .triton# beside .venv: what torch 2.13.0 wants of it on CUDA, and a CPU build is better without

.DEFAULT_GOAL := help
.PHONY: help setup dev quickstart test kernels fuzz check lint format types doctor table base tickets bench lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make .venv and install the locked dependencies

dev: $(VENV)/.installed-dev ## the same, with what tests and checks need

quickstart: setup ## fine-tune the embedded base on the embedded data, before and after shown
	$(BIN)/qlora train quickstart

test: dev ## the whole test suite (no network, no GPU needed)
	$(BIN)/python -m pytest

kernels: dev ## the Triton kernels without a card: interpreted, and compiled by triton's own ptxas
	test -d $(TRITON) || sed -n '/^triton==/,/[^\\]$$/p' requirements-cuda.lock | $(LOCKED) --target $(TRITON) -r /dev/stdin
	PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/test_triton_ops.py

check: lint types test ## what must pass before a change lands: lint, format, types, tests

lint: dev ## ruff, and that everything is formatted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev ## mypy, strict, on the ground floor
	$(BIN)/mypy

format: dev ## format everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: setup ## is this machine ready to train?
	$(BIN)/qlora doctor

table: setup ## predicted peaks of the shipped recipes into recipes/README.md
	$(BIN)/python scripts/recipe_table.py

tickets: setup ## generate the embedded task again (byte-identical)
	$(BIN)/python scripts/make_tickets.py

base: setup ## pretrain the embedded base again (about half an hour on two cores)
	$(BIN)/python scripts/pretrain_base.py

bench: setup ## the benchmarks that need no GPU
	$(BIN)/python scripts/bench_startup.py
	$(BIN)/python scripts/bench_data.py
	$(BIN)/python scripts/bench_train.py
	$(BIN)/python scripts/bench_load.py
	$(BIN)/python scripts/bench_plan.py
	$(BIN)/python scripts/bench_step.py --trace
	$(BIN)/python scripts/bench_step.py --quickstart
	$(BIN)/python scripts/bench_head.py
	$(BIN)/python scripts/bench_convergence.py
	$(BIN)/python scripts/bench_quickstart.py
	$(BIN)/python scripts/bench_merge.py
	$(BIN)/python scripts/bench_serve.py

fuzz: setup $(VENV)/.installed-tools ## a minute of malformed recipes and rows: only our own errors may come out
	$(BIN)/python scripts/fuzz_readers.py --seconds 60 --seed 1

lock: dev $(VENV)/.installed-tools ## write the locks, with hashes, from what is installed in .venv
	$(BIN)/python scripts/write_locks.py

clean: ## remove .venv, caches and runs
	rm -rf $(VENV) $(TRITON) runs wandb .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $$($(PYTHON) --version) found; Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Every file is checked against its hash. pip prefers the registry's torch; one that lies on this machine
# (pip's find-links) is taken first, if its hash is known. A torch built for CUDA names its libraries, which
# have a lock of their own, because a CPU build does not want their gigabytes.
$(VENV)/.installed: requirements.lock requirements-torch.lock requirements-cuda.lock pyproject.toml | $(VENV)/bin/python
	$(LOCKED) -r requirements.lock
	$(LOCKED) --no-index -r requirements-torch.lock >/dev/null 2>&1 || $(LOCKED) -r requirements-torch.lock
	! grep -q '^Requires-Dist: nvidia-' $(VENV)/lib/python*/site-packages/torch-*.dist-info/METADATA || \
	  $(LOCKED) -r requirements-cuda.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(LOCKED) -r requirements-dev.lock
	@touch $@

$(VENV)/.installed-tools: requirements-tools.lock $(VENV)/.installed
	$(LOCKED) -r requirements-tools.lock
	@touch $@
