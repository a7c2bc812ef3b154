# Shared by the launch files: finds fusejax, sets what suits this machine's device, says which ends deserve another start.
# shellcheck shell=bash

# use_fusejax: puts the fusejax of this checkout's .venv, or of $FUSEJAX_VENV, first on the PATH.
use_fusejax() {
  local root venv
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${FUSEJAX_VENV:-$root/.venv}
  [ ! -x "$venv/bin/fusejax" ] || PATH="$venv/bin:$PATH"
  command -v fusejax >/dev/null || {
    echo "fusejax is not installed in $venv nor on the PATH; FUSEJAX_VENV names its virtual environment" >&2
    return 2
  }
}

# use_device_settings: compiler flags and variables for the device that is here. FUSEJAX_FLAGS=a100 names it, none sets nothing.
use_device_settings() {
  local lines
  # A restarted job reads its compiled programs from here instead of compiling for minutes.
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/fusejax/compiled}"
  [ "${FUSEJAX_FLAGS:-auto}" != none ] || return 0
  lines=$(fusejax env --flags "${FUSEJAX_FLAGS:-auto}") || return
  eval "$lines"
}

# deserves_restart CODE: true for 85 (preempted, saved), 75 (stuck, ended by the watchdog) and for an end by a signal, as when
# another process or the machine died. Not for 2 (bad configuration) and 1 (a defect): they would end the same way.
deserves_restart() {
  [ "$1" -eq 85 ] || [ "$1" -eq 75 ] || [ "$1" -ge 129 ]
}

# run_noting_end COMMAND...: runs it and notes in the directory $FUSEJAX_ENDS when and how it ended. SIGTERM is left to it.
run_noting_end() {
  local code=0
  trap : TERM
  "$@" || code=$?
  echo "$code" >"$FUSEJAX_ENDS/$(date +%s.%N).${SLURM_PROCID:-0}"
  return "$code"
}

# first_end DIR CODE: how the first process ended, as the others lose a peer by that and end in other ways; else CODE.
first_end() {
  local first
  first=$(find "$1" -type f -size +0 ! -exec grep -qx 0 {} \; -print | sort -V | head -n 1)
  if [ -n "$first" ]; then cat "$first"; else echo "$2"; fi
}
