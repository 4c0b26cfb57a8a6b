#!/usr/bin/env bash
# Prune tokenizer, embedding and output layer: `megatron-prune vocab plan --keep-ids`, `prune`.
#
#   CKPT_PATH=/models/Llama-2-7b-chat-hf NEW_PATH=pruned bash emb_pruner/llama_emb_pruner/prune_spm_and_emb.sh [MORE FLAGS]
#
#   CKPT_PATH                  Hugging Face directory; it does not change
#   NEW_PATH                   the pruned model, a new directory
#   REMAIN_VOCAB_PATH=remain_vocab_ids.pt   of get_vocab_freq.sh; what has to stay is added
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/setup_env.sh"
help_if_asked "$@"
wanted CKPT_PATH NEW_PATH
setup_env

python "$REPO/emb_pruner/llama_emb_pruner/prune_spm_and_emb.py" --hf_dir "$CKPT_PATH" --save "$NEW_PATH" \
    --remain_vocab_path "${REMAIN_VOCAB_PATH:-remain_vocab_ids.pt}" "$@"
