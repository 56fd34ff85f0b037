#!/usr/bin/env bash
# The whole recipe in miniature: text -> rows -> base -> stage 1 -> stage 2 -> SFT -> export -> evaluation -> report.
# `make demo` calls it inside .venv. Results of an earlier demo are replaced; its data is reused if nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."

demo=runs/demo
export TOKENIZERS_PARALLELISM=true
started=$SECONDS

step() {
    printf '\n[%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$1"
    shift
    printf '       %s\n' "$*"
    "$@"
}

# Two ranks of one thread each train faster than one rank of two threads, and show data parallelism.
if [[ $(nproc) -gt 1 ]]; then
    export OMP_NUM_THREADS=1
    train=(torchrun --standalone --nproc-per-node 2 scripts/train.py)
else
    train=(python scripts/train.py)
fi

rm -rf "$demo"/{base,stage1,stage2,sft,export,report.html,summary.json}

step "Real text of this Python installation, as packed rows" python scripts/prepare_data.py +exp=data/mini
step "Base: a short-context model from scratch, 512 tokens" "${train[@]}" +exp=mini/base
step "Stage 1: 512 -> 2K tokens" "${train[@]}" +exp=mini/stage1
step "Stage 2: 2K -> 8K tokens, optimizer state carried over" "${train[@]}" +exp=mini/stage2
step "SFT: answers only" "${train[@]}" +exp=mini/sft
unset OMP_NUM_THREADS
step "Export to Hugging Face, verified against the Megatron model" python scripts/export.py
step "Evaluation after every stage, and of the exported model" python scripts/evaluate.py \
    "models=[$demo/base,$demo/stage1,$demo/stage2,$demo/sft,hf:$demo/export/hf]"
step "Report" python scripts/report.py
step "One answer of the exported model, by plain transformers" python scripts/ask.py "$demo/export/hf" \
    "What does this Python function do? def read_text(path, encoding=None)"

printf '\nDone in %d:%02d. Open %s/report.html; the figures are in %s/summary.json.\n' \
    $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$demo" "$demo"
