# make demo   train on synthetic bone X-rays, end with test scores and a report
# make test   lint, types, tests and parity tests
# make stress the long form of the fault tests: 200 kills, 50 signals, full disks, damage, fuzzing (half an hour)
# make bench  every figure of docs/performance.md, on a machine that does nothing else (an hour and a half)
# make venv   only the environment
# Everything is plain pip underneath: see README.md.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: venv demo test lint types unit parity stress bench clean

venv: .venv/installed
demo: .venv/installed
	$(BIN)/python -m pdrunet_jax.train --config phantom

test: lint types unit parity

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
types: .venv/installed-dev
	$(BIN)/mypy
unit: .venv/installed-dev
	$(BIN)/python -m pytest tests -n 2 --dist loadfile
parity: .venv/installed-dev
	$(BIN)/python -m pytest parity_tests -n 2 --dist loadfile --no-loadscope-reorder
stress: .venv/installed-dev
	STRESS=1 $(BIN)/python -m pytest tests/faults tests/data tests/distributed -n 2 --dist loadfile --timeout 3600
bench: .venv/installed-dev
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m benchmarks

.venv/bin/python:
	$(PYTHON) -m venv .venv
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@
# torch by itself and first: its exact version is what decides which build is taken.
.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable '.[dev]'
	touch .venv/installed $@

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
