# Everything a person or CI runs. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
CODE := ir frontends hw_targets passes codegen runtime stratum tests examples tools bench
FOLDERS = $(wildcard $(CODE))
# Hundreds of processes import the same modules: their compiled form is kept, even where the environment says not to.
PYTEST := PYTHONDONTWRITEBYTECODE= $(PY) -m pytest
WORKERS ?= 2

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

# --- environment ---------------------------------------------------------------------------------------------------

$(PY):
	@python=$$(tools/find-python) || exit 1; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: cannot create $(VENV); on Debian and Ubuntu the missing piece is 'apt-get install python3-venv'" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(PY)
	$(PIP) install -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(PIP) install -e '.[test,dev]'
	@touch $@

# transformers only after torch, so that torch is the build asked for and not one drawn in by a range.
$(VENV)/.installed-reference: pyproject.toml $(VENV)/.installed
	$(PIP) install torch==2.13.0
	$(PIP) install -e '.[test,reference]'
	@touch $@

$(VENV)/.installed-extras: pyproject.toml $(VENV)/.installed
	$(PIP) install -e '.[test,plot,cuda-tools]'
	@touch $@

$(VENV)/.installed-bench: pyproject.toml $(VENV)/.installed
	$(PIP) install -e '.[test,bench]'
	@touch $@

install: $(VENV)/.installed ## create .venv and install stratum into it
install-dev: $(VENV)/.installed-dev ## the same with the developers' tools

# --- use -----------------------------------------------------------------------------------------------------------

PROMPT ?= def read_file(path):
demo: $(VENV)/.installed ## install, compile examples/tiny-moe, generate text
	$(BIN)/compile-model build examples/tiny-moe -o build/tiny-moe
	$(BIN)/compile-model run build/tiny-moe --prompt '$(PROMPT)' -n 96 --repetition-penalty 1.15

# --- tests ---------------------------------------------------------------------------------------------------------

# A file's tests go to one worker: what a module compiles for all of them is compiled once.
test: $(VENV)/.installed ## install and run the suite (no torch needed)
	$(PYTEST) -n $(WORKERS) --dist loadfile --ignore=tests/reference $(ARGS)

test-text: $(VENV)/.installed ## only the text tests: parser, printer, verifier, passes
	$(PYTEST) -n $(WORKERS) tests/text $(ARGS)

test-reference: $(VENV)/.installed-reference ## compare with torch and transformers
	$(PYTEST) tests/reference $(ARGS)

test-extras: $(VENV)/.installed-extras ## install ptxas and matplotlib, and run the tests that need them
	$(PYTEST) -n $(WORKERS) --ignore=tests/reference -m extra $(ARGS)

# A single test may take longer than what otherwise is a team of threads that hangs.
EXAMPLES ?= 400
fuzz: $(VENV)/.installed ## the property tests with new random examples, EXAMPLES where a test names no number; about an hour
	HYPOTHESIS_PROFILE=fuzz FUZZ_EXAMPLES=$(EXAMPLES) $(PYTEST) -n $(WORKERS) --ignore=tests/reference -m hypothesis \
	  -o faulthandler_timeout=14400 $(ARGS)

mutants: $(VENV)/.installed ## plant known wrong changes and show that the suite catches each
	$(PY) tools/mutants.py $(ARGS)

# --- checks --------------------------------------------------------------------------------------------------------

format: $(VENV)/.installed-dev ## rewrite the sources in the house format
	$(BIN)/ruff format $(FOLDERS)
	$(BIN)/ruff check --fix $(FOLDERS)

lint: $(VENV)/.installed-dev ## format and lint, without changing anything
	$(BIN)/ruff format --check $(FOLDERS)
	$(BIN)/ruff check $(FOLDERS)

types: $(VENV)/.installed-dev ## type check
	$(BIN)/basedpyright --level error

# --- the rest ------------------------------------------------------------------------------------------------------

bench: $(VENV)/.installed ## llama-bench's rows for MODEL=DIR (default: the demo model)
	$(BIN)/compile-model bench $(or $(MODEL),examples/tiny-moe) $(ARGS)

quality: $(VENV)/.installed-bench ## what each number format costs examples/tiny-moe; writes docs/quality.md
	$(PY) -m bench.quality $(ARGS)

bench-peers: $(VENV)/.installed ## llama.cpp, OpenVINO and ours side by side; ARGS=--prepare first, then a quiet machine
	$(PY) -m bench.peers $(ARGS)

docs: $(VENV)/.installed ## regenerate the op pages under docs/ops, and the table of machines
	$(PY) -m ir.op_docs
	$(PY) -m hw_targets.target_docs

ci: ## what CI runs
	.ci/run

clean: ## remove the environment and everything built
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis

.PHONY: help install install-dev demo test test-text test-reference test-extras fuzz mutants format lint types bench quality docs ci clean
