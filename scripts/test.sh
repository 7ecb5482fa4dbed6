#!/usr/bin/env bash
# All checks: ruff, mypy, import-linter, pytest on all cores. Arguments go to pytest (`-n 0` runs in one process). With
# --fast only the tests marked fast, within two minutes. Checks against the official benchmark files run when
# DAMA_BENCH_DATA names their folder.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONDONTWRITEBYTECODE # or every child process would compile the whole repository
pytest=(pytest --numprocesses auto --dist loadfile --no-loadscope-reorder)

install_chromium() { # the pages are tested in a real browser
    if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then return; fi
    echo "test: installing chromium and chromium-driver"
    as_root=$([ "$(id -u)" -eq 0 ] || echo sudo)
    $as_root apt-get update -qq && $as_root apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
}

# DeepSpeed compiles its collectives at their first use, behind a lock that a killed process leaves behind: here once,
# before tests run side by side and kill processes.
compile_collectives() {
    DS_ACCELERATOR=cpu python -c 'from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load()' >/dev/null
}

if [ "${1:-}" = --fast ]; then
    shift
    pytest+=(-m fast)
else
    install_chromium
    compile_collectives
fi
ruff check .
lint-imports

# Types are checked beside the tests, in what those leave of the processors; what mypy finds is printed behind them.
types=$(mktemp)
mypy >"$types" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null || true; rm -f "$types"' EXIT
status=0
"${pytest[@]}" "$@" || status=$?
wait "$mypy" || { status=1 && cat "$types"; }
exit "$status"
