# What a person does with this project. Every target makes the environment that it needs, once, in .venv.
# PYTHON chooses the interpreter (3.11 to 3.13), ARGS goes to the program or to pytest: make test ARGS='-m "not e2e"'

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

# airflow standalone and other programs look their helpers up on PATH
export PATH := $(CURDIR)/$(BIN):$(PATH)
# without bytecode, each of Airflow's processes compiles its modules anew: 10 seconds instead of 4 before the first line of a task
unexport PYTHONDONTWRITEBYTECODE

# $(call install,EXTRA): this project with an extra, in the versions of constraints.txt
define install
	echo "Installing the $(1) environment into $(VENV) ..."; \
	.ci/install $(BIN)/python constraints.txt --editable ".[$(1)]"
endef

.PHONY: help
help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(VENV)/.runtime ## 50,000 products, their descriptions and the bill, against the simulator
	@$(BIN)/python -m example_dags.demo demo $(ARGS)

.PHONY: airflow
airflow: $(VENV)/.runtime ## the same catalog in a real Airflow with its UI; Ctrl-C ends it
	@$(BIN)/python -m example_dags.demo airflow $(ARGS)

# two workers, because most tests wait for something; ARGS='-n 0' runs them in this process, for a debugger
.PHONY: test
test: $(VENV)/.dev ## the whole test suite, with a real PostgreSQL and a real Airflow
	@$(BIN)/python -m pytest -n 2 $(ARGS)

# an environment of its own: the provider needs SQLAlchemy below 2.1, and constraints.txt has a newer one
SNOWFLAKE := .matrix/snowflake
SNOWFLAKE_TESTS := $(addsuffix .py,$(addprefix tests/integration/test_,before_the_money results_constraints results_elsewhere results_keys \
	results_snowflake) tests/crash/test_two_databases)
.PHONY: test-snowflake
test-snowflake: $(SNOWFLAKE)/.ready ## results in Snowflake, on an emulation of it: Airflow 3.2.2 and the provider, in .matrix/snowflake
	@$(SNOWFLAKE)/bin/python -m pytest -n 2 -k snowflake $(SNOWFLAKE_TESTS) $(ARGS)

$(SNOWFLAKE)/.ready: pyproject.toml constraints-3.2.2.txt
	@[ -x $(SNOWFLAKE)/bin/python ] || $(PYTHON) -m venv $(SNOWFLAKE)
	@echo "Installing the emulation of Snowflake into $(SNOWFLAKE) ..."
	@$(if $(wildcard $(BIN)/uv),UV="$(abspath $(BIN)/uv)") .ci/install $(SNOWFLAKE)/bin/python constraints-3.2.2.txt \
	    --editable ".[snowflake-test]" || { echo "fakesnow or apache-airflow-providers-snowflake cannot be installed"; exit 1; }
	@touch $@

.PHONY: test-browser
test-browser: $(VENV)/.dev ## the Batches page in a real browser, which must be there: apt-get install chromium
	@command -v chromium >/dev/null || { echo "There is no chromium on PATH: apt-get update && apt-get install -y chromium"; exit 1; }
	@$(BIN)/python -m pytest -n 0 tests/e2e/test_batches_page.py $(ARGS)

# about half an hour for each cell; make test-matrix SETS=3.1.0 PYTHONS=3.11 ARGS='-n 2 tests/unit' is one minute
SETS ?= 3.1.0 3.1.8 3.2.2 3.3.2 newest
PYTHONS ?= 3.11 3.12 3.13
.PHONY: test-matrix
test-matrix: ## the suite on released Airflows and every Python: SETS='3.1.0 newest' PYTHONS='3.11' ARGS='tests/unit'
	@$(if $(wildcard $(BIN)/uv),UV="$(abspath $(BIN)/uv)") .ci/matrix "$(SETS)" "$(PYTHONS)" $(ARGS)

.PHONY: check
check: $(VENV)/.dev ## lint, format, types, and what may import what
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/unit/test_layers.py

.PHONY: bench
bench: $(VENV)/.bench ## the measurements beside the official provider and common.ai
	@$(BIN)/python -m tests.bench $(ARGS)

# with ANTHROPIC_API_KEY the real API, after the bound and a question; without, the simulator. docs/contract.md says what it may cost
.PHONY: contract
contract: $(VENV)/.runtime ## what the package rests on, checked against the real API, or without a key against the simulator
	@$(BIN)/python -m tests.contract $(ARGS)

.PHONY: crash
crash: $(VENV)/.dev ## a real Airflow whose processes are killed at random: make crash ARGS='--seed 1 --kills 100 --database postgres'
	@$(BIN)/python -m tests.crash.chaos $(ARGS)

.PHONY: constraints
constraints: ## constraints.txt anew, from the newest versions that fit
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT \
	    && $(PYTHON) -m venv "$$dir/env" \
	    && "$$dir/env/bin/python" -m pip install -qq uv --editable ".[dev,bench]" \
	    && { sed -n '/^#/p' constraints.txt; "$$dir/env/bin/python" -m pip freeze --exclude-editable; } > "$$dir/constraints.txt" \
	    && ! grep -nE '^[^#].*(@|://)' "$$dir/constraints.txt" \
	    && cp "$$dir/constraints.txt" constraints.txt && git diff --stat constraints.txt
# those of the released Airflows, constraints-<version>.txt, are made by .ci/released

.PHONY: clean
clean: ## remove the environment, the demo's files and what the tools leave behind
	@rm -rf $(VENV) .matrix .demo build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find airflow_provider_batchkit tests example_dags -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The environment: one directory, one stamp per set of packages in it.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) \
	    else "this needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@$(call install,sqlite)
	@touch $@

# MySQL's provider needs a driver that is built from source; where its headers are missing, the tests that need it are skipped by name
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(call install,dev)
	@if pkg-config --exists libmariadb 2>/dev/null; then $(call install,mysql); fi
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	@$(call install,bench)
	@touch $@
