#!/usr/bin/env bash
# Megatron shards of any layout -> Hugging Face: `megatron-prune convert --to hf`.
#
#   LOAD=/ckpt/llama2-3b-recovered SAVE=/models/llama2-3b \
#   bash tools/checkpoint_conversion/megatron_to_hf.sh [MORE FLAGS]
#
#   LOAD, SAVE    Megatron directory; new Hugging Face directory
#   DTYPE=keep    or fp32, bf16, fp16
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/setup_env.sh"
help_if_asked "$@"
wanted LOAD SAVE
setup_env

megatron-prune convert --load "$LOAD" --save "$SAVE" --to hf --dtype "${DTYPE:-keep}" "$@"
