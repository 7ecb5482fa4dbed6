"""dama.hardness.score: Eq. 5 on paper, the stage against a naive loop, kills, and changed inputs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dama.hardness import score
from dama.hardness.clip import ClipScorer, load_clip
from dama.hardness.score import Hardness, delta_bar, hardness_delta, load_hardness, run_hardness, similarity
from dama.hardness.split import split_statements
from dama.pairs import PairsError, PreferencePair, SkippedPair, read_pairs
from dama.stage import Shard, Stage, StageError
from tests.dama.tiny_clip import write_tiny_clip

ANSWERS = [
    "A cat is on the mat.",
    "A dog is in the park, and a child is next to it. The sky is blue.",
    "There is a red bus. Two men are standing beside it.",
    "A cat is on the mat. It is " + "very, " * 90 + "tired.",
]


# -------------------------------------------------------------------------------------------------------- equations


def test_hardness_delta_on_paper() -> None:
    """S_w scores .3, .2, .1: sum .6, mean .2. S_l .25, .15: sum .4, mean .2. So delta is .2 as sum, 0 as mean."""
    chosen, rejected = [0.3, 0.2, 0.1], [0.25, 0.15]
    assert hardness_delta(chosen, rejected) == pytest.approx(0.2)
    assert hardness_delta(chosen, rejected, "mean") == pytest.approx(0.0, abs=1e-12)


def test_hardness_delta_limits() -> None:
    assert hardness_delta([0.1, 0.2], [0.2, 0.1]) == 0.0  # equal scores in any order
    assert hardness_delta([0.1], [0.4]) == -hardness_delta([0.4], [0.1])
    with pytest.raises(ValueError, match="at least one statement"):
        hardness_delta([], [0.1])
    with pytest.raises(ValueError, match="expected one of sum, mean, got 'max'"):
        hardness_delta([0.1], [0.1], "max")


def test_delta_bar_on_paper() -> None:
    """(.2 - .1 + .5) / 3 = .2."""
    assert delta_bar([0.2, -0.1, 0.5]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="at least one pair"):
        delta_bar([])


def test_similarity_on_paper() -> None:
    """Image (0.6, 0.8); statements (1, 0) and (0, 1): cosines 0.6 and 0.8; as logits at scale 100: 60 and 80."""
    image, statements = torch.tensor([0.6, 0.8]), torch.eye(2)
    assert similarity(image, statements).tolist() == pytest.approx([0.6, 0.8])
    assert similarity(image, statements, 100.0).tolist() == pytest.approx([60.0, 80.0])
    assert similarity(image, statements, 100.0, -12.0).tolist() == pytest.approx([48.0, 68.0])  # SigLIP has a bias
    assert similarity(torch.eye(2), statements).tolist() == [1.0, 1.0]  # an image for each statement


# ------------------------------------------------------------------------------------------------------------ stage


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def scorer(clip_folder: Path) -> ClipScorer:
    return load_clip(str(clip_folder), None, "cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def pairs() -> list[PreferencePair]:
    """Nine pairs on five images, the images' uses interleaved."""
    return [
        PreferencePair(
            id=f"p{index}",
            image=f"{index % 5}.png",
            question="What is it?",
            chosen=ANSWERS[index % 4],
            rejected=ANSWERS[(index + 1) % 4],
            kind="odd" if index % 2 else "even",
        )
        for index in range(9)
    ]


def naive_cosines(scorer: ClipScorer, image: Path, statements: list[str]) -> list[float]:
    """open_clip's own functions, one text at a time, nothing cut or batched."""
    with torch.inference_mode():
        pixels = scorer.preprocess(Image.open(image).convert("RGB"))[None]
        picture = scorer.model.encode_image(pixels, normalize=True)[0]
        texts = [scorer.model.encode_text(scorer.tokens.tokenizer([text]), normalize=True)[0] for text in statements]
    return [float(picture @ text) for text in texts]


def run(pairs: list[PreferencePair], images: Path, out: Path, scorer: ClipScorer | None, **flags: Any) -> Hardness:
    run_hardness(pairs, images, out, scorer, progress=False, **flags)
    return load_hardness(out)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "hardness.jsonl").read_text().splitlines()]


def test_stage_agrees_with_a_naive_loop(
    pairs: list[PreferencePair], images: Path, scorer: ClipScorer, tmp_path: Path
) -> None:
    result = run(pairs, images, tmp_path / "out", scorer)
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert set(rows) == {pair.id for pair in pairs}
    for pair in pairs:
        row = rows[pair.id]
        for side in ("chosen", "rejected"):
            statements = row[f"{side}_statements"]
            expected = naive_cosines(scorer, images / pair.image, statements)
            assert row[f"{side}_scores"] == pytest.approx(expected, abs=1e-6)
        difference = sum(row["chosen_scores"]) - sum(row["rejected_scores"])
        assert row["delta"] == pytest.approx(difference, abs=1e-12)
        assert result.delta[pair.id] == row["delta"]
    assert result.delta_bar == pytest.approx(np.mean([row["delta"] for row in rows.values()]))
    assert rows["p0"]["chosen_statements"] == split_statements(ANSWERS[0])


def test_long_statements_are_split_not_cut(
    pairs: list[PreferencePair], images: Path, scorer: ClipScorer, tmp_path: Path
) -> None:
    run(pairs, images, tmp_path / "out", scorer)
    row = next(row for row in rows_of(tmp_path / "out") if row["id"] == "p3")
    assert len(row["chosen_statements"]) > 3
    assert " ".join(row["chosen_statements"]) == ANSWERS[3]
    assert max(map(scorer.tokens.count, row["chosen_statements"])) <= 77


@pytest.mark.parametrize("batch_size, workers, count", [(1, 0, 1), (2, 2, 2), (64, 1, 3), (3, 0, 7)])
def test_direct_scores_whatever_batch_workers_shards_and_resume_point(
    pairs: list[PreferencePair],
    images: Path,
    scorer: ClipScorer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    workers: int,
    count: int,
) -> None:
    """Against open_clip's own functions to 1e-5.

    Chunks of two images, three in all; the last shard is stopped after its first.
    """
    monkeypatch.setattr(score, "IMAGES_PER_CHUNK", 2)
    flags: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": False}
    append = Stage.append

    def append_and_stop(stage: Stage, records: list[dict[str, Any]]) -> None:
        append(stage, records)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(Stage, "append", append_and_stop)
        run_hardness(pairs, images, tmp_path, scorer, shard=Shard(count - 1, count), **flags)
    manifests = [run_hardness(pairs, images, tmp_path, scorer, shard=Shard(i, count), **flags) for i in range(count)]
    assert [manifest is None for manifest in manifests] == [True] * (count - 1) + [False]
    rows = {row["id"]: row for row in rows_of(tmp_path)}
    for pair in pairs:
        row = rows[pair.id]
        for side in ("chosen", "rejected"):
            expected = naive_cosines(scorer, images / pair.image, row[f"{side}_statements"])
            assert row[f"{side}_scores"] == pytest.approx(expected, abs=1e-5)


def test_workers_and_shards_change_not_a_byte(
    pairs: list[PreferencePair], images: Path, scorer: ClipScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "IMAGES_PER_CHUNK", 2)
    for name, workers, count in (("plain", 0, 1), ("workers", 2, 1), ("shards", 0, 3)):
        for index in range(count):
            run_hardness(pairs, images, tmp_path / name, scorer, workers=workers, shard=Shard(index, count))
    plain, *others = (contents(tmp_path / name) for name in ("plain", "workers", "shards"))
    assert others == [plain, plain]


def contents(out: Path) -> tuple[bytes, dict[str, Any]]:
    """The records' bytes and the manifest without its times."""
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["time"]
    return (out / "hardness.jsonl").read_bytes(), manifest


def test_scale_and_reduction(pairs: list[PreferencePair], images: Path, scorer: ClipScorer, tmp_path: Path) -> None:
    """Logits are cosines times exp(logit scale), so delta is too; the mean divides each answer's sum by its length."""
    cosine = run(pairs, images, tmp_path / "cosine", scorer)
    logit = run(pairs, images, tmp_path / "logit", scorer, scale="logit")
    run(pairs, images, tmp_path / "mean", scorer, reduction="mean")
    for pair_id, delta in cosine.delta.items():
        assert logit.delta[pair_id] == pytest.approx(delta * scorer.logit_scale, abs=1e-5)
    row = rows_of(tmp_path / "mean")[0]
    assert row["delta"] == pytest.approx(np.mean(row["chosen_scores"]) - np.mean(row["rejected_scores"]))
    with pytest.raises(ValueError, match="expected scale in"):
        run(pairs, images, tmp_path / "x", scorer, scale="percent")


def test_each_image_is_read_once(
    pairs: list[PreferencePair], images: Path, scorer: ClipScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five images in chunks of two: one more would be read twice if a chunk ended within an image's pairs."""
    from dama.hardness import clip

    seen: list[str] = []
    original = clip.load_image
    monkeypatch.setattr(clip, "load_image", lambda path: seen.append(Path(path).name) or original(path))
    monkeypatch.setattr(score, "IMAGES_PER_CHUNK", 2)
    run(pairs, images, tmp_path / "out", scorer)
    assert seen == [f"{index}.png" for index in range(5)]


def test_summary_on_paper(tmp_path: Path, pairs: list[PreferencePair]) -> None:
    """Deltas .1, -.1 (even) and .3 (odd): delta_bar .1, one of three negative, sd of the even ones .1."""
    scores = [((0.1,), (0.0,)), ((0.2, 0.2), (0.1,)), ((0.1,), (0.2,))]
    three = [replace(pair, clip_scores=given) for pair, given in zip(pairs, scores)]
    manifest = run_hardness(
        three, tmp_path, tmp_path / "out", None, progress=False, skipped=[SkippedPair("p9", "image is missing: x.png")]
    )
    summary = manifest["summary"]
    assert summary["delta_bar"] == pytest.approx(0.1)
    assert summary["pairs"] == 3 and summary["statements"] == {"chosen": 4, "rejected": 3}
    assert summary["spread"]["all"]["negative"] == pytest.approx(1 / 3)
    assert summary["spread"]["even"] == pytest.approx(
        {"pairs": 2, "mean": 0.0, "sd": 0.1, "min": -0.1, "max": 0.1, "negative": 0.5}
    )
    assert summary["correlations"]["statements"] == pytest.approx(0.8660254)  # sqrt(3)/2: r of (.1, .3, -.1), (0, 1, 0)
    assert summary["skipped"] == [{"id": "p9", "reason": "image is missing: x.png"}]


def test_released_scores_reproduce_their_delta(tmp_path: Path, golden: Path) -> None:
    """Record 0: (.31 - .12) - (.05 - .2) = .34; record 1: (.22 + .4 + .1) - (-.3) = 1.02."""
    pairs = read_pairs(golden / "dama/rlaifv_records.json")
    result = run(pairs, golden / "images", tmp_path / "out", None)
    assert [result.delta["0"], result.delta["1"]] == pytest.approx([0.34, 1.02])
    assert result.fingerprint["scores"] == "given"


def test_missing_scores_are_named_before_anything_is_written(tmp_path: Path, pairs: list[PreferencePair]) -> None:
    given = [replace(pairs[0], clip_scores=((0.1,), (0.2,))), replace(pairs[1], clip_scores=((), (0.2,))), pairs[2]]
    with pytest.raises(PairsError, match="2 errors\n  row p1: no scores(?s:.*)row p2: no scores"):
        run(given, tmp_path, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_changed_inputs_are_refused_by_name(
    pairs: list[PreferencePair], images: Path, scorer: ClipScorer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(pairs, images, out, scorer)
    other_clip = load_clip(str(write_tiny_clip(tmp_path / "seed1/tiny", seed=1)), None, "cpu")
    edited = [replace(pairs[0], chosen="Something else."), *pairs[1:]]
    for changed, clip, flags, field in (
        (edited, scorer, {}, "--data (content): "),
        (pairs, other_clip, {}, "--clip.weights: "),
        (pairs, scorer, {"scale": "logit"}, '--scale: "cosine" -> "logit"'),
        (pairs, scorer, {"reduction": "mean"}, '--reduction: "sum" -> "mean"'),
    ):
        with pytest.raises(StageError, match="made from other inputs") as caught:
            run(changed, images, out, clip, **flags)
        named = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
        assert len(named) == 1 and named[0].startswith(field)
    Image.new("RGB", (40, 40)).save(images / "3.png")
    with pytest.raises(StageError, match=r"\n  --image_folder \(content\): "):
        run(pairs, images, out, scorer)
    before = load_hardness(out)
    assert run(pairs, images, out, scorer, overwrite=True).delta != before.delta


@pytest.mark.kill
def test_killed_and_resumed_gives_the_same_bytes(
    pairs: list[PreferencePair], images: Path, scorer: ClipScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one image, five in all; a process kills itself after two of them, the next after two more."""
    monkeypatch.setattr(score, "IMAGES_PER_CHUNK", 1)

    def live(out: Path, chunks: int) -> None:
        torch.set_num_threads(1)
        append, done = Stage.append, []

        def append_and_die(stage: Stage, records: list[dict[str, Any]]) -> None:
            append(stage, records)
            done.append(1)
            if len(done) == chunks:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Stage, "append", append_and_die)
        run_hardness(pairs, images, out, scorer, progress=False)

    def exit_code(out: str, chunks: int) -> int | None:
        process = multiprocessing.get_context("fork").Process(target=live, args=(tmp_path / out, chunks))
        process.start()
        process.join(60)
        return process.exitcode

    lives = [("calm", 99), ("killed", 2), ("killed", 2), ("killed", 99)]
    assert [exit_code(out, chunks) for out, chunks in lives] == [0, -signal.SIGKILL, -signal.SIGKILL, 0]
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")
    assert json.loads((tmp_path / "killed/manifest.json").read_text())["time"]["records"] == 1


def test_load_hardness_needs_a_finished_stage(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no manifest\.json in (?s:.*)python -m dama hardness"):
        load_hardness(tmp_path)
