# shellcheck shell=bash
# Holdoff for Bash scripts: a lease around a command or a function, and error reports.
#
#   source /usr/local/lib/holdoff/holdoff.sh
#
#   with_lease TOKEN [OPTIONS OF holdoff run --] COMMAND [ARGUMENT…]
#   holdoff_error DIVISION ENDPOINT STATUS
#   holdoff_blocked [STATUS [RETRY_AFTER]]
#
# It needs Bash 4.4 and the command `holdoff`, keeps no state and changes nothing in your shell: the
# bodies of these functions are subshells. README.md beside this file lists the limitations.

# In syntax that every shell understands, since any may read it.
if [ -z "${BASH_VERSION-}" ] || [ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -lt 44 ]; then
  echo "holdoff.sh: this is not Bash 4.4 or newer; begin your script with: #!/usr/bin/env bash" >&2
  # shellcheck disable=SC2317  # reached where the file is run and not sourced
  return 69 2>/dev/null || exit 69
fi

# Run a command, or a function of your script, while holding a lease on a token. Exit codes are
# those of `holdoff run`: the command's own, or 64, 69, 70, 75, 77, 79, 126, 127.
#
# `holdoff run` starts a process, so a function runs in its own Bash, with all your functions,
# your `set` and `shopt` options and the variables that you exported. Functions are passed in the
# environment, which only this user can read, and are removed from it on arrival, so that they do not
# replace commands of other scripts.
with_lease() (
  _holdoff_usage='with_lease TOKEN [OPTION… --] COMMAND [ARGUMENT…], such as
with_lease apps/exact-nl/tokens/finance --wait 2h -- datahub /file:job.sql'
  (($# > 1)) || _holdoff_fail 64 'a token and a command are needed' "$_holdoff_usage"
  _holdoff_options=(--token "$1")
  shift
  if [[ $1 == -* ]]; then
    while (($#)) && [[ $1 != -- ]]; do
      _holdoff_options+=("$1")
      shift
    done
    (($# > 1)) || _holdoff_fail 64 'after options -- and a command are needed' "$_holdoff_usage"
    shift
  fi
  [[ $(type -P holdoff) ]] || _holdoff_fail 127 "there is no command holdoff on the PATH $PATH" \
    'install it (pip install holdoff), or add its folder to the PATH: cron and systemd set a short one'
  if [[ $(type -t -- "$1") == function ]]; then
    _holdoff_bash=("${BASH:-bash}")
    for _holdoff_name in errexit nounset pipefail noglob noclobber xtrace; do
      if [[ -o $_holdoff_name ]]; then _holdoff_bash+=(-o "$_holdoff_name"); fi
    done
    for _holdoff_name in dotglob extglob failglob globstar inherit_errexit lastpipe nocaseglob \
      nocasematch nullglob; do
      if shopt -q "$_holdoff_name"; then _holdoff_bash+=(-O "$_holdoff_name"); fi
    done
    _holdoff_ours=()
    while IFS=' ' read -r _ _holdoff_flags _holdoff_name; do
      if [[ $_holdoff_flags == *x* ]]; then continue; fi
      export -f -- "${_holdoff_name?}"
      _holdoff_ours+=("$_holdoff_name")
    done <<<"$(declare -F)"
    # shellcheck disable=SC2016  # for the Bash that is started
    set -- "${_holdoff_bash[@]}" \
      -c 'while [[ $1 != -- ]]; do export -nf -- "$1"; shift; done; shift; "$@"' \
      "$0" "${_holdoff_ours[@]}" -- "$@"
  fi
  exec holdoff run "${_holdoff_options[@]}" -- "$@"
)

# Report an error of the provider to `holdoff run`, which reads the output: it is counted once. The key
# of the run, HOLDOFF_REPORT_KEY, distinguishes this report from the same text in data.
holdoff_error() (
  (($# == 3)) ||
    _holdoff_fail 64 'usage: holdoff_error DIVISION ENDPOINT STATUS' 'what is not known is ""'
  # A query or fragment in a URL does not count, and may be secret; so may a password before the host.
  _holdoff_path=${2%%[?#]*}
  if [[ $_holdoff_path =~ ^([^/]*//)[^/@]*@(.*)$ ]]; then
    _holdoff_path=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
  fi
  _holdoff_tell ERROR "status=$3" "division=$1" "endpoint=$_holdoff_path"
)

# Report that the provider refuses all calls, with the HTTP status and the value of the response's
# header Retry-After.
holdoff_blocked() (
  _holdoff_tell BLOCKED "status=${1-}" "retry_after=${2-}"
)

# Print a line with the known fields. A value can contain neither a quote nor an end of line. It goes
# to stderr, so that a captured output of a function does not contain it.
_holdoff_tell() (
  _holdoff_line=HOLDOFF-$1
  if [[ ${HOLDOFF_REPORT_KEY-} ]]; then
    _holdoff_line+=" key=$HOLDOFF_REPORT_KEY"
  else
    printf 'holdoff: HOLDOFF_REPORT_KEY is not set, so this report counts only under %s\n' \
      'holdoff run --trust-output' >&2
  fi
  for _holdoff_field in "${@:2}"; do
    _holdoff_value=${_holdoff_field#*=}
    if [[ $_holdoff_value ]]; then
      _holdoff_line+=" ${_holdoff_field%%=*}=\"${_holdoff_value//[\"[:cntrl:]]/}\""
    fi
  done
  printf '%s\n' "$_holdoff_line" >&2
)

_holdoff_fail() {
  printf 'holdoff: %s\n' "$2" >&2
  printf '%s\n' "${@:3}" >&2
  exit "$1"
}
