# `make demo` and `make test` do all that is needed on a fresh Debian 12 or 13 machine, as root, and can be repeated.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest -q --numprocesses=3

help:
	@echo "make demo      set up this machine and move a Redis between two hosts on it"
	@echo "make unit      only the tests that need neither root nor containers"
	@echo "make system    only the tests with real containers and hosts on this machine, all of them"
	@echo "make test-vm   only the tests between two virtual machines; DEBIAN=12 for Debian 12 in them"
	@echo "make test      set up this machine, check the code and run the tests that the commit's hash draws"
	@echo "make test-all  the same with all tests"
	@echo "make bench     what a container's life costs, beside runc and crun, moves of real services and of files in a tmpfs,"
	@echo "               and moves as memory grows, beside runc and ssh (three hours; docs/memory.md)"
	@echo "make lint      only check the code"
	@echo "make setup     only set up this machine"
	@echo "make clean     remove what was made in this directory"

setup:
	@vagrant/provision.sh --dev

setup-vm:
	@vagrant/provision.sh --vm

demo: setup
	@.venv/bin/pymigrate demo

lint: setup
	@$(MAKE) --no-print-directory static

static:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	shellcheck --exclude SC2016 .ci/run vagrant/provision.sh vagrant/pair vagrant/make-tree vagrant/make-box vagrant/demo.sh

# mypy uses one processor only.
check: setup-vm
	@$(MAKE) --no-print-directory --jobs=2 --output-sync static unit

test: check
	PYMIGRATE_ROUNDS=$${PYMIGRATE_ROUNDS:-2} $(PYTEST) --draw tests/system tests/vm

test-all: check
	$(PYTEST) tests/system tests/vm

# No set-up, which needs root: .venv must be there (`make setup`).
unit:
	$(PYTHON) -m pytest -q --numprocesses=2 tests/unit tests/contract

system: setup-vm
	$(PYTEST) tests/system

bench: setup-vm
	@$(PYTHON) tests/bench/lifecycle.py
	@$(PYTHON) -m tests.bench.services
	@$(PYTHON) -m tests.bench.tmpfs
	@$(PYTHON) -m tests.bench.memory --output docs

test-vm: setup-vm
	$(PYTHON) -m pytest -q -m vm

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help setup setup-vm demo lint static check unit system test test-all test-vm bench clean
