# make demo: set-up and the main job.  make test: set-up and the whole test suite.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN = $(VENV)/bin
# Idle OpenMP threads that spin slow everything else on a small machine.
export KMP_BLOCKTIME ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test lint docs
install: $(VENV)/.installed
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	touch $@

demo: install
	PATH="$(abspath $(BIN)):$$PATH" bash benchmark/demo.sh

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: install
	$(BIN)/python docs/generate.py
