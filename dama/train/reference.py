"""The reference log-probs: log pi_ref(y | m, x) of every view of every pair, as a resumable, sharded stage.

Uses the training's own model family, so that a step of training that starts from the same weights finds R_i = 0 up to
rounding. Batches hold pairs of similar length; answers to an image share one image encoding. Pairs of the first batch,
and at the end of each shard a sample, are computed again, each alone, and must be the same up to rounding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dama.console import log
from dama.errors import error_list
from dama.images import ImageFolder
from dama.logps import AnswerTokenLogps
from dama.pairs import PreferencePair, SkippedPair
from dama.stage import WHOLE, Record, Shard, Stage, differences, open_stage, read_stage
from dama.token_weights import NONE
from dama.train.data import (
    DATA_FLAGS,
    ImageChoice,
    PairDataset,
    PairValues,
    data_fingerprint,
    encode_pairs,
    validate_same_inputs,
)
from dama.train.describe import describe
from dama.train.family import ModelFamily, PreparedPair, shown_images
from dama.train.reference_parts import (
    ADDED,
    STAGE,
    TOKEN_FILE,
    TOKEN_TYPE,
    Part,
    Wanted,
    complete_parts,
    missing_views,
    read_parts,
    remove_additions,
    views_of,
)
from dama.train.rows import longest
from dama.train.trainer import PairLoader
from dama.views import PAIR_VIEWS

__all__ = ["BASE_AS_REFERENCE", "describe", "reference_of_pairs", "run_reference"]

BASE_AS_REFERENCE = "base"  # --reference: log-probs of the base under LoRA adapters, on the fly
FLAGS = DATA_FLAGS | {
    "pairs": "--data (content)", "precision": "--precision", "batch_size": "--batch_size",
}  # fmt: skip
VERIFIED_SHARE = 0.005
# Nats per square root of tokens by which answers' sums may differ between their batch and alone, as a root mean square
# of a sample: rounding errors of tokens add up like a random walk, 0.03 to 0.04 nats a token in bf16. A single answer
# may differ OUTLIER times as much.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
OUTLIER = 4


def run_reference(
    family: ModelFamily,
    data_args: Any,
    args: Any,
    pairs: Sequence[PreferencePair],
    skipped: Sequence[SkippedPair],
    out: str | Path,
    batch_size: int,
    *,
    shard: Shard = WHOLE,
    overwrite: bool = False,
    progress: bool = True,
    per_token: bool = False,
    data: dict[str, str] | None = None,
) -> Record | None:
    """Compute log-probs of every pair and write them to `out`.

    Returns the manifest, or None while other shards are missing. Where `out` is finished for the same inputs, only the
    missing views are computed, and added to it.

    Args:
        family: whose `module`, on its device and in evaluation mode, is pi_ref.
        data_args, args: as for training.
        pairs, skipped: what `dama.pairs.check_pairs` made of --data_path.
        batch_size: pairs in one forward pass (twice as many sequences).
        per_token: whether log-probs of single tokens are kept too.
        data: the pairs' `data_fingerprint`, where it is known.

    Raises:
        ValueError: a pair computed alone has other log-probs than in its batch.
    """
    inputs = (data or data_fingerprint(pairs, data_args)) | family.fingerprint()
    inputs |= {"precision": str(family.module.dtype).removeprefix("torch."), "batch_size": batch_size}
    if overwrite:
        if shard.index == 0:
            remove_additions(out)
    elif parts := parts_of_same_inputs(out, inputs):
        wanted = missing_parts(parts, family, args, per_token)
        if not wanted.views:
            log(f"{STAGE}: complete in {out} ({'; '.join(map(str, parts))}), skipped")
            return read_stage(out, STAGE)[0]
        out = Path(out) / ADDED / wanted.folder
        log(f"{STAGE}: adds {', '.join(view.name for view in wanted.views)}{' per token' * per_token} in {out}")
        family = family.with_views(wanted.views)  # type: ignore[attr-defined]  # asked for here only, see ModelFamily
    choice = ImageChoice.of(pairs, family.views, args)
    encoded = encode_pairs(pairs, family, data_args, choice)
    prepared = [PreparedPair(pairs[i], encoded.rows[i], encoded.images[i]) for i in encoded.fits]
    work = ReferenceWork(family, args, plan_batches(prepared, batch_size), data_args.image_folder or [], per_token)
    fingerprint = inputs | choice.fingerprint() | ({"per_token": str(TOKEN_TYPE)} if per_token else {})
    options: dict[str, Any] = {"flags": FLAGS, "attachment": TOKEN_FILE if per_token else None}
    with open_stage(out, STAGE, fingerprint, work.sizes, shard=shard, overwrite=overwrite, **options) as stage:
        work.fill(stage, progress)
        facts: Record = {"skipped": [{"id": skip.id, "reason": skip.reason} for skip in [*skipped, *encoded.long]]}
        if not stage.complete:
            facts["verified"] = work.verify(sample_of(stage.records(), f"{args.seed} {shard}"))
        return stage.conclude(summarize, facts)


def missing_parts(parts: Sequence[Part], family: ModelFamily, args: Any, per_token: bool) -> Wanted:
    """Views that the family reads and the parts of a finished folder lack; no views where they have all."""
    choice = ImageChoice(family.views, args.corruption, args.corruption_seed)
    wanted = Wanted(family.views, choice.made_by, per_token)
    return replace(wanted, views=missing_views(parts, wanted))


@dataclass(frozen=True)
class ReferenceWork:
    """The pairs of the stage in batches, and how their log-probs are computed.

    Attributes:
        args: training arguments: device, loader workers, tokens whose logits exist at one time.
        per_token: whether log-probs of single tokens are computed too.
    """

    family: ModelFamily
    args: Any
    batches: Sequence[Sequence[PreparedPair]]
    image_folder: ImageFolder
    per_token: bool

    @property
    def sizes(self) -> list[int]:
        """Number of pairs of each batch."""
        return [len(batch) for batch in self.batches]

    @cached_property
    def dataset(self) -> PairDataset:
        """All pairs, batch after batch."""
        pairs = [item for batch in self.batches for item in batch]
        return PairDataset(pairs, self.image_folder, self.family.prepare_image)

    @cached_property
    def load(self) -> PairLoader:
        """Reads the images of pairs and collates them."""
        return PairLoader(self.family, self.dataset)

    @property
    def tolerance(self) -> float:
        """Tolerance of `compare` in the model's precision."""
        return TOLERANCE[self.family.module.dtype]

    def loader(self, numbers: Sequence[int]) -> DataLoader:
        """Collated batches with these numbers, read ahead by worker processes."""
        starts = [0, *accumulate(self.sizes)]
        positions = [list(range(starts[number], starts[number + 1])) for number in numbers]
        workers = self.args.dataloader_num_workers
        return DataLoader(self.dataset, batch_sampler=positions, collate_fn=self.load, num_workers=workers)

    def alone(self, items: Sequence[PreparedPair]) -> list[Record]:
        """Records of pairs that are computed one by one."""
        return [logps_of_batch(self.family, self.load([item]), [item], self.args)[0][0] for item in items]

    def fill(self, stage: Stage, progress: bool) -> None:
        """Append every batch that is missing. Raises ValueError where the first does not match its pairs alone."""
        with tqdm(total=stage.total, initial=stage.records_done, desc=STAGE, unit="pair", disable=not progress) as bar:
            for number, batch in zip(stage.to_do, self.loader(stage.to_do)):
                items = self.batches[number]
                records, tokens = logps_of_batch(self.family, batch, items, self.args, self.per_token)
                if number == stage.to_do[0]:  # hours later would be late
                    compare(records, self.alone(items), self.tolerance)
                stage.append(records, tokens)
                bar.update(len(items))

    def verify(self, sample: Sequence[Record]) -> Record:
        """Compare stored records with their pairs computed alone."""
        items = {item.pair.id: item for item in self.dataset.prepared}
        return compare(sample, self.alone([items[record["id"]] for record in sample]), self.tolerance)


def parts_of_same_inputs(out: str | Path, inputs: Record) -> list[Part]:
    """The parts of a finished folder; none where it is not finished, or was made from other inputs."""
    parts = complete_parts(out)
    return parts if parts and not differences(parts[0].inputs, inputs) else []


def plan_batches(prepared: Sequence[PreparedPair], batch_size: int) -> list[list[PreparedPair]]:
    """Pairs of similar length together, the batches in a fixed random order, so that every shard gets as much to do."""
    if not prepared:
        raise ValueError("reference: expected pairs, got none that fits; see --model_max_length and --on_long_pair")

    def length(item: PreparedPair) -> tuple[int, str]:
        return longest(item.rows), item.pair.id

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
        for side in views_of(record):
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


def summarize(records: Sequence[Record], facts: Sequence[Record]) -> Record:
    """Counts, tokens, means, and what the shards' verifications found."""
    checks = [fact["verified"] for fact in facts]
    views = views_of(next(iter(records)))
    return {
        "pairs": len(records),
        "skipped": facts[0]["skipped"],
        "tokens": {side: sum(r[f"{side}_tokens"] for r in records) for side in views},
        "mean_logp": {side: sum(r[f"{side}_logp"] for r in records) / len(records) for side in views},
        "verified": {
            "pairs": sum(check["pairs"] for check in checks),
            "max_difference": max(check["max_difference"] for check in checks),
            "drift": max(check.get("drift", 0.0) for check in checks),
        },
    }


@torch.no_grad()
def logps_of_batch(
    family: ModelFamily, batch: dict[str, Any], items: Sequence[PreparedPair], args: Any, per_token: bool = False
) -> tuple[list[Record], bytes]:
    """Log-probs of pairs under pi_ref.

    Returns:
        One record a pair: its id, and for each view VIEW_logp (nats, summed) and VIEW_tokens. And with `per_token` the
        log-probs of its answers' tokens, pair after pair, as bytes.

    Raises:
        ValueError: a log-prob is infinite or no number.
    """
    device = args.device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "images"}
    images = [batch["images"][image].to(device) for image in shown_images(items)]
    asked: dict[str, Any] = {"per_token": True} if per_token else {}
    found = family.answer_logps(family.module, inputs, images, False, args.logp_chunk, **asked)
    logps, tokens = (values.view(len(family.views), -1).tolist() for values in (found.logps, found.tokens))
    names = [view.name for view in family.views]
    require_finite(names, logps, items)
    columns = {f"{name}_logp": column for name, column in zip(names, logps)}
    columns |= {f"{name}_tokens": column for name, column in zip(names, tokens)}
    rows = zip(*columns.values())
    records = [{"id": item.pair.id} | dict(zip(columns, row)) for item, row in zip(items, rows, strict=True)]
    return records, token_bytes(cast("AnswerTokenLogps", found), len(items)) if per_token else b""


def require_finite(names: Sequence[str], logps: Sequence[Sequence[float]], items: Sequence[PreparedPair]) -> None:
    """Raise ValueError where a log-prob, [V][B], is infinite or no number."""
    for name, column in zip(names, logps):
        for item, logp in zip(items, column, strict=True):
            if not math.isfinite(logp):
                raise ValueError(
                    f"reference: expected finite log-probs, got {logp} for view {name} of pair {item.pair.id}\n"
                    "Remedy: another checkpoint where its weights hold such numbers (a training that diverged), "
                    "--precision fp32 where they overflow"
                )


def token_bytes(found: AnswerTokenLogps, pairs: int) -> bytes:
    """Log-probs of single tokens of V x B answers as float32, pair after pair."""
    answers = found.per_token.float().cpu().split(found.tokens.tolist())
    in_pairs = [answers[row] for pair in range(pairs) for row in range(pair, len(answers), pairs)]
    return torch.cat(in_pairs).numpy().astype(TOKEN_TYPE).tobytes()


def validate_parts(folder: str, parts: Sequence[Part], wanted: Wanted, args: Any) -> None:
    """Raise ValueError where views that training needs are missing in a folder, with the command that adds them."""
    missing = missing_views(parts, wanted)
    if not missing:
        return
    loss, per_token = " ".join(args.loss), " per token" if wanted.per_token else ""
    reads_image = any(view.corrupted for view in missing)
    flags = f"--loss {loss}" + f" --corruption {args.corruption}" * reads_image
    because = flags + f" --token_weights {args.token_weights}" * wanted.per_token
    raise ValueError(
        f"--reference {folder}: expected log-probs{per_token} of the views {', '.join(view.name for view in missing)} "
        f"for {because}, found {'; '.join(map(str, parts))}. `python -m dama reference "
        f"{flags}{' --per_token' * wanted.per_token} ... --out {folder}` adds them."
    )


def reference_of_pairs(
    pairs: Sequence[PreferencePair], data_args: Any, args: Any, data: dict[str, str], family: ModelFamily
) -> PairValues:
    """Reference log-probs of every view of every pair, from --reference or else from the data file.

    None for a pair that the stage left out as too long. `data` is the pairs' `data_fingerprint`.

    Raises:
        ValueError: made from other inputs (each field named), or missing.
    """
    if data_args.reference == BASE_AS_REFERENCE:
        zeros = (0.0,) * len(family.views)
        return PairValues([zeros] * len(pairs), {"logps": "of the base, on the fly"})
    if data_args.reference:
        return stored_reference(pairs, data_args.reference, args, data, family)
    loss = args.preference_loss()
    if not loss.needs_reference and args.weighting().is_static:
        log(f"reference: --loss {loss.name} needs no log-probs of the reference model; metrics take them as 0")
        zeros = (0.0,) * len(family.views)
        return PairValues([zeros] * len(pairs), {"logps": "none: the loss has no reference"})
    without = [pair.id for pair in pairs if pair.reference is None]
    if without or loss.views != PAIR_VIEWS:
        without = without or [pair.id for pair in pairs]
        why = "" if loss.needs_reference else f"--loss {loss.name} needs none, but its --strategy or --selection does. "
        raise ValueError(
            f"reference: expected log-probs for every pair, got none for {len(without)} of {len(pairs)} (first: "
            f"{without[0]}). {why}Run `python -m dama reference` and pass its folder as --reference."
        )
    if args.token_weights != NONE:
        raise ValueError(
            f"--token_weights {args.token_weights}: expected reference log-probs per token, found sums in the data "
            "file. Run `python -m dama reference --per_token` and pass its folder as --reference."
        )
    given = [pair.reference for pair in pairs if pair.reference is not None]
    return PairValues([(logps.chosen, logps.rejected) for logps in given], {"logps": "in the data file"})


def stored_reference(
    pairs: Sequence[PreferencePair], folder: str, args: Any, data: dict[str, str], family: ModelFamily
) -> PairValues:
    """Reference log-probs of the loss's views, from a stage's folder; views that only token weights read have none.

    Raises:
        ValueError: made from other inputs, or without a view that the loss needs.
    """
    manifest, _ = read_stage(folder, STAGE)
    validate_same_inputs(STAGE, folder, manifest["fingerprint"], data | family.fingerprint())
    views, choice = args.preference_loss().views, ImageChoice(family.views, args.corruption, args.corruption_seed)
    wanted = Wanted(views, choice.made_by, args.token_weights != NONE)
    validate_parts(folder, complete_parts(folder), wanted, args)
    stored = read_parts(folder, wanted)
    rest = len(family.views) - len(views)
    places = [[*views].index(view) if view in views else -1 for view in family.views]

    def in_order(values: tuple[Any, ...] | None, none: Any) -> tuple[Any, ...] | None:
        """Values of the loss's views as those of the family's, `none` for the others."""
        padded = values and (*values, none)
        return padded and tuple(padded[place] for place in places)

    sums = [stored.sums.get(pair.id) for pair in pairs]
    if rest:
        sums = [in_order(values, 0.0) for values in sums]
    tokens = [in_order(stored.tokens.get(pair.id), None) for pair in pairs] if wanted.per_token else []
    return PairValues(sums, stored.fingerprint, tokens)
