#!/usr/bin/env bash
# One process of a job, on one machine: sets what suits the device, then becomes `fusejax "$@"`.
#
#   bash scripts/process.sh train configs/mine.yaml
#
# Which process it is stands in FUSEJAX_COORDINATOR, FUSEJAX_PROCESSES and FUSEJAX_PROCESS, or is found out by JAX
# with FUSEJAX_DISTRIBUTED=auto (SLURM, GKE with TPUs, TPU VMs). See docs/launch.md.
set -euo pipefail
# shellcheck source=scripts/launch_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

use_fusejax
use_device_settings
if [ -n "${FUSEJAX_ENDS:-}" ]; then
  run_noting_end fusejax "$@" || exit
else
  exec fusejax "$@"
fi
