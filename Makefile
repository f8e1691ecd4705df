# Every target runs from .venv, which scripts/bootstrap.sh fills from a lock: from requirements-demo.lock
# what runs the project, from requirements.lock also what tests it.
# The first line of help beside a target is what `make help` prints.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Tests and demo use the project's own commands.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Without bytecode each of the many processes of the tests would compile the project again.
unexport PYTHONDONTWRITEBYTECODE

DEMO_READY := .venv/.ready-demo
READY := .venv/.ready
# Most tests wait most of the time.
WORKERS := $(shell echo $$((4 * $$(nproc))))
SEED := $(shell echo $$RANDOM)
PYTEST := pytest --quiet --no-header --numprocesses $(WORKERS) --dist worksteal --hypothesis-seed $(SEED)
SHELL_SCRIPTS := .ci/run $(wildcard scripts/*.sh clients/bash/*.sh deploy/*.sh tests/bats/*.bats)

.PHONY: help demo demo-short test test-all lint format types pyright imports unit custody integration clients model e2e \
	proto chart pytest \
	stores every-store models generate man lock dist wheels bench soak soak-short chaos chaos-short custody-chaos mutants \
	fuzz fuzz-short coverage prove-bare clean

help: ## Show the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(DEMO_READY) ## Jobs on three hosts share one token: without Holdoff, then with it
	@python clients/demo/demo.py

# The longest first. They mostly wait, so that two cores can run all of them at once.
STAGES := pytest stores lint types pyright imports demo-short
test: $(READY) ## Every check and all tests in parallel: one line per stage, and the log of a failure
	@rm -rf build/stages
	@echo 'running in parallel: $(STAGES); logs in build/stages'
	@$(MAKE) --jobs 3 --keep-going $(STAGES:%=stage-%)

stage-%:
	@scripts/stage.sh $*

LONG_STAGES := every-store models pytest-long demo soak bench chaos custody-chaos fuzz-short mutants prove-bare
test-all: test ## The long version: every store, many examples, whole fleets, soak, a bare Debian
	@$(MAKE) --keep-going $(LONG_STAGES:%=stage-%)

lint: $(READY) ## Style of Python and of shell scripts
	ruff check
	ruff format --check
	shellcheck $(SHELL_SCRIPTS)

types: $(READY) ## mypy, strict
	mypy
	mypy --platform win32 --cache-dir .mypy_cache/win32 --follow-imports silent $(wildcard clients/python/holdoff/_*_windows.py) \
		clients/python/holdoff/_job.py

pyright: $(READY) ## basedpyright: the clients as a user's type checker sees them
	basedpyright

imports: $(READY) ## Which module may import which
	lint-imports --no-cache --no-logo

# Stores of tests wait for each write to the disk: less so in memory, if there is a gigabyte free.
IN_MEMORY := $(shell grep -q ' /dev/shm [^ ]* [^ ]*noexec' /proc/mounts || \
	df --output=avail /dev/shm 2>/dev/null | awk 'NR == 2 && $$1 > 1048576 { print "/dev/shm" }')
pytest stores: export TMPDIR := $(or $(TMPDIR),$(IN_MEMORY),/tmp)

pytest: $(READY) ## All tests
	$(PYTEST)

pytest-long: $(READY) ## All tests, with whole fleets and every version of Kubernetes
	HOLDOFF_TEST_LENGTH=long $(PYTEST)

unit custody integration clients model e2e proto chart: $(READY) ## The tests of one kind
	$(PYTEST) tests/$@

STORE_TESTS := $(addprefix tests/integration/test_,leases.py queue.py budgets.py back_offs.py audit.py)
stores: $(READY) ## Leases, budgets and back-offs on a Cluster and behind Sentinel
	@$(MAKE) --jobs 2 --output-sync=target stores-cluster stores-sentinel

# Without more workers, each of which would start a store of its own.
stores-%: $(READY)
	HOLDOFF_TEST_STORE=$* $(PYTEST) --numprocesses 0 $(STORE_TESTS)

every-store: $(READY) ## All tests that use a store, on each kind of store
	for kind in embedded server cluster sentinel; do HOLDOFF_TEST_STORE=$$kind $(PYTEST) tests/integration; done

models: $(READY) ## The models, with many examples
	HOLDOFF_MODEL_EXAMPLES=3000 $(PYTEST) tests/model

demo-short: $(DEMO_READY) ## The demo on a faster clock
	python clients/demo/demo.py --short

bench: $(READY) ## Benchmarks, without assertions
	PYTHONPATH=. python tests/bench/handover.py
	PYTHONPATH=. python tests/bench/output.py
	PYTHONPATH=. python tests/bench/sending.py
	PYTHONPATH=. python tests/bench/handing_out.py
	PYTHONPATH=. python tests/bench/renewing.py
	PYTHONPATH=. SECONDS=5 python tests/bench/attacks.py

coverage: $(READY) ## Coverage of lines and branches, including started processes
	rm -rf build/coverage
	coverage run -m $(PYTEST) || true
	coverage combine --quiet
	coverage report --skip-covered

SECONDS := 180
soak: $(READY) ## 1000 waiters on two replicas for three minutes, or SECONDS=20: promises and timings
	PYTHONPATH=. python tests/soak/soak.py --seconds $(SECONDS)

soak-short: $(READY) ## The same in half a minute
	PYTHONPATH=. python tests/soak/soak.py --seconds 5

STORE := all
FAULTS :=
ONLY :=
CHAOS = PYTHONPATH=. python tests/chaos/run.py --store $(STORE) --seed $(SEED) --faults "$(FAULTS)"
CHAOS_SECONDS = $(if $(filter command line,$(origin SECONDS)),$(SECONDS),120)
chaos: $(READY) ## A fleet, and faults from a SEED, on a STORE for SECONDS; what it saw is judged
	$(CHAOS) --seconds $(CHAOS_SECONDS)

chaos-short: $(READY) ## The same for two minutes in all, as CI runs it
	$(CHAOS) --seconds 120

ROTATION := none,until-used,single-use,single-use-revokes
custody-chaos: $(READY) ## Tokens in custody; coordinators and a STORE are killed and frozen in the midst of refreshes
	PYTHONPATH=. python tests/chaos/custody.py --store $(STORE) --seconds $(CHAOS_SECONDS) --seed $(SEED) \
		--rotation $(ROTATION)

mutants: $(READY) ## Take out one safeguard at a time: does a test notice? ONLY=words picks some
	PYTHONPATH=. python -m tests.mutants.run --only "$(ONLY)"

TARGET := all
FUZZ = PYTHONPATH=. python -m tests.fuzz.run --target $(TARGET) --seed $(SEED)
FUZZ_SECONDS = $(if $(filter command line,$(origin SECONDS)),$(SECONDS),300)
fuzz: $(READY) ## Requests, files, output and HTTP built from a SEED, then mutated; for SECONDS, on a TARGET
	$(FUZZ) --seconds $(FUZZ_SECONDS)

fuzz-short: $(READY) ## The same for one minute in all, as CI runs it
	$(FUZZ) --seconds 60

format: $(READY) ## Fix what ruff can fix
	ruff check --fix
	ruff format

generate: $(READY) ## Generate code after a change in proto/ or in the chart's schema
	python scripts/generate.py
	python scripts/chart_values.py

man: $(READY) ## Man pages of every command, into build/man; read them with man -M build/man holdoff
	python scripts/manpages.py build/man

LOCK := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --custom-compile-command 'make lock' --quiet
lock: $(READY) ## Update the locks from pyproject.toml; UPGRADE=--upgrade takes newer releases
	$(LOCK) --all-extras --group dev $(UPGRADE) --output-file requirements.lock
	$(LOCK) --extra coordinator --group build --constraint requirements.lock --output-file requirements-demo.lock

dist: $(READY) ## Wheel, sdist and a bill of materials (CycloneDX), into dist/
	rm -rf dist
	hatchling build
	twine check --strict dist/*
	scripts/sbom.sh >dist/holdoff.cdx.json

VERSIONS := 3.11 3.12 3.13 3.14
SYSTEMS := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu x86_64-apple-darwin aarch64-apple-darwin windows
wheels: $(READY) ## Check that all dependencies have wheels for each Python and system
	for system in $(SYSTEMS); do for version in $(VERSIONS); do \
		uv pip compile pyproject.toml --all-extras --only-binary :all: --python-version $$version \
			--python-platform $$system --quiet --output-file /dev/null && echo "$$system $$version"; \
	done; done

prove-bare: ## As root: `make demo` and `make test` on a Debian with only Python, git and make
	scripts/bare-debian.sh

clean: ## Remove .venv and all generated files
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache tests/clients/node_modules
	find clients coordinator scripts tests -name __pycache__ -prune -exec rm -rf {} +

$(DEMO_READY): requirements-demo.lock pyproject.toml scripts/bootstrap.sh
	@scripts/bootstrap.sh $<
	@touch $@

# It has all that the demo needs.
$(READY): requirements.lock pyproject.toml scripts/bootstrap.sh tests/clients/package-lock.json
	@scripts/bootstrap.sh $<
	@touch $@ $(DEMO_READY)
