# make help: what there is. The environment is made by launch/setup_env.sh on first use.
VENV ?= $(if $(GKD_VENV),$(GKD_VENV),.venv)
PYTHON := $(VENV)/bin/python
SHELL_SCRIPTS := $(wildcard launch/*.sh) launch/slurm.sbatch tests/setup_swift.sh tests/compat.sh .ci/run
PYTEST_ARGS ?=

export OMP_NUM_THREADS := 1

.PHONY: help env check format test test-fast test-nightly bench docs

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

env:  ## make or update the environment
	@bash launch/setup_env.sh

check: env  ## lint, format, types, shell scripts
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/shellcheck $(SHELL_SCRIPTS)

format: env  ## rewrite the code in the project's format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:  ## the whole CPU test suite, as continuous integration runs it
	bash launch/run_tests.sh $(PYTEST_ARGS)

test-fast:  ## the inner loop: all that takes seconds
	bash launch/run_tests.sh -m "not slow" $(PYTEST_ARGS)

test-nightly:  ## with every kill, fuzzed input and grid in full (hours)
	GKD_TEST_FULL=1 bash launch/run_tests.sh $(PYTEST_ARGS)

docs: env  ## links, file map, command lines and configuration page of the documentation
	$(PYTHON) -m pytest -q tests/test_docs.py

bench: env  ## every benchmark under benchmarks/
	@scripts=$$(ls benchmarks/bench_*.py 2>/dev/null); if [ -z "$$scripts" ]; then echo "no benchmarks in this version"; fi; \
	for script in $$scripts; do echo "== $$script"; $(PYTHON) -m benchmarks.$$(basename $$script .py) || exit 1; done
