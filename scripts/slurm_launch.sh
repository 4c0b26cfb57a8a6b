#!/usr/bin/env bash
# A LAUNCHER for Slurm. It starts N processes of megatron_prune inside the current allocation.
#
#   LAUNCHER="bash $PWD/scripts/slurm_launch.sh"    and then prune_llama.sh, recover.sh, train.sh
#
#   RANKS_PER_NODE=8     processes on one node
#
# There is no torchrun in between: Slurm's signals reach the ranks themselves, which have all the time
# Slurm gives them to save (torchrun kills after 30 seconds), and their exit code comes back (75:
# interrupted and saved).
set -euo pipefail

# shellcheck source=scripts/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || die "wanted: RANKS STAGE FLAGS..., found: $*"
wanted SLURM_JOB_ID SLURM_JOB_NODELIST

ranks=$1
shift
per_node=${RANKS_PER_NODE:-8}
((ranks >= per_node)) || per_node=$ranks
((ranks % per_node == 0)) || die "$ranks ranks do not fill nodes of $per_node"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of the job's own: two jobs may share a node.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --wait: when one rank has ended and the others do not follow within a minute, end them.
# shellcheck disable=SC2016  # expanded by each task, not here
exec srun --nodes $((ranks / per_node)) --ntasks "$ranks" --ntasks-per-node "$per_node" --wait=60 \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
        exec python -m megatron_prune "$@"' rank "$@"
