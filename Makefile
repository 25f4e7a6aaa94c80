# Every target works on a machine that has only Python 3.11+, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install up down test test-fast test-gpu test-cluster cluster-programs cluster cluster-down lint soak bench bench-gpu bench-sim clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# The stamp makes a second `make` cost nothing; it is older than pyproject.toml when dependencies changed.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[control,worker,dev,plot]'
	-@$(BIN)/python -m lanewise.kernels.cpu_build  # else the first worker does it while somebody waits
	@touch $@

install: $(VENV)/.installed  ## make .venv with everything in it

up: install  ## serve the built-in model: router + 1 prefill worker + 1 decode worker (Ctrl-C stops)
	$(BIN)/lanewise up $(ARGS)

down: install  ## stop a detached `lanewise up --detach`
	$(BIN)/lanewise down

lint: install  ## ruff, mypy --strict, layer contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install lint cluster-programs  ## everything that guards a merge
	$(BIN)/pytest -m 'not slow'

test-fast: install lint  ## without real processes
	$(BIN)/pytest -m 'not slow and not e2e and not chaos and not cluster'

test-gpu: install  ## kernels, graphs and ranks on the GPU that is here; without one they run in `make test`, interpreted
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU here")'
	$(BIN)/pytest -m gpu -W default $(ARGS)

test-cluster: install cluster-programs  ## on a real Kubernetes, which is built once and started here (Linux as root)
	$(BIN)/pytest -m 'cluster and not slow' $(ARGS)

# Nothing to do, and no failure, where no cluster can be started: the tests skip there and say why.
cluster-programs: install
	@$(BIN)/python -m tests.cluster.kube build --if-possible

cluster: install  ## leave a Kubernetes with the operator running; prints its kubeconfig
	@$(BIN)/python -m tests.cluster.kube up $(ARGS)

cluster-down: install  ## end what `make cluster` left running, with every trace of it
	@$(BIN)/python -m tests.cluster.kube down $(ARGS)

soak: install  ## long chaos, fuzz and load
	$(BIN)/pytest -m slow

bench: bench-sim  ## measurements; never part of the tests
	$(BIN)/python benchmarks/router_overhead.py
	$(BIN)/python benchmarks/kv_channel.py
	$(BIN)/python benchmarks/kernels.py
	-$(BIN)/python benchmarks/scaling_table.py

bench-gpu: install  ## the table of docs/performance.md for a GPU: ARGS='--shape 32b --json gpu.json'
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-sim: install  ## the scheduling tables of docs/scheduling.md
	-$(BIN)/python benchmarks/sim_table.py

clean:  ## remove everything that was made here
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
