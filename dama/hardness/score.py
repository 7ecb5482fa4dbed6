"""Hardness of preference pairs: delta_i (Eq. 5) and delta_bar, and the resumable stage that computes them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from dama.console import digest_of
from dama.hardness import split
from dama.hardness.clip import ClipScorer
from dama.pairs import (
    PairsError,
    PreferencePair,
    SkippedPair,
    distinct_images,
    fault_list,
    image_digests,
    pairs_fingerprint,
    resolve_image,
)
from dama.stage import Record, open_stage, read_stage

STAGE = "hardness"
IMAGES_PER_CHUNK = 64  # what a kill can cost; fixed, so that the batch size does not change the chunks
PAIRS_PER_CHUNK = 4096  # of the quick way, from given scores
SCALES = ("cosine", "logit")
REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Hardness:
    """A finished stage: delta of each pair by id, their mean, and what they were computed from."""

    delta: dict[str, float]
    delta_bar: float
    fingerprint: Record


# -------------------------------------------------------------------------------------------------------- equations


def hardness_delta(chosen_scores: Sequence[float], rejected_scores: Sequence[float], reduction: str = "sum") -> float:
    """delta_i = sum over S_w of c(I, s) - sum over S_l of c(I, s)  (Eq. 5); "mean" takes each answer's mean instead.

    The sum grows with the number of statements, so it favours the longer answer; the mean does not.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not chosen_scores or not rejected_scores:
        raise ValueError("hardness needs a score of at least one statement of each answer")
    reduce = math.fsum if reduction == "sum" else statistics.fmean
    return reduce(chosen_scores) - reduce(rejected_scores)


def delta_bar(deltas: Sequence[float]) -> float:
    """delta_bar: the mean of delta over D, against which alpha_D measures each pair."""
    if not deltas:
        raise ValueError("delta_bar is a mean and needs at least one pair")
    return statistics.fmean(deltas)


def similarity(image: Tensor, statements: Tensor, scale: float = 1.0) -> Tensor:
    """c(I, s): [S] cosines, times `scale` (CLIP's logit scale for logits), of unit vectors [D] and [S, D]."""
    return scale * (statements * image).sum(-1)


# ------------------------------------------------------------------------------------------------------------ stage


def run_hardness(
    pairs: Sequence[PreferencePair],
    image_folder: str | Path,
    out: str | Path,
    scorer: ClipScorer | None,
    *,
    scale: str = "cosine",
    reduction: str = "sum",
    batch_size: int = 32,
    workers: int = 0,
    overwrite: bool = False,
    skipped: Sequence[SkippedPair] = (),
    progress: bool = True,
) -> Record:
    """Scores every pair and writes out/hardness.jsonl and out/manifest.json; returns the manifest.

    `scorer` None takes the scores that the pairs carry (`clip_scores`) instead of a CLIP's. Complete output of the
    same inputs is left as it is, interrupted output continued. Each distinct image is encoded once; `batch_size`
    counts images and changes scores by rounding only. `skipped` is listed in the manifest. Pairs come out grouped
    by image, in the order of each image's first use.
    """
    if scale not in SCALES or reduction not in REDUCTIONS:
        raise ValueError(f"expected scale in {SCALES} and reduction in {REDUCTIONS}, got {scale!r} and {reduction!r}")
    if scorer is None:
        _require_scores(pairs)
    chunks = _chunks_by_image(pairs) if scorer else _chunks_of(pairs, PAIRS_PER_CHUNK)
    fingerprint = hardness_fingerprint(pairs, image_folder, scorer, scale, reduction, max(1, workers))
    with open_stage(out, STAGE, fingerprint, [len(chunk) for chunk in chunks], overwrite=overwrite) as stage:
        if stage.complete:
            return read_stage(out, STAGE)[0]
        to_do = chunks[stage.chunks_done :]
        if scorer is None:
            for chunk in to_do:
                stage.append(_records_from_scores(chunk, reduction))
        else:
            factor = scorer.logit_scale if scale == "logit" else 1.0
            images = [distinct_images(chunk) for chunk in chunks]
            done, total = (sum(map(len, part)) for part in (images[: stage.chunks_done], images))
            with tqdm(initial=done, total=total, desc=STAGE, unit="image", disable=not progress) as bar:
                encoded = _encode_chunks(images[stage.chunks_done :], image_folder, scorer, batch_size, workers, bar)
                for chunk, features in zip(to_do, encoded):
                    stage.append(_score_chunk(chunk, features, scorer, factor, reduction))
        return stage.finish(summarise(stage.records(), skipped))


def load_hardness(folder: str | Path) -> Hardness:
    """Reads what run_hardness wrote. Raises dama.stage.StageError where it is absent, unfinished or damaged."""
    manifest, records = read_stage(folder, STAGE)
    delta = {record["id"]: record["delta"] for record in records}
    return Hardness(delta, manifest["summary"]["delta_bar"], manifest["fingerprint"])


def hardness_fingerprint(
    pairs: Sequence[PreferencePair],
    image_folder: str | Path,
    scorer: ClipScorer | None,
    scale: str,
    reduction: str,
    workers: int = 4,
) -> Record:
    """Whatever delta depends on. With given scores (`scorer` None) images and CLIP play no part in it."""
    common = {"pairs": pairs_fingerprint(pairs), "reduction": reduction}
    if scorer is None:
        return common | {"scores": "given"}
    images = digest_of(image_digests(pairs, image_folder, workers))
    return common | {"images": images, "clip": scorer.identity, "splitter": split.VERSION, "scale": scale}


def summarise(records: Sequence[Record], skipped: Sequence[SkippedPair] = ()) -> Record:
    """delta_bar, counts, and the spread of delta over all pairs and per kind."""
    deltas = [record["delta"] for record in records]
    kinds = sorted({record["kind"] for record in records})
    by_kind = {kind: [record["delta"] for record in records if record["kind"] == kind] for kind in kinds}
    return {
        "delta_bar": delta_bar(deltas),
        "pairs": len(records),
        "statements": {
            "chosen": sum(len(record["chosen_scores"]) for record in records),
            "rejected": sum(len(record["rejected_scores"]) for record in records),
        },
        "spread": {"all": _spread(deltas)} | {kind or "(no kind)": _spread(values) for kind, values in by_kind.items()},
        "length_correlation": _length_correlation(records),
        "skipped": [{"id": pair.id, "reason": pair.reason} for pair in skipped],
    }


def _spread(deltas: Sequence[float]) -> Record:
    """sd is that of the population; `negative` the share of pairs whose rejected answer fits the image better."""
    return {
        "pairs": len(deltas),
        "mean": statistics.fmean(deltas),
        "sd": statistics.pstdev(deltas),
        "min": min(deltas),
        "max": max(deltas),
        "negative": sum(delta < 0 for delta in deltas) / len(deltas),
    }


def _length_correlation(records: Sequence[Record]) -> float | None:
    """Pearson's r of delta and the difference in statements: how far delta is length; None where one is constant."""
    longer = [float(len(record["chosen_scores"]) - len(record["rejected_scores"])) for record in records]
    deltas = [record["delta"] for record in records]
    if len(set(longer)) < 2 or len(set(deltas)) < 2:
        return None
    return statistics.correlation(deltas, longer)


# ---------------------------------------------------------------------------------------------------------- scoring


def _chunks_of(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _chunks_by_image(pairs: Iterable[PreferencePair]) -> list[list[PreferencePair]]:
    """Chunks of 64 images with all their pairs, so that no image is met twice."""
    by_image: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_image.setdefault(pair.image, []).append(pair)
    groups = _chunks_of(list(by_image.values()), IMAGES_PER_CHUNK)
    return [[pair for group in groups_of_chunk for pair in group] for groups_of_chunk in groups]


def _records_from_scores(chunk: Sequence[PreferencePair], reduction: str) -> list[Record]:
    """Records of pairs that carry their scores; what the statements were is not known."""
    scores = [pair.clip_scores or ((), ()) for pair in chunk]
    return [
        _record(pair, _Scored([], chosen), _Scored([], rejected), reduction)
        for pair, (chosen, rejected) in zip(chunk, scores)
    ]


def score_faults(pairs: Sequence[PreferencePair]) -> list[str]:
    """The rows whose own scores cannot be used, because one answer has none."""
    lacking = [pair.id for pair in pairs if pair.clip_scores is None or not all(pair.clip_scores)]
    return [f"row {id_}: no scores in chosen_logits or rejected_logits" for id_ in lacking]


def _require_scores(pairs: Sequence[PreferencePair]) -> None:
    faults = score_faults(pairs)
    if faults:
        remedy = "complete these rows, or drop --from_scores and have a CLIP score all"
        raise PairsError(fault_list("pairs with given scores", faults, remedy))


def _encode_chunks(
    images: Sequence[Sequence[str]],
    image_folder: str | Path,
    scorer: ClipScorer,
    batch_size: int,
    workers: int,
    bar: tqdm,
) -> Iterator[dict[str, Tensor]]:
    """The features [D] of each chunk's images by name; one loader decodes for all, no batch holds images of two."""
    batches = [_chunks_of([resolve_image(image_folder, name) for name in names], batch_size) for names in images]
    encoded = scorer.iter_images([batch for of_chunk in batches for batch in of_chunk], workers)
    for names, of_chunk in zip(images, batches):
        features = []
        for batch in islice(encoded, len(of_chunk)):
            features += list(batch)
            bar.update(len(batch))
        yield dict(zip(names, features, strict=True))


def _score_chunk(
    chunk: Sequence[PreferencePair], images: dict[str, Tensor], scorer: ClipScorer, factor: float, reduction: str
) -> list[Record]:
    answers = {answer for pair in chunk for answer in (pair.chosen, pair.rejected)}
    statements = {answer: statements_of(answer, scorer) for answer in sorted(answers)}
    distinct = sorted({statement for of_answer in statements.values() for statement in of_answer})
    row = {statement: index for index, statement in enumerate(distinct)}
    features = scorer.encode_texts(distinct)

    def scored(image: str, answer: str) -> _Scored:
        rows = [row[statement] for statement in statements[answer]]
        scores = similarity(images[image], features[rows], factor).tolist()
        return _Scored(statements[answer], [round(score, 8) for score in scores])

    return [
        _record(pair, scored(pair.image, pair.chosen), scored(pair.image, pair.rejected), reduction) for pair in chunk
    ]


def statements_of(answer: str, scorer: ClipScorer) -> list[str]:
    """S of an answer, each statement short enough for the CLIP's text tower."""
    return [
        piece
        for statement in split.split_statements(answer)
        for piece in split.fit_to_context(statement, scorer.count_tokens, scorer.context_length)
    ]


class _Scored(NamedTuple):
    """An answer's statements and their scores c(I, s)."""

    statements: Sequence[str]
    scores: Sequence[float]


def _record(pair: PreferencePair, chosen: _Scored, rejected: _Scored, reduction: str) -> Record:
    return {
        "id": pair.id,
        "delta": hardness_delta(chosen.scores, rejected.scores, reduction),
        "chosen_statements": list(chosen.statements),
        "chosen_scores": list(chosen.scores),
        "rejected_statements": list(rejected.statements),
        "rejected_scores": list(rejected.scores),
        "kind": pair.kind,
    }
