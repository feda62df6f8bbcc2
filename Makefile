# `make` alone lists what can be made. Everything is installed into .venv, once.

PYTHON ?= python3
BIN := .venv/bin
# One stamp for each set of extras; `dev` includes what `quickstart` needs.
USER_READY := .venv/ready-report-data
DEV_READY := .venv/ready-dev

.DEFAULT_GOAL := help
.PHONY: help quickstart test distributed faults check format lint imports types benchmark lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(USER_READY)  ## train a small GPT on this machine, offline, and open its report
	$(BIN)/overnight quickstart

test: $(DEV_READY)  ## the whole test suite, on the CPU and without a network
	$(BIN)/pytest -q

# One test at a time: each keeps two to four processes busy.
distributed: $(DEV_READY)  ## the long tests of runs in several processes
	$(BIN)/pytest -q -n0 -m distributed

# One part at a time, as above. The tests leave each part's table in pytest's cache.
faults: $(DEV_READY)  ## the fault campaigns (half an hour); writes docs/reliability.md
	$(BIN)/pytest -q -n0 -m campaign
	$(BIN)/python tools/figures.py docs/reliability.md .pytest_cache/d/figures --command "make faults"

check: format lint imports types test  ## everything that a change must pass

format: $(DEV_READY)  ## check the format; `ruff format .` corrects it
	$(BIN)/ruff format --check .

lint: $(DEV_READY)  ## ruff's rules
	$(BIN)/ruff check .

imports: $(DEV_READY)  ## import-linter: which folder may import which
	$(BIN)/lint-imports

types: $(DEV_READY)  ## mypy in strict mode
	$(BIN)/mypy

# Folders, each of them optional: PEER of build-nanogpt, NANOGPT, LLMC, BPE of GPT-2's vocabulary; SHAKESPEARE
# is the text. llm.c steps at the size that its own program has: at 1,024 tokens a step takes it a minute.
VOCABULARY = $(if $(BPE),--bpe "$(BPE)")
CHECKOUTS = $(if $(PEER),--peer "$(PEER)") $(if $(NANOGPT),--nanogpt "$(NANOGPT)")
benchmark: $(DEV_READY)  ## measure speed against peers; see benchmarks/README.md
	$(BIN)/python benchmarks/train_step.py $(CHECKOUTS) $(VOCABULARY) --steps 4 --warm-ups 2
	$(if $(LLMC),$(BIN)/python benchmarks/train_step.py --llmc "$(LLMC)" $(VOCABULARY) --sides overnight llm.c \
		--rows 4 --context 64)
	$(BIN)/python benchmarks/evaluate.py $(CHECKOUTS) $(VOCABULARY)
	$(if $(SHAKESPEARE),$(BIN)/python benchmarks/shakespeare.py --text "$(SHAKESPEARE)" --repeats 1 \
		$(if $(NANOGPT),--nanogpt "$(NANOGPT)"))
	$(BIN)/python benchmarks/generate.py --repeats 3
	$(BIN)/python benchmarks/startup.py --repeats 3
	$(BIN)/python benchmarks/prepare.py $(VOCABULARY)
	$(BIN)/python benchmarks/stream.py

lock: $(DEV_READY)  ## write constraints.txt from what is installed in .venv
	$(BIN)/python tools/lock.py > constraints.new && mv constraints.new constraints.txt

clean:  ## remove the environment and every cache; runs/ and data/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
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
