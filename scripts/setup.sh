#!/usr/bin/env bash
# Makes .venv with the exact versions of constraints.txt, and this repository installed in it, with what its tests and
# its documentation need. About 90 s and 6 GB the first time; nothing when the files below have not changed since. PYTHON
# names the interpreter (default: python3). Where there is no .venv yet, an active virtual or conda environment that holds
# these versions is used: .venv becomes a link to it. TORCH_INDEX_URL names an index of PyTorch's wheels for an older
# CUDA, such as cu126, where the driver is too old for CUDA 13 (below 580; `nvidia-smi` shows it).
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."

# Prints how many of constraints.txt's versions the interpreter $1 lacks, with the first; nothing where it has all.
differing_versions() {
    "$1" - <<'PYTHON'
import importlib.metadata as metadata
import re
import sys

differing = [] if sys.version_info >= (3, 11) else [f"Python {sys.version.split()[0]} instead of 3.11 or newer"]
for line in open("constraints.txt", encoding="utf-8"):
    name, *wanted = re.split("={2,3}", line.partition("#")[0].strip())
    try:
        found = metadata.version(name) if wanted else None
    except metadata.PackageNotFoundError:
        found = "none"
    if wanted and found != wanted[0]:
        differing.append(f"{name} {found} instead of {wanted[0]}")
if differing:
    print(f"{len(differing)}, the first is {differing[0]}")
PYTHON
}

active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ ! -e .venv ] && [ ! -L .venv ] && [ -x "$active/bin/python" ]; then
    differing=$(differing_versions "$active/bin/python")
    if [ -z "$differing" ]; then
        echo "setup: using the active environment $active; .venv is a link to it"
        "$active/bin/python" -c 'import importlib.metadata as m; m.version("dama-mllm")' 2>/dev/null ||
            "$active/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
        ln -s "$active" .venv
    else
        echo "setup: the active environment $active differs from constraints.txt ($differing); making .venv"
    fi
fi

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

# An environment that is not this script's own is left as it is.
if [ -L .venv ]; then
    differing=$(differing_versions .venv/bin/python)
    if [ -n "$differing" ]; then
        echo "setup: .venv, a link to $(readlink .venv), differs from constraints.txt ($differing); remove the link" >&2
        exit 1
    fi
    exit
fi

# Another build of torch, remembered for later calls: `===` in constraints.txt would refuse 2.13.0+cu126, `==` takes it.
index=${TORCH_INDEX_URL:-$(cat .venv/.torch_index 2>/dev/null || true)}
wanted=$({ cat setup.py pyproject.toml constraints.txt && echo "$index"; } | sha256sum | cut -c1-16)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    echo "setup: installing into .venv (once; about 90 s and 6 GB)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt)
    cp constraints.txt .venv/constraints.txt
    if [ -n "$index" ]; then
        echo "$index" >.venv/.torch_index
        sed 's/^torch===/torch==/' constraints.txt >.venv/constraints.txt
        "${install[@]}" --index-url "$index" torch torchvision
    fi
    "${install[@]}" --editable '.[dev,docs]'
    "${install[@]}" --no-deps gradio # see pyproject.toml
    echo "$wanted" >.venv/.installed
fi
