#!/usr/bin/env bash
# One process per machine of a TPU VM slice, by gcloud. What each machine is, JAX asks the machine.
#
#   bash scripts/tpu_vm.sh NAME ZONE setup                          copy this checkout to every worker and install it there
#   bash scripts/tpu_vm.sh NAME ZONE train configs/mine.yaml        run; `output` in a bucket that all workers have mounted
#   bash scripts/tpu_vm.sh NAME ZONE stop                           SIGTERM to all: they save and end with 85
#
# FUSEJAX_PROJECT is passed to gcloud as --project. A job that was stopped by its watchdog or lost a worker is started again,
# FUSEJAX_MAX_RESTARTS times at most (default 20). A spot TPU that was taken away must be made again first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/launch_common.sh
. scripts/launch_common.sh
[ $# -ge 3 ] || {
  echo "usage: bash scripts/tpu_vm.sh NAME ZONE setup|stop|COMMAND CONFIG [--section.key value ...]" >&2
  exit 2
}
tpu=$1 zone=$2
shift 2
tpu_vm=(gcloud compute tpus tpu-vm)
place=(--zone="$zone" ${FUSEJAX_PROJECT:+--project="$FUSEJAX_PROJECT"} --worker=all)

# on_all COMMAND: on every worker at once, their output together.
on_all() { "${tpu_vm[@]}" ssh "$tpu" "${place[@]}" --command="$1"; }

case $1 in
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz -o "$archive" HEAD # what is committed, and nothing else
    "${tpu_vm[@]}" scp "$archive" "$tpu:/tmp/fusejax.tar.gz" "${place[@]}"
    on_all "mkdir -p ~/fusejax && tar -xzf /tmp/fusejax.tar.gz -C ~/fusejax && cd ~/fusejax && python3 -m venv .venv &&
      .venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]' && .venv/bin/fusejax env"
    ;;
  stop)
    # Not by the name alone: only the process that this script has started, by its number.
    on_all "kill -TERM \$(cat /tmp/fusejax-job.pid)"
    ;;
  *)
    words=$(printf '%q ' "$@")
    for variable in FUSEJAX_FLAGS HF_HUB_OFFLINE; do
      [ -z "${!variable:-}" ] || export_words+=" $variable=$(printf %q "${!variable}")"
    done
    for attempt in $(seq 0 "${FUSEJAX_MAX_RESTARTS:-20}"); do
      code=0
      on_all "cd ~/fusejax && echo \$\$ >/tmp/fusejax-job.pid &&
        exec env FUSEJAX_DISTRIBUTED=auto${export_words:-} bash scripts/process.sh $words" || code=$?
      echo "== start $attempt on $tpu ended with $code" >&2
      # 85 is an end that was asked for, by `stop` or by Google taking the machines: they would not be there.
      if [ "$code" -eq 85 ] || ! deserves_restart "$code"; then break; fi
    done
    exit "$code"
    ;;
esac
