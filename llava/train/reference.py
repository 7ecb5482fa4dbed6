"""The reference log-probs: log pi_ref(y | I, x) of both answers of every pair, as a resumable stage.

Runs on the training's own model set-up and data path, so that a step of training that starts from the same weights
finds R_i = 0 up to rounding. Batches hold pairs of similar length; answers of a pair share one image encoding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dama.console import digest_of, say
from dama.pairs import PreferencePair, SkippedPair
from dama.stage import open_stage, read_stage
from llava.model.fingerprint import digest_of_checkpoint
from llava.train.arguments import BASE_AS_REFERENCE, Arguments
from llava.train.dpo_data import (
    DataCollatorForDPODataset,
    DPODataset,
    PairValues,
    PreparedPair,
    data_fingerprint,
    encode_pairs,
    refuse_other_inputs,
)
from llava.train.setup_model import setup_model

STAGE = "reference"
SIDES = ("chosen", "rejected")


def run_reference(
    arguments: Arguments,
    pairs: Sequence[PreferencePair],
    skipped: Sequence[SkippedPair],
    out: str | Path,
    batch_size: int,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Computes log-probs for every pair and writes them to `out`; returns the manifest.

    Args:
        arguments: as for training; `model_name_or_path` is pi_ref.
        pairs, skipped: what `dama.pairs.check_pairs` made of --data_path.
        batch_size: pairs in one forward pass (twice as many sequences).
    """
    model_args, data_args, args = arguments
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model, tokenizer, image_processor = setup_model(arguments, dtype=dtype)
    model = model.to(args.device).eval()
    encoded = encode_pairs(pairs, arguments, tokenizer, model)
    # Similar lengths together: sorted by the longer answer, the id settles ties so that the order is always the same.
    order = sorted(encoded.fits, key=lambda i: (max(len(a.input_ids) for a in encoded.answers[i]), pairs[i].id))
    prepared = [PreparedPair(pairs[i], *encoded.answers[i], 0.0, 0.0, 0.0) for i in order]
    dataset = DPODataset(prepared, str(data_args.image_folder), image_processor, model.config)
    collate = DataCollatorForDPODataset(tokenizer, dataset, args.shared_prefix)
    batches = [prepared[i : i + batch_size] for i in range(0, len(prepared), batch_size)]

    fingerprint = data_fingerprint(pairs, data_args) | model_fingerprint(arguments, model, tokenizer)
    fingerprint |= {"precision": str(model.dtype).removeprefix("torch."), "batch_size": batch_size}
    with open_stage(out, STAGE, fingerprint, [len(batch) for batch in batches], overwrite=overwrite) as stage:
        if stage.complete:
            return read_stage(out, STAGE)[0]
        with tqdm(total=stage.total, initial=stage.records_done, desc=STAGE, unit="pair") as bar:
            for batch in batches[stage.chunks_done :]:
                stage.append(logps_of_batch(model, collate(batch), batch, args))
                bar.update(len(batch))
        skipped = [*skipped, *encoded.long]
        records = stage.records()
        summary = {
            "pairs": len(records),
            "skipped": [{"id": skip.id, "reason": skip.reason} for skip in skipped],
            "tokens": {side: sum(r[f"{side}_tokens"] for r in records) for side in SIDES},
            "mean_logp": {side: sum(r[f"{side}_logp"] for r in records) / len(records) for side in SIDES},
        }
        return stage.finish(summary)


@torch.no_grad()
def logps_of_batch(model: Any, batch: dict[str, Any], items: Sequence[PreparedPair], args: Any) -> list[dict[str, Any]]:
    """One record a pair: id, chosen_logp, rejected_logp (nats, summed), chosen_tokens, rejected_tokens."""
    sums = model(
        input_ids=batch["input_ids"].to(args.device),
        attention_mask=batch["attention_mask"].to(args.device),
        labels=batch["targets"].to(args.device),
        images=batch["images"].to(args.device, model.dtype),
        image_index=batch["image_index"],
        tails=batch.get("tails"),
        logp_chunk=args.logp_chunk,
    )
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
    summary = manifest["summary"]
    say(
        f"reference: {summary['pairs']} pairs, {len(summary['skipped'])} skipped, "
        f"{summary['tokens']['chosen']} + {summary['tokens']['rejected']} answer tokens, mean log-prob "
        f"{summary['mean_logp']['chosen']:.2f} / {summary['mean_logp']['rejected']:.2f} (chosen / rejected), "
        f"{manifest['time']['seconds']:.1f} s -> {out}"
    )
    for skip in summary["skipped"]:
        say(f"  skipped {skip['id']}: {skip['reason']}")
