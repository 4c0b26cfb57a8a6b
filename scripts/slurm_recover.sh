#!/usr/bin/env bash
# Recovery training under Slurm, for as many time slices as it takes. Submit this script from the checkout,
# with the flags of `megatron-prune train`:
#
#   sbatch --nodes 2 --time 24:00:00 scripts/slurm_recover.sh \
#       --load /ckpt/pruned --save /ckpt/recovered --data-path /data/web_text_document ...
#
# Five minutes before its time is up (USR1), or when the job is preempted or told to (TERM), training
# finishes its step, saves and exits with 75; the job then puts itself back into the queue, and the
# next slice continues to the bit. Any other exit code, the largest of the ranks', is the job's.
#
# Checkout, environment, --load, --save and --data-path must lie on a file system that all nodes see.
#
#   REQUEUE_ON="75"      exit codes to queue again after; "75 5" also after a rank was lost
#   MAX_RESTARTS=100     not more often than this
#
#SBATCH --job-name=megatron-recover
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this file, so its own place says nothing.
repo=${SLURM_SUBMIT_DIR:?submit this with sbatch from the checkout}
[[ -f "$repo/scripts/slurm_launch.sh" ]] || {
    echo "$repo is not the checkout; submit from there" >&2
    exit 2
}
export RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-8}

# srun passes signals on to its tasks; without a trap they would end this shell first.
signalled=
# shellcheck disable=SC2329  # by the traps
pass_on() {
    signalled=$1
    kill -s "$1" "$launcher" 2>/dev/null || true
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

bash "$repo/scripts/slurm_launch.sh" "${SLURM_NTASKS:?}" train "$@" &
launcher=$!
status=0
while :; do
    signalled=
    wait "$launcher" && status=0 || status=$?
    [[ -n "$signalled" ]] || break # a signal ends `wait`, not the training
done

for code in ${REQUEUE_ON:-75}; do
    if ((status == code)); then
        if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-100})); then
            echo "exit $status after $SLURM_RESTART_COUNT restarts; not queued again" >&2
            break
        fi
        echo "exit $status; back into the queue" >&2
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
done
exit "$status"
