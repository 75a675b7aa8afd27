# genfw: `make run` trains and shows the default model, `make test` checks everything.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: help env run test check docs-check smoke fid-check clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# torch first and by itself, so that nothing pulls another build; constraints.txt pins what was tested.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

env: .venv/ready  ## the environment, in .venv

run: env  ## train the default model on the digits, then the table and the pictures (ARGS="model=vae" for another)
	$(BIN)/python -m genfw $(ARGS)

test: env  ## all tests and doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

check: env  ## formatting, lint, types, doctests, import laws
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q genfw tests/test_imports.py

clean:  ## remove what was made (not runs)
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache
