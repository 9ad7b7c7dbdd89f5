#!/usr/bin/env bash
# Prefix tuning on all GPUs of one node. The run writes checkpoints: after a preemption, run the same command again.
#
#   MODEL=meta-llama/Llama-3.1-8B TRAIN_FILE=data/tulu_90k.jsonl OUTPUT_DIR=output/8b-prefix_tuning \
#       bash scripts/finetune_prefix_tuning_with_accelerate.sh
#   MODEL=… TRAIN_FILE=… OUTPUT_DIR=… ENGINE=ddp TOTAL_BATCH_SIZE=128 BATCH_SIZE_PER_GPU=2 NUM_VIRTUAL_TOKENS=20 \
#       bash scripts/finetune_prefix_tuning_with_accelerate.sh --max_seq_length 4096
#
# Without LEARNING_RATE, the method's recipe sets the rate. scripts/common.sh lists the environment variables; further
# arguments go to open_instruct/finetune_peft.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require_variables MODEL TRAIN_FILE OUTPUT_DIR
ensure_environment deepspeed
TOTAL_BATCH_SIZE=${TOTAL_BATCH_SIZE:-128} MAX_SEQ_LENGTH=${MAX_SEQ_LENGTH:-4096} launch \
    --use_prefix_tuning --num_virtual_tokens "${NUM_VIRTUAL_TOKENS:-50}" --gradient_checkpointing \
    --checkpointing_steps "${CHECKPOINTING_STEPS:-100}" --resume_from_checkpoint "$@"
