# Every target is plain pip, pytest and ruff underneath: see README.md and CONTRIBUTING.md.

PYTHON ?= python3
# Index to install torch from; empty takes pip's own settings. https://download.pytorch.org/whl/cpu has builds for CPUs.
TORCH_INDEX ?=
# Anything takes a torch with CUDA libraries (several GB), which otherwise is for machines with an NVIDIA GPU.
TORCH_CUDA ?= $(wildcard /proc/driver/nvidia)
TORCH = $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv dev demo web test lint types unit parity stress gpu-check lowest newest bench clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/installed  ## Create .venv with the package and its required dependencies
dev: .venv/installed-dev  ## Add what tests, linting and types need

demo: .venv/installed  ## Train on synthetic bone X-rays; ends with test scores and a report (2 minutes)
	$(BIN)/python -m pdrunet_jax.train --config phantom

web: pdrunet_jax/export/page.html  ## Build the page for export --format html, and test its modules (Node.js 20 or later)
	cd web && npm test

test: lint types unit parity  ## Lint, types, tests and parity tests

lint: .venv/installed-dev  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev  ## Check types
	$(BIN)/mypy

unit: .venv/installed-dev  ## Run the tests without the parity tests
	$(PYTEST) tests

parity: .venv/installed-dev  ## Compare with PyTorch and print the error budget
	$(PYTEST) parity_tests

stress: .venv/installed-dev  ## Run the long form of the tests: 200 kills, 50 signals, full disks, damage, fuzzing
	$(PYTEST) tests/faults tests/data tests/predict tests/distributed tests/export --stress --timeout 3600

gpu-check: .venv/installed-dev  ## Compile for NVIDIA GPUs that are not there, and check the programs (4 minutes, Linux x86-64)
	@version=$$(sed -n 's/^jaxlib==//p' constraints.txt); \
	if [ -d .gpu/jax_plugins ] || $(PIP) --no-deps --target .gpu "jax-cuda12-pjrt==$$version" "jax-cuda12-plugin==$$version"; \
	then PYTHONPATH=.gpu $(BIN)/python -m gpu_check; \
	else rm -rf .gpu; echo "gpu-check skipped: no wheels of jax-cuda12-pjrt and jax-cuda12-plugin $$version for this machine"; fi

lowest newest:  ## Try the lowest (newest) versions that pyproject.toml allows, in an environment of their own (3 minutes)
	.ci/try-versions $@ $(PYTHON)

bench: .venv/installed-dev  ## Measure every figure of docs/performance.md on an otherwise idle machine (1.5 hours)
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m benchmarks

clean:  ## Delete .venv, builds and caches
	rm -rf .venv .gpu build dist web/node_modules pdrunet_jax/export/page.html .mypy_cache .pytest_cache .ruff_cache .hypothesis

web/node_modules/.package-lock.json: web/package.json web/package-lock.json
	@command -v npm >/dev/null || { echo "make web needs Node.js 20 or later, with npm: https://nodejs.org"; exit 1; }
	cd web && npm ci --no-audit --no-fund
pdrunet_jax/export/page.html: web/node_modules/.package-lock.json web/build.js web/NOTICES.txt $(shell find web/src -type f)
	cd web && npm run --silent build -- ../$@
.venv/bin/python:
	$(PYTHON) -m venv .venv
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@
# torch first and on its own: its exact version decides which build pip picks.
.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	@$(TORCH) --dry-run --no-deps --report .venv/torch.json
	@if [ "$$(uname)" = Linux ] && [ -z "$(TORCH_CUDA)" ] && grep -Eq '"(nvidia|cuda)-' .venv/torch.json; then \
	echo "torch would bring several GB of CUDA libraries, and this machine has no NVIDIA GPU. Add to the command"; \
	echo "  TORCH_INDEX=https://download.pytorch.org/whl/cpu    for a build without them, or"; \
	echo "  TORCH_CUDA=1                                        to take it all the same"; exit 1; fi
	$(TORCH)
	$(PIP) --editable '.[dev]'
	touch .venv/installed $@
