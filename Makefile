# Two commands: `make demo` and `make test`. Both go through `make install`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo

# A set variable of this name would have every process compile all modules anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install install-test demo test lint pytest docs bench audit clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

install: $(VENV)/.installed          ## .venv with the command .venv/bin/kvpatch
install-test: $(VENV)/.installed-test ## the same, with what the tests need

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Pinned in constraints.txt; torch is named first so that its pin decides which build is taken.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[run,view]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: install    ## fetch the embedded models, ask both where the mode sits, write the report
	$(BIN)/kvpatch run demo --model smollm2-135m --dtype auto --out $(DEMO)

lint: install-test  ## format, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

test: install-test  ## format, rules, types, and every test that needs no GPU
	@$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: install-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: install-test  ## the documentation as a site, in site/; a warning stops it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install-test  ## benchmarks, as ratios to a named peer measured in the same run
	$(BIN)/python benchmarks/decode.py

# Without --strict a service that knows none of the packages passes as one that knows of no vulnerability.
audit: $(BIN)/python  ## known vulnerabilities of the pinned versions; asks a service
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean:           ## remove the environment and the demo's results
	rm -rf $(VENV) $(DEMO) site
