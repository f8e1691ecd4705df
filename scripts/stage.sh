#!/usr/bin/env bash
# Makes one target as a stage of `make test`: one line with its time, and its whole log if it failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

readonly STAGE=$1 LOG=build/stages/$1.log
unset MAKEFLAGS MFLAGS MAKELEVEL # the stage's own make knows nothing of the one that started it
mkdir -p build/stages

began=$EPOCHREALTIME status=0
make "$STAGE" >"$LOG" 2>&1 </dev/null || status=$?
seconds=$(awk "BEGIN { print $EPOCHREALTIME - $began }")

line=$(printf '%-10s %-6s %5.1f s' "$STAGE" "$( ((status)) && echo FAILED || echo ok)" "$seconds")
# What pytest counted, and what it skipped for want of something.
counted=$(sed -nE 's/^=* ?([0-9]+ (passed|failed)[^=]*) in [0-9.]+s.*/\1/p' "$LOG" | paste -sd ';' -)
skipped=$(grep '^SKIPPED' "$LOG" || true)
{
  ((status)) && cat "$LOG"
  printf '%s\n' "$line${counted:+  $counted}"
  [[ -z $skipped ]] || printf '%s\n' "$skipped"
  ((status)) && printf 'repeat it: make %s\n' "$STAGE"
} | tee -a build/stages/summary
exit "$status"
