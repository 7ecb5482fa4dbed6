#!/usr/bin/env bash
# Sourced by scripts before they do anything: with --help the lines at the head of the script are all that it says.
set -euo pipefail
if [ "${1:-}" = --help ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit
fi
