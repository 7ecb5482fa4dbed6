"""The reference log-probs: log pi_ref(y | I, x) of both answers of every pair, as a resumable stage.

Runs on the training's own model set-up and data path, so that a step of training that starts from the same weights
finds R_i = 0 up to rounding. Batches hold pairs of similar length; answers of a pair share one image encoding.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dama.console import digest_of, digest_of_file, say
from dama.pairs import PreferencePair, SkippedPair
from dama.stage import open_stage, read_stage
from llava.conversation import get_template
from llava.train.arguments import Arguments
from llava.train.dpo_data import (
    DataCollatorForDPODataset,
    DPODataset,
    PairValues,
    PreparedPair,
    data_fingerprint,
    drop_long_pairs,
    encode_pair,
    refuse_other_inputs,
)
from llava.train.setup_model import setup_model

STAGE = "reference"
SIDES = ("chosen", "rejected")
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 1 << 20


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
    model, tokenizer, image_processor = setup_model(arguments)
    model = model.to(args.device).eval()
    template = get_template(str(model_args.version))
    encoded = [encode_pair(pair, tokenizer, template, model.config.mm_use_im_start_end) for pair in pairs]
    fits, long = drop_long_pairs(
        pairs, encoded, model.get_vision_tower().tokens_per_image, args.model_max_length, data_args.on_long_pair,
        str(data_args.data_path),
    )  # fmt: skip
    # Similar lengths together: sorted by the longer answer, the id settles ties so that the order is always the same.
    fits.sort(key=lambda i: (max(len(answer.input_ids) for answer in encoded[i]), pairs[i].id))
    prepared = [PreparedPair(pairs[i], *encoded[i], 0.0, 0.0, 0.0) for i in fits]
    dataset = DPODataset(prepared, str(data_args.image_folder), image_processor, model.config)
    collate = DataCollatorForDPODataset(tokenizer, dataset)
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
        skipped = [*skipped, *long]
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
        logp_chunk=args.logp_chunk,
    )
    chosen, rejected = sums.logps.tolist()[: len(items)], sums.logps.tolist()[len(items) :]
    n_chosen, n_rejected = sums.tokens.tolist()[: len(items)], sums.tokens.tolist()[len(items) :]
    return [
        {"id": item.pair.id, "chosen_logp": c, "rejected_logp": r, "chosen_tokens": nc, "rejected_tokens": nr}
        for item, c, r, nc, nr in zip(items, chosen, rejected, n_chosen, n_rejected)
    ]


def reference_of_pairs(
    pairs: Sequence[PreferencePair], arguments: Arguments, model: Any, tokenizer: PreTrainedTokenizerBase
) -> PairValues:
    """(log pi_ref(y_w), log pi_ref(y_l)) of every pair, from --reference or else from the data file.

    Raises:
        ValueError: made from other inputs (each field named), or missing.
    """
    _, data_args, _ = arguments
    if data_args.reference:
        manifest, records = read_stage(data_args.reference, STAGE)
        current = data_fingerprint(pairs, data_args) | model_fingerprint(arguments, model, tokenizer)
        refuse_other_inputs(STAGE, data_args.reference, manifest["fingerprint"], current)
        logps = {record["id"]: (record["chosen_logp"], record["rejected_logp"]) for record in records}
        # Pairs that the stage skipped as too long are skipped by training too, before these zeros are looked at.
        return PairValues([logps.get(pair.id, (0.0, 0.0)) for pair in pairs], manifest["fingerprint"])
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
        "vision_tower": digest_of_checkpoint(tower.vision_tower_name),
        "tokenizer": digest_of([len(tokenizer), tokenizer("Is it a cat? It's 3.5 cats!\n").input_ids]),
        "template": str(model_args.version),
        "image_aspect_ratio": model.config.image_aspect_ratio,
        "image_processor": digest_of(json.loads(tower.image_processor.to_json_string())),
        "mm_use_im_start_end": model.config.mm_use_im_start_end,
    }


def digest_of_checkpoint(source: str) -> str:
    """Identity of a checkpoint's weights: a hub name with its revision, or a digest of the folder's weight files.

    Files over 64 MiB are read at 64 evenly spaced blocks of 1 MiB, so that 13 GB cost a second.
    """
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import cached_file

        config = cached_file(source, "config.json")
        return f"{source}@{Path(str(config)).parent.name}"
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and path.is_file())
    if not weights:
        raise FileNotFoundError(f"checkpoint '{source}': expected weights (*.safetensors or *.bin), found none")
    return digest_of([[path.name, path.stat().st_size, _digest_of_weights(path)] for path in weights])


def _digest_of_weights(path: Path) -> str:
    size = path.stat().st_size
    if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
        return digest_of_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for k in range(SAMPLED_BLOCKS):
            file.seek(k * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1), os.SEEK_SET)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


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
