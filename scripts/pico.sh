#!/usr/bin/env bash
# The whole walk on a pico model, in under a minute: the quickest way to see that every command
# works with the next, with real processes.
#
#   bash scripts/pico.sh
#
#   RUN_DIR=runs/pico     everything goes here; what is there from an earlier run is removed
#   TP=3                  tensor-parallel size: 1 or 3
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
help_if_asked "$@"
setup_env
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

: "${RUN_DIR:=$REPO/runs/pico}" "${TP:=3}"
# Only what this script itself has made is removed.
if [[ -e "$RUN_DIR" ]]; then
    [[ -f "$RUN_DIR/.pico" ]] || die "$RUN_DIR was not made by pico.sh; set RUN_DIR to another place"
    rm -r "$RUN_DIR"
fi
mkdir -p "$RUN_DIR"
touch "$RUN_DIR/.pico"
cd "$RUN_DIR"

layout=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size 1)
run() {
    show "$@"
    "$@"
}

say "a model and a corpus"
python "$REPO/tools/make_pico_model.py" --save model
python "$REPO/tools/make_default_corpus.py" --save corpus --code-bytes 200000 >/dev/null
run megatron-prune preprocess --input corpus/prose.train.jsonl --json-key text \
    --tokenizer-model model --output-prefix corpus/prose --append-eod --workers 1

say "Hugging Face -> Megatron -> plan -> pruned"
run megatron-prune convert --load model --save source --to megatron "${layout[@]}"
run megatron-prune plan --load source --save plan.json --hidden-size-remain 36 \
    --ffn-hidden-size-remain 60 --num-attention-heads-remain 3 --drop-layers 1 --balance-for "$TP" --seed 7
run on_ranks "$TP" prune --load source --save pruned --plan plan.json --to megatron "${layout[@]}"
run megatron-prune verify --load pruned --source source --plan plan.json

say "recovery"
run on_ranks "$TP" train --load pruned --save recovered --data-path corpus/prose_text_document \
    --micro-batch-size 4 --global-batch-size 4 --seq-length 64 --train-iters 20 --split 90,10,0 \
    --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 2 --log-interval 1 \
    --eval-interval 10 --eval-iters 1 --save-interval 20 --seed 7 "${layout[@]}"

say "Megatron -> Hugging Face, judged"
run megatron-prune reshard --load recovered --save resharded \
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
run megatron-prune convert --load resharded --save hf --to hf
run megatron-prune evaluate --load pruned --data corpus/prose.eval.txt --seq-length 64 \
    --max-windows 64 --json pruned.json
run megatron-prune evaluate --load hf --data corpus/prose.eval.txt --seq-length 64 \
    --max-windows 64 --json recovered.json
run python "$REPO/tools/generate.py" hf --max-new-tokens 8
run megatron-prune report pruned=pruned.json recovered=recovered.json recovery=recovered plan.json \
    --load source --save report.html

python - <<'PY'
import json

before, after = (json.load(open(f"{name}.json"))["loss"] for name in ("pruned", "recovered"))
print(f"held-out loss: pruned {before:.3f}, recovered {after:.3f}")
raise SystemExit(0 if after < before - 0.1 else "pico: error: training did not lower the loss")
PY
say "pico walk done in $SECONDS s"
