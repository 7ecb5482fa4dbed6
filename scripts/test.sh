#!/usr/bin/env bash
# All checks: ruff, mypy, import-linter, pytest on as many processes as there are cores. Arguments go to pytest; `-n 0`
# among them stays in one process. With --fast only the tests marked fast, within about a minute. Checks against the
# official benchmark files run when DAMA_BENCH_DATA names their folder.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
pytest=(pytest --numprocesses auto --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = --fast ]; then
    shift
    pytest+=(-m fast)
elif ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    # The pages are tested in a real browser.
    echo "test: installing chromium and chromium-driver"
    as_root=$([ "$(id -u)" -eq 0 ] || echo sudo)
    $as_root apt-get update -qq && $as_root apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
fi
ruff check .
mypy
lint-imports
"${pytest[@]}" "$@"
