#!/usr/bin/env bash
# Try prefix tuning on the bundled model and sample; environment variables name others.
#
#   bash scripts/test_finetune_prefix_tuning.sh
#   bash scripts/test_finetune_prefix_tuning.sh --num_virtual_tokens 10 --max_train_steps 100
#   MODEL=meta-llama/Llama-3.2-1B TRAIN_FILE=data/my.jsonl OUTPUT_DIR=output/mine TOTAL_BATCH_SIZE=32 \
#       bash scripts/test_finetune_prefix_tuning.sh --max_seq_length 2048
#
# scripts/common.sh lists the environment variables; further arguments go to open_instruct/finetune_peft.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment core
launch --use_prefix_tuning --num_sample_answers 50 "$@"
