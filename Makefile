# Two commands to know: `make demo` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint environment

environment: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=/path/to/it")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: environment
	$(BIN)/python -m jobs.demo jobs/presets/demo.yaml

test: environment
	$(BIN)/python -m pytest

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
