# Two commands do everything on a machine with Python 3.11 or later and make:
#   make compare   trains and compares the models on embedded data; writes report/index.html
#   make test      runs the tests
# Both make a virtual environment in .venv first. Variables: PYTHON, VENV, ARGS (more arguments for the command that is run).

VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN    := $(VENV)/bin
ARGS   ?=

# Waiting threads sleep: many small products on a busy machine stall if they spin.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help compare test lint format clean

help:
	@echo "make compare   train and compare the models on embedded data; write report/index.html"
	@echo "make test      run the tests"
	@echo "make lint      check style and types"
	@echo "make format    rewrite the code in the project's style"
	@echo "make clean     remove what the commands above made"

compare: $(VENV)/installed
	$(BIN)/probllm compare --small $(ARGS)

# A worker for each core, and one thread for each worker.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) report runs dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps: installed again only when what is to be installed changed.
$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing probllm into $(VENV); the first time this takes some minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[data,plots]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "probllm needs Python 3.11 or later; none was found. Say which: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
