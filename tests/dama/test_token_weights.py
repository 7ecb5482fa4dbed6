"""Weights of single tokens: worked out by hand, their limits, their gradients, and a training with each."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from dama.losses import Loss
from dama.pairs import ReferenceLogps
from dama.stage import StageError, read_stage
from dama.token_weights import (
    TokenLogps,
    TokenTexts,
    TokenWeights,
    segment_weights,
    visual_differences,
    visual_weights,
    words_of,
)
from dama.train.arguments import PreferenceArguments, objective_errors
from dama.train.data import PairValues, join_pairs
from dama.train.reference import reference_of_pairs, run_reference
from dama.train.reference_parts import Wanted, complete_parts, missing_views, read_parts
from dama.train.trainer import decoded
from dama.views import CHOSEN, CHOSEN_CORRUPTED, PAIR_VIEWS, REJECTED, REJECTED_CORRUPTED
from llava.tokenization import load_tokenizer
from tests.conftest import ROOT
from tests.dama.test_family import TinyFamily, train, world  # noqa: F401  (a fixture)

# --- Changed segments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["A", " cat", "."], [("A", 1), ("cat", 1), (".", 1)]),
        (["A", " c", "at", " s", "its", "."], [("A", 1), ("cat", 2), ("sits", 2), (".", 1)]),
        ([" it", "'", "s", "", "!"], [("it's", 4), ("!", 1)]),  # a part of a character belongs to what is before it
        (["a", "\n", "b"], [("a", 1), ("\n", 1), ("b", 1)]),
        ([], []),
    ],
)
def test_words_on_paper(texts, words):
    assert words_of(texts) == words


def test_segments_on_paper():
    """For w: A black c|at sits . </s>; l: A dog sits there . </s>.

    `dog` replaces `black cat`, `there` is only in l; both tokens of `cat` get g.
    """
    chosen = ["A", " black", " c", "at", " sits", ".", "</s>"]
    rejected = ["A", " dog", " sits", " there", ".", "</s>"]
    assert segment_weights(chosen, rejected, 5) == ([1, 5, 5, 5, 1, 1, 1], [1, 5, 1, 5, 1, 1])
    assert segment_weights(chosen, chosen, 5) == ([1] * 7, [1] * 7)
    assert segment_weights(["no"], ["yes", "!"], 2) == ([2], [2, 2])


def test_texts_of_tokens_spell_the_answer():
    """LLaMA's pieces: spaces belong to the word behind them, bytes of one character come together."""
    tokenizer = load_tokenizer(str(ROOT / "playground/tinycoco/weights/llava"))
    text = "There is a red ball, isn't there? Yes: \N{SNOWMAN}.</s>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = TokenTexts(partial(decoded, tokenizer))(ids)
    assert "".join(texts).replace("\N{REPLACEMENT CHARACTER}", "") == text.replace("\N{SNOWMAN}", "")
    words = [word for word, _ in words_of(texts)]
    assert words[:8] == ["There", "is", "a", "red", "ball", ",", "isn't", "there"] and sum(
        size for _, size in words_of(texts)
    ) == len(ids)


# --- What the image decides ------------------------------------------------------------------------------------------


def test_visual_weights_on_paper():
    """s(log 3) = 3/4: 5/4 in the chosen, 3/4 in the rejected answer.

    s(0) = 1/2: an image that decides nothing gives weight 1 in both. s(z) between 0 and 1: weights between 1/2 and 3/2.
    """
    z = torch.tensor([math.log(3), 0.0, 100.0, -100.0], dtype=torch.float64)
    assert visual_weights(z, CHOSEN).tolist() == pytest.approx([1.25, 1.0, 1.5, 0.5])
    assert visual_weights(z, REJECTED).tolist() == pytest.approx([0.75, 1.0, 0.5, 1.5])


VIEWS = (CHOSEN, REJECTED, CHOSEN_CORRUPTED, REJECTED_CORRUPTED)


def token_logps(policy, counts, views, reference=None):
    policy = torch.as_tensor(policy, dtype=torch.float64)
    return TokenLogps(views, policy, torch.zeros_like(policy) if reference is None else reference, counts)


def test_differences_on_paper():
    """Two pairs with answers of 1 and 2 tokens, and of 1 and 1: z of each token, its own image minus the other one."""
    counts = ((1, 2), (1, 1), (1, 2), (1, 1))
    logps = token_logps([-1, -2, -3, -4, -5, -1.5, -2.5, -2, -4, -8], counts, VIEWS)
    z = visual_differences(logps)
    assert z["chosen"].tolist() == [0.5, 0.5, -1.0] and z["rejected"].tolist() == [0.0, 3.0]


# --- Weighted sums ---------------------------------------------------------------------------------------------------


def test_weighted_sums_on_paper():
    """For w of 2 tokens, log-probs -1 and -2 against -1.5 and -1, weights 5 and 1: policy -7, reference -8.5, r = 1.5.

    l of one token, -3 against -2, weight 2: r = -2. R = 3.5. Per unit of weight: -7/6 + 8.5/6 = 1/4 and -1.
    """
    reference = torch.tensor([-1.5, -1.0, -2.0], dtype=torch.float64)
    logps = token_logps([-1, -2, -3], ((2,), (1,)), PAIR_VIEWS, reference)
    sums = logps.weighted(torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64), PAIR_VIEWS)
    assert sums.policy.tolist() == [[-7.0], [-6.0]] and sums.reference.tolist() == [[-8.5], [-4.0]]
    assert sums.R.tolist() == [3.5] and sums.tokens.tolist() == [[6.0], [2.0]]
    assert sums.averaged().R.tolist() == pytest.approx([0.25 + 1])
    assert Loss()(sums, torch.tensor([0.5])).item() == pytest.approx(math.log(1 + math.exp(-0.5 * 3.5)))


def test_weights_of_one_are_plain_sums_and_views_can_be_left_out():
    logps = token_logps(torch.randn(10, generator=torch.Generator().manual_seed(0)), ((1, 2), (1, 1)) * 2, VIEWS)
    sums = logps.weighted(torch.ones(10, dtype=torch.float64), PAIR_VIEWS)
    assert sums.views == PAIR_VIEWS and sums.tokens.tolist() == [[1, 2], [1, 1]]
    values = logps.policy.tolist()
    expected = [[values[0], values[1] + values[2]], [values[3], values[4]]]
    assert torch.allclose(sums.policy, torch.tensor(expected, dtype=torch.float64))


def weighted_loss(policy, reference, weights):
    """DPO with fixed weights, or with those of what the image decides."""
    logps = TokenLogps(VIEWS, policy, reference, ((2, 1), (1, 2)) * 2)
    if weights is None:
        z = visual_differences(logps)
        pair = [visual_weights(z[view.answer], view) for view in PAIR_VIEWS]
        weights = torch.cat(pair * 2)
    return Loss()(logps.weighted(weights, PAIR_VIEWS), torch.tensor([0.5, 2.0], dtype=torch.float64))


def test_gradients():
    """Fixed weights by finite differences.

    Of visual weights, which have no gradient, by hand: -b s(-b R) w_t for the chosen answer's tokens, and none for the
    noised image's.
    """
    generator = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 12, dtype=torch.float64, generator=generator)
    weights = torch.rand(12, dtype=torch.float64, generator=generator)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: weighted_loss(p, reference, weights), policy)
    weighted_loss(policy, reference, None).sum().backward()
    own, noised = policy.grad.split(6)
    z = (policy[:3] - policy[6:9]).detach()
    weight = torch.sigmoid(z) + 0.5
    logps = TokenLogps(VIEWS, policy.detach(), reference, ((2, 1), (1, 2)) * 2)
    rejected = visual_weights((policy[3:6] - policy[9:]).detach(), REJECTED)
    R = logps.weighted(torch.cat([weight, rejected] * 2), PAIR_VIEWS).R
    slope = -torch.tensor([0.5, 2.0]) * torch.sigmoid(-torch.tensor([0.5, 2.0]) * R)
    assert torch.allclose(own[:3], weight * slope[[0, 0, 1]]) and torch.allclose(own[3:], -rejected * slope[[0, 1, 1]])
    assert not noised.any()


# --- Flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["segments", "segments:0.5", "segments:x", "segments:nan", "segments:inf", "tokens:2"])
def test_what_is_no_weighting_is_named(text):
    with pytest.raises(ValueError, match=rf"--token_weights {text}: expected one of none, segments:G"):
        TokenWeights.parse(text)


def test_parsing():
    assert TokenWeights.parse("none") is None
    assert str(TokenWeights.parse("segments:5")) == "segments:5" and TokenWeights.parse("segments:2.5").g == 2.5
    assert str(TokenWeights.parse("visual")) == "visual" and TokenWeights.parse("visual").views == VIEWS


def arguments(folder, **flags):
    return PreferenceArguments(output_dir=str(folder), use_cpu=True, **flags)


def test_the_second_image_is_tpos_noise_unless_the_loss_reads_one(tmp_path):
    assert arguments(tmp_path).corruption == "crop"
    assert arguments(tmp_path, token_weights="visual").corruption == "noise"
    assert arguments(tmp_path, token_weights="visual", corruption="blank").corruption == "blank"
    assert arguments(tmp_path, token_weights="visual", loss=["mdpo"]).corruption == "crop"
    assert arguments(tmp_path, token_weights="visual").views() == VIEWS
    assert arguments(tmp_path, token_weights="segments:5", loss=["mdpo"]).views() == (*PAIR_VIEWS, CHOSEN_CORRUPTED)


def test_a_third_answer_has_no_weights(tmp_path):
    (error,) = objective_errors(arguments(tmp_path, loss=["symmpo"], token_weights="segments:5"))
    assert "--token_weights segments:5: weights tokens of the chosen and the rejected answer" in error
    assert objective_errors(arguments(tmp_path, loss=["mdpo"], token_weights="segments:5")) == []


# --- Stages and training, on a model of a few lines ------------------------------------------------------------------


def stage(world, folder, loss="dpo", corruption="blank", **options):  # noqa: F811
    pairs, data_args, root = world
    torch.manual_seed(0)
    family = TinyFamily(loss)
    args = arguments(root / "out", loss=[loss], corruption=corruption)
    run_reference(family, data_args, args, pairs, [], root / folder, batch_size=3, progress=False, **options)
    return root / folder


def test_stored_tokens_add_up_to_the_sums(world):  # noqa: F811
    folder = stage(world, "reference", "mdpo", per_token=True)
    manifest, records = read_stage(folder, "reference")
    assert manifest["fingerprint"]["per_token"] == "float32" and list(manifest["attached"]) == ["tokens.f32"]
    wanted = Wanted((CHOSEN_CORRUPTED, REJECTED), "blank, seed 0", per_token=True)
    stored = read_parts(folder, wanted)
    for record in records:
        sums, tokens = stored.sums[record["id"]], stored.tokens[record["id"]]
        assert sums == (record["chosen_corrupted_logp"], record["rejected_logp"])
        assert [len(values) for values in tokens] == [record["chosen_corrupted_tokens"], record["rejected_tokens"]]
        assert [values.sum() for values in tokens] == pytest.approx(sums, abs=1e-4)


def test_a_finished_folder_gets_only_what_it_lacks(world, monkeypatch):  # noqa: F811
    """Pairs, then a second image, then their tokens: each time only the views that are missing.

    The old files stay as they were. What was added has the values of a stage that computes all at once.
    """
    computed = []
    original = TinyFamily.with_views
    monkeypatch.setattr(TinyFamily, "with_views", lambda self, views: computed.append(views) or original(self, views))
    folder = stage(world, "grown")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    stage(world, "grown", "mdpo")
    stage(world, "grown", "mdpo", corruption="noise")
    stage(world, "grown", per_token=True)
    stage(world, "grown", "mdpo", per_token=True)
    stage(world, "grown", "mdpo", per_token=True)
    assert computed == [(CHOSEN_CORRUPTED,), (CHOSEN_CORRUPTED,), PAIR_VIEWS, (CHOSEN_CORRUPTED,)]
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    wanted = Wanted((*PAIR_VIEWS, CHOSEN_CORRUPTED), "blank, seed 0", per_token=True)
    grown = read_parts(folder, wanted)
    whole = read_parts(stage(world, "whole", "mdpo", per_token=True), wanted)
    for id_, sums in whole.sums.items():
        assert grown.sums[id_] == pytest.approx(sums, abs=1e-4)
        for one, other in zip(whole.tokens[id_], grown.tokens[id_], strict=True):
            assert np.abs(one - other).max() < 1e-5
    assert missing_views(complete_parts(folder), Wanted((CHOSEN_CORRUPTED,), "crop, seed 0")) == (CHOSEN_CORRUPTED,)


def test_an_addition_from_other_inputs_is_named(world):  # noqa: F811
    folder = stage(world, "grown")
    stage(world, "grown", "mdpo")
    path = folder / "added" / "chosen_corrupted-blank-0" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"]["model"] = "other"
    path.write_text(json.dumps(manifest))
    wanted = Wanted((CHOSEN_CORRUPTED,), "blank, seed 0")
    with pytest.raises(StageError, match='chosen_corrupted-blank-0: made from other inputs .*model: "tiny" -> "other"'):
        read_parts(folder, wanted)
    stage(world, "grown", overwrite=True)
    assert not (folder / "added").exists()


class Letters:
    """The tokenizer of TinyFamily: a token is a letter."""

    @staticmethod
    def decode(ids, **_):
        return "".join(map(chr, ids))


def joined(world, args, folder, loss="dpo"):  # noqa: F811
    pairs, data_args, _ = world
    data_args.reference = str(folder)
    family = TinyFamily(loss)
    family.views = args.views()
    reference = reference_of_pairs(pairs, data_args, args, {}, family)
    return join_pairs(pairs, hardness_of(pairs), reference, family, data_args, args)


def hardness_of(pairs):
    return PairValues([0.1 * i for i in range(len(pairs))], {})


def test_what_was_not_stored_is_named_with_its_command(world):  # noqa: F811
    folder = stage(world, "reference")
    args = arguments(world[2] / "out", token_weights="segments:5")
    with pytest.raises(
        ValueError,
        match="log-probs per token of the views chosen, rejected for --loss dpo --token_weights segments:5, found "
        "chosen, rejected. `python -m dama reference --loss dpo --per_token ... --out .*reference` adds them",
    ):
        joined(world, args, folder)
    stage(world, "reference", per_token=True)
    items = joined(world, args, folder).train.prepared
    assert [len(known) for known in items[0].reference_tokens] == [row.supervised for row in items[0].rows]


def test_views_that_only_weights_read_need_no_reference(world):  # noqa: F811
    folder = stage(world, "reference", per_token=True)
    items = joined(world, arguments(world[2] / "out", token_weights="visual"), folder).train.prepared
    assert items[0].reference[2:] == (0.0, 0.0) and items[0].reference_tokens[2:] == (None, None)
    assert [image.corruption for image in items[0].images] == ["", "", "noise", "noise"]


WHOLE = {"per_device_train_batch_size": 6}


def test_segments_of_weight_one_are_plain_dpo(world):  # noqa: F811
    """1 on every token: the losses, gradients and R_bar of a training without weights, up to the order of sums."""
    _, plain = train(world, **WHOLE)
    _, ones = train(world, token_weights="segments:1", tokenizer=Letters(), **WHOLE)
    for one, other in zip(plain, ones, strict=True):
        for name in ("loss", "grad_norm", "dama/R_bar", "rewards/chosen"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("weights", ["segments:5", "visual"])
@pytest.mark.parametrize("loss", ["dpo", "mdpo", "ipo", "bco_pair", "sft"])
def test_a_step_does_not_depend_on_its_micro_batches(world, weights, loss):  # noqa: F811
    """6 pairs at once = 2 x 3, with each kind of weights, one and two images, a mean, a state, no reference."""
    chosen = {"token_weights": weights, "tokenizer": Letters(), "corruption": "other_image"}
    if loss == "sft":
        chosen["strategy"] = "none"
    _, whole = train(world, loss, **chosen, **WHOLE)
    _, parts = train(world, loss, per_device_train_batch_size=2, gradient_accumulation_steps=3, **chosen)
    assert whole[-1]["loss"] < whole[0]["loss"]
    for one, other in zip(whole, parts, strict=True):
        for name in ("loss", "grad_norm", "dama/R_bar", "rewards/rejected"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=2e-5), name


def test_weights_move_the_segments_that_differ(world):  # noqa: F811
    """`It is red.` against `It is blue.`: with 5 on the colors the gap of plain sums grows faster in the first step."""
    gaps = []
    for weights in ("none", "segments:5"):
        trainer, rows = train(world, token_weights=weights, tokenizer=Letters(), strategy="none", **WHOLE)
        gaps.append(rows[1]["rewards/margins"])
        assert "rewards/chosen_corrupted" not in rows[0]
    assert gaps[1] > 2 * gaps[0] > 0


def test_the_weighted_mean_is_a_flag(world):  # noqa: F811
    """--dpo_use_average: RLHF-V's division by the sum of the weights; rewards are then per unit of weight."""
    chosen = {"token_weights": "segments:5", "tokenizer": Letters(), "strategy": "none", **WHOLE}
    sums, means = (train(world, dpo_use_average=average, **chosen)[1] for average in (False, True))
    first, mean = sums[0]["logps/chosen"], means[0]["logps/chosen"]
    # `It is red.` has 3 of 10 letters in the color, `It is blue.` 4 of 11: 1 x 7 + 5 x 3 = 22 and 7 + 5 x 4 = 27.
    assert first / 27 > mean > first / 22


def test_log_probs_per_token_come_from_the_base_or_are_not_needed(world):  # noqa: F811
    """A data file's sums are not enough; a loss without a reference, under a static weighting, needs none."""
    pairs, data_args, root = world
    summed = [replace(pair, reference=ReferenceLogps(-1.0, -2.0)) for pair in pairs]
    args = arguments(root / "out", token_weights="segments:5")
    with pytest.raises(
        ValueError, match="--token_weights segments:5: expected reference log-probs per token, found sums"
    ):
        reference_of_pairs(summed, data_args, args, {}, TinyFamily())
    free = arguments(root / "out", token_weights="segments:5", loss=["simpo"], strategy="none")
    assert reference_of_pairs(pairs, data_args, free, {}, TinyFamily("simpo")).tokens == ()


def test_the_first_loss_is_log_2_with_any_weights():
    """Equal policies: R = 0 whatever the weights."""
    policy = torch.randn(3, dtype=torch.float64)
    sums = token_logps(policy, ((2,), (1,)), PAIR_VIEWS, policy.clone()).weighted(torch.rand(3).double(), PAIR_VIEWS)
    assert Loss()(sums, torch.tensor([0.7])).item() == pytest.approx(-logsigmoid(torch.tensor(0.0)).item())
