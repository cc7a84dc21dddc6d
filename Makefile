# Two commands to know: `make demo` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo chat test test-slow lint environment submit cluster cluster-down

environment: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=/path/to/it")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: environment
	$(BIN)/python -m jobs.demo jobs/presets/demo.yaml

# The demo's champion, taught to answer questions; makes the demo first where it is not made yet.
chat: environment
	$(BIN)/python -m jobs.pipeline demo
	$(BIN)/python -m jobs.demo demo-chat

# A file of tests on each of two processes: most of them wait for servers and workers to start.
test: environment
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

# Nodes, drivers and servers killed in the middle; needs PostgreSQL's server and chromium on the machine.
test-slow: environment
	$(BIN)/python -m pytest -m slow

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PRESET is a name (demo) or a path; SET holds more settings: make submit PRESET=demo SET="storage=s3://gpt/artifacts"
submit: environment
	$(BIN)/python -m jobs.submit $(PRESET) $(SET) $(if $(JOB),--job $(JOB))

cluster: environment
	$(BIN)/python -m jobs.cluster up

cluster-down: environment
	$(BIN)/python -m jobs.cluster down
