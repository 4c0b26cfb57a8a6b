#!/usr/bin/env bash
# Hugging Face -> Megatron shards: `megatron-prune convert --to megatron`.
#
#   LOAD=/models/Llama-2-7b-hf SAVE=/ckpt/llama2-7b-tp8 TP=8 \
#   bash tools/checkpoint_conversion/hf_to_megatron.sh [MORE FLAGS]
#
#   LOAD, SAVE                Hugging Face directory; new Megatron directory
#   TP=1 PP=1                 tensor- and pipeline-parallel sizes
#   CKPT_FORMAT=torch_dist    or torch (mp_rank_XX)
#   DTYPE=keep                or fp32, bf16, fp16
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/setup_env.sh"
help_if_asked "$@"
wanted LOAD SAVE
setup_env

megatron-prune convert --load "$LOAD" --save "$SAVE" --to megatron \
    --ckpt-format "${CKPT_FORMAT:-torch_dist}" --dtype "${DTYPE:-keep}" \
    --tensor-model-parallel-size "${TP:-1}" --pipeline-model-parallel-size "${PP:-1}" "$@"
