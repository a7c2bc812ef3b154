#!/usr/bin/env bash
# One process per machine over plain SSH, each with all devices of its machine. The first host is the coordinator.
#
#   bash scripts/ssh.sh HOSTS train configs/mine.yaml        HOSTS: a file with one host per line, or "node1 node2"
#
# Needs keys without a password, and this checkout with its .venv at the same path everywhere (FUSEJAX_ROOT). A job that was
# preempted or lost a machine starts again, FUSEJAX_MAX_RESTARTS times at most (default 20). Ctrl-C and SIGTERM go to all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/launch_common.sh
. scripts/launch_common.sh
[ $# -ge 2 ] || {
  echo "usage: bash scripts/ssh.sh HOSTS COMMAND CONFIG [--section.key value ...]" >&2
  exit 2
}
if [ -f "$1" ]; then mapfile -t hosts < <(grep -Ev '^ *(#|$)' "$1"); else read -ra hosts <<<"$1"; fi
shift
root=${FUSEJAX_ROOT:-$PWD}
# What reaches a machine; it is given the host and one command.
read -ra reach <<<"${FUSEJAX_SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15}"
name=fusejax-$$
stopped=""

# start NUMBER WORD...: runs `fusejax WORD...` on a host. The remote shell becomes the process, so its number is the one to signal.
start() {
  local number=$1 variable settings
  shift
  settings="FUSEJAX_COORDINATOR=${hosts[0]#*@}:${FUSEJAX_PORT:-12345} FUSEJAX_PROCESSES=${#hosts[@]} FUSEJAX_PROCESS=$number"
  for variable in FUSEJAX_FLAGS FUSEJAX_VENV JAX_PLATFORMS JAX_COMPILATION_CACHE_DIR NCCL_SOCKET_IFNAME HF_HUB_OFFLINE; do
    [ -z "${!variable:-}" ] || settings+=" $variable=$(printf %q "${!variable}")"
  done
  "${reach[@]}" "${hosts[$number]}" "cd $(printf %q "$root") && echo \$\$ >/tmp/$name-$number.pid &&
    exec env $settings bash scripts/process.sh $(printf '%q ' "$@")" </dev/null 2>&1 | sed -u "s/^/$number: /"
}

# signal SIGNAL: to the process on every host.
signal() {
  local number
  for number in "${!hosts[@]}"; do
    "${reach[@]}" "${hosts[$number]}" "kill -$1 \$(cat /tmp/$name-$number.pid)" </dev/null 2>/dev/null &
  done
}

# run_once WORD...: starts all and prints nothing; returns how the first that failed ended, or 0.
run_once() {
  local number pid code first=0 watch="" pids=()
  for number in "${!hosts[@]}"; do
    start "$number" "$@" &
    pids+=($!)
  done
  while [ ${#pids[@]} -gt 0 ]; do
    code=0
    wait -n -p pid "${pids[@]}" || code=$?
    [ -n "${pid:-}" ] || continue # the wait was interrupted by a signal
    for number in "${!pids[@]}"; do [ "${pids[$number]}" != "$pid" ] || unset "pids[$number]"; done
    if [ "$code" -ne 0 ] && [ "$first" -eq 0 ]; then
      first=$code
      # The others notice by themselves and end; whoever does not is stuck.
      (for _ in $(seq "${FUSEJAX_GRACE:-120}"); do sleep 1; done && signal KILL && wait) >/dev/null 2>&1 &
      watch=$!
    fi
  done
  [ -z "$watch" ] || kill "$watch" 2>/dev/null || true
  return "$first"
}

trap 'stopped=1; signal TERM' TERM INT
for attempt in $(seq 0 "${FUSEJAX_MAX_RESTARTS:-20}"); do
  code=0
  run_once "$@" || code=$?
  echo "== start $attempt on ${#hosts[@]} hosts ended with $code" >&2
  if [ -n "$stopped" ] || ! { deserves_restart "$code"; }; then break; fi
done
exit "$code"
