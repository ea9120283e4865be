# Each target installs what it needs into .venv/PYTHON first.
PYTHON ?= python3
VENV ?= .venv/$(notdir $(PYTHON))
BIN = $(VENV)/bin
SEED ?= 0
FLAGS ?=
KILLS ?= 20
STOPS ?= 6
EXAMPLES ?= 200
OUTPUT ?= runs/demo

.PHONY: help demo test test-slow test-peers test-gpu nvidia-gpu test-faults lint docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## train and compare CLM, random and SLM on a small corpus; SEED=, OUTPUT=, FLAGS=
	$(BIN)/python -m tools.demo --output=$(OUTPUT) --seed=$(SEED) $(FLAGS)

test: $(VENV)/dev.stamp ## run the fast tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/dev.stamp ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-peers: $(VENV)/peers.stamp ## compare with PyTorch and Transformers
	$(BIN)/python -m pytest -m peers

test-gpu: nvidia-gpu $(VENV)/dev.stamp $(VENV)/cuda.stamp ## compare an NVIDIA GPU with the CPU
	TEST_ON_GPU=1 $(BIN)/python -m pytest -m gpu

nvidia-gpu:
	@nvidia-smi --list-gpus > /dev/null 2>&1 || { echo "make test-gpu: no GPU: these tests did not run" >&2; exit 1; }

test-faults: $(VENV)/dev.stamp ## kill and stop commands at random moments, and fuzz; SEED=, KILLS=, STOPS=, EXAMPLES=
	HYPOTHESIS_PROFILE=faults HYPOTHESIS_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -k fuzz
	$(BIN)/python -m tools.faults --seed=$(SEED) --kills=$(KILLS) --stops=$(STOPS)

lint: $(VENV)/dev.stamp ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/docs.stamp ## build the documentation into site/
	$(BIN)/mkdocs build --strict

# Installs the package with one extra, and again when the requirements change.
$(VENV)/%.stamp: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

$(VENV)/peers.stamp: $(VENV)/dev.stamp

clean: ## delete environments, runs and build output
	rm -rf .venv runs build site *.egg-info
