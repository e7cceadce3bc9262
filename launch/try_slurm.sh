#!/bin/bash
# SLURM on one machine, to try studies on it and to run tests/test_slurm.py. As root, in a container
# or on a machine that may be thrown away:
#
#   apt-get install --yes slurm-wlm munge
#   launch/try_slurm.sh
#   python -m medmerge_jax.main --config configs/quickstart.py --workdir runs/quickstart \
#       --config.study.executor=slurm --config.study.workers=2 \
#       --config.study.gpus=0 --config.study.cpus=1
#   launch/try_slurm.sh stop
#
# It overwrites /etc/slurm/slurm.conf: the machine is one node without GPUs, with a partition `main`
# and another, `high`, whose jobs preempt those of `main` after 30 seconds of grace.
set -eu
state=/var/lib/try_slurm
node=$(hostname -s)

stop() {
    for name in slurmd slurmctld munged; do
        if pid=$(cat "$state/$name.pid" 2>/dev/null); then
            kill "$pid" 2>/dev/null || true
            while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
            rm -f "$state/$name.pid"
        fi
    done
}

# Without control groups, which containers lack; a requeued job may begin again after six seconds,
# where it usually waits for two minutes.
configure() {
    local memory
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    cat >/etc/slurm/slurm.conf <<CONF
ClusterName=try
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthInfo=socket=$state/munge.socket,cred_expire=5
StateSaveLocation=$state/slurmctld
SlurmdSpoolDir=$state/slurmd
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((memory / $(nproc)))
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$node Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=$node PriorityTier=2 PreemptMode=OFF
CONF
}

start() {
    mkdir -p /etc/slurm "$state/slurmctld" "$state/slurmd"
    chmod 755 "$state" # whoever asks SLURM for something reads munge's socket
    configure
    if [ ! -s "$state/munge.key" ]; then
        (umask 077 && head -c 128 /dev/urandom >"$state/munge.key")
    fi
    munged --force --key-file="$state/munge.key" --socket="$state/munge.socket" \
        --pid-file="$state/munged.pid" --log-file="$state/munged.log" \
        --seed-file="$state/munged.seed"
    slurmctld
    slurmd
    for ((second = 0; second < 60; second++)); do
        if sinfo --noheader --format=%T 2>/dev/null | grep -q idle; then
            sinfo
            return
        fi
        sleep 1
    done
    echo "the node does not come up; the logs in $state say why" >&2
    exit 1
}

case ${1:-start} in
    start)
        stop
        start
        ;;
    stop) stop ;;
    *)
        echo "launch/try_slurm.sh [start|stop] is wanted, not $1" >&2
        exit 2
        ;;
esac
