# Every target sets up what it needs, in $(VENV), once. Override: make test VENV=path TORCH="torch==2.11.0" PYTHON=python3.12
PYTHON ?= python3
VENV   ?= .venv
# A torch already in $(VENV) is kept. Without a GPU, this pin gives a CPU build where one is at hand.
TORCH  ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 'torch>=2.6' || echo 'torch==2.13.0')
# CUDA builds of torch bring their own triton. Beside a CPU build this one, which needs no driver, runs and compiles the kernels
# for the tests; the table of the compile gate was made with it.
TRITON ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo 'triton==3.6.0')
# Without a GPU nobody would call the CUDA module: the gate of the tests compiles the same kernels, for the same architectures.
export UNIKE_BUILD_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0)
PYTEST_ARGS ?= -n 2 --dist loadfile

PY := $(VENV)/bin/python

# One thread per process that sleeps when idle: two processes that spin on two cores are thirty times slower.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo bench test lint format clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.ready-all ## edit a small multimodal model on the CPU and print what changed
	$(PY) -m bench.quality.demo

bench: $(VENV)/.ready-all ## time the operators and whole decoders against what torch can do
	$(PY) -m bench.latency.run

test: lint ## lint, then run the tests
	$(PY) -m pytest -q $(PYTEST_ARGS)

lint: $(VENV)/.ready-test ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.ready-test ## rewrite the code in the house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove builds and caches (keeps $(VENV))
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# .ready-EXTRA: $(VENV) has torch and this package with that extra. The constraint makes pip fail rather than replace torch.
$(VENV)/.ready-%: pyproject.toml setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer, please: make PYTHON=python3.12")'
	$(PY) -m pip --version 2>/dev/null || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install $(foreach word,$(TORCH),'$(word)')
	$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	$(PY) -m pip install -qq --constraint $(VENV)/torch.txt --editable '.[$*]'
	$(if $(TRITON),$(if $(filter test,$*),$(PY) -m pip install -qq $(TRITON)))
	touch $@
