# make help: what there is. The environment is made by launch/setup_env.sh on first use.
VENV ?= $(if $(GKD_VENV),$(GKD_VENV),.venv)
PYTHON := $(VENV)/bin/python
SHELL_SCRIPTS := $(wildcard launch/*.sh) launch/slurm.sbatch tests/setup_swift.sh benchmarks/setup_trl.sh benchmarks/gpu_check.sh tests/compat.sh .ci/run
PYTEST_ARGS ?=

export OMP_NUM_THREADS := 1

.PHONY: help env check format test test-fast test-nightly test-kernels bench docs

# Tests whose numbers come from float32 arithmetic, and settings under which the CPU's libraries take other kernels.
KERNEL_TESTS := tests/model tests/weights/test_logits.py tests/test_platform.py tests/teacher/test_teacher_pipeline.py \
	$(addprefix tests/loss/test_,$(addsuffix .py,vocab_parallel_jsd vocab_cross_entropy topk_jsd fused_linear_jsd)) \
	tests/commands/test_convert.py tests/examples/test_gguf_to_hf.py tests/teacher/test_served.py \
	$(addprefix tests/train/test_,$(addsuffix .py,step_exact privileged layout_pairs pitfalls evaluate export golden \
	checkpoint separate_runs))
KERNELS := ATEN_CPU_CAPABILITY=default,MKL_CBWR=COMPATIBLE,ONEDNN_MAX_CPU_ISA=SSE41 \
	ATEN_CPU_CAPABILITY=avx2,MKL_CBWR=AVX2,ONEDNN_MAX_CPU_ISA=AVX2

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

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

test-nightly:  ## with every kill, fuzzed input and grid in full (an hour and a half)
	GKD_TEST_FULL=1 bash launch/run_tests.sh $(PYTEST_ARGS)

test-kernels: env  ## the numeric tests again, with the kernels of other CPUs
	@for kernels in $(KERNELS); do echo "== $$kernels"; \
	env $$(echo $$kernels | tr , ' ') $(PYTHON) -m pytest -q -n 3 $(KERNEL_TESTS) $(PYTEST_ARGS) || exit 1; done

docs: env  ## links, file map, command lines and configuration page of the documentation
	$(PYTHON) -m pytest -q tests/test_docs.py

bench: env  ## every benchmark under benchmarks/
	@scripts=$$(ls benchmarks/bench_*.py 2>/dev/null); if [ -z "$$scripts" ]; then echo "no benchmarks in this version"; fi; \
	for script in $$scripts; do echo "== $$script"; $(PYTHON) -m benchmarks.$$(basename $$script .py) || exit 1; done
