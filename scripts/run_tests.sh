#!/usr/bin/env bash
# Set up the environment if needed, then check style and types and run the tests.
#
#   bash scripts/run_tests.sh                                everything that runs without a GPU
#   bash scripts/run_tests.sh tests/test_chat.py -k mask     arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ensure_environment dev
cd "$REPO_ROOT"
ruff check .
ruff format --check .
mypy
# Two workers with one thread each: the models are too small to fill a core.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@"
