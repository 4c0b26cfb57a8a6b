#!/usr/bin/env bash
# Recovery training: continued pretraining of a pruned checkpoint, `megatron-prune train`.
#
#   LOAD=/ckpt/pruned SAVE=/ckpt/recovered DATA_PATH=/data/web_text_document TP=8 \
#   bash scripts/recover.sh [MORE FLAGS]
#
# Run it again to go on after an interruption: SAVE knows where it stopped.
#
#   LOAD, SAVE, DATA_PATH     checkpoint to start from; where to save; Megatron's --data-path (a prefix
#                             of .bin/.idx, or "WEIGHT PREFIX WEIGHT PREFIX ...")
#   TP=1 PP=1 DP=1            TP x PP x DP processes on this machine; for several machines, set
#                             LAUNCHER (see scripts/slurm_launch.sh)
#   TRAIN_ITERS=1000 SEQ_LENGTH=4096 MICRO_BATCH_SIZE=1 GLOBAL_BATCH_SIZE=1024
#   LR=2.5e-5 MIN_LR=1e-5 LR_WARMUP_ITERS=50 WEIGHT_DECAY=0.01 CLIP_GRAD=1.0
#   SAVE_INTERVAL=100 EVAL_INTERVAL=100 EVAL_ITERS=10 SPLIT=99,1,0 SEED=1234
#   PRECISION=bf16            or fp16, fp32
#
# The defaults are the recipe of jordddan/Pruning-LLMs, which reports a training loss of 1.839, 1.746
# and 1.713 after 4, 8 and 12 billion tokens for LLaMA2-7B pruned to 3B by random choice.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
help_if_asked "$@"
wanted LOAD SAVE DATA_PATH
setup_env

: "${TP:=1}" "${PP:=1}" "${DP:=1}" "${PRECISION:=bf16}"
read -ra blend <<<"$DATA_PATH"
precision=()
[[ "$PRECISION" == fp32 ]] || precision=("--$PRECISION")

on_ranks $((TP * PP * DP)) train --load "$LOAD" --save "$SAVE" --data-path "${blend[@]}" \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "${precision[@]}" \
    --train-iters "${TRAIN_ITERS:-1000}" --seq-length "${SEQ_LENGTH:-4096}" \
    --micro-batch-size "${MICRO_BATCH_SIZE:-1}" --global-batch-size "${GLOBAL_BATCH_SIZE:-1024}" \
    --lr "${LR:-2.5e-5}" --min-lr "${MIN_LR:-1e-5}" --lr-decay-style cosine \
    --lr-warmup-iters "${LR_WARMUP_ITERS:-50}" --weight-decay "${WEIGHT_DECAY:-0.01}" \
    --clip-grad "${CLIP_GRAD:-1.0}" --save-interval "${SAVE_INTERVAL:-100}" --log-interval 1 \
    --eval-interval "${EVAL_INTERVAL:-100}" --eval-iters "${EVAL_ITERS:-10}" \
    --split "${SPLIT:-99,1,0}" --seed "${SEED:-1234}" "$@"
