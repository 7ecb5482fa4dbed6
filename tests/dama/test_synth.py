"""`python -m dama synth`: ranking on paper, bad input that never becomes a pair, killed anywhere and resumed."""

import argparse
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from dama.pairs import check_pairs, read_pairs
from dama.stage import StageError
from dama.synth import command, images, rank, respond
from dama.synth import pairs as outputs
from dama.synth.images import Drawn, run_images
from dama.synth.pairs import run_rank_responses
from dama.synth.prompts import Prompt, SynthError, read_prompts, read_step
from dama.synth.rank import ALIKE, ALL_TIED, LENGTH, MARGIN, TOO_FEW, Choice, Filters, choose, combine, run_rank_images
from dama.synth.respond import DrivenResponder, Sampling, run_respond

PROMPTS = [Prompt(f"art-{n}", f"picture {n}", f"what is {n}?") for n in range(1, 41)]


# --------------------------------------------------------------------------------------------------------- stand-ins


class Artist:
    """A picture in the prompt's number; `stop_after` calls it breaks down, as a killed process."""

    def __init__(self, spoil=None, stop_after=None):
        self.spoil, self.stop_after, self.calls = spoil or {}, stop_after, 0

    def identity(self):
        return {"model": "squares"}

    def draw(self, prompts, guidance, seeds):
        self.calls += 1
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        return [self.spoil.get(seed, self.picture(seed)) for seed in seeds]

    @staticmethod
    def picture(seed):
        picture = Image.new("RGB", (8, 8), (seed % 251, 90, 20))
        picture.putpixel((seed % 8, 0), (255, 255, 255))
        picture.putpixel((0, 7), (seed // 256 % 256, 3, seed % 7))
        return Drawn(picture)


class Reward:
    """Scores by a function of the item."""

    def __init__(self, score, name="reward", sees_image=True, stop_after=None):
        self.of, self.name, self.sees_image, self.stop_after, self.calls = score, name, sees_image, stop_after, 0

    def identity(self):
        return {"model": self.name}

    def score(self, items):
        self.calls += 1
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        return [float(self.of(item)) for item in items]


class Driver:
    """A generation driver as another package has it; draws its words from torch's generator."""

    name = "driver"

    def __init__(self, texts=None, stop_after=None):
        self.texts, self.stop_after, self.calls = texts, stop_after, 0

    def identity(self):
        return {"weights": "none"}

    def answer(self, requests, image_folder, decoding):
        import torch

        self.calls += 1
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        for _, _, image in requests:
            Image.open(Path(image_folder) / image).verify()
        sampled = [[" ".join(["word"] * int(torch.randint(1, 20, ()))) for _ in range(decoding)] for _ in requests]
        return [self.texts or texts for texts in sampled]


def responder(texts=None, stop_after=None):
    driver = Driver(texts, stop_after)
    return DrivenResponder(lambda: driver, lambda *parts: parts, lambda sampling, seed: sampling.samples)


def path_length(item):
    return int(item.image.stem.rpartition("-")[2])


def words(item):
    return len(item.text.split())


def complete(out, artist=None, image_reward=None, answers=None, reward=None, prompts=PROMPTS, filters=None, samples=4):
    """All four steps."""
    run_images(artist or Artist(), prompts, out, batch_size=3, suffix="png")
    run_rank_images([image_reward or Reward(path_length)], out)
    run_respond([answers or responder()], out, Sampling(samples))
    return run_rank_responses([reward or Reward(words)], out, filters or Filters())


# ----------------------------------------------------------------------------------------------------------- prompts


def test_prompts_of_text_and_questions(tmp_path):
    (tmp_path / "art.txt").write_text("a vase\n\na sketch\n")
    (tmp_path / "q.txt").write_text("<image> How is it?\nWhat is it?\n")
    assert read_prompts([tmp_path / "art.txt"], [tmp_path / "q.txt"]) == [
        Prompt("art-1", "a vase", "How is it?"),
        Prompt("art-2", "a sketch", "What is it?"),
    ]


def test_all_faults_of_prompts_at_once(tmp_path):
    good = {"prompt": "a", "question": "b"}
    rows = [good | {"id": "../x"}, {"prompt": "a"}, good | {"question": "<image>\nq"}, 7]
    rows += [good | {"question": "x <image> y"}, good | {"id": "x-3"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    with pytest.raises(SynthError, match="prompts: 6 errors") as error:
        read_prompts([tmp_path / "p.jsonl", tmp_path / "none.txt"])
    said = str(error.value)
    for part in ("'../x'", "no question; give --questions", "got int", "one more image", "torn", "none.txt: no such"):
        assert part in said
    (tmp_path / "p.jsonl").write_text(2 * (json.dumps(good | {"id": "x"}) + "\n"))
    with pytest.raises(SynthError, match="id x is used more than once"):
        read_prompts([tmp_path / "p.jsonl"])


# ----------------------------------------------------------------------------------------------------------- ranking


def test_mean_rank_on_paper():
    """Rewards A: 3 > 2 > 1 gives shares 1, 1/2, 0; B: 5 = 5 > 0 gives 3/4, 3/4, 0: means 7/8, 5/8, 0."""
    assert combine({"A": [3, 2, 1], "B": [5, 5, 0]}) == [7 / 8, 5 / 8, 0]
    assert combine({"A": [3, None, 1]}) == [3, None, 1]  # the only reward's own scores
    assert combine({"A": [3, None, 1], "B": [0, 4, 1]}) == [1 / 2, None, 1 / 2]  # rated by both, or by none


def test_choice_on_paper():
    """Scores 4, 1, 3: best 0, worst 1. Within a quarter of the words only 0 over 2 is left (gap 1)."""
    texts, scores = ["a b c d", "z", "a b c e"], [4.0, 1.0, 3.0]
    assert choose(texts, scores, Filters()) == Choice(0, 1)
    assert choose(texts, scores, Filters(length_balance=0.25)) == Choice(0, 2)
    assert choose(texts, scores, Filters(margin=3.5)) == Choice(error=MARGIN)
    assert choose(texts, scores, Filters(margin=2, length_balance=0.25)) == Choice(error=LENGTH)
    # "a b c d" and "a b c e": 2 x 3 of 8 words
    assert rank.likeness(texts[0], texts[2]) == 0.75
    assert choose(texts, scores, Filters(length_balance=0.25, alike=0.75)) == Choice(error=ALIKE)
    assert choose(texts, [1.0, 1.0, None], Filters()) == Choice(error=ALL_TIED)
    assert choose(texts, [1.0, None, None], Filters()) == Choice(error=TOO_FEW)


# --------------------------------------------------------------------------------------------------- the whole, and bad


def test_best_over_worst_in_both_formats(tmp_path):
    summary = complete(tmp_path)
    assert (summary["pictures"], summary["pairs"]) == (40, 40)
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert check_pairs(pairs, tmp_path) == (pairs, [])
    _, records = read_step(tmp_path, "rank-responses")
    for pair, record in zip(pairs, records):
        lengths = [len(answer["text"].split()) for answer in record["answers"]]
        assert (len(pair.chosen.split()), len(pair.rejected.split())) == (max(lengths), min(lengths))
    same = read_pairs(tmp_path / "pds_dpo.json")
    assert [(p.id, p.image, p.question, p.chosen, p.rejected) for p in pairs] == [
        (p.id, p.image, p.question, p.chosen, p.rejected) for p in same
    ]
    row = json.loads((tmp_path / "pds_dpo.json").read_text())[0]
    assert list(row) == ["id", "image", "conversations", "rejected_conversations"]
    assert row["conversations"][0] == {"from": "human", "value": "<image> what is 1?"}
    # Candidate 3 has the largest number in its name.
    assert (tmp_path / pairs[0].image).read_bytes() == (tmp_path / "stages/images/art-1-3.png").read_bytes()


def test_seeds_and_guidance_are_those_of_pds_dpo(tmp_path):
    run_images(Artist(), PROMPTS[:3], tmp_path, suffix="png")
    _, records = read_step(tmp_path, "images")
    assert [(r["guidance"], r["seed"]) for r in records[4:8]] == [(5, 1000), (7, 1001), (9, 1002), (11, 1003)]


def test_bad_pictures_are_counted_and_never_kept(tmp_path):
    """Prompt 1: refused, black, one colour, fine. Prompt 2: four the same. Prompt 3: nothing at all."""
    black, red = Drawn(Image.new("RGB", (8, 8))), Drawn(Image.new("RGB", (8, 8), (200, 10, 10)))
    refused, nan = Drawn(None, images.REFUSED), Drawn(None, images.NOT_FINITE)
    spoil = {0: refused, 1: black, 2: red, 2000: nan, 2001: refused, 2002: black, 2003: black}
    spoil |= {1000 + k: Artist.picture(5) for k in range(4)}
    summary = complete(tmp_path, Artist(spoil), prompts=PROMPTS[:3])
    manifest, records = read_step(tmp_path, "images")
    assert manifest["summary"] == {
        "candidates": 12,
        "usable": 2,
        "faults": {images.ONE_COLOR: 4, images.REPEATED: 3, images.REFUSED: 2, images.NOT_FINITE: 1},
    }
    assert {record["fault"] for record in records if record["image"]} == {""}
    ranked, kept = read_step(tmp_path, "rank-images")
    assert ranked["summary"]["left_out"] == {rank.NO_PICTURE: 1}
    assert [record["image"] for record in kept] == ["images/art-1.png", "images/art-2.png", None]
    listed = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert listed == [{"id": "art-3", "step": "rank-images", "reason": rank.NO_PICTURE}]
    assert summary["pairs"] == 2 and [pair.id for pair in read_pairs(tmp_path / "pairs.jsonl")] == ["art-1", "art-2"]


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (lambda _: math.nan, rank.NO_PICTURE),
        (lambda _: math.inf, rank.NO_PICTURE),
        (lambda _: 2, rank.ALL_TIED),
    ],
)
def test_image_rewards_that_say_nothing(score, reason, tmp_path):
    run_images(Artist(), PROMPTS[:5], tmp_path, suffix="png")
    summary = run_rank_images([Reward(score)], tmp_path)["summary"]
    assert (summary["pictures"], summary["left_out"]) == (0, {reason: 5})
    with pytest.raises(SynthError, match="no picture is left"):
        run_respond([responder()], tmp_path, Sampling(2))


def test_a_threshold_for_the_best_picture(tmp_path):
    run_images(Artist(), PROMPTS[:2], tmp_path, suffix="png")
    summary = run_rank_images([Reward(path_length)], tmp_path, threshold=3.5)["summary"]
    assert summary["left_out"] == {rank.BELOW: 2}
    assert read_step(tmp_path, "rank-images")[1][0]["fault"] == f"{rank.BELOW} (3)"


@pytest.mark.parametrize(
    ("texts", "score", "left_out"),
    [
        (["", " ", "one", ""], words, {TOO_FEW: 40}),
        (["same", "same ", "same", "same"], words, {TOO_FEW: 40}),
        (["see <image>", "one", "", ""], words, {TOO_FEW: 40}),
        (["a", "b", "c", "d"], words, {ALL_TIED: 40}),
        (["a b", "b", "c", "d"], lambda item: math.nan, {TOO_FEW: 40}),
    ],
)
def test_bad_answers_and_rewards_never_make_a_pair(texts, score, left_out, tmp_path):
    with pytest.raises(SynthError, match="(?s)no pair is left of 40 pictures.*Remedy"):
        complete(tmp_path, answers=responder(texts), reward=Reward(score))
    assert json.loads((tmp_path / "summary.json").read_text())["left_out"] == left_out
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == 40 and not (tmp_path / "pairs.jsonl").exists()


def test_why_answers_are_left_out_is_counted(tmp_path):
    texts = ["a b c", "a", "a ", ""]
    summary = complete(tmp_path, answers=responder(texts), reward=Reward(words))
    assert summary["pairs"] == 40
    assert summary["answers_left_out"] == {outputs.SAME_ANSWER: 40, respond.NO_ANSWER: 40}
    half_blind = Reward(lambda item: math.nan if item.text == "a" else 1)
    with pytest.raises(SynthError, match="no pair is left"):
        run_rank_responses([half_blind], tmp_path, Filters(), overwrite=True)
    _, records = read_step(tmp_path, "rank-responses")
    assert records[0]["fault"] == (f"{TOO_FEW} ({respond.NO_ANSWER}: 1, {rank.NO_NUMBER}: 1, {outputs.SAME_ANSWER}: 1)")


def test_pairs_that_the_filters_moved_are_counted(tmp_path):
    texts = ["a b c d e f g h", "a b c d e f g", "a b c d e f", "a"]
    summary = complete(tmp_path, answers=responder(texts), filters=Filters(length_balance=0.25))
    assert (summary["pairs"], summary["not_best_and_worst"]) == (40, 40)
    assert {pair.rejected for pair in read_pairs(tmp_path / "pairs.jsonl")} == {"a b c d e f"}


def test_several_rewards_are_combined_by_rank(tmp_path):
    """Words 3, 2, 1 and, blind, the reverse of 2, 3, 1: mean ranks 3/4, 3/4... only the third is last of both."""
    texts = ["a b c", "a b", "a", "a"]
    blind = Reward(lambda item: {3: 2, 2: 3, 1: 1}[words(item)], "blind", sees_image=False)
    run_images(Artist(), PROMPTS[:2], tmp_path, suffix="png")
    run_rank_images([Reward(path_length)], tmp_path)
    run_respond([responder(texts)], tmp_path, Sampling(4))
    summary = run_rank_responses([Reward(words), blind], tmp_path, Filters())
    assert {name: made["sees_image"] for name, made in summary["rewards"].items()} == {"reward": True, "blind": False}
    record = read_step(tmp_path, "rank-responses")[1][0]
    assert [answer["score"] for answer in record["answers"]] == [0.75, 0.75, 0, None]
    assert (record["chosen"], record["rejected"]) == (0, 2)


# ---------------------------------------------------------------------------------------------------- killed, resumed


def content(folder):
    """Every file that does not name the time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize("killed", ["artist", "image_reward", "answers", "reward"])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_killed_anywhere_and_resumed_is_undisturbed(killed, stop_after, tmp_path, capsys):
    parts = {
        "artist": lambda stop=None: Artist(stop_after=stop and 4 * stop),  # asked once for each guidance scale
        "image_reward": lambda stop=None: Reward(path_length, stop_after=stop),
        "answers": lambda stop=None: responder(stop_after=stop),
        "reward": lambda stop=None: Reward(words, stop_after=stop),
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    complete(whole, **{name: make() for name, make in parts.items()})
    with pytest.raises(KeyboardInterrupt):
        complete(broken, **{name: make(stop_after if name == killed else None) for name, make in parts.items()})
    resumed = {name: make() for name, make in parts.items()}
    complete(broken, **resumed)
    # image_folder in the summary names the run's own folder
    ours, theirs = content(broken), content(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if name != "summary.json" and ours[name] != theirs[name]] == []
    if stop_after > 1:
        assert "continues at record" in capsys.readouterr().out
    calls = resumed["artist"].calls
    complete(broken, **resumed)
    assert resumed["artist"].calls == calls  # complete: nothing is drawn again


def test_a_step_names_the_one_that_is_missing(tmp_path):
    with pytest.raises(StageError, match=r"step images in .* is not there\nRemedy: run `python -m dama synth images"):
        run_rank_images([Reward(path_length)], tmp_path)
    run_images(Artist(), PROMPTS[:2], tmp_path, suffix="png")
    with pytest.raises(StageError, match="dama synth rank-images"):
        run_respond([responder()], tmp_path, Sampling(2))
    with pytest.raises(StageError, match="made from other inputs"):
        run_images(Artist(), PROMPTS[:2], tmp_path, suffix="png", seed=1)


def test_a_second_round_asks_about_the_pictures_of_the_first(tmp_path):
    complete(tmp_path / "one", prompts=PROMPTS[:4])
    run_respond([responder()], tmp_path / "two", Sampling(3), pictures=tmp_path / "one", seed=1)
    summary = run_rank_responses([Reward(words)], tmp_path / "two", Filters())
    assert summary["image_folder"] == str(tmp_path / "one")
    pairs = read_pairs(tmp_path / "two/pairs.jsonl")
    assert check_pairs(pairs, tmp_path / "one")[0] == pairs
    assert pairs != read_pairs(tmp_path / "one/pairs.jsonl")


def test_one_responder_twice_is_refused(tmp_path):
    complete(tmp_path, prompts=PROMPTS[:2])
    with pytest.raises(SynthError, match="driver is given more than once"):
        run_respond([responder(), responder()], tmp_path, Sampling(2))


# ----------------------------------------------------------------------------------------------------------- command


def parse(*words):
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    return parser.parse_args(list(words))


def test_all_faults_of_the_flags_at_once(tmp_path):
    args = parse(
        "--out", str(tmp_path), "--samples", "0", "--margin", "-1", "--near_duplicate", "0", "--reward", "magic:x",
        "--reward", "judge:m", "--image_reward", "text:x", "--reward", "http:localhost", "--device", "tpu",
    )  # fmt: skip
    with pytest.raises(SynthError) as error:
        command.run(args)
    said = str(error.value)
    for part in (
        "--samples 0", "--margin -1", "--near_duplicate 0", "magic:x: expected KIND:WHAT", "--base_url, got none",
        "it never sees the picture", "http://HOST/PATH", "--device tpu", "--prompts: expected", "--responder:",
    ):  # fmt: skip
        assert part in said


def test_the_command_runs_all_steps_and_writes_the_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p.prompt, "question": p.question + " <b>"}) + "\n" for p in PROMPTS[:5])
    )

    def open_reward(args, word, step, device):
        return Reward(path_length if step == "rank-images" else words, word, word.startswith("clip"))

    monkeypatch.setattr(command, "open_reward", open_reward)
    monkeypatch.setattr(command, "open_responder", lambda args, word, device: responder())
    out = tmp_path / "run"
    args = parse("--out", str(out), "--prompts", str(tmp_path / "p.jsonl"), "--samples", "4", "--responder", "llava:x",
                 "--reward", "text:armo", "--image_reward", "clip:x", "--device", "cpu")  # fmt: skip
    command.run(args, Artist())
    page = (out / "report.html").read_text()
    for part in ("text:armo", "never sees the picture", "data:image/", "statements", "what is 1? &lt;b&gt;", "kept"):
        assert part in page
    assert "rank-responses: 5 pictures, 5 pairs" in capsys.readouterr().out
    (out / "report.html").unlink()
    command.run(parse("report", "--out", str(out)))
    assert (out / "report.html").read_text() == page
