# Each target only wraps commands that docs/quickstart.md and docs/contributing.md show.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m codebook_jax.main --workdir=runs/demo

.PHONY: demo docs lint test test-all

# Trains the tiny CODIS on the built-in scenes, exports it, prints the retrieval table and writes a report.
demo: $(VENV)/.installed
	$(RUN) --config=configs/base.py:tiny
	$(RUN) --mode=export
	$(RUN) --mode=eval
	$(RUN) --config=configs/base.py:tiny --mode=report

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "codebook_jax needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

$(VENV)/.for-tests: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet -e .[test]
	touch $@

test: $(VENV)/.for-tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/.for-tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.for-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/rumdl check --no-cache README.md docs launch/README.md

# The documentation site, in build/site.
docs: $(VENV)/.for-tests
	$(VENV)/bin/python -m mkdocs build --strict
