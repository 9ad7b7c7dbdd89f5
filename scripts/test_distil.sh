#!/usr/bin/env bash
# Compress a book of 48 facts (144 tokens) into a prefix of 9 keys and values, and ask what is left of it, in wordings
# that training never used. About two minutes on two cores.
#
#   bash scripts/test_distil.sh
#   METHOD=prompt_tuning NUM_VIRTUAL_TOKENS=18 STEPS=1000 bash scripts/test_distil.sh
#   OUTPUT_DIR=output/mine bash scripts/test_distil.sh     (default: output/test_distil, which is replaced)
#
# Further arguments go to open_instruct/finetune_peft.py. docs/distil.md explains the figures.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment core
cd "$REPO_ROOT"
output="${OUTPUT_DIR:-output/test_distil}"
require_counts NUM_VIRTUAL_TOKENS STEPS
overwrite=()
[[ -n "${OUTPUT_DIR:-}" ]] || overwrite=(--overwrite_output_dir)
python open_instruct/finetune_peft.py --model_name_or_path assets/lookup-model --train_file data/book/train.jsonl \
    --validation_file data/book/heldout.jsonl --distill_context data/book/book.txt \
    "--use_${METHOD:-prefix_tuning}" --num_virtual_tokens "${NUM_VIRTUAL_TOKENS:-9}" \
    --max_train_steps "${STEPS:-3000}" --learning_rate_factor 2 \
    --logging_steps 100 --num_sample_answers 0 --output_dir "$output" "${overwrite[@]}" "$@"
python open_instruct/evaluate_peft.py --adapter "distilled=$output" --file data/book/heldout.jsonl \
    --context data/book/book.txt --metrics loss exact_match --max_new_tokens 12
