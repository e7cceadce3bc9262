#!/bin/bash
# One run on SLURM. In the folder of this repository, with the Python environment active:
#
#   sbatch --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh \
#       --config configs/aptos.py --workdir runs/aptos
#
# Options for sbatch (--nodes, --partition, --account, ...) come before the script's name, those of
# medmerge_jax.main after it. One task per GPU; the workdir is on a disk that all nodes share, and
# so is MEDMERGE_JAX_CACHE, or each node decodes the images again.
# Preempted or out of time, the run saves, goes back to the queue and resumes; `scancel` ends it.
#
# In a container (launch/apptainer.def) instead of an environment:
#
#   PYTHON="apptainer exec --nv medmerge.sif python" sbatch ... launch/slurm.sh --config ...
#SBATCH --job-name=medmerge
#SBATCH --nodes=1
# Of each task: otherwise SLURM gives it one core, which decodes images, copies batches to its GPU
# and launches the GPU's work by turns.
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# SLURM signals the tasks itself. This shell outlives a signal meant for all, but not `scancel`.
trap : USR1

# srun does not inherit --cpus-per-task (from SLURM 22.05 on). When one task ends, the others have a
# minute to follow.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
srun --kill-on-bad-exit=0 --wait=60 ${PYTHON:-python} -m medmerge_jax.main "$@"
status=$?

# 75: stopped by a signal, and saved. 138, 143: by SIGUSR1 or SIGTERM before Python could listen.
# 134: JAX ended a task that had lost another, which may be due to a fault that would come again, so
# not for ever.
case $status in
    75 | 138 | 143) again=1 ;;
    134) again=$((${SLURM_RESTART_COUNT:-0} < 10)) ;;
    *) again=0 ;;
esac
if [ "$again" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
