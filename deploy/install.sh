#!/usr/bin/env bash
# Installs the wheel of this checkout, with what the coordinator needs in the versions and with the
# hashes of requirements.lock, into a new virtual environment: deploy/install.sh /opt/holdoff
set -euo pipefail
readonly TARGET=$1
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The lock's entries of the named packages, hashes included.
locked() {
  local name
  while read -r name; do
    sed -n "/^$name==/,/[^\\\\]\$/p" requirements.lock
  done
}

uv pip compile pyproject.toml --extra coordinator --extra tracing --constraint requirements.lock --no-annotate \
  --no-header --quiet | sed 's/==.*//' | locked >"$work/needed.lock"
printf '%s\n' editables hatchling packaging pathspec pluggy trove-classifiers |
  locked >"$work/build.lock"

uv venv --quiet "$work/build"
uv pip install --quiet --python "$work/build" --require-hashes --no-deps -r "$work/build.lock"
uv build --quiet --wheel --no-build-isolation --python "$work/build" --out-dir "$work/dist" .
uv venv --quiet "$TARGET"
# With bytecode, which a read-only container cannot write: otherwise every start compiles it again.
uv pip install --quiet --compile-bytecode --python "$TARGET" --require-hashes --no-deps --only-binary :all: \
  -r "$work/needed.lock"
uv pip install --quiet --compile-bytecode --python "$TARGET" --no-deps "$work"/dist/*.whl
install --mode=0644 deploy/healthy.py "$TARGET/healthy.py"
