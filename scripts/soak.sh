#!/usr/bin/env bash
# Kills a stage with `kill -9` at random moments until it has ended, and compares the result with an undisturbed run's.
#   bash scripts/soak.sh train --kills 20             DPO on 2 ranks under DeepSpeed ZeRO-2: about 10 minutes on 2 cores
#   bash scripts/soak.sh train --ranks 1              without DeepSpeed; further flags go to the training
#   bash scripts/soak.sh prepare|hardness|reference|generate  about 3 minutes each
# --seed draws other moments. One line a kill, then the verdict; the exit code is 0 only where nothing differs.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || bash scripts/setup.sh
exec .venv/bin/python scripts/soak.py "$@"
