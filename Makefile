# `make` alone lists what can be made. Everything is installed into .venv, once.

PYTHON ?= python3
BIN := .venv/bin
# One stamp per set of extras; `dev` includes what `quickstart` needs, never the other way round.
USER_READY := .venv/ready-report-data
DEV_READY := .venv/ready-dev

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format lint types benchmark lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(USER_READY)  ## train a small GPT on this machine, offline, and open its report
	$(BIN)/overnight quickstart

test: $(DEV_READY)  ## the whole test suite, on the CPU and without a network
	$(BIN)/pytest -q

check: format lint types test  ## everything a change must pass

format: $(DEV_READY)  ## is the code formatted? (ruff format . mends it)
	$(BIN)/ruff format --check .

lint: $(DEV_READY)  ## ruff's rules
	$(BIN)/ruff check .

types: $(DEV_READY)  ## mypy, strictly
	$(BIN)/mypy

benchmark: $(DEV_READY)  ## measure speed; PEER= folder of build-nanogpt, BPE= folder of GPT-2's vocabulary
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/prepare.py $(if $(BPE),--bpe "$(BPE)")
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/train_step.py $(if $(PEER),--peer "$(PEER)") $(if $(BPE),--bpe "$(BPE)")

lock: $(DEV_READY)  ## write constraints.txt from what is installed in .venv
	$(BIN)/python tools/lock.py > constraints.new && mv constraints.new constraints.txt

clean:  ## remove the environment and every cache; runs/ and data/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "overnight needs Python 3.11, 3.12 or 3.13; say which with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

$(USER_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report,data]'
	@touch $@

$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(USER_READY)
