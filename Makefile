# make check    code style and the fast tests: run it before every commit
# make format   put the code into the project's style
# make bench    every benchmark: hours on two cores (benchmarks/README.md)
# make test     every test but the exhaustive ones; test-all: every test

PYTHON := $(or $(FRUGAL_VENV),.venv)/bin/python

.PHONY: check format test test-all bench setup

check: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	bash scripts/run_tests.sh fast

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	bash scripts/run_tests.sh

test-all:
	bash scripts/run_tests.sh all

bench: setup
	$(PYTHON) -m benchmarks.bench_data
	$(PYTHON) -m benchmarks.bench_prepare
	$(PYTHON) -m benchmarks.bench_pretraining
	$(PYTHON) -m benchmarks.bench_glue
	$(PYTHON) -m benchmarks.bench_clm
	$(PYTHON) -m benchmarks.bench_loss_memory
	$(PYTHON) -m benchmarks.bench_optimizers
	$(PYTHON) -m benchmarks.bench_memory
	$(PYTHON) -m benchmarks.bench_pipeline --loss_steps 300
	$(PYTHON) -m benchmarks.bench_offload
	$(PYTHON) -m benchmarks.bench_time_to_loss

setup:
	@bash scripts/setup.sh --dev
