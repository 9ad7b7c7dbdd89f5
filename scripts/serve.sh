#!/usr/bin/env bash
# Serve a checkpoint of merge_peft.py with vLLM, prefixes included, as an OpenAI-compatible server.
#
#   bash scripts/serve.sh output/both                      http://localhost:8000/v1
#   bash scripts/serve.sh output/both --port 9000          flags after the checkpoint go to `vllm serve`
#   bash scripts/serve.sh --print output/both              only print the command
#   PYTHON=~/vllm/bin/python bash scripts/serve.sh …       the interpreter of vLLM's own environment
#
# docs/serving.md shows the client's side.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m open_instruct.serving.vllm_command "$@"
