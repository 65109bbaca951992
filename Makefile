# Every target makes the environment it needs in $(VENV), with the versions of constraints.txt.
#   make demo    tune attention on this machine and run a real encoder with it
#   make test    lint, then all tests that need no accelerator
#   make lint    ruff, mypy (strict), the layers contract
#   make bench   the short comparisons: JSON and a picture in out/
#   make clean   remove the environment and everything built

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

# A thread that spins after a torch call takes the core from the kernel that follows it.
export OMP_WAIT_POLICY ?= passive
export TVM_THREAD_POOL_SPIN_COUNT ?= 1000

.PHONY: help demo test lint bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,6s/^# *//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else "einfall needs Python 3.10 to 3.13, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	@echo "==> environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# Which extras are installed is remembered in a file beside them.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing einfall[$*]"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet -c constraints.txt -e ".[$*]"
	@touch $@

test: lint
	@echo "==> tests"
	$(BIN)/python -m pytest -n $(JOBS)

# mypy sees the package under its own name, whatever the checkout is called.
lint: $(VENV)/.installed-test,models
	@echo "==> ruff"
	$(BIN)/ruff check .
	@echo "==> mypy"
	@mkdir -p $(VENV)/named && ln -sfn "$(CURDIR)" $(VENV)/named/einfall
	cd $(VENV)/named && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" einfall
	@echo "==> layers"
	$(BIN)/lint-imports --config pyproject.toml

demo: $(VENV)/.installed-models,plots
	$(BIN)/python cookbook/minilm/demo.py

bench: $(VENV)/.installed-plots
	$(BIN)/python benchmarks/cpu.py
	@echo "==> overhead"
	@mkdir -p out
	$(BIN)/python benchmarks/overhead.py | tee out/overhead.json

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
