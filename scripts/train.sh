#!/usr/bin/env bash
# The baseline: a model of the same shape as a checkpoint, trained from random weights.
#
#   LOAD=/ckpt/pruned SAVE=/ckpt/random DATA_PATH=/data/web_text_document TP=8 \
#   LR=3e-4 MIN_LR=3e-5 bash scripts/train.sh [MORE FLAGS]
#
# LOAD gives the shape and the tokenizer, its weights are not used: they are drawn afresh from SEED.
# Variables and defaults are those of scripts/recover.sh, so that the two differ in nothing else.
set -euo pipefail

# shellcheck source=scripts/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
help_if_asked "$@"
exec bash "$REPO/scripts/recover.sh" --init-random "$@"
