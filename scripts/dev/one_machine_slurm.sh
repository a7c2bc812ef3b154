#!/usr/bin/env bash
# A SLURM of one machine to try scripts/slurm.sbatch on: Debian's packages, unpacked into a directory, not installed.
#
#   bash scripts/dev/one_machine_slurm.sh start DIR    needs apt-get, dpkg and a package index, or the packages in DIR/deb
#   . DIR/env.sh && sbatch --test-only scripts/slurm.sbatch train config.yaml
#   bash scripts/dev/one_machine_slurm.sh stop DIR
#
# The node claims 64 cores and 8 GPUs, so that the launch file is taken as it is. Jobs of the partition `urgent` preempt those
# of the default one, which are asked to stop and have 120 s for it. Nothing protects it: stop it after use.
set -euo pipefail
action=${1:-} dir=$(realpath -m "${2:?usage: one_machine_slurm.sh start|stop DIR}")
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15 libmunge2)

unpack() {
  mkdir -p "$dir/deb" "$dir/tree"
  if ! compgen -G "$dir/deb/slurmctld_*.deb" >/dev/null; then
    (cd "$dir/deb" && apt-get download -qq "${packages[@]}")
  fi
  for deb in "$dir"/deb/*.deb; do dpkg -x "$deb" "$dir/tree"; done
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

configure() {
  local libraries plugins
  plugins=$(dirname "$(find "$dir/tree" -name auth_none.so)")
  libraries="$plugins:$(dirname "$plugins")"
  mkdir -p "$dir/state" "$dir/spool" "$dir/bin"
  for program in "$dir"/tree/usr/bin/*; do ln -sf "$program" "$dir/bin/"; done
  for program in slurmctld slurmd slurmstepd; do ln -sf "$dir/tree/usr/sbin/$program-wlm" "$dir/bin/$program"; done
  cat >"$dir/env.sh" <<ENV
export SLURM_CONF="$dir/slurm.conf" PATH="$dir/bin:\$PATH"
export LD_LIBRARY_PATH="$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
ENV
  touch "$dir"/gpu{0..7} # stand in for devices, which SLURM counts by their files
  echo "Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=onemachine
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
PluginDir=$plugins
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=localhost NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
}

case $action in
  start)
    unpack; configure
    # shellcheck source=/dev/null
    . "$dir/env.sh"
    slurmctld -i -c
    slurmd -d "$dir/bin/slurmstepd"
    for _ in $(seq 60); do
      sinfo -h -o %T 2>/dev/null | grep -q idle && exit 0
      sleep 0.5
    done
    tail -n 20 "$dir/slurmctld.log" "$dir/slurmd.log" >&2 && exit 1
    ;;
  stop) for pid in "$dir"/slurmd.pid "$dir"/slurmctld.pid; do [ ! -f "$pid" ] || kill "$(cat "$pid")"; done ;;
  *) echo "usage: one_machine_slurm.sh start|stop DIR" >&2 && exit 2 ;;
esac
