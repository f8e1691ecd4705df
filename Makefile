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
SHELL_SCRIPTS := .ci/run $(wildcard scripts/*.sh clients/bash/*.sh deploy/*.sh tests/bats/*.bats)

.PHONY: help demo demo-short test lint format types pyright imports shell unit integration model e2e proto chart pytest \
	stores generate man lock dist wheels bench soak soak-short prove-bare clean

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
	mypy --platform win32 --follow-imports silent $(wildcard clients/python/holdoff/_*_windows.py) \
		clients/python/holdoff/_job.py

pyright: $(READY) ## How the clients read to a user's type checker, beside mypy's view
	basedpyright

imports: $(READY) ## Who may import whom
	lint-imports --no-cache --no-logo

pytest: $(READY) ## All tests
	$(PYTEST)

unit integration model e2e proto chart: $(READY) ## The tests of one kind
	$(PYTEST) tests/$@

STORE_TESTS := $(addprefix tests/integration/test_,leases.py queue.py budgets.py back_offs.py audit.py)
stores: $(READY) ## Leases and budgets on a Cluster, and behind Sentinel
	HOLDOFF_TEST_STORE=cluster pytest --numprocesses 2 $(STORE_TESTS)
	HOLDOFF_TEST_STORE=sentinel pytest --numprocesses 2 $(STORE_TESTS)

demo-short: $(READY) ## The demo on a faster clock
	python clients/demo/demo.py --short

bench: $(READY) ## Measure; nothing is asserted
	PYTHONPATH=. python tests/bench/handover.py
	PYTHONPATH=. python tests/bench/output.py

SECONDS := 180
soak: $(READY) ## 1000 waiters at two replicas for three minutes, or SECONDS=20: promises and figures
	PYTHONPATH=. python tests/soak/soak.py --seconds $(SECONDS)

soak-short: $(READY) ## The same in half a minute
	PYTHONPATH=. python tests/soak/soak.py --seconds 5

format: $(READY) ## Let ruff repair what it can
	ruff check --fix
	ruff format

generate: $(READY) ## After a change below proto/ or of the chart's schema: what is made from them
	python scripts/generate.py
	python scripts/chart_values.py

man: $(READY) ## Man pages of every command, into build/man; read them with man -M build/man holdoff
	python scripts/manpages.py build/man

lock: $(READY) ## Renew requirements.lock from pyproject.toml; UPGRADE=--upgrade takes newer releases
	uv pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command 'make lock' --quiet $(UPGRADE) --output-file requirements.lock

dist: $(READY) ## Wheel, sdist and a bill of materials (CycloneDX), into dist/
	rm -rf dist
	hatchling build
	twine check --strict dist/*
	scripts/sbom.sh >dist/holdoff.cdx.json

VERSIONS := 3.11 3.12 3.13 3.14
SYSTEMS := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu x86_64-apple-darwin aarch64-apple-darwin windows
wheels: $(READY) ## Whether all that is needed has wheels for each Python and system
	for system in $(SYSTEMS); do for version in $(VERSIONS); do \
		uv pip compile pyproject.toml --all-extras --only-binary :all: --python-version $$version \
			--python-platform $$system --quiet --output-file /dev/null && echo "$$system $$version"; \
	done; done

prove-bare: ## As root: `make demo` and `make test` on a Debian with Python, git and make alone
	scripts/bare-debian.sh

clean: ## Remove .venv and everything that tools left
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find clients coordinator scripts tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml scripts/bootstrap.sh
	scripts/bootstrap.sh
	@touch $@
