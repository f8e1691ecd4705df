# Every target runs from .venv, which scripts/bootstrap.sh fills from requirements.lock.
# The first line of help beside a target is what `make help` prints.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Tests and demo find the project's own commands, and nobody's else.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

READY := .venv/.ready
PYTEST := pytest --numprocesses auto --maxprocesses 8
SHELL_SCRIPTS := .ci/run $(wildcard scripts/*.sh clients/bash/*.sh)

.PHONY: help demo demo-short test lint format types pyright imports shell unit integration model e2e proto pytest \
	stores generate man lock bench soak soak-short prove-bare clean

help: ## Show the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY) ## Jobs on three hosts share one token: without Holdoff, then with it
	@python clients/demo/demo.py

test: lint types pyright imports stores pytest demo-short ## Every check, then the demo in short

lint: $(READY) ## Style of Python and of shell scripts
	ruff check
	ruff format --check
	shellcheck $(SHELL_SCRIPTS)

types: $(READY) ## mypy, strict
	mypy

pyright: $(READY) ## How the clients read to a user's type checker, beside mypy's view
	basedpyright

imports: $(READY) ## Who may import whom
	lint-imports --no-cache --no-logo

pytest: $(READY) ## All tests
	$(PYTEST)

unit integration model e2e proto: $(READY) ## The tests of one kind
	$(PYTEST) tests/$@

STORE_TESTS := $(addprefix tests/integration/test_,leases.py queue.py budgets.py back_offs.py)
stores: $(READY) ## Leases and budgets on a Cluster, and behind Sentinel
	HOLDOFF_TEST_STORE=cluster pytest --numprocesses 2 $(STORE_TESTS)
	HOLDOFF_TEST_STORE=sentinel pytest --numprocesses 2 $(STORE_TESTS)

demo-short: $(READY) ## The demo on a faster clock
