# Everything runs in .venv; `make demo` and `make test` set it up on a fresh machine.
# TORCH_INDEX: where to take torch from, such as https://download.pytorch.org/whl/cpu (its +cpu outranks PyPI's build;
# PyPI stays beside it, since that index need not hold the pinned versions of torch's own dependencies).
# EXTRAS: beside what the commands need: dev (tests and linters), data (Minari), export (ONNX), pipelines (diffusers,
# which dev has too), or nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,data,export
# Test files side by side, one file in one process: they share fixtures, and each uses one thread.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile
comma := ,
STAMP := $(VENV)/.sightline-installed-$(subst $(comma),-,$(EXTRAS))
TORCH := $(VENV)/.torch-installed

# Debian's packages: Mesa's software GL; and all that a bare system lacks.
GL_PACKAGES := libegl1 libgl1 libgl1-mesa-dri libosmesa6
PACKAGES := python3 python3-venv $(GL_PACKAGES)
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

.PHONY: help setup torch gl packages demo policy-demo generator-demo test test-all lint format speed clean

help:
	@echo "make demo      train SGQN on cartpole-swingup from pixels, evaluate under distractions, write the report"
	@echo "make policy-demo  imitate a script of Meta-World from pixels, fine-tune with DPPO, compare before and after"
	@echo "make generator-demo  pretrain an image generator on drawn shapes, fine-tune it with Flow-GRPO, write the report"
	@echo "make test      the tests (minutes)"
	@echo "make test-all  slow learning and resume tests too"
	@echo "make lint      ruff, mypy, import-linter"
	@echo "make speed     benchmark tables of every hot path"
	@echo "make setup     only install: virtual environment, pinned packages, GL check"
	@echo "make packages  as root on a bare Debian: what the others need of the system"

setup: $(STAMP) gl

torch: $(TORCH)

$(TORCH): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sightline needs Python 3.11 or newer; run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(STAMP): pyproject.toml constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

packages:
	apt-get update -qq
	$(APT_INSTALL) $(PACKAGES)

# A headless GL backend: EGL, else OSMesa; where neither is there, install Mesa's, or say what to install.
gl: $(STAMP)
	@$(BIN)/python -W ignore -m envs.rendering || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing Mesa's software GL"; \
	    apt-get update -qq && $(APT_INSTALL) $(GL_PACKAGES); \
	  fi; \
	  $(BIN)/python -W ignore -m envs.rendering; }

demo: setup
	$(BIN)/python -m experiments.demo

policy-demo: setup
	$(BIN)/python -m experiments.policy_demo

generator-demo: $(STAMP)
	$(BIN)/python -m experiments.generator_demo

test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

speed: setup
	$(BIN)/python -m experiments.speed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
