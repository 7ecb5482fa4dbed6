"""TinyCOCO behind dama.synth: what the artist draws is known, pairs by truth are true, the gain is counted right."""

import math

import pytest

from dama.pairs import check_pairs, read_pairs
from dama.synth.images import ONE_COLOR, run_images
from dama.synth.pairs import run_rank_responses
from dama.synth.prompts import read_prompts, read_step
from dama.synth.rank import Filters, run_rank_images
from dama.synth.respond import DrivenResponder, Sampling, run_respond
from dama.synth.rewards import ClipReward
from eval.core.types import Answer
from eval.objhal import score_captions
from playground.tinycoco.preferences import judge
from playground.tinycoco.run import CLIP, vocabulary
from playground.tinycoco.scenes import draw
from playground.tinycoco.synth import (
    SceneArtist,
    context_of,
    gain_reached,
    main,
    painted_scene,
    reward_figures,
    scenes_of,
    write_prompts,
    write_true_pairs,
)
from playground.tinycoco.vocabulary import mentioned_categories


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_prompts(path, 12)
    return read_prompts([path])


def test_prompts_say_where_they_are(prompts):
    assert [context_of(prompt.prompt) for prompt in prompts] == [prompt.id.rpartition("-")[0] for prompt in prompts]
    with pytest.raises(ValueError, match="expected one of the places"):
        context_of("A pizza and a bus.")


def test_more_guidance_is_closer_to_the_prompt(prompts):
    """Chances of a wrong object are 0.6 at 5 and 0.2 at 11; a few objects find no room, too."""

    def wrong(guidance):
        drawn = [painted_scene(prompts[0].prompt, guidance, seed) for seed in range(400)]
        named = set(mentioned_categories(prompts[0].prompt))
        return sum(scene is None or set(scene.categories) != named for scene in drawn) / 400

    assert 0.53 < wrong(5.0) < 0.69 and 0.13 < wrong(11.0) < 0.3


def test_the_artist_draws_by_seed_and_now_and_then_black(prompts, tmp_path):
    artist = SceneArtist()
    two = artist.draw([prompts[0].prompt] * 2, 7.0, [1, 2])
    assert two[0].picture.tobytes() == draw(painted_scene(prompts[0].prompt, 7.0, 1)).tobytes()
    assert two[0].picture.tobytes() != two[1].picture.tobytes()
    black = next(seed for seed in range(1000) if painted_scene(prompts[0].prompt, 7.0, seed) is None)
    summary = run_images(artist, prompts[:1], tmp_path, guidance=[7.0], seed=black, suffix="png")["summary"]
    assert summary["faults"] == {ONE_COLOR: 1}


def test_pairs_by_reward_and_by_truth(prompts, tmp_path):
    """A responder that names what is drawn, and the same with an absent thing."""
    run_images(SceneArtist(), prompts, tmp_path, suffix="png")
    run_rank_images([ClipReward(str(CLIP))], tmp_path)
    shown = scenes_of(tmp_path)

    class Driver:
        name = "honest and not"

        def identity(self):
            return {}

        def answer(self, requests, image_folder, decoding):
            return [[f"The image shows {what(shown[id_])}.", f"The image shows {what(shown[id_], True)}."]
                    for id_, _, _ in requests]  # fmt: skip

    def what(scene, invent=False):
        absent = next(name for name in ("pizza", "laptop", "horse") if name not in scene.categories)
        named = [*scene.categories[:-1], absent if invent else scene.categories[-1]]
        return " and ".join(f"a {name}" for name in named)

    run_respond([DrivenResponder(Driver, lambda *parts: parts, lambda *_: None)], tmp_path, Sampling(2))
    run_rank_responses([ClipReward(str(CLIP))], tmp_path, Filters())
    write_true_pairs(tmp_path, tmp_path, tmp_path / "truth.jsonl")
    true = read_pairs(tmp_path / "truth.jsonl")
    assert check_pairs(true, tmp_path)[0] == true and len(true) == len(shown) == 12
    for pair in true:
        assert judge(pair.chosen, shown[pair.id]).invented == 0 < judge(pair.rejected, shown[pair.id]).invented
    figures = reward_figures(tmp_path, tmp_path)
    assert figures["pairs"] == "12; chosen invents less in 100.0 %, more in 0.0 %"
    assert figures["answers ordered as the truth orders them"] == "100.0 % of 12 couples"
    kept = read_step(tmp_path, "rank-images")[1]
    fits = [set(shown[r["id"]].categories) == set(mentioned_categories(r["prompt"])) for r in kept]
    kept_by_reward = f"{100 * sum(fits) / 12:.1f} % of those that the image reward kept"
    assert figures["pictures that show what was asked"].endswith(kept_by_reward)


def test_context_pairs_by_rules(prompts, tmp_path):
    """An answer that goes on with something that is not there, one that begins so, and a true one."""
    run_images(SceneArtist(), prompts, tmp_path, suffix="png")
    run_rank_images([ClipReward(str(CLIP))], tmp_path)
    shown = scenes_of(tmp_path)

    class Driver:
        name = "driver"

        def identity(self):
            return {}

        def answer(self, requests, image_folder, decoding):
            return [self.three(shown[id_]) for id_, _, _ in requests]

        @staticmethod
        def three(scene):
            absent = next(name for name in ("pizza", "laptop", "horse") if name not in scene.categories)
            true, wrong = f"There is a {scene.categories[0]}.", f"There is also a {absent} near it."
            return [f"{true} {wrong} Nice.", f"{wrong} {true}", true]

    run_respond([DrivenResponder(Driver, lambda *parts: parts, lambda *_: None)], tmp_path, Sampling(3))
    assert main(["pairs", "context", "--out", str(tmp_path)]) == 0
    _, records = read_step(tmp_path, "context")
    assert [bool(record["context"]) for record in records[:3]] == [True, False, False]
    pairs = read_pairs(tmp_path / "context_pairs.jsonl")
    assert len(pairs) == 24 and check_pairs(pairs, tmp_path)[0] == pairs
    for pair in pairs:
        scene = shown[pair.image.removeprefix("images/").removesuffix(".png")]
        assert judge(pair.chosen, scene).invented == 0 < judge(pair.rejected, scene).invented
        assert judge(pair.context or "", scene).invented == 0


def test_gain_reached_on_paper():
    """Of 8 captions 8 are wrong before, 4 with the reward, 0 with the truth: half of the gain. No gain, no share."""

    def scored(wrong):
        answers = [Answer(str(n), f"{n}", "q", "A dog." if n < wrong else "A cat.") for n in range(8)]
        return score_captions(answers, {str(n): {"cat"} for n in range(8)}, vocabulary())

    value, low, high = gain_reached(scored(8), scored(4), scored(0), "response_level")
    assert value == 50 and low == pytest.approx(12.5) and high == pytest.approx(87.5)
    assert math.isnan(gain_reached(scored(8), scored(4), scored(8), "response_level")[0])
