"""Hardness of preference pairs: delta_i (Eq. 5) and delta_bar, and the resumable stage that computes them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dama.console import digest_of
from dama.errors import error_list
from dama.hardness import split
from dama.hardness.clip import ClipError, ClipScorer, TextTokens, fetch_later
from dama.images import ImageFolder, plain_folder, resolve_image
from dama.pairs import PairsError, PreferencePair, SkippedPair, distinct_images, image_digests, pairs_fingerprint
from dama.stage import WHOLE, Record, Shard, open_stage, read_stage

if TYPE_CHECKING:
    from dama.hardness.split_llm import LlmSplitter

STAGE = "hardness"
FLAGS = {
    "pairs": "--data (content)", "images": "--image_folder (content)", "clip": "--clip", "reduction": "--reduction",
    "scale": "--scale", "scores": "--from_scores", "splitter": "--splitter",
}  # fmt: skip
IMAGES_PER_CHUNK = 64  # what a kill can cost; fixed, so that the batch size does not change the chunks
PAIRS_PER_CHUNK = 4096  # of the quick way, from given scores
SCALES = ("cosine", "logit")
REDUCTIONS = ("sum", "mean")
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Hardness:
    """A finished stage: delta of each pair with an image by id, their mean, and what they were computed from."""

    delta: dict[str, float]
    delta_bar: float
    fingerprint: Record


# -------------------------------------------------------------------------------------------------------- equations


def hardness_delta(chosen_scores: Sequence[float], rejected_scores: Sequence[float], reduction: str = "sum") -> float:
    """delta_i = sum over S_w of c(I, s) - sum over S_l of c(I, s)  (Eq. 5); "mean" takes each answer's mean instead.

    The sum grows with the number of statements, so it favors the longer answer; the mean does not.
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


def similarity(images: Tensor, statements: Tensor, scale: float = 1.0, bias: float = 0.0) -> Tensor:
    """c(I, s): [S] cosines of unit vectors [D] or [S, D] with [S, D]; for logits times CLIP's scale, plus its bias."""
    return scale * (statements * images).sum(-1) + bias


# ------------------------------------------------------------------------------------------------------------ stage


def run_hardness(
    pairs: Sequence[PreferencePair],
    image_folder: ImageFolder,
    out: str | Path,
    scorer: ClipScorer | None,
    *,
    scale: str = "cosine",
    reduction: str = "sum",
    splitter: LlmSplitter | None = None,
    batch_size: int = 32,
    workers: int = 0,
    shard: Shard = WHOLE,
    overwrite: bool = False,
    skipped: Sequence[SkippedPair] = (),
    progress: bool = True,
    data: Mapping[str, str] | None = None,
) -> Record | None:
    """Score every pair and write out/hardness.jsonl and out/manifest.json; return the manifest.

    `scorer` None takes the scores that the pairs carry (`clip_scores`) instead of a CLIP's; `splitter` None splits by
    rules. Complete output of the same inputs is left as it is, interrupted output continued. A `shard` of several does
    its part and returns None while others are missing. Each distinct image is encoded once; `batch_size` counts images
    and changes scores by rounding only. `data` has the digests of pairs and images where they are known.
    `skipped` is listed in the manifest. Pairs come out grouped by image, in the order of each image's first use.
    Of a pair of several images each statement counts with the image that it fits best. A pair of texts alone is not
    scored.
    """
    _validate(pairs, scorer, scale, reduction)
    chunks = _chunks_by_image(pair for pair in pairs if pair.image) if scorer else _chunks_of(pairs, PAIRS_PER_CHUNK)
    data = data or {"pairs": pairs_fingerprint(pairs)}
    if scorer is not None and "images" not in data:
        data = {**data, "images": digest_of(image_digests(pairs, image_folder, max(1, workers)))}
    fingerprint = hardness_fingerprint(pairs, data, scorer, scale, reduction, splitter)
    sizes = [len(chunk) for chunk in chunks]
    with open_stage(out, STAGE, fingerprint, sizes, shard=shard, overwrite=overwrite, flags=FLAGS) as stage:
        to_do = [chunks[number] for number in stage.to_do]
        scored: Iterator[list[Record]]
        if scorer is None:
            scored = (_records_from_scores(chunk, reduction) for chunk in to_do)
        else:
            encoded = _encode_chunks(to_do, image_folder, scorer, batch_size, workers, progress)
            texts = _texts_of_chunks(to_do, scorer.tokens, splitter, workers)
            scored = _score_chunks(to_do, encoded, texts, scorer, scale, reduction)
        for records in scored:
            stage.append(records)
        left_out = [{"id": pair.id, "reason": pair.reason} for pair in skipped]
        return stage.conclude(summarize, {"skipped": left_out, "image_folder": plain_folder(image_folder)})


def load_hardness(folder: str | Path) -> Hardness:
    """Read what run_hardness wrote. Raises dama.stage.StageError where it is absent, unfinished or damaged."""
    manifest, records = read_stage(folder, STAGE)
    delta = {record["id"]: record["delta"] for record in records}
    return Hardness(delta, manifest["summary"]["delta_bar"], manifest["fingerprint"])


def hardness_fingerprint(
    pairs: Sequence[PreferencePair],
    data: Mapping[str, str],
    scorer: ClipScorer | None,
    scale: str,
    reduction: str,
    splitter: LlmSplitter | None = None,
) -> Record:
    """Whatever delta depends on. With given scores (`scorer` None) images and CLIP play no part in it.

    Args:
        data: digests of the pairs and, for a scorer, of their images.
    """
    common = {"pairs": data["pairs"], "reduction": reduction}
    if scorer is None:
        return common | {"scores": "given"}
    rules = split.version_for({answer for pair in pairs for answer in (pair.chosen, pair.rejected)})
    split_by = rules if splitter is None else {"rules": rules} | splitter.identity
    return common | {"images": data["images"], "clip": scorer.identity, "splitter": split_by, "scale": scale}


def summarize(records: Sequence[Record], facts: Sequence[Record] = ()) -> Record:
    """delta_bar, counts, and the spread of delta over all pairs and per kind; `facts` of the first shard are kept."""
    deltas = [record["delta"] for record in records]
    kinds = sorted({record["kind"] for record in records})
    by_kind = {kind: [record["delta"] for record in records if record["kind"] == kind] for kind in kinds}
    fallbacks = Counter(reason for record in records for reason in record.get("fallbacks", {}).values())
    return {
        "delta_bar": delta_bar(deltas),
        "pairs": len(records),
        "statements": {
            "chosen": sum(len(record["chosen_scores"]) for record in records),
            "rejected": sum(len(record["rejected_scores"]) for record in records),
        },
        "fallbacks": dict(sorted(fallbacks.items())),  # answers that an LLM should have split and rules did, by reason
        "spread": {"all": spread(deltas)} | {kind or "(no kind)": spread(values) for kind, values in by_kind.items()},
        "correlations": {name: correlation(deltas, values) for name, values in length_differences(records).items()},
        **(facts[0] if facts else {}),
    }


def spread(deltas: Sequence[float]) -> Record:
    """Sd is that of the population; `negative` the share of pairs whose rejected answer fits the image better."""
    return {
        "pairs": len(deltas),
        "mean": statistics.fmean(deltas),
        "sd": statistics.pstdev(deltas),
        "min": min(deltas),
        "max": max(deltas),
        "negative": sum(delta < 0 for delta in deltas) / len(deltas),
    }


def length_differences(records: Sequence[Record]) -> dict[str, list[float]]:
    """By how much each chosen answer is longer than the rejected one, in statements and in words."""
    statements = [float(len(record["chosen_scores"]) - len(record["rejected_scores"])) for record in records]
    words = [float(record["chosen_words"] - record["rejected_words"]) for record in records]
    return {"statements": statements, "words": words}


def correlation(deltas: Sequence[float], lengths: Sequence[float]) -> float | None:
    """Pearson's r: how far delta, as a sum, is length; None where one of the two is constant."""
    if len(set(lengths)) < 2 or len(set(deltas)) < 2:
        return None
    return statistics.correlation(deltas, lengths)


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
    unknown = split.Split([])
    return [
        _record(pair, (unknown, unknown), (chosen, rejected), reduction)
        for pair, (chosen, rejected) in zip(chunk, scores)
    ]


def score_errors(pairs: Sequence[PreferencePair]) -> list[str]:
    """The rows whose own scores cannot be used, because one answer has none."""
    lacking = [pair.id for pair in pairs if pair.clip_scores is None or not all(pair.clip_scores)]
    return [f"row {id_}: no scores in chosen_logits or rejected_logits" for id_ in lacking]


def _validate(pairs: Sequence[PreferencePair], scorer: ClipScorer | None, scale: str, reduction: str) -> None:
    if scale not in SCALES or reduction not in REDUCTIONS:
        raise ValueError(f"expected scale in {SCALES} and reduction in {REDUCTIONS}, got {scale!r} and {reduction!r}")
    if scorer is None and (errors := score_errors(pairs)):
        remedy = "complete these rows, or drop --from_scores and have a CLIP score all"
        raise PairsError(error_list("pairs with given scores", errors, remedy))
    if scorer is not None and not any(pair.image for pair in pairs):
        raise PairsError("hardness: expected pairs with an image, got none; train with --strategy none or model")


def _encode_chunks(
    chunks: Sequence[Sequence[PreferencePair]],
    image_folder: ImageFolder,
    scorer: ClipScorer,
    batch_size: int,
    workers: int,
    progress: bool,
) -> Iterator[Tensor]:
    """[I, D] features of each chunk's distinct images; one loader decodes for all, no batch holds images of two."""
    images = [distinct_images(chunk) for chunk in chunks]
    batches = [_chunks_of([resolve_image(image_folder, name) for name in names], batch_size) for names in images]
    encoded = scorer.iter_images([batch for of_chunk in batches for batch in of_chunk], workers)
    with tqdm(total=sum(map(len, images)), desc=STAGE, unit="image", disable=not progress) as bar:
        for names, of_chunk in zip(images, batches):
            features = torch.cat(list(islice(encoded, len(of_chunk))))
            bar.update(len(names))
            yield features


class ChunkTexts(NamedTuple):
    """The splits of a chunk's answers, its distinct statements, and their token ids."""

    splits: dict[str, split.Split]
    statements: list[str]
    ids: list[list[int]]


@dataclass(frozen=True)
class ChunkSplitter:
    """Splits and tokenizes the answers of chunk after chunk; worker processes do it ahead of the text tower."""

    answers: Sequence[Sequence[str]]  # distinct ones of each chunk, sorted
    tokens: TextTokens
    splitter: LlmSplitter | None

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, number: int) -> ChunkTexts:
        answers = self.answers[number]
        if self.splitter is None:
            splits = {answer: split.Split(split.split_statements(answer)) for answer in answers}
        else:
            splits = self.splitter.split(answers)
        ids: dict[str, list[int]] = {}  # each text is tokenized once

        def count(text: str) -> int:
            if text not in ids:
                ids[text] = self.tokens.ids(text)
            return len(ids[text])

        limit = self.tokens.context_length
        for answer, (statements, fallback) in splits.items():
            pieces = [piece for statement in statements for piece in split.fit_to_context(statement, count, limit)]
            splits[answer] = split.Split(pieces, fallback)
        distinct = sorted({piece for parts in splits.values() for piece in parts.statements})
        return ChunkTexts(splits, distinct, [ids[piece] for piece in distinct])


def _as_it_is(texts: Any) -> Any:
    return texts


def _texts_of_chunks(
    chunks: Sequence[Sequence[PreferencePair]], tokens: TextTokens, splitter: LlmSplitter | None, workers: int
) -> Iterator[ChunkTexts]:
    """An LLM is asked from this process; a quarter as many processes as decode images keep up with them otherwise."""
    answers = [sorted({answer for pair in chunk for answer in (pair.chosen, pair.rejected)}) for chunk in chunks]
    dataset: Any = ChunkSplitter(answers, tokens, splitter)
    processes = 0 if splitter else math.ceil(workers / 4)
    yield from DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, num_workers=processes)


def _score_chunks(
    chunks: Sequence[Sequence[PreferencePair]],
    encoded: Iterable[Tensor],
    texts: Iterable[ChunkTexts],
    scorer: ClipScorer,
    scale: str,
    reduction: str,
) -> Iterator[list[Record]]:
    """The records of each chunk; on a GPU they are put together while the next chunk's work is under way."""
    factor, bias = (scorer.logit_scale, scorer.logit_bias) if scale == "logit" else (1.0, 0.0)
    score = partial(similarity, scale=factor, bias=bias)
    waiting: Callable[[], list[Record]] | None = None
    for chunk, images, of_chunk in zip(chunks, encoded, texts):
        statements = scorer.encode_texts(of_chunk.statements, of_chunk.ids)
        ready = _queue_scores(chunk, of_chunk, images, statements, score, reduction)
        if waiting is not None:
            yield waiting()
        waiting = ready
    if waiting is not None:
        yield waiting()


def _queue_scores(
    chunk: Sequence[PreferencePair],
    texts: ChunkTexts,
    images: Tensor,
    statements: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    reduction: str,
) -> Callable[[], list[Record]]:
    """Start scoring a chunk's pairs from features [I, D] and [S, D].

    Returns:
        A function that waits for the scores and returns the records.
    """
    image_row = {name: row for row, name in enumerate(distinct_images(chunk))}
    text_row = {statement: row for row, statement in enumerate(texts.statements)}
    splits = [(texts.splits[pair.chosen], texts.splits[pair.rejected]) for pair in chunk]
    rows = [
        (image_row[name], text_row[statement])
        for pair, both in zip(chunk, splits)
        for parts in both
        for statement in parts.statements
        for name in pair.own_images
    ]
    of_image, of_text = torch.tensor(rows, device=images.device).T
    fetch = fetch_later(score(images[of_image], statements[of_text]))

    def records() -> list[Record]:
        scores = iter(fetch())
        take = [
            [[round(best(islice(scores, len(pair.own_images))), 8) for _ in parts.statements] for parts in both]
            for pair, both in zip(chunk, splits)
        ]
        for pair, both, of_pair in zip(chunk, splits, take):
            _require_finite(pair, both, of_pair)
        return [_record(pair, both, of_pair, reduction) for pair, both, of_pair in zip(chunk, splits, take)]

    return records


def best(scores: Iterable[float]) -> float:
    """The largest of a statement's scores with each image; NaN where one is."""
    found = list(scores)
    return math.nan if any(map(math.isnan, found)) else max(found)


def _require_finite(pair: PreferencePair, splits: Sequence[split.Split], scores: Sequence[Sequence[float]]) -> None:
    """Raise ClipError, naming the pair and its image, where CLIP gives NaN or an infinite score."""
    scored = [item for parts, of_side in zip(splits, scores) for item in zip(parts.statements, of_side)]
    wrong = [(statement, score) for statement, score in scored if not math.isfinite(score)]
    if not wrong:
        return
    first = f"{wrong[0][1]} for {wrong[0][0][:80]!r}"
    got = f"expected finite scores, got {len(wrong)} of {len(scored)} that are not, the first {first}"
    remedy = "--precision fp32, another --clip, or leave the pair out; chunks that are scored are kept"
    raise ClipError(f"pair {pair.id} (image {pair.image}): {got}\nRemedy: {remedy}")


def _record(
    pair: PreferencePair,
    splits: tuple[split.Split, split.Split],
    scores: Sequence[Sequence[float]],
    reduction: str,
) -> Record:
    record: Record = {"id": pair.id, "delta": hardness_delta(scores[0], scores[1], reduction)}
    for side, answer, parts, of_side in zip(SIDES, (pair.chosen, pair.rejected), splits, scores):
        record |= {f"{side}_statements": parts.statements, f"{side}_scores": list(of_side)}
        record[f"{side}_words"] = len(answer.split())
    fallbacks = {side: parts.fallback for side, parts in zip(SIDES, splits) if parts.fallback}
    record |= {"kind": pair.kind, "source": pair.source, "image": pair.image, "question": pair.question}
    more: Record = {"images": list(pair.own_images) if pair.more_images else [], "context": pair.context}
    more |= {"second_image": pair.second_image, "fallbacks": fallbacks}
    return record | {name: value for name, value in more.items() if value}
