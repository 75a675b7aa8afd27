# genfw: `make run` trains and shows the default model, `make test` checks everything.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: help env run grid smoke test check fid-check peers clean faults
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

grid: env  ## the comparison: vae, mhvae, and vdm with 3 parameterizations x 2 schedules, two jobs side by side
	$(BIN)/python -m genfw --multirun 'experiment=glob(grid_*)' hydra.launcher.n_jobs=2 $(ARGS)

smoke: env  ## a few steps of every model x parameterization x schedule
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/smoke.py

test: env  ## all tests and doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

faults: env  ## ten kills of each model at each moment, and signals, on one rank and two: ten minutes; goes on where it was stopped
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/faults.py $(ARGS)

check: env  ## formatting, lint, types, doctests, import laws
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q genfw tests/test_imports.py

# torchvision must be the one built for torch, so FID by Inception has an environment of its own (5.8 GB on x86_64).
FID_TORCH := $(if $(filter aarch64,$(shell uname -m)),torch==2.9.1 torchvision==0.24.1,torch==2.14.1 torchvision==0.29.1)
.venv-fid/ready: constraints.txt
	$(PYTHON) -m venv .venv-fid
	.venv-fid/bin/python -m pip install --quiet $(FID_TORCH)
	.venv-fid/bin/python -m pip install --quiet -c <(grep -v '^torch==' constraints.txt) $(FID_TORCH) \
	  torch-fidelity==0.4.0 lightning torchmetrics hydra-core wandb jaxtyping matplotlib safetensors \
	  scikit-learn datasets rich filelock
	.venv-fid/bin/python -m pip install --quiet --no-deps -e .
	touch $@

fid-check: .venv-fid/ready  ## FID end to end on random Inception weights, in an environment of its own
	.venv-fid/bin/python benchmarks/fid_check.py

.venv-peers/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	.venv-peers/bin/python -m pip install --quiet -c constraints.txt -e '.[test]' cloudpickle imageio pydantic opt_einsum tqdm
	.venv-peers/bin/python -m pip install --quiet --no-deps pythae==0.1.2 pyro-ppl==1.9.2 pyro-api==0.1.2
	touch $@

peers: .venv-peers/ready  ## speed beside Pythae, Pyro and diffusers, in an environment of its own
	OMP_NUM_THREADS=1 .venv-peers/bin/python benchmarks/peers.py $(ARGS)

clean:  ## remove what was made (not runs)
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache
