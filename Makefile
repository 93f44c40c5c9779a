# Every target works on a fresh clone: each begins with `install`, which does nothing when the
# environment is up to date. PYTHON chooses the interpreter that the environment is made with.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
SLIM := $(VENV)/slim
SOURCES := serving adapters training benchmarks deploy tests
UP_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help install up test check lint types imports slim lock bench doctor clean

help:
	@echo 'make install  environment in .venv        make check  lint, types, imports, slim import'
	@echo 'make up       serve the default model     make test   the test suite'
	@echo 'make doctor   what this host lacks        make bench  what the gateway costs'
	@echo 'make lock     new locks after a change of pyproject.toml'

install:
	@$(PYTHON) deploy/install.py

up: install
	@exec $(VENV)/bin/headrace up $(UP_ARGS)

doctor: install
	@$(VENV)/bin/headrace doctor

test: install
	@$(RUN) -m pytest $(TEST_ARGS)

check: lint types imports slim

lint: install
	@$(RUN) -m ruff check $(SOURCES)
	@$(RUN) -m ruff format --check $(SOURCES)

types: install
	@$(RUN) -m mypy
	@MYPYPATH=deploy $(RUN) -m mypy --config-file pyproject.toml deploy/install.py deploy/lock.py deploy/pip_runner.py deploy/slim_check.py

imports: install
	@$(RUN) -m pytest -q tests/test_imports.py

slim:
	@$(PYTHON) deploy/install.py --slim --venv $(SLIM)
	@$(SLIM)/bin/python -I deploy/slim_check.py

lock:
	@$(PYTHON) deploy/lock.py

bench: install
	@$(RUN) -m benchmarks.gateway_cost $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
