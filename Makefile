# make demo         four ranks train a Keras 3 model on real data
# make test         lint and all tests
# make test-fast    lint and the quick tests of those that start no ranks
# All make .venv, install hvdext and build Horovod first; a second run installs nothing.
# Another Python:  make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.hvdext-installed

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Hundreds of processes import the package and its tests: compiled once, not by each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo bench gpu-check test test-fast test-plain test-peers unit lint format engine doctor clean distclean

help:
	@echo "make demo         four ranks train a Keras 3 model on real data"
	@echo "make test         lint and all tests"
	@echo "make test-fast    lint and the quick tests of those that start no ranks"
	@echo "make test-plain   all tests that start no ranks, with graphs built as for users: for once a week"
	@echo "make test-peers   Horovod's and Keras' own tests: needs HOROVOD_SOURCE, a checkout of Horovod's repository"
	@echo "make bench        what docs/measured.md says, measured here; SUITE=full: beside peers"
	@echo "make gpu-check    on a machine with a GPU: what works there, as a table; PRETEND=--pretend: on CPUs"
	@echo "make lint | format | engine | doctor | clean | distclean"

demo: engine
	TF_CPP_MIN_LOG_LEVEL=3 horovodrun -np 4 python examples/train.py

# Tests with threads share the cores; those that start ranks have them for themselves.
test: lint unit
	python -m pytest -m multiprocess

test-fast: lint engine
	python -m pytest -m "not multiprocess and not slow" --numprocesses 2

unit: engine
	python -m pytest -m "not multiprocess" --numprocesses 2

test-plain: engine
	python -m pytest -m "not multiprocess" --numprocesses 2 --plain

# Some minutes, on a machine that does nothing else; SUITE=full also measures peers, and takes hours.
SUITE ?= quick
bench: engine
	python benchmarks/suite.py --suite $(SUITE)

gpu-check: engine
	python benchmarks/gpu_check.py $(PRETEND)

# Not a part of make test: tests of others, some of a checkout that is not part of this project.
test-peers: engine
	python -m tests.peers.keras_tests
	python -m tests.peers.horovod_tests

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	python -m pytest --noconftest --quiet tests/unit/test_rooms.py
	mypy

format: $(INSTALLED)
	ruff format .
	ruff check --fix .

# Without a stamp: the command finds out by itself, in a fraction of a second, whether the installed
# engine fits the installed TensorFlow.
engine: $(INSTALLED)
	@hvdext build-horovod

doctor: engine
	@hvdext doctor

$(INSTALLED): setup.cfg setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v < (3, 14) or sys.exit( \
	  "PYTHON must be 3.10 to 3.13. Received: %d.%d. Try: make PYTHON=python3.12" % v[:2])'
	@test ! -x $(VENV)/bin/python || $(PYTHON) -c 'import subprocess, sys; \
	  had = subprocess.check_output(["$(VENV)/bin/python", "-c", "import sys; print(sys.version_info[:2])"], text=True); \
	  had.strip() == str(sys.version_info[:2]) or sys.exit( \
	  "$(VENV) holds another Python: %s. Run make distclean first." % had.strip())'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check --editable '.[examples,tests]'
	@touch $@

clean:
	rm -rf build dist hvdext.egg-info .pytest_cache .ruff_cache .mypy_cache
	find hvdext tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Finished engines stay in the user's cache folder, so the next set-up is quick.
distclean: clean
	rm -rf $(VENV)
