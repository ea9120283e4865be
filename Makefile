# make demo | test | test-slow | test-peers | lint, each with an environment of its own for each PYTHON.
PYTHON ?= python3
VENV ?= .venv/$(notdir $(PYTHON))
BIN = $(VENV)/bin
SEED ?= 0
FLAGS ?=
OUTPUT ?= runs/demo

.PHONY: demo test test-slow test-peers lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m tools.demo --output=$(OUTPUT) --seed=$(SEED) $(FLAGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

test-peers: $(VENV)/peers.stamp
	$(BIN)/python -m pytest -m peers

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The package and one extra, again whenever what it needs has changed.
$(VENV)/%.stamp: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

$(VENV)/peers.stamp: $(VENV)/dev.stamp

clean:
	rm -rf .venv runs build *.egg-info
