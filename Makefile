PYTHON ?= python

check:            ## style, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:             ## the default suite, under 4 minutes on 2 cores
	$(PYTHON) -m pytest

test-all:         ## everything this machine can run
	$(PYTHON) -m pytest -m "slow or not slow"

golden:           ## compares with the stored numbers, never rewrites them
	$(PYTHON) -m pytest tests/golden

docs:             ## README tables from conf/
	$(PYTHON) scripts/readme_tables.py

.PHONY: check test test-all golden docs
