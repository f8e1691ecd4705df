#!/usr/bin/env bats
# The shim as a script's author meets it. HOLDOFF_ENDPOINT names a coordinator, and TOKEN a token that may
# be refreshed again at once; tests/e2e/test_bats.py gives both. What takes a look from outside, such as
# at processes and their environment, is in tests/e2e/test_bash.py.

# shellcheck disable=SC1091,SC2016 # a path of the suite's; for the shell that is started
bats_require_minimum_version 1.5.0

setup() {
  set -u
  # shellcheck source=../../clients/bash/holdoff.sh
  source "$BATS_TEST_DIRNAME/../../clients/bash/holdoff.sh"
}

@test "a command runs under a lease, and its output passes" {
  run --separate-stderr -0 with_lease "$TOKEN" bash -c 'echo "$HOLDOFF_TOKEN"'
  [ "$output" = "$TOKEN" ]
}

@test "so does a function, with the variables that were exported" {
  greet() { echo "hello $1, $NAME, under $HOLDOFF_TOKEN"; }
  export NAME=world
  run --separate-stderr -0 with_lease "$TOKEN" greet there
  [ "$output" = "hello there, world, under $TOKEN" ]
}

@test "exit codes pass" {
  run -4 with_lease "$TOKEN" bash -c 'exit 4'
  fail() { return 7; }
  run -7 with_lease "$TOKEN" fail
}

@test "options before -- are for holdoff run" {
  run --separate-stderr -0 with_lease "$TOKEN" --job nightly --no-wait -- echo 'done'
  [ "$output" = "done" ]
  run -64 with_lease "$TOKEN" --no-such-option -- true
  [[ $output == *'no-such-option'* ]]
}

@test "two at once run one after the other" {
  local log="$BATS_TEST_TMPDIR/log"
  step() {
    echo begin >>"$1"
    sleep 0.2
    echo end >>"$1"
  }
  with_lease "$TOKEN" step "$log" &
  local first=$!
  with_lease "$TOKEN" step "$log"
  wait "$first"
  [ "$(tr '\n' ' ' <"$log")" = "begin end begin end " ]
}

@test "no lease in time is 75" {
  local gate="$BATS_TEST_TMPDIR/gate"
  mkfifo "$gate" "$gate.held"
  hold() {
    echo >"$1.held"
    read -r <"$1"
  }
  with_lease "$TOKEN" hold "$gate" &
  local holder=$!
  read -r <"$gate.held"
  run -75 with_lease "$TOKEN" --no-wait -- true
  echo >"$gate"
  wait "$holder"
}

@test "no coordinator is 69, and says what to do" {
  HOLDOFF_ENDPOINT=127.0.0.1:1 run -69 with_lease "$TOKEN" --wait 1s -- true
  [[ $output == *HOLDOFF_ENDPOINT* ]]
}

@test "an error is counted where it was met" {
  failing() { holdoff_error 535193 crm/Accounts 400; }
  run -0 with_lease "$TOKEN" failing
  until holdoff budget list "${TOKEN%/tokens/*}" | grep -q crm/Accounts; do sleep 0.05; done
}

@test "mistakes are told with their remedy" {
  run -64 with_lease
  [[ $output == *'a token and a command are needed'* ]]
  run -64 holdoff_error 535193
  [ -n "$output" ]
}

@test "the shell stays as it was" {
  local before after
  before=$(set -o && shopt && declare -F)
  with_lease "$TOKEN" true
  after=$(set -o && shopt && declare -F)
  [ "$before" = "$after" ]
}
