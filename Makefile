# Everything runs in .venv, which is made from constraints.txt on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check setup clean

demo: setup  ## the main job, end to end on drawn shapes
	$(BIN)/python -m trainer.demo

test: setup  ## all tests
	$(BIN)/pytest

check: setup  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo
