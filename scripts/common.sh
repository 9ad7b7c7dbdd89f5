# shellcheck shell=bash
# Sourced by the launchers: creates the environment once, and builds the launch command from environment variables.

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$REPO_ROOT${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"

# ensure_environment core|dev|…: keep the current environment if it has the packages that setup.py requires with that
# extra; otherwise use .venv, which is created on first use.
ensure_environment() {
    local python=python3 extra=$1 name
    [[ -z "${PRINT_COMMAND:-}" ]] || return 0
    if "$python" "$REPO_ROOT/scripts/check_environment.py" "$extra" >/dev/null 2>&1; then
        return
    fi
    if [[ ! -x "$REPO_ROOT/.venv/bin/python" ]]; then
        for name in python3 python3.13 python3.12 python3.11 python3.10; do
            if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
                python=$name
                break
            fi
        done
        echo "making $REPO_ROOT/.venv with $("$python" --version)" >&2
        "$python" -m venv "$REPO_ROOT/.venv"
    fi
    # shellcheck disable=SC1091
    source "$REPO_ROOT/.venv/bin/activate"
    if python "$REPO_ROOT/scripts/check_environment.py" "$extra" >/dev/null 2>&1; then
        return
    fi
    echo "installing pinned dependencies (a minute or two)" >&2
    python -m pip install --quiet --constraint "$REPO_ROOT/constraints.txt" --editable "${REPO_ROOT}[$extra]"
    if ! python "$REPO_ROOT/scripts/check_environment.py" "$extra" >&2; then
        echo "error: the environment is still incomplete" >&2
        exit 1
    fi
}

# require_variables NAME …: stop if one is not set.
require_variables() {
    local name
    for name in "$@"; do
        if [[ -z "${!name:-}" ]]; then
            echo "error: $name is not set: see the examples at the head of $0" >&2
            exit 2
        fi
    done
}

# require_counts NAME …: stop if one is set to anything but a positive number.
require_counts() {
    local name
    for name in "$@"; do
        if [[ ! "${!name:-1}" =~ ^[1-9][0-9]{0,8}$ ]]; then
            echo "error: $name ${!name} is no positive number: give one, or leave it unset" >&2
            exit 2
        fi
    done
}

# launch FLAG …: run finetune_peft.py, in several processes through accelerate. Environment variables (default):
#   MODEL (the bundled model)            TRAIN_FILE (the bundled sample)     VALIDATION_FILE (held out from TRAIN_FILE)
#   OUTPUT_DIR (output/NAME_OF_SCRIPT)   NUM_PROCESSES (GPUs, or 1)          TOTAL_BATCH_SIZE (16)
#   BATCH_SIZE_PER_GPU (TOTAL / processes, at most 16)
#   MAX_SEQ_LENGTH, LEARNING_RATE, NUM_EPOCHS, SEED (the defaults of finetune_peft.py)
#   ENGINE (zero2 on several GPUs; or ddp, zero3, fsdp)  DS_CONFIG (configs/ds_configs/ENGINE.json)
#   PRINT_COMMAND=1: print the command instead of running it
launch() {
    local gpus=0 processes total per_gpu accumulation command flags engine=${ENGINE:-zero2}
    require_counts NUM_PROCESSES TOTAL_BATCH_SIZE BATCH_SIZE_PER_GPU
    if command -v nvidia-smi >/dev/null 2>&1; then
        gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    fi
    processes=${NUM_PROCESSES:-$((gpus > 1 ? gpus : 1))}
    total=${TOTAL_BATCH_SIZE:-16}
    per_gpu=${BATCH_SIZE_PER_GPU:-$((total / processes > 16 ? 16 : total / processes))}
    if ((per_gpu < 1 || total % (processes * per_gpu) != 0)); then
        echo "error: TOTAL_BATCH_SIZE $total is no multiple of NUM_PROCESSES $processes ×" \
            "BATCH_SIZE_PER_GPU $per_gpu: change one of them" >&2
        exit 2
    fi
    accumulation=$((total / processes / per_gpu))

    command=(accelerate launch --num_machines 1 --num_processes "$processes" --mixed_precision no --dynamo_backend no)
    if [[ ! "$engine" =~ ^(ddp|zero2|zero3|fsdp)$ ]]; then
        echo "error: ENGINE $engine is unknown: use ddp, zero2, zero3 or fsdp" >&2
        exit 2
    fi
    if ((gpus > 1 && processes > 1)); then
        case $engine in
            ddp) command+=(--multi_gpu) ;;
            fsdp) command+=(--use_fsdp --fsdp_version 2 --fsdp_reshard_after_forward true) ;;
            *)
                command+=(--use_deepspeed
                    --deepspeed_config_file "${DS_CONFIG:-$REPO_ROOT/configs/ds_configs/$engine.json}")
                ;;
        esac
    elif ((processes > 1)); then
        # Several processes on CPUs: `--cpu` would silently start one (docs of accelerate 1.15).
        export ACCELERATE_USE_CPU=true
        command+=(--multi_gpu)
    fi
    # One process needs no launcher, which would hide the exit code and print a traceback of its own.
    ((processes > 1)) || command=(python3)
    flags=(
        --model_name_or_path "${MODEL:-$REPO_ROOT/assets/tiny-model}"
        --train_file "${TRAIN_FILE:-$REPO_ROOT/data/sample/train.jsonl}"
        --output_dir "${OUTPUT_DIR:-$REPO_ROOT/output/$(basename "$0" .sh)}"
        --per_device_train_batch_size "$per_gpu"
        --gradient_accumulation_steps "$accumulation"
    )
    if [[ -n "${VALIDATION_FILE:-}" || -z "${TRAIN_FILE:-}" ]]; then
        flags+=(--validation_file "${VALIDATION_FILE:-$REPO_ROOT/data/sample/heldout.jsonl}")
    fi
    [[ -n "${OUTPUT_DIR:-}" ]] || flags+=(--overwrite_output_dir) # the default folder is ours to replace
    [[ -z "${MAX_SEQ_LENGTH:-}" ]] || flags+=(--max_seq_length "$MAX_SEQ_LENGTH")
    [[ -z "${LEARNING_RATE:-}" ]] || flags+=(--learning_rate "$LEARNING_RATE")
    [[ -z "${NUM_EPOCHS:-}" ]] || flags+=(--num_train_epochs "$NUM_EPOCHS")
    [[ -z "${SEED:-}" ]] || flags+=(--seed "$SEED")
    command+=("$REPO_ROOT/open_instruct/finetune_peft.py" "${flags[@]}" "$@")
    if [[ -n "${PRINT_COMMAND:-}" ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    "${command[@]}"
}
