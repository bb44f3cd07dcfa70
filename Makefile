# Everything runs in .venv, which the first command makes (Python 3.11 or 3.10) and later ones reuse.
.DEFAULT_GOAL := help
.PHONY: help demo test bench lint venv
SHELL := bash

VENV := .venv
RUN := PYTHONPATH=lib $(VENV)/bin/python -m
# The stamp's name changes with what is required, so that .venv follows.
STAMP := $(VENV)/.installed-$(shell cat requirements.txt requirements-dev.txt pyproject.toml | sha256sum | cut -c1-16)

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1|/' | awk -F'|' '{printf "make %-7s %s\n", $$1, $$2}'

demo: $(STAMP) ## play the loop on sample data; ARGS=--once stops the server afterwards
	@$(RUN) samadapt demo $(ARGS)

# Tests that train for minutes on a real server have the machine to themselves; the others share it, a core each.
test: lint ## ruff, mypy and all tests; with ARGS, which go to pytest, those that they choose
ifeq ($(ARGS),)
	@result=0; \
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not e2e" -n 2 --dist worksteal || result=1; \
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "e2e and not alone" -n 2 --dist loadfile --no-loadscope-reorder || result=1; \
	$(VENV)/bin/python -m pytest -m alone || result=1; \
	exit $$result
else
	$(VENV)/bin/python -m pytest $(ARGS)
endif

bench: $(STAMP) ## measure on real data in ../shared/data (long); ARGS are passed on
	@$(RUN) samadapt.evaluation.bench $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

venv: $(STAMP) ## make or update .venv

# A python3.11 on PATH may be a shim without a Python behind it, so each candidate has to run.
$(STAMP):
	@set -e; usable='import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))'; \
	if ! $(VENV)/bin/python -c "$$usable" 2>/dev/null; then \
		for python in $(PYTHON) python3.11 python3.10 python3 python; do \
			if "$$python" -c "$$usable" 2>/dev/null; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "samadapt needs Python 3.11 or 3.10 (with venv), and none was found on PATH." >&2; \
			echo "Install one (Debian, Ubuntu: apt-get install python3.11-venv), or say which: make PYTHON=/path/to/python3.11 ..." >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$($$found --version); packages take a few minutes and about 8 GB."; \
		"$$found" -m venv --clear $(VENV); \
	fi; \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt; \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .; \
	rm -f $(VENV)/.installed-*; touch $(STAMP)
