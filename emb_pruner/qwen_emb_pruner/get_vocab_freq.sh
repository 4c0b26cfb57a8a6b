#!/usr/bin/env bash
# How often a corpus has each token, and the ids that remain: `megatron-prune vocab count`, `plan`.
#
#   MODEL_NAME_OR_PATH=/models/Qwen-1_8B DATA_PATH=corpus.txt bash emb_pruner/qwen_emb_pruner/get_vocab_freq.sh [MORE FLAGS]
#
#   MODEL_NAME_OR_PATH   whose tokens to count
#   DATA_PATH                  the corpus; DATA_TYPE=mmap: the prefix of .bin and .idx
#   DATA_TYPE=txt              or mmap
#   VOCAB_FREQ=vocab_freq      writes this .txt (an id and its count a line) and .npz
#   REMAIN_VOCAB_SIZE=30000    of the new vocabulary
#   REMAIN_VOCAB_IDS_PATH=remain_vocab_ids.pt
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/setup_env.sh"
help_if_asked "$@"
wanted MODEL_NAME_OR_PATH DATA_PATH
setup_env

python "$REPO/emb_pruner/qwen_emb_pruner/get_vocab_freq.py" --model_name_or_path "$MODEL_NAME_OR_PATH" \
    --data_type "${DATA_TYPE:-txt}" --data_path "$DATA_PATH" \
    --vocab_freq "${VOCAB_FREQ:-vocab_freq}" \
    --remain_vocab_size "${REMAIN_VOCAB_SIZE:-30000}" \
    --remain_vocab_ids_path "${REMAIN_VOCAB_IDS_PATH:-remain_vocab_ids.pt}" "$@"
