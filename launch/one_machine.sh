#!/bin/bash
# One run on this machine: on all of its GPUs, on some, or without any on its processor.
#
#   launch/one_machine.sh --config configs/aptos.py --workdir runs/aptos
#   CUDA_VISIBLE_DEVICES=0,1 launch/one_machine.sh --config configs/aptos.py --workdir runs/aptos
#
# One process drives them all; PROCESSES=8 starts eight with a GPU each, should one not keep up.
# On SIGTERM or SIGUSR1 the run saves and ends with status 75; the same command resumes it.
set -u
processes=${PROCESSES:-1}
if [ "$processes" = 1 ]; then
    exec python -m medmerge_jax.main "$@"
fi

IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}"
coordinator=localhost:${PORT:-$((20000 + RANDOM % 10000))}
pids=()
asked= # the last signal, also for processes that are yet to be started

# Before any is started: a signal without a trap ends this script, and nothing else.
pass_on() {
    local pid
    asked=$1
    for pid in "${pids[@]}"; do
        kill "-$asked" "$pid" 2>/dev/null
    done
}
# Ctrl-C becomes SIGTERM too: processes in the background do not see SIGINT.
trap 'pass_on TERM' INT TERM
trap 'pass_on USR1' USR1

for ((id = 0; id < processes; id++)); do
    CUDA_VISIBLE_DEVICES=${gpus[id]} python -m medmerge_jax.main "$@" \
        --coordinator "$coordinator" --num_processes "$processes" --process_id "$id" &
    pids+=($!)
done
if [ -n "$asked" ]; then
    pass_on "$asked"
fi

status=0
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    while kill -0 "$pid" 2>/dev/null; do # it was `wait` that the signal ended
        wait "$pid"
        code=$?
    done
    status=$((code > status ? code : status))
done
exit "$status"
