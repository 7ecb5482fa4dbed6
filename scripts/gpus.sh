#!/usr/bin/env bash
# Sourced by scripts that start DeepSpeed: which GPUs of this machine are theirs. `deepspeed --num_gpus N` would take
# the first N of the machine, whatever CUDA_VISIBLE_DEVICES says, and nvidia-smi lists them all too.
set -euo pipefail

# The indices of the GPUs to use, one a line: those of CUDA_VISIBLE_DEVICES (indices or UUIDs, as far as it reaches: an
# entry that names no GPU ends the list, as in CUDA), else all that nvidia-smi lists.
visible_gpus() {
    local listed entry index
    listed=$(nvidia-smi --query-gpu=index,uuid --format=csv,noheader 2>/dev/null || true)
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        if [ -n "$listed" ]; then cut -d, -f1 <<<"$listed"; fi
        return
    fi
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | tr -d ' \t' | while read -r entry; do
        case $entry in
            '' | -*) break ;;
            GPU-*) # a UUID, which may be cut short
                index=$(awk -F', *' -v uuid="$entry" 'index($2, uuid) == 1 { print $1; exit }' <<<"$listed")
                if [ -z "$index" ]; then break; fi
                echo "$index"
                ;;
            *[!0-9]*)
                echo "CUDA_VISIBLE_DEVICES: expected indices or UUIDs of whole GPUs, got '$entry'; unset it, or list them" >&2
                return 1
                ;;
            *) echo "$entry" ;;
        esac
    done
}

# launch_on COUNT: DeepSpeed's options for the first COUNT of them, such as --include localhost:2,3. Where there are
# fewer, as in a dry run, or the ranks are on CPUs, only their number is given; the doctor says what is missing.
launch_on() {
    local found
    found=$(visible_gpus | head -n "$1")
    if [ "${DS_ACCELERATOR:-}" = cpu ] || [ "$(grep -c . <<<"$found")" -lt "$1" ]; then
        echo "--num_gpus $1"
    else
        echo "--include localhost:$(paste -sd, - <<<"$found")"
    fi
}
