"""A model family of a few lines that shares nothing with LLaVA trains DAMA through the protocol alone."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from dama.logps import AnswerIndex, indexed_logps, indexed_token_logps
from dama.losses import Loss
from dama.pairs import PreferencePair
from dama.train.arguments import PreferenceArguments
from dama.train.data import PairValues, join_pairs
from dama.train.family import group_lengths, shown_images
from dama.train.reference import reference_of_pairs, run_reference
from dama.train.rows import EncodedRow
from dama.train.throughput import ModelSize
from dama.train.trainer import PreferenceTrainer

LETTERS = 128


class TinyModel(nn.Module):
    """Predicts a letter from the one before it and the image's mean color: one matrix and one embedding."""

    def __init__(self):
        super().__init__()
        self.letters, self.color, self.head = nn.Embedding(LETTERS, 16), nn.Linear(3, 16), nn.Linear(16, LETTERS)
        self.dtype, self.config = torch.float32, SimpleNamespace(to_dict=dict)

    def forward(self, ids, colors, index, per_token=False):
        hidden = torch.tanh(self.letters(ids) + self.color(colors)[:, None])
        return (indexed_token_logps if per_token else indexed_logps)(hidden, index, self.head, chunk=64)


class TinyFamily:
    """Two rows per pair, padded; images are their mean colors."""

    encodes_ahead, max_tokens, files = False, 64, ()

    def __init__(self, loss="dpo"):
        self.module, self.views = TinyModel(), Loss.parse([loss]).views

    def encode(self, pairs, images):
        return [self.encode_pair(pair) for pair in pairs]

    def encode_pair(self, pair):
        question = [ord(letter) for letter in pair.question]
        rows = {}
        for view in self.views:
            answer = [ord(letter) for letter in getattr(pair, view.answer)]
            labels = torch.tensor([-100] * len(question) + answer)
            rows[view] = EncodedRow(torch.tensor(question + answer), labels)
        return tuple(rows.values())

    def tokens(self, ids):
        return ids

    def groups(self, item):
        return group_lengths(item.rows, self.views, self.tokens)

    @staticmethod
    def prepare_image(image):
        pixels = torch.tensor(list(image.get_flattened_data()), dtype=torch.float32)
        return pixels.mean(0) / 255

    def collate(self, items):
        rows = [(item.rows[v], item.images[v]) for v in range(len(self.views)) for item in items]
        images = shown_images(items)
        return {
            "ids": nn.utils.rnn.pad_sequence([row.input_ids for row, _ in rows], True),
            "labels": nn.utils.rnn.pad_sequence([row.labels for row, _ in rows], True, -100),
            "shown": torch.tensor([images.index(image) for _, image in rows]),
        }

    def answer_logps(self, model, batch, images, encoded, chunk, per_token=False):
        colors = torch.stack(list(images))[batch["shown"]]
        return model(batch["ids"], colors, AnswerIndex.of(batch["labels"]), per_token)

    def with_views(self, views):
        other = copy.copy(self)
        other.views = views
        return other

    def size(self):
        return ModelSize(decoder=256, output=2048, attention=0, tower=0, projector=48, patches=0)

    def fingerprint(self):
        return {"model": "tiny"}


def colored(folder):
    """Eight pairs about plain images, their data arguments and folder: "red" is right on red ones, "blue" on others."""
    pairs = []
    for i in range(8):
        color, other = ("red", "blue") if i % 2 else ("blue", "red")
        if not (folder / f"{i}.png").exists():
            Image.new("RGB", (4, 4), color).save(folder / f"{i}.png")
        texts = {"chosen": f"It is {color}.", "rejected": f"It is {other}.", "second": f"No {color}."}
        pairs.append(PreferencePair(str(i), f"{i}.png", "Color? ", **texts))
    data_args = SimpleNamespace(
        data_path="pairs", image_folder=str(folder), on_long_pair="fail", reference=None, eval_pairs=2
    )
    return pairs, data_args, folder


@pytest.fixture
def world(tmp_path):
    return colored(tmp_path)


def train(world, loss="dpo", tokenizer=None, **flags):
    """Reference stage, joining, training; the trainer and its losses by step."""
    trainer = trainer_of(world, loss, tokenizer, **flags)
    trainer.train()
    return trainer, rows_of(trainer)


def rows_of(trainer):
    """The log of every step."""
    return [row for row in trainer.state.log_history if "loss" in row]


def trainer_of(world, loss="dpo", tokenizer=None, **flags):
    """Reference stage and joining; a trainer that has not begun."""
    pairs, data_args, folder = world
    torch.manual_seed(0)
    family = TinyFamily(loss)
    common = {"output_dir": str(folder / f"out_{loss}"), "num_train_epochs": 20, "save_strategy": "no"}
    args = PreferenceArguments(
        use_cpu=True, loss=[loss], learning_rate=0.05, logging_steps=1, report_to="none", disable_tqdm=True, seed=1,
        **common | flags,
    )  # fmt: skip
    data_args.reference = str(folder / f"reference_{loss}")
    per_token = args.token_weighting() is not None
    options = {"batch_size": 4, "progress": False, "per_token": per_token}
    run_reference(family, data_args, args, pairs, [], data_args.reference, **options)
    family.views = args.views()
    reference = reference_of_pairs(pairs, data_args, args, {}, family)
    hardness = PairValues([0.1 * i for i in range(len(pairs))], {})
    data = join_pairs(pairs, hardness, reference, family, data_args, args)
    return PreferenceTrainer(
        family, tokenizer, args, train_dataset=data.train, eval_dataset=data.held_out, delta_bar=data.delta_bar
    )


def test_dama_trains_a_model_that_is_not_llava(world):
    """Six pairs a step: the first loss is log 2, the model being its reference; at the end held-out pairs are right."""
    trainer, rows = train(world, per_device_train_batch_size=6)
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and rows[-1]["dama/R_bar"] > 0
    assert trainer.evaluate()["eval_rewards/accuracies"] == 1.0


def test_an_objective_on_two_images_learns_both(world):
    """`mdpo` with other images raises the chosen answer on its own image above the same answer on another one."""
    _, rows = train(world, "mdpo", per_device_train_batch_size=6, corruption="other_image")
    last = rows[-1]
    assert last["rewards/chosen"] > last["rewards/chosen_corrupted"] and last["rewards/margins"] > 0


def test_a_reference_free_objective_needs_no_stage(world, capsys):
    pairs, data_args, folder = world
    args = PreferenceArguments(output_dir=str(folder / "out"), use_cpu=True, loss=["simpo"], strategy="none")
    found = reference_of_pairs(pairs, data_args, args, {}, TinyFamily("simpo"))
    assert found.values == [(0.0, 0.0)] * 8
    assert "--loss simpo needs no log-probs of the reference model" in capsys.readouterr().out
    args.strategy = "model"
    with pytest.raises(ValueError, match="--loss simpo needs none, but its --strategy or --selection does. Run"):
        reference_of_pairs(pairs, data_args, args, {}, TinyFamily("simpo"))


def test_a_stage_without_the_views_names_the_command(world):
    pairs, data_args, folder = world
    args = PreferenceArguments(output_dir=str(folder / "out"), use_cpu=True)
    data_args.reference = str(folder / "plain")
    run_reference(TinyFamily(), data_args, args, pairs, [], data_args.reference, batch_size=4, progress=False)
    args.loss = ["mdpo"]
    with pytest.raises(ValueError, match="views chosen_corrupted for --loss mdpo.*dama reference --loss mdpo"):
        reference_of_pairs(pairs, data_args, args, {}, TinyFamily("mdpo"))


def test_another_corruption_is_another_reference(world):
    pairs, data_args, folder = world
    args = PreferenceArguments(output_dir=str(folder / "out"), use_cpu=True, loss=["mdpo"], corruption="blank")
    data_args.reference = str(folder / "blank")
    run_reference(TinyFamily("mdpo"), data_args, args, pairs, [], data_args.reference, batch_size=4, progress=False)
    args.corruption = "noise"
    with pytest.raises(ValueError, match="--corruption"):
        reference_of_pairs(pairs, data_args, args, {}, TinyFamily("mdpo"))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"loss": ["mdpo"], "corruption": "field"}, "8 of 8 pairs without rejected_images"),
        ({"loss": ["symmpo"]}, "without a second answer"),
    ],
)
def test_pairs_that_lack_what_the_views_need_are_refused(world, flags, match):
    pairs, data_args, folder = world
    pairs = [PreferencePair(p.id, p.image, p.question, p.chosen, p.rejected) for p in pairs]
    args = PreferenceArguments(output_dir=str(folder / "out"), use_cpu=True, **flags)
    family = TinyFamily("mdpo")
    family.views = args.preference_loss().views
    data_args.reference = "somewhere"
    row = EncodedRow(torch.ones(2).long(), torch.ones(2).long())
    family.encode = lambda pairs, images: [(row,) * len(family.views)] * len(pairs)
    with pytest.raises(ValueError, match=match):
        join_pairs(pairs, PairValues([0.0] * 8, {}), PairValues([(0.0,) * 6] * 8, {}), family, data_args, args)


def test_pairs_with_a_context_need_a_family_that_reads_it(world):
    pairs, data_args, folder = world
    pairs = [replace(pair, context="So. ") for pair in pairs]
    args = PreferenceArguments(output_dir=str(folder / "out"), use_cpu=True)
    with pytest.raises(ValueError, match=r"8 of 8 pairs have a context \(first: 0\), which this model family does not"):
        run_reference(TinyFamily(), data_args, args, pairs, [], folder / "out", 4)
