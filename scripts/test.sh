#!/usr/bin/env bash
# Everything that CI runs: lint, format, types, tests, the main job end to end, the fast tests on a second Python.
#
#   bash scripts/test.sh                  needs network to the package index the first time only
#
# Every check runs even after one has failed; the exit code is 1 where any did. FUSEJAX_PYTHON names the interpreter,
# FUSEJAX_TEST_WORKERS the number of test processes (default 2: each test process has eight fake CPU devices).
# FUSEJAX_SKYPILOT=1 installs SkyPilot (460 MB) into .venv-sky, and its parser reads scripts/skypilot.yaml then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

python=$(find_python) || {
  echo "No Python 3.11 or newer with venv was found as python3, python3.1x or under pyenv." >&2
  exit 2
}
ensure_venv .venv "$python"
install .venv test
if [ -n "${FUSEJAX_SKYPILOT:-}" ]; then
  ensure_venv .venv-sky "$python"
  .venv-sky/bin/python -m pip install --disable-pip-version-check --quiet skypilot==0.14.1
fi

failed=()
# check NAME COMMAND...: runs one check, says how long it took and remembers a failure.
check() {
  local name="$1" start=$SECONDS
  shift
  say "$name: $*"
  if "$@"; then
    echo "-- $name passed in $((SECONDS - start)) s"
  else
    failed+=("$name")
    echo "-- $name FAILED in $((SECONDS - start)) s"
  fi
}

workers=${FUSEJAX_TEST_WORKERS:-2}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE=1
# Processes that tests start compile what others have compiled already; half of the time here is XLA's.
export JAX_COMPILATION_CACHE_DIR="$scratch/compiled"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

check lint .venv/bin/python -m ruff check .
check format .venv/bin/python -m ruff format --check .
check types .venv/bin/python -m pyright --pythonpath .venv/bin/python
# Two thirds of the time of the fast tests is LLVM's, for programs that run once. XLA's own passes run all the same; tests
# that hang on roundings, slow ones and the quickstart are compiled as users' programs are.
quick=(env XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
tests=(-m pytest -q --dist worksteal --durations=20)
check "fast tests" "${quick[@]}" .venv/bin/python "${tests[@]}" -n "$workers" -m "not slow and not optimized"
check quickstart .venv/bin/fusejax quickstart --fast --out "$scratch/quickstart/run" --cache "$scratch/quickstart/cache" --json
check "slow tests" env FUSEJAX_TEST_QUICKSTART="$scratch/quickstart" \
  .venv/bin/python "${tests[@]}" -n "$workers" -m "slow or optimized"

first=$(.venv/bin/python -c 'import sys; print(sys.version_info[1])')
second=11
[ "$first" != 11 ] || second=12
if other=$(find_python "$second"); then
  ensure_venv ".venv-3$second" "$other"
  install ".venv-3$second" test
  check "fast tests on Python 3.$second" \
    "${quick[@]}" ".venv-3$second/bin/python" "${tests[@]}" -n "$workers" -m "not slow and not optimized and not once"
else
  say "No second interpreter: looked for python3.$second on PATH and under ${PYENV_ROOT:-$HOME/.pyenv}/versions"
  echo "Kernels for NVIDIA GPUs need JAX 0.11 and so Python 3.12: without it none of their tests has run." >&2
fi

if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED after $SECONDS s: ${failed[*]}"
  exit 1
fi
say "All checks passed in $SECONDS s"
