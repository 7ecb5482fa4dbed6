#!/usr/bin/env bash
# Sourced by scripts before they do anything: with --help or -h the lines at the head of the script are all that it says.
set -euo pipefail
for word in "$@"; do
    case $word in
    --help | -h)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit
        ;;
    esac
done
