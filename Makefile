# make quickstart | test | test-all | prepare-setup | test-prepare | lint | lock    (PYTHON=python3.12 chooses the interpreter)
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do $$python -c '' 2>/dev/null && echo $$python && break; done)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
ifeq ($(filter lock clean,$(MAKECMDGOALS))$(wildcard requirements/py$(VERSION).txt),)
$(error $(PYTHON) is Python "$(VERSION)", which has no lock under requirements/; choose one with PYTHON=python3.11 or PYTHON=python3.12)
endif
VENV ?= .venv
BIN := $(VENV)/bin
# One stamp per interpreter: choosing another one makes the environment anew.
STAMP := $(VENV)/.installed-py$(VERSION)
LOCK := requirements/py$(VERSION).txt

.PHONY: setup quickstart test test-all prepare-setup test-prepare lint lock clean

setup: $(STAMP)

$(STAMP): setup.py $(LOCK)
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

quickstart: $(STAMP)
	$(BIN)/python -m gemma_encoder.main --config=experiments/quickstart.py --workdir=runs/quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

# Apache Beam needs other versions of some packages than training: it has an environment and a lock of its own.
prepare-setup: .venv-prepare/.installed-py$(VERSION)

.venv-prepare/.installed-py$(VERSION): setup.py requirements/py$(VERSION)-prepare.txt
	$(PYTHON) -m venv --clear .venv-prepare
	.venv-prepare/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/py$(VERSION)-prepare.txt
	.venv-prepare/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

test-prepare: prepare-setup
	.venv-prepare/bin/python -m pytest tests/test_prepare.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Locks for each Python, from setup.py and requirements/constraints.txt. Needs uv, which resolves for a Python that is not installed.
lock:
	for version in 3.11 3.12; do for kind in "" -prepare; do \
	  uv pip compile setup.py --extra test $${kind:+--extra prepare} --constraint requirements/constraints.txt \
	    --python-version $$version --python-platform x86_64-manylinux_2_31 --no-annotate --custom-compile-command "make lock" --upgrade --quiet \
	    --output-file requirements/py$$(echo $$version | tr -d .)$$kind.txt || exit 1; \
	done; done

clean:
	rm -rf $(VENV) .venv-prepare build *.egg-info .pytest_cache .ruff_cache .hypothesis
