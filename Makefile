# `make demo` and `make test` do all that is needed on a fresh Debian 12 or 13 machine, as root, and can be repeated.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest -q --numprocesses=3

help:
	@echo "make demo    set up this machine and move a Redis between two hosts on it"
	@echo "make test    set up this machine, check the code and run the tests that the commit's hash draws"
	@echo "make test-all  the same with all tests"
	@echo "make test-vm only the tests between two virtual machines; DEBIAN=12 for Debian 12 in them"
	@echo "make bench   what a container's life costs, beside runc and crun, moves of real services and of files in a tmpfs"
	@echo "make lint    only check the code"
	@echo "make setup   only set up this machine"
	@echo "make clean   remove what was made in this directory"

setup:
	@vagrant/provision.sh --dev

setup-vm:
	@vagrant/provision.sh --vm

demo: setup
	@.venv/bin/pymigrate demo

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	shellcheck --exclude SC2016 .ci/run vagrant/provision.sh vagrant/pair vagrant/make-tree vagrant/make-box vagrant/demo.sh

test: setup-vm lint
	PYMIGRATE_ROUNDS=$${PYMIGRATE_ROUNDS:-2} $(PYTEST) --draw

test-all: setup-vm lint
	$(PYTEST)

bench: setup-vm
	@$(PYTHON) tests/bench/lifecycle.py
	@$(PYTHON) -m tests.bench.services
	@$(PYTHON) -m tests.bench.tmpfs

test-vm: setup-vm
	$(PYTHON) -m pytest -q -m vm

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help setup setup-vm demo lint test test-all test-vm bench clean
