r"""DAMA with an objective of your own, without a change to the repository.

This script is `python -m dama` with one more row in the table of objectives. Every command and flag works with it:

    python examples/own_objective.py hardness  --data pairs.jsonl --image_folder images --out runs/hardness
    python examples/own_objective.py reference --data pairs.jsonl --image_folder images --loss dpop \
        --model liuhaotian/llava-v1.5-7b --precision bf16 --out runs/reference
    deepspeed --num_gpus 4 examples/own_objective.py train --deepspeed scripts/zero2.json \
        --data pairs.jsonl --image_folder images --loss dpop --model liuhaotian/llava-v1.5-7b \
        --hardness runs/hardness --reference runs/reference --bf16 True --out runs/dpop

--strategy and --selection set beta and choose pairs for it as for DPO. A model that has finished is not trained again
with the same flags: after a change of the equation, choose another name or another --out.
"""

from __future__ import annotations

import sys

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dama.cli import main
from dama.losses import OBJECTIVES, LossConfig, Objective, ViewLogps
from dama.views import CHOSEN

PENALTY = 5.0  # lambda


def dpop(y: ViewLogps, b: Tensor, _: LossConfig) -> Tensor:
    """-log s(b [R - lambda max(0, -r(w))]): DPO that keeps the chosen answer likely (DPO-Positive, arXiv 2402.13228).

    Args:
        y: log-probs of N pairs: y.r(view) is log pi - log pi_ref, y.R is r(chosen) - r(rejected).
        b: [N], beta of each pair. _: constants of the repository's own objectives.
    """
    return -logsigmoid(b * (y.R - PENALTY * relu(-y.r(CHOSEN))))


OBJECTIVES["dpop"] = Objective(dpop, "DPO that keeps the chosen answer likely")

if __name__ == "__main__":
    sys.exit(main())
