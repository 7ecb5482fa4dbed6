"""Rounding noise of bf16: log-probs and R of the same pairs packed 4 at a time, alone, and in fp32.

The reference stage and training's first step judge differences by nats per square root of tokens
(dama.train.reference.TOLERANCE, dama.train.trainer.REFERENCE_DRIFT); this is what they would see. The frozen
vision tower is in bf16 everywhere, as in training.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dama.train.reference import TOLERANCE
from dama.train.trainer import REFERENCE_DRIFT
from llava.estimate.plan import Plan
from llava.rehearsal import training
from llava.rehearsal.launch import is_rehearsed
from scripts.gpu.block import Report
from scripts.gpu.models import free, plan_of, shape_of

PACKED = 4
PAIRS = 4 if is_rehearsed() else 16
# Random weights spread logits by 1.3; trained ones by about 3, and noise in bf16 grows with them.
LOGIT_SPREAD = 3.0
MARGIN = 3  # of a limit above the noise that it must let pass


def measure(report: Report) -> None:
    """Compare log-probs in bf16, packed and one by one, with those in fp32."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    with tempfile.TemporaryDirectory() as name:
        plan = plan_of(Path(name), shape_of())
        model = training.build(plan, torch.float32).eval()
        spread_logits(model)
        logps: dict[str, Tensor] = {}
        with report.case("logits") as found:
            logps["fp32"] = logps_of(plan, model, 1)
            found |= {"spread": LOGIT_SPREAD, "mean_logp_of_a_token": float(logps["fp32"].sum() / tokens().sum())}
        for parameter in model.parameters():  # not the buffers: the rotary embedding's stay in fp32
            parameter.data = parameter.data.to(torch.bfloat16)
        free()
        for head in ("bf16", "fp32"):
            model.float32_logits = head == "fp32"
            with report.case(f"{head} logits") as found:
                logps |= {f"{head} packed": logps_of(plan, model, PACKED), f"{head} alone": logps_of(plan, model, 1)}
                found |= compare(logps, head)
    report.line = "; ".join(line_of(head, report.cases[f"{head} logits"]) for head in ("bf16", "fp32"))


def spread_logits(model: Any) -> None:
    """Scales the output layer, whose inputs have a norm of sqrt(D)."""
    weight = model.lm_head.weight
    with torch.no_grad():
        weight.mul_(LOGIT_SPREAD / (weight.float().std().item() * weight.shape[1] ** 0.5))


def tokens() -> Tensor:
    """[2 * PAIRS] answer tokens, those of the chosen answers first."""
    pair = shape_of().pair
    return torch.tensor([float(pair.chosen)] * PAIRS + [float(pair.rejected)] * PAIRS)


@torch.no_grad()
def logps_of(plan: Plan, model: Any, at_a_time: int) -> Tensor:
    """[2 * PAIRS] log-probs of the same pairs, however many are packed."""
    batch = PairSource(plan)
    parts = [
        model(**batch.take(start, at_a_time), logp_chunk=plan.arguments[2].logp_chunk).logps.cpu().chunk(2)
        for start in range(0, PAIRS, at_a_time)
    ]
    return torch.cat([torch.cat(side) for side in zip(*parts)]).double()


class PairSource:
    """Random pairs with images, the same ones whatever the micro-batch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def take(self, start: int, count: int) -> dict[str, Any]:
        """Pairs start to start + count as the model's arguments, on the GPU."""
        from measure import random_images, random_pairs

        from llava.model.splice import ForwardPlan

        shape = shape_of()
        items = random_pairs(shape, PAIRS)[start : start + count]
        ids = [torch.cat([i.chosen.input_ids, i.rejected.input_ids[-shape.pair.rejected :]]) for i in items]
        labels = [torch.cat([i.chosen.labels, i.rejected.labels[-shape.pair.rejected :]]) for i in items]
        tails = [(shape.pair.chosen, shape.pair.rejected)] * count
        plan = ForwardPlan.of_groups(ids, labels, [[i] for i in range(count)], [shape.patches] * count, tails)
        images = random_images(shape, PAIRS)[start : start + count]
        return {"plan": plan.to(torch.device("cuda", 0)), "images": images.to("cuda")}


def compare(logps: dict[str, Tensor], head: str) -> dict[str, Any]:
    """Noise of each comparison in nats per square root of tokens, and the limits that it leads to."""
    packed, alone, exact = logps[f"{head} packed"], logps[f"{head} alone"], logps["fp32"]
    of_tokens = {
        "packed_against_alone": noise(packed - alone, tokens()),
        "packed_against_fp32": noise(packed - exact, tokens()),
    }
    of_R = {
        "R_packed_against_alone": noise(gap(packed - alone), sum(tokens().chunk(2))),
        "R_packed_against_fp32": noise(gap(packed - exact), sum(tokens().chunk(2))),
    }
    of_answers = float(gap(packed - exact).square().mean().sqrt())
    limits = {
        "tolerance": MARGIN * of_tokens["packed_against_alone"],
        "tolerance_now": TOLERANCE[torch.bfloat16],
        "reference_drift": MARGIN * max(of_R.values()),
        "reference_drift_now": REFERENCE_DRIFT[True],
    }
    return {"nats_per_root_token": of_tokens | of_R, "R_nats": of_answers, "limits": limits}


def gap(difference: Tensor) -> Tensor:
    """[PAIRS] the difference's part in R."""
    chosen, rejected = difference.chunk(2)
    return chosen - rejected


def noise(difference: Tensor, count: Any) -> float:
    """Root mean square of a sum's error over the square root of its tokens: one token's standard deviation."""
    return float((difference / count.sqrt()).square().mean().sqrt())


def line_of(head: str, found: dict[str, Any]) -> str:
    """Summary of one head's noise, in nats, beside the limits that the reference check uses now."""
    if "limits" not in found:
        return f"{head} logits: {found.get('error', 'out of memory')}"
    each, limits = found["nats_per_root_token"], found["limits"]
    return (
        f"{head} logits: {each['packed_against_alone']:.3f} nats a token packed against alone, "
        f"{each['packed_against_fp32']:.3f} against fp32, R {found['R_nats']:.2f} nats; {MARGIN} x noise gives "
        f"TOLERANCE {limits['tolerance']:.2g} (now {limits['tolerance_now']:g}), "
        f"REFERENCE_DRIFT {limits['reference_drift']:.2g} (now {limits['reference_drift_now']:g})"
    )
