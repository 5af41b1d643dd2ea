# make quickstart | test | test-all | fuzz | docs | lint | lock | prepare-setup | test-prepare
# (PYTHON=python3.12 chooses the interpreter)
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do $$python -c '' 2>/dev/null && echo $$python && break; done)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
ifeq ($(filter lock clean,$(MAKECMDGOALS))$(wildcard requirements/py$(VERSION).txt),)
$(error $(PYTHON) is Python "$(VERSION)", which has no lock under requirements/; choose one with PYTHON=python3.11 or PYTHON=python3.12)
endif
VENV ?= .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
# One stamp per interpreter: another interpreter gets a new environment.
STAMP := $(VENV)/.installed-py$(VERSION)
LOCK := requirements/py$(VERSION)

.PHONY: setup quickstart test-setup test test-all fuzz docs prepare-setup test-prepare lint lock clean

setup: $(STAMP)

# Dependencies of prediction, training and retrieval.
$(STAMP): setup.py $(LOCK).txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP) -r $(LOCK).txt
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# The same environment, with the dependencies of the tests at the same versions.
test-setup: $(STAMP)-test

$(STAMP)-test: $(STAMP) $(LOCK)-test.txt
	$(BIN)/python $(PIP) -r $(LOCK)-test.txt
	touch $@

quickstart: $(STAMP)
	$(BIN)/gemma-encoder train --config=quickstart --workdir=runs/quickstart

test: $(STAMP)-test
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile -m "not slow"

test-all: $(STAMP)-test
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

# Damages small files of every kind and reads them; a table of outcomes, exit code 1 for a fault.
# COUNT=20000 tries more cases, FIRST=10000 other ones, SEED=1234 repeats one.
COUNT ?= 10000
FIRST ?= 0
fuzz: $(STAMP)-test
	$(BIN)/python -m tests.fuzz --count=$(COUNT) --first=$(FIRST) $(if $(SEED),--seed=$(SEED))

# The pages under docs/ and the API reference, with warnings as errors, in
# docs/_build/html/index.html.
docs: $(STAMP)-test
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Apache Beam needs other versions of some packages than training, hence an environment and a lock
# of its own.
prepare-setup: .venv-prepare/.installed-py$(VERSION)

.venv-prepare/.installed-py$(VERSION): setup.py $(LOCK)-prepare.txt
	$(PYTHON) -m venv --clear .venv-prepare
	.venv-prepare/bin/python $(PIP) -r $(LOCK)-prepare.txt
	.venv-prepare/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

test-prepare: prepare-setup
	.venv-prepare/bin/python -m pytest tests/test_prepare.py

lint: $(STAMP)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Locks for each Python, from setup.py and requirements/constraints.txt: first the dependencies of
# the tests, then those of training at the same versions. Needs uv, which resolves for a Python
# that is not installed.
COMPILE = uv pip compile setup.py --python-version $$version --python-platform x86_64-manylinux_2_31 --no-annotate \
  --custom-compile-command "make lock" --upgrade --quiet --constraint requirements/constraints.txt
lock:
	for version in 3.11 3.12; do \
	  to=requirements/py$$(echo $$version | tr -d .); \
	  $(COMPILE) --extra test --output-file $$to-test.txt && \
	  $(COMPILE) --extra train --extra tfds --extra retrieval --constraint $$to-test.txt --output-file $$to.txt && \
	  $(COMPILE) --extra test --extra prepare --output-file $$to-prepare.txt || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-prepare docs/_build docs/api build *.egg-info .pytest_cache .ruff_cache .hypothesis .fuzz
