"""The blocks of scripts/gpu_check.sh: what only a GPU can show, measured in a few minutes."""
