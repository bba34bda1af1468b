# Everything sets itself up: `make serve` in a fresh clone needs Python 3.11 or newer and make, nothing else.
# Variables: ARGS (passed on to the command), EXTRAS (packages beyond the needed ones: cuda; of serve and setup the default
# is what the machine can use), PYTHON, VENV, PYTEST_ARGS, TARGET (of `make load`), KERNEL_ARCHITECTURES (of `make kernels`).

VENV ?= .venv
BIN := $(VENV)/bin
PYTHONS = $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
TARGET ?=
KERNEL_ARCHITECTURES ?= sm_80 sm_90a
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadfile
# Whether there is an NVIDIA driver, and its library can be loaded and speaks CUDA 13, which the packages are made for.
CUDA_DRIVER := import ctypes, sys; version = ctypes.c_int(); \
	sys.exit(ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) or version.value < 13000)
ifeq ($(origin EXTRAS),undefined)
  ifneq ($(filter serve setup,$(MAKECMDGOALS)),)
    EXTRAS := $(shell { test -e /proc/driver/nvidia || command -v nvidia-smi; } >/dev/null && for candidate in $(PYTHONS); do \
      command -v "$$candidate" >/dev/null && { "$$candidate" -c '$(CUDA_DRIVER)' 2>/dev/null && echo cuda; break; }; done)
    ifeq ($(EXTRAS),cuda)
      $(info there is an NVIDIA driver: with the packages for the GPU (EXTRAS= leaves them out))
    endif
  endif
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1

installed = $(patsubst %,$(VENV)/.installed-%,runtime $(EXTRAS) $(1))

.DEFAULT_GOAL := help
.PHONY: help setup models serve test lint bench bench-gpu kernels kernels-all sanitize load dashboards screenshots lock clean
.NOTPARALLEL:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: models  ## .venv with the locked packages, and the default models

models: $(call installed)
	@$(BIN)/python -m models

serve: models  ## the service; on a GPU where there is one; options in ARGS="--port 9000"
	@exec $(BIN)/python -m service $(ARGS)

test: models $(call installed,test load) $(VENV)/.prometheus  ## the tests; PYTEST_ARGS="tests/models -x" for some of them
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(call installed,test load)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

bench: models $(call installed,test)  ## both models on the CPU beside ONNX Runtime; options in ARGS
	$(BIN)/python -m benchmarks cpu --suite models $(ARGS)

bench-gpu: models $(call installed,test cuda)  ## models, kernels, accuracy on the GPU; needs PyTorch, timm and transformers, too
	$(BIN)/python -m benchmarks models $(ARGS)
	$(BIN)/python -m benchmarks packed $(ARGS)
	$(BIN)/python -m benchmarks kernels $(ARGS)
	$(BIN)/python -m benchmarks accuracy $(ARGS)

kernels: $(call installed,kernels)  ## the CUDA kernels compiled for Ampere or Hopper and inspected; needs no GPU
	$(BIN)/python -m engine.targets.cuda.gate --in-turn $(KERNEL_ARCHITECTURES) $(ARGS)

sanitize: $(call installed,test cuda)  ## compute-sanitizer over every kernel on the GPU
	$(BIN)/python -m tests.gpu.sanitize $(ARGS)

kernels-all: $(call installed,kernels)  ## all of them for every architecture
	$(BIN)/python -m engine.targets.cuda.gate $(ARGS)

load: models $(call installed,load)  ## what a server can do: build/load/report.html; of TARGET=http://host:port, or of its own
	$(BIN)/python -m load_tests.capacity $(if $(TARGET),--target $(TARGET)) $(ARGS)

dashboards: $(call installed,test)  ## deploy/grafana/dashboards anew from deploy/grafana/*.py
	$(BIN)/python -m deploy.grafana

screenshots: models $(call installed,test load)  ## docs/page/*.webp anew: the page of a server that runs the default models
	$(BIN)/python -m docs.page

lock: | $(VENV)/.created  ## requirements.lock anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file requirements.lock pyproject.toml

clean:  ## remove .venv, built models, downloads and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis models/.cache
	rm -rf models/*/[0-9]* models/*/labels.txt models/*/tokenizer.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per group of packages: `runtime` are the project's dependencies, the others its extras. The versions
# are those of requirements.lock, whatever pyproject.toml would allow.
REQUIREMENTS := import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	group = sys.argv[1]; \
	print(*(project["dependencies"] if group == "runtime" else project["optional-dependencies"][group]), sep="\n")

$(VENV)/.installed-%: pyproject.toml requirements.lock | $(VENV)/.created
	@echo "installing the $* packages into $(VENV)"
	@$(BIN)/python -c '$(REQUIREMENTS)' $* > $@.txt
	@$(BIN)/python -m pip install --quiet --no-compile --requirement $@.txt --constraint requirements.lock
	@mv $@.txt $@

# For the tests of deploy/. Without it they are skipped, and say so.
$(VENV)/.prometheus: tests/deploy/get-prometheus | $(VENV)/.created
	@tests/deploy/get-prometheus $(VENV)/prometheus && touch $@ || \
		echo "warning: no Prometheus: the tests that need it will be skipped (on Debian: apt install prometheus)" >&2

$(VENV)/.created:
	@for candidate in $(PYTHONS); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making $(VENV) with $$("$$candidate" --version)"; \
			"$$candidate" -m venv --clear $(VENV) && touch $@ && exit 0; \
			rm -rf $(VENV); \
			echo "error: $$candidate cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; \
			exit 1; \
		fi; \
	done; \
	echo "error: Tilewave needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3" >&2; exit 1
