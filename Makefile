# Everything runs in .venv, which is made from constraints.txt on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-fast check setup clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup  ## draw shapes, train on them, and generate images of captions that training has not seen
	$(BIN)/python -m trainer.demo

test: setup  ## all tests, in two processes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-fast: setup  ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile

check: setup  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: .venv/.done  ## install everything into .venv

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## delete .venv and the demo
	rm -rf .venv demo
