#!/usr/bin/env bash
# All checks: ruff, mypy, pytest (arguments go to pytest). Checks against the official benchmark files run when
# DAMA_BENCH_DATA names their folder.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ruff check .
mypy
pytest "$@"
