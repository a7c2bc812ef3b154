# Shared by quickstart.sh and test.sh: finds an interpreter, makes a virtual environment, installs fusejax.
# shellcheck shell=bash

say() { printf '\n== %s\n' "$*"; }

# usable PYTHON [MINOR]: true where PYTHON runs, is 3.11 or newer (or exactly 3.MINOR) and can make environments.
usable() {
  "$1" - "${2:-}" >/dev/null 2>&1 <<'PY'
import ensurepip, sys, venv
minor = sys.argv[1]
sys.exit(not (sys.version_info[:2] == (3, int(minor)) if minor else sys.version_info >= (3, 11)))
PY
}

# find_python [MINOR]: prints the first usable interpreter among $FUSEJAX_PYTHON, PATH and pyenv's versions.
find_python() {
  local minor="${1:-}" candidate
  local -a candidates=()
  [ -n "$minor" ] || candidates=(${FUSEJAX_PYTHON:+"$FUSEJAX_PYTHON"} python3 python3.12 python3.11 python3.13)
  [ -z "$minor" ] || candidates=("python3.$minor" python3)
  for candidate in "${candidates[@]}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
    if usable "$candidate" "$minor"; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# ensure_venv DIR PYTHON: makes the environment DIR, again where it is broken (a removed interpreter, a moved folder).
ensure_venv() {
  if "$1/bin/python" -m pip --version >/dev/null 2>&1; then
    say "$1 is there ($("$1/bin/python" --version))"
  else
    say "Making $1 with $2 ($("$2" --version))"
    "$2" -m venv --clear "$1"
  fi
}

# install DIR EXTRA: installs fusejax[EXTRA] with the tested versions unless exactly that was done before.
install() {
  local stamp="$1/.fusejax-installed" state key
  state="$PWD $(cat pyproject.toml setup.cfg constraints.txt | cksum)"
  key="$state ${2:-base}"
  if [ -f "$stamp" ] && grep -qxF "$key" "$stamp"; then
    say "fusejax${2:+[$2]} is installed in $1 and up to date"
    return 0
  fi
  say "Installing fusejax${2:+[$2]} into $1 with the versions of constraints.txt (a few minutes the first time)"
  "$1/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".${2:+[$2]}"
  if [ -f "$stamp" ] && grep -qF "$state" "$stamp"; then
    echo "$key" >>"$stamp"
  else
    echo "$key" >"$stamp"
  fi
}
