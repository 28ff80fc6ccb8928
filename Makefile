# make train CONFIG=configs/v1_20.py ARGS='--config.epochs=2'
CONFIG ?= configs/digits.py
ARGS ?=
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= -n auto --maxprocesses 4 --dist worksteal

.PHONY: setup setup-dev train test test-fast lint format clean

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements.txt requirements-dev.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $(VENV)/.ready $@

train: setup
	$(VENV)/bin/python -m resnet_jax.main --config=$(CONFIG) $(ARGS)

test: setup-dev
	$(VENV)/bin/python -m pytest $(WORKERS) $(ARGS)

test-fast: setup-dev
	$(VENV)/bin/python -m pytest $(WORKERS) -m "not slow" $(ARGS)

lint: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck launch/tpu_vm.sh launch/tpu_worker.sh launch/slurm.sbatch

format: setup-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
