#!/usr/bin/env bash
# Text -> Megatron's .bin/.idx: `megatron-prune preprocess`.
#
#   INPUT=corpus.jsonl TOKENIZER=/models/Llama-2-7b-hf OUTPUT_PREFIX=/data/web \
#   bash scripts/pretrain_data_process.sh [MORE FLAGS]
#
# makes /data/web_text_document.bin and .idx; give that prefix to training as DATA_PATH.
#
#   INPUT             a JSON object a line
#   JSON_KEY=text     the key that holds the text
#   TOKENIZER         Hugging Face directory, or a tokenizer.model
#   OUTPUT_PREFIX     where to write
#   WORKERS=N         processes (default: one a core)
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
help_if_asked "$@"
wanted INPUT TOKENIZER OUTPUT_PREFIX
setup_env

megatron-prune preprocess --input "$INPUT" --json-key "${JSON_KEY:-text}" \
    --tokenizer-model "$TOKENIZER" --output-prefix "$OUTPUT_PREFIX" --append-eod \
    --workers "${WORKERS:-$(python -c 'import os; print(os.cpu_count())')}" "$@"
