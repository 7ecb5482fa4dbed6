"""The reference log-probs: log pi_ref(y | I, x) of both answers of every pair, as a resumable, sharded stage.

Runs on the training's own model set-up and data path, so that a step of training that starts from the same weights
finds R_i = 0 up to rounding. Batches hold pairs of similar length; answers of a pair share one image encoding. Pairs of
the first batch, and at the end of each shard a sample, are computed again, each alone, and must come out the same up to
rounding.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dama.console import digest_of, say
from dama.errors import error_list
from dama.pairs import PreferencePair, SkippedPair
from dama.stage import WHOLE, Record, Shard, open_stage, read_stage
from llava.model.fingerprint import digest_of_checkpoint
from llava.train.arguments import BASE_AS_REFERENCE, Arguments
from llava.train.dpo_data import (
    DATA_FLAGS,
    DataCollatorForDPODataset,
    DPODataset,
    PairValues,
    PreparedPair,
    answer_logps_of,
    data_fingerprint,
    encode_pairs,
    refuse_other_inputs,
)
from llava.train.setup_model import setup_model

STAGE = "reference"
FLAGS = DATA_FLAGS | {
    "pairs": "--data (content)", "precision": "--precision", "batch_size": "--batch_size",
}  # fmt: skip
SIDES = ("chosen", "rejected")
VERIFIED_SHARE = 0.005
# Nats per square root of tokens by which answers' sums may differ between their batch and alone, as a root mean square
# of a sample: rounding errors of tokens add up like a random walk, 0.03 to 0.04 nats a token in bf16. A single answer
# may differ OUTLIER times as much.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
OUTLIER = 4


def run_reference(
    arguments: Arguments,
    pairs: Sequence[PreferencePair],
    skipped: Sequence[SkippedPair],
    out: str | Path,
    batch_size: int,
    *,
    shard: Shard = WHOLE,
    overwrite: bool = False,
    progress: bool = True,
) -> Record | None:
    """Computes log-probs for every pair and writes them to `out`; returns the manifest, or None while other shards
    are missing.

    Args:
        arguments: as for training; `model_name_or_path` is pi_ref.
        pairs, skipped: what `dama.pairs.check_pairs` made of --data_path.
        batch_size: pairs in one forward pass (twice as many sequences).

    Raises:
        ValueError: a pair computed alone has other log-probs than in its batch.
    """
    _, data_args, args = arguments
    model, tokenizer, image_processor = setup_model(arguments, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # from here on each rank works alone, and may end before the others
    model = model.to(args.device).eval()
    encoded = encode_pairs(pairs, arguments, tokenizer, model)
    skipped = [*skipped, *encoded.long]
    batches = plan_batches(
        [PreparedPair(pairs[i], *encoded.answers[i], 0.0, 0.0, 0.0) for i in encoded.fits], batch_size
    )  # fmt: skip
    sizes = [len(batch) for batch in batches]
    prepared = [item for batch in batches for item in batch]
    dataset = DPODataset(prepared, data_args.image_folder or [], image_processor, model.config)
    image_tokens = model.get_vision_tower().tokens_per_image
    collate = DataCollatorForDPODataset(tokenizer, dataset, args.shared_prefix, image_tokens)

    def logps_alone(item: PreparedPair) -> Record:
        return logps_of_batch(model, collate([item]), [item], args)[0]

    fingerprint = data_fingerprint(pairs, data_args) | model_fingerprint(arguments, model, tokenizer)
    fingerprint |= {"precision": str(model.dtype).removeprefix("torch."), "batch_size": batch_size}
    with open_stage(out, STAGE, fingerprint, sizes, shard=shard, overwrite=overwrite, flags=FLAGS) as stage:
        starts = [0, *accumulate(sizes)]
        positions = [list(range(starts[number], starts[number + 1])) for number in stage.to_do]
        loader = DataLoader(
            dataset, batch_sampler=positions, collate_fn=collate, num_workers=args.dataloader_num_workers
        )  # fmt: skip
        with tqdm(total=stage.total, initial=stage.records_done, desc=STAGE, unit="pair", disable=not progress) as bar:
            for number, batch in zip(stage.to_do, loader):
                records = logps_of_batch(model, batch, batches[number], args)
                if number == stage.to_do[0]:  # hours later would be late
                    compare(records, list(map(logps_alone, batches[number])), TOLERANCE[model.dtype])
                stage.append(records)
                bar.update(sizes[number])
        facts: Record = {"skipped": [{"id": skip.id, "reason": skip.reason} for skip in skipped]}
        if not stage.complete:
            sample = sample_of(stage.records(), f"{args.seed} {shard}")
            items = {item.pair.id: item for item in prepared}
            again = [logps_alone(items[record["id"]]) for record in sample]
            facts["verified"] = compare(sample, again, TOLERANCE[model.dtype])
        return stage.conclude(summarise, facts)


def plan_batches(prepared: Sequence[PreparedPair], batch_size: int) -> list[list[PreparedPair]]:
    """Pairs of similar length together, the batches in a fixed random order, so that every shard gets as much to do."""
    if not prepared:
        raise ValueError("reference: expected pairs, got none that fits; see --model_max_length and --on_long_pair")

    def length(item: PreparedPair) -> tuple[int, str]:
        return max(len(item.chosen.input_ids), len(item.rejected.input_ids)), item.pair.id

    ordered = sorted(prepared, key=length)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    random.Random(0).shuffle(batches)
    return batches


def sample_of(records: Sequence[Record], seed: str) -> list[Record]:
    """0.5 % of the records of a shard, at least one where it has any."""
    return random.Random(seed).sample(list(records), math.ceil(VERIFIED_SHARE * len(records)))


def compare(records: Sequence[Record], again: Sequence[Record], tolerance: float) -> Record:
    """How far log-probs computed in a batch are from the same pairs' alone.

    Args:
        tolerance: nats per square root of an answer's tokens, for the root mean square of all answers.

    Returns:
        {"pairs", "max_difference" in nats, "drift": the root mean square in nats per square root of tokens}.

    Raises:
        ValueError: the drift is above the tolerance, or an answer's own above OUTLIER times that; those are named.
    """
    largest, drifts, outliers = 0.0, [], []
    for record, alone in zip(records, again, strict=True):
        for side in SIDES:
            was, now, tokens = record[f"{side}_logp"], alone[f"{side}_logp"], record[f"{side}_tokens"]
            largest, drift = max(largest, abs(was - now)), abs(was - now) / math.sqrt(tokens)
            drifts.append(drift)
            if not drift <= OUTLIER * tolerance or alone[f"{side}_tokens"] != tokens:
                allowed = f"expected a difference of at most {OUTLIER * tolerance * math.sqrt(tokens):.4f}"
                got = f"{was:.4f} in its batch, {now:.4f} alone; {allowed}"
                outliers.append(f"pair {record['id']}, {side} answer of {tokens} tokens: {got}")
    mean = math.sqrt(sum(drift**2 for drift in drifts) / max(1, len(drifts)))
    if not outliers and not mean <= tolerance:
        outliers = [
            f"{len(drifts)} answers: {mean:.2g} nats per square root of tokens apart (root mean square), expected at "
            f"most {tolerance:g}"
        ]
    if outliers:
        remedy = "another --batch_size, or --precision fp32; where it stays, do not trust this device's kernels"
        raise ValueError(error_list("reference: pairs computed again", outliers, remedy))
    return {"pairs": len(records), "max_difference": largest, "drift": mean}


def summarise(records: Sequence[Record], facts: Sequence[Record]) -> Record:
    """Counts, tokens, means, and what the shards' verifications found."""
    checks = [fact["verified"] for fact in facts]
    return {
        "pairs": len(records),
        "skipped": facts[0]["skipped"],
        "tokens": {side: sum(r[f"{side}_tokens"] for r in records) for side in SIDES},
        "mean_logp": {side: sum(r[f"{side}_logp"] for r in records) / len(records) for side in SIDES},
        "verified": {
            "pairs": sum(check["pairs"] for check in checks),
            "max_difference": max(check["max_difference"] for check in checks),
            "drift": max(check.get("drift", 0.0) for check in checks),
        },
    }


@torch.no_grad()
def logps_of_batch(model: Any, batch: dict[str, Any], items: Sequence[PreparedPair], args: Any) -> list[dict[str, Any]]:
    """One record a pair: id, chosen_logp, rejected_logp (nats, summed), chosen_tokens, rejected_tokens."""
    inputs = {"plan": batch["plan"].to(args.device), "images": batch["images"].to(args.device)}
    sums = answer_logps_of(model, inputs, args.logp_chunk)
    chosen, rejected = sums.logps.tolist()[: len(items)], sums.logps.tolist()[len(items) :]
    n_chosen, n_rejected = sums.tokens.tolist()[: len(items)], sums.tokens.tolist()[len(items) :]
    return [
        {"id": item.pair.id, "chosen_logp": c, "rejected_logp": r, "chosen_tokens": nc, "rejected_tokens": nr}
        for item, c, r, nc, nr in zip(items, chosen, rejected, n_chosen, n_rejected)
    ]


def reference_of_pairs(
    pairs: Sequence[PreferencePair],
    arguments: Arguments,
    data: dict[str, str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> PairValues:
    """(log pi_ref(y_w), log pi_ref(y_l)) of every pair, from --reference or else from the data file.

    None for a pair that the stage left out as too long. `data` is the pairs' `data_fingerprint`.

    Raises:
        ValueError: made from other inputs (each field named), or missing.
    """
    _, data_args, _ = arguments
    if data_args.reference == BASE_AS_REFERENCE:
        return PairValues([(0.0, 0.0)] * len(pairs), {"logps": "of the base, on the fly"})
    if data_args.reference:
        manifest, records = read_stage(data_args.reference, STAGE)
        current = data | model_fingerprint(arguments, model, tokenizer)
        refuse_other_inputs(STAGE, data_args.reference, manifest["fingerprint"], current)
        logps = {record["id"]: (record["chosen_logp"], record["rejected_logp"]) for record in records}
        return PairValues([logps.get(pair.id) for pair in pairs], manifest["fingerprint"])
    without = [pair.id for pair in pairs if pair.reference is None]
    if without:
        raise ValueError(
            f"reference: expected log-probs for every pair, got none for {len(without)} of {len(pairs)} (first: "
            f"{without[0]}). Run `python -m dama reference` and pass its folder as --reference."
        )
    given = [pair.reference for pair in pairs if pair.reference is not None]
    return PairValues([(logps.chosen, logps.rejected) for logps in given], {"logps": "in the data file"})


def model_fingerprint(arguments: Arguments, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Whatever else a log-prob depends on: weights, vision tower, tokenizer, template, the way images are prepared."""
    model_args, _, _ = arguments
    tower = model.get_vision_tower()
    return {
        "model": digest_of_checkpoint(str(model_args.model_name_or_path)),
        "vision_tower": digest_of_checkpoint(tower.folder),
        "tokenizer": digest_of([len(tokenizer), tokenizer("Is it a cat? It's 3.5 cats!\n").input_ids]),
        "template": str(model_args.version),
        "image_aspect_ratio": model.config.image_aspect_ratio,
        "image_processor": digest_of(json.loads(tower.image_processor.to_json_string())),
        "mm_use_im_start_end": model.config.mm_use_im_start_end,
    }


def describe(manifest: dict[str, Any], out: str | Path) -> None:
    """The stage's closing lines."""
    summary, verified = manifest["summary"], manifest["summary"]["verified"]
    say(
        f"reference: {summary['pairs']} pairs in {manifest['fingerprint']['precision']}, {len(summary['skipped'])} "
        f"skipped, {summary['tokens']['chosen']} + {summary['tokens']['rejected']} answer tokens, mean log-prob "
        f"{summary['mean_logp']['chosen']:.2f} / {summary['mean_logp']['rejected']:.2f} (chosen / rejected), "
        f"{manifest['time']['seconds']:.1f} s -> {out}"
    )
    say(
        f"reference: {verified['pairs']} pairs computed again, each alone: log-probs differ by at most "
        f"{verified['max_difference']:.2g} nats"
    )
    for skip in summary["skipped"]:
        say(f"  skipped {skip['id']}: {skip['reason']}")
