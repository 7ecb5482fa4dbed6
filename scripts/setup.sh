#!/usr/bin/env bash
# Makes .venv with the exact versions of constraints.txt, and this repository installed in it. About 90 s and 6 GB the
# first time; nothing when the files below have not changed since. PYTHON names the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
missing=()
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || missing+=("Python 3.11 or newer (PYTHON names it)")
"$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=("Python's venv module (Debian: python3-venv)")
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null || true)
[ -f "$header/Python.h" ] || missing+=("Python's headers (Debian: python3-dev), for DeepSpeed's CPU op")
command -v "${CXX:-g++}" >/dev/null || missing+=("a C++ compiler (Debian: g++), for DeepSpeed's CPU op")
command -v git >/dev/null || missing+=("git")
if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: this machine lacks:" >&2
    printf '  - %s\n' "${missing[@]}" >&2
    exit 1
fi

wanted=$(cat setup.py constraints.txt | sha256sum | cut -c1-16)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing into .venv (once; about 90 s and 6 GB)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt gradio # see setup.py
    echo "$wanted" > .venv/.installed
fi
