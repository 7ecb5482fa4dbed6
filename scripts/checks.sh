#!/usr/bin/env bash
# Sourced by scripts for `digits`. Bash runs commands inside arithmetic ("a[$(cmd)]" as a number), and reads 08 as octal:
# whatever comes from the environment or the command line passes `digits` before $(( )), (( )), -eq, -lt or similar.
set -euo pipefail

digits() { # digits NAME VALUE [LEAST]: ends the script unless VALUE is a whole number of at least LEAST (default: 0)
    local least=${3:-0}
    case ${2:-} in
        '' | *[!0123456789]* | 0?* | ??????????*) ;;
        *) if [ "$2" -ge "$least" ]; then return; fi ;;
    esac
    printf '%s: expected a whole number from %s to 999999999 in digits, got %q\n' "$1" "$least" "${2:-}" >&2
    exit 1
}
