"""Two steps of a script's training in the real engine, beside their estimate.

In a child: python -m tests.cuda.steps OUT.json RANKS --config-of SCRIPT FLAGS
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from llava.estimate.configs import configs_of
from llava.estimate.fit import reserved
from llava.estimate.memory import estimate_step
from llava.estimate.sizes import ModelShape
from llava.rehearsal.engine import single_rank_world
from llava.rehearsal.training import planned, rehearse


def main(out: str, ranks: str, *words: str) -> None:
    with single_rank_world(int(ranks)):
        plan, lengths = planned(list(words), int(ranks))
        found = rehearse(plan, lengths)
    args = plan.arguments[2]
    shape = ModelShape.of(*configs_of(plan.arguments[0]))
    peak = estimate_step(plan.arguments, shape, lengths, plan.ranks, True, plan.layout).peak
    facts = {
        "levels": [asdict(level) for level in found.levels],
        "waits": found.waits,
        "ran_out_in": found.ran_out_in,
        "peak": found.peak,
        "reserved": found.reserved,
        "estimate": peak,
        "estimated_reserve": reserved(peak, True, args.gradient_checkpointing),
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "layout": plan.layout,
        "checkpointing": args.gradient_checkpointing,
        "faults": [fault for fault in plan.errors if "memory: " in fault],
    }
    Path(out).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
