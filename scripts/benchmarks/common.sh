# Shared by the scripts beside it: help, and what is missing said before anything is generated.
# shellcheck shell=bash

# help_of SCRIPT: prints the comment at its head.
help_of() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"; }

# begin SCRIPT [ARGUMENT]...: answers --help, and refuses a call without a model directory.
begin() {
  local script="$1"
  shift
  case "${1:-}" in
  -h | --help)
    help_of "$script"
    exit 0
    ;;
  '')
    help_of "$script" >&2
    exit 2
    ;;
  esac
  [ -d "$1" ] || stop "$1 is no directory: give an exported model (fusejax export)"
}

# stop MESSAGE: ends the script as a mistake that can be mended.
stop() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# need COMMAND...: every one must be installed.
need() {
  local command
  for command in "$@"; do
    command -v "$command" >/dev/null || stop "$command is not installed"
  done
}

# need_key NAME: a key in the environment, which is not printed.
need_key() { [ -n "${!1:-}" ] || stop "$1 is not set: the judge needs a key, and costs money"; }

# fusejax_command: fusejax of PATH, of .venv here, or as the variable FUSEJAX names it.
fusejax_command() {
  FUSEJAX="${FUSEJAX:-$(command -v fusejax || echo .venv/bin/fusejax)}"
  command -v "$FUSEJAX" >/dev/null || stop "no fusejax in PATH or .venv/bin; FUSEJAX=/path/to/fusejax names it"
}

# with_venv DIR PACKAGE...: a virtual environment of its own for a judge, whose requirements are not ours.
with_venv() {
  local place="$1"
  shift
  [ -x "$place/bin/python" ] || python3 -m venv "$place"
  "$place/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
