#!/usr/bin/env bash
# Another tensor- and pipeline-parallel layout: `megatron-prune reshard`.
#
#   LOAD=/ckpt/pruned-tp8 SAVE=/ckpt/pruned-tp2 TP=2 bash scripts/transfer.sh [MORE FLAGS]
#
#   LOAD, SAVE      Megatron directory; new Megatron directory
#   TP=1 PP=1       the sizes it shall have
#   CKPT_FORMAT     torch_dist or torch (default: that of LOAD)
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
help_if_asked "$@"
wanted LOAD SAVE
setup_env

format=()
[[ -z "${CKPT_FORMAT:-}" ]] || format=(--ckpt-format "$CKPT_FORMAT")
megatron-prune reshard --load "$LOAD" --save "$SAVE" "${format[@]}" \
    --tensor-model-parallel-size "${TP:-1}" --pipeline-model-parallel-size "${PP:-1}" "$@"
