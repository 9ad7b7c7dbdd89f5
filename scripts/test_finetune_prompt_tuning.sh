#!/usr/bin/env bash
# Try prompt tuning on the bundled model and sample; environment variables name others.
#
#   bash scripts/test_finetune_prompt_tuning.sh
#   bash scripts/test_finetune_prompt_tuning.sh --num_virtual_tokens 20 --max_train_steps 100
#   MODEL=meta-llama/Llama-3.2-1B TRAIN_FILE=data/my.jsonl OUTPUT_DIR=output/mine TOTAL_BATCH_SIZE=32 \
#       bash scripts/test_finetune_prompt_tuning.sh --max_seq_length 2048
#
# scripts/common.sh lists the environment variables; further arguments go to open_instruct/finetune_peft.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment core
launch --use_prompt_tuning --num_sample_answers 50 "$@"
