#!/usr/bin/env bash
# Hugging Face -> Megatron shards, by its old name; the same as
# tools/checkpoint_conversion/hf_to_megatron.sh, with the same variables:
#
#   LOAD=/models/Llama-2-7b-hf SAVE=/ckpt/llama2-7b-tp8 TP=8 bash scripts/hf2megatron.sh
#
# See `bash tools/checkpoint_conversion/hf_to_megatron.sh --help`.
set -euo pipefail

# shellcheck source=scripts/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
exec bash "$REPO/tools/checkpoint_conversion/hf_to_megatron.sh" "$@"
