#!/usr/bin/env bash
# The steps of a summarisation notebook on the bundled T5: the base as it is, full fine-tuning, LoRA, prompt tuning and
# prefix tuning, and one table of ROUGE on held-out rows. Three minutes on two cores.
#
#   bash scripts/test_finetune_t5.sh
#   MODEL=google/flan-t5-small TRAIN_FILE=dialogues.jsonl VALIDATION_FILE=heldout.jsonl bash scripts/test_finetune_t5.sh
#   METHODS="lora prefix_tuning" STEPS=1000 bash scripts/test_finetune_t5.sh
#   OUTPUT_DIR=output/mine bash scripts/test_finetune_t5.sh     (default: output/test_finetune_t5, which is replaced)
#
# Further arguments go to open_instruct/finetune_peft.py. docs/encoder_decoder.md explains the table.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment eval
cd "$REPO_ROOT"
output="${OUTPUT_DIR:-output/test_finetune_t5}"
require_counts STEPS
held_out="${VALIDATION_FILE:-data/sample/heldout.jsonl}"
overwrite=()
[[ -n "${OUTPUT_DIR:-}" ]] || overwrite=(--overwrite_output_dir)
trained=()
for method in ${METHODS:-full lora prompt_tuning prefix_tuning}; do
    flags=()
    [[ "$method" == full ]] || flags=("--use_$method")
    python open_instruct/finetune_peft.py --model_name_or_path "${MODEL:-assets/tiny-t5}" \
        --train_file "${TRAIN_FILE:-data/sample/train.jsonl}" --validation_file "$held_out" "${flags[@]}" \
        --max_train_steps "${STEPS:-300}" --logging_steps 50 --num_sample_answers 0 \
        --output_dir "$output/$method" "${overwrite[@]}" "$@"
    kind=adapter
    [[ "$method" != full ]] || kind=model
    trained+=("--$kind" "$method=$output/$method")
done
python open_instruct/evaluate_peft.py --model_name_or_path "${MODEL:-assets/tiny-t5}" "${trained[@]}" \
    --file "$held_out" --metrics loss rouge
