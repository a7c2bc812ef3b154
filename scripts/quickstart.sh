#!/usr/bin/env bash
# From a fresh clone to a finished knowledge fusion: makes .venv, installs fusejax, runs `fusejax quickstart`.
#
#   bash scripts/quickstart.sh            the full run (CPU, no hub, no data set needed)
#   bash scripts/quickstart.sh --fast     a smaller one; every option of `fusejax quickstart` works here
#
# Run again, it skips what is installed and continues what was interrupted. FUSEJAX_PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

python=$(find_python) || {
  echo "No Python 3.11 or newer with venv was found as python3, python3.1x or under pyenv. Install one" >&2
  echo "(Debian and Ubuntu: apt-get install python3 python3-venv) or name it: FUSEJAX_PYTHON=/path/to/python3" >&2
  exit 2
}
ensure_venv .venv "$python"
install .venv ""

say "Running: fusejax quickstart $*"
exec .venv/bin/fusejax quickstart "$@"
