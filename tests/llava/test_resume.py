"""Killed and resumed is never killed: every sampler, epoch and number of ranks; which checkpoint is loaded."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

from dama.train.checkpoints import of_first_rank, seal_checkpoint
from dama.train.provenance import PROVENANCE_FILE
from llava.model.utils import read_file
from llava.train import train, train_dpo
from llava.train.arguments import parse_arguments
from llava.train.llava_trainer import LLaVATrainer
from scripts.soak import free_port
from tests.conftest import GOLDEN
from tests.llava.tiny import SAVES, arguments, flags

SAMPLERS = {
    "random": [],
    "random by data_seed": ["--data_seed", "7"],
    "sequential": ["--train_sampling_strategy", "sequential"],
    "length": ["--train_sampling_strategy", "group_by_length"],
    "modality": ["--group_by_modality_length", "True"],
    "modality, adapters": ["--group_by_modality_length", "True", "--lora_enable", "True", "--lora_r", "4"],
    "modality, accumulated": ["--group_by_modality_length", "True", "--gradient_accumulation_steps", "2"],
}
ON_TWO_RANKS = ("random", "length", "modality")


class Killed(Exception):
    """Stands for a kill right after a save."""


def write_rows(folder):
    """17 rows of several lengths, with and without an image: the last step of an epoch is smaller."""
    records = json.loads((GOLDEN / "sft" / "records.json").read_text())
    rows = [copy.deepcopy(row) | {"id": f"{row['id']} {k}"} for k in range(3) for row in records][:17]
    for number, row in enumerate(rows):
        row["conversations"][-1]["value"] += " word" * number
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def dying_at(step):
    """LLaVATrainer._save_checkpoint that is cut off by a kill right after the save of that step."""
    save = LLaVATrainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        if self.state.global_step == step:
            raise Killed

    return save_and_die


def run_killed(words, folder, step, run=train.run, parse=arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLaVATrainer, "_save_checkpoint", dying_at(step))
        with pytest.raises(Killed):
            run(parse(folder, *words))


def assert_same_bits(one, other):
    for (name, value), (_, again) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(value, again), name


def check_sampler(name, folder, data, ranks, epochs=3):
    """Undisturbed, and killed in the middle of the second epoch, at its end, and in the third."""
    words = ["--num_train_epochs", epochs, *SAVES, *SAMPLERS[name], "--data_path", data,
             "--per_device_train_batch_size", 4 // ranks]  # fmt: skip
    whole = train.run(arguments(folder / "whole", *words))
    steps = whole.state.max_steps // epochs
    parts = folder / "parts"
    for step in (steps + 1, 2 * steps, 2 * steps + 1)[: 1 if epochs == 2 else 3]:
        run_killed(words, parts, step)
    resumed = train.run(arguments(parts, *words))
    assert_same_bits(whole, resumed)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(set(losses[0])) > 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_resumed_run_ends_in_the_same_bits(in_golden, tmp_path, name):
    check_sampler(name, tmp_path, write_rows(tmp_path), ranks=1)


@pytest.mark.distributed
def test_two_resumed_ranks_end_in_the_same_bits(in_golden, tmp_path):
    """Several samplers in one start of two ranks, which runs this file as a module of the checkout."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command = [*launcher, str(free_port()), "-m", __name__, str(tmp_path)]
    write_rows(tmp_path)
    done = subprocess.run(command, cwd=GOLDEN.parents[1], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("same bits on rank") == 2 * len(ON_TWO_RANKS)


def test_every_epoch_shows_every_row_once_on_every_rank_alike():
    """The order depends on seed and epoch, not on what else is drawn."""
    from llava.train.llava_trainer import LengthGroupedSampler

    lengths = [5, -3, 8, -9, 2, 7, -1, 4, 6, -2, 3, -8, 1, 9, -4, 10, -5, -6]

    def order(epoch, seed=3):
        torch.rand(epoch + 1)
        sampler = LengthGroupedSampler(2, 2, lengths, group_by_modality=True, seed=seed)
        sampler.set_epoch(epoch)
        before = torch.get_rng_state()
        rows = list(sampler)
        assert torch.equal(torch.get_rng_state(), before)
        return rows

    orders = [order(epoch) for epoch in range(4)]
    assert all(sorted(rows) == list(range(18)) for rows in orders)
    assert [order(epoch) for epoch in range(4)] == orders
    assert len({tuple(rows) for rows in orders}) == 4 and order(0, seed=4) != orders[0]


# --- Which checkpoint is loaded --------------------------------------------------------------------------------------

SHORT = [*SAVES, "--max_steps", "4", "--per_device_train_batch_size", "2"]


@pytest.fixture()
def whole(in_golden, tmp_path):
    """An undisturbed run of 4 steps with a checkpoint after each."""
    return train.run(arguments(tmp_path / "whole", *SHORT))


def test_an_explicit_checkpoint_is_where_a_run_continues(whole, tmp_path, capsys):
    (tmp_path / "whole" / PROVENANCE_FILE).unlink()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for folder in (tmp_path / "whole", tmp_path / "elsewhere"):
        again = train.run(arguments(folder, *SHORT, "--resume_from_checkpoint", checkpoint))
        assert f"continuing from {checkpoint}\n" in capsys.readouterr().out
        assert_same_bits(whole, again)


def test_the_last_checkpoint_can_be_asked_for(whole, tmp_path, capsys):
    (tmp_path / "whole" / PROVENANCE_FILE).unlink()
    train.run(arguments(tmp_path / "whole", *SHORT, "--resume_from_checkpoint", "True"))
    assert "checkpoint-4\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--resume_from_checkpoint False: expected no checkpoint in .*, found some"):
        arguments(tmp_path / "whole", *SHORT, "--resume_from_checkpoint", "False")


@pytest.mark.parametrize("damage", ["weights", "seal", "other flags", "no optimizer"])
def test_a_checkpoint_that_cannot_be_continued_is_refused(whole, tmp_path, damage):
    checkpoint, more = tmp_path / "whole" / "checkpoint-2", []
    message = {"weights": "found no whole model.safetensors", "seal": "found no whole dama_seal.json",
               "other flags": "--weight_decay: .*0.1", "no optimizer": "saved with --save_only_model"}  # fmt: skip
    if damage == "weights":
        (checkpoint / "model.safetensors").write_bytes(b"")
    elif damage == "seal":
        (checkpoint / "dama_seal.json").unlink()
    elif damage == "no optimizer":
        (checkpoint / "optimizer.pt").unlink()
        seal_checkpoint(checkpoint, 1)
    else:
        more = ["--weight_decay", "0.1"]
    with pytest.raises(ValueError, match=message[damage]):
        train.run(arguments(tmp_path / "new", *SHORT, "--resume_from_checkpoint", checkpoint, *more))


WAYS = {
    "full": [],
    "lora": ["--lora_enable", "True", "--lora_r", "4"],
    "projector": ["--tune_mm_mlp_adapter", "True", "--check_reference", "False"],
}
BEST = ["--variant", "paper", "--eval_pairs", "2", "--eval_strategy", "steps", "--eval_steps", "1", *SAVES,
        "--max_steps", "4", "--load_best_model_at_end", "True", "--metric_for_best_model", "eval_loss"]  # fmt: skip


def parse_pairs(folder, *words):
    return parse_arguments(flags(folder, *map(str, words)))


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_trained_part_comes_from_the_best_checkpoint(in_golden, tmp_path, way, interrupted):
    """The held-out loss of two pairs rises in full training and falls in the others.

    The best is defined as the other end, so that it is not the last checkpoint.
    """
    words = [*BEST, *WAYS[way], "--greater_is_better", str(way != "full")]
    if interrupted:
        run_killed(words, tmp_path / "before", 2, train_dpo.run, parse_pairs)
        (tmp_path / "before").rename(tmp_path / "run")  # the recorded path of the best is no longer right
    trainer = train_dpo.run(parse_pairs(tmp_path / "run", *words))
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 4 and trainer.state.global_step == 4
    saved, checkpoint = tmp_path / "run" / "out", tmp_path / "run" / "out" / f"checkpoint-{best}"
    one, other = (weights_of(folder) for folder in (saved, checkpoint))
    last = weights_of(saved / "checkpoint-4")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], last[name]) for name in one if "mm_projector" in name)


def weights_of(folder):
    """What was trained, as a folder has it."""
    names = ("model.safetensors", "adapter_model.safetensors", "non_lora_trainables.bin", "mm_projector.bin")
    files = [folder / name for name in names if (folder / name).is_file()]
    return {name.replace(".default", ""): t for file in files for name, t in read_file(file).items()}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    os.chdir(GOLDEN)  # the golden configs name their vision tower relative to that folder
    torch.distributed.init_process_group("gloo")
    assert of_first_rank(Path(str(torch.distributed.get_rank()))) == Path("0")
    for sampler in ON_TWO_RANKS:
        check_sampler(sampler, place / sampler, place / "rows.json", ranks=2, epochs=2)
        sys.stdout.write(f"same bits on rank {torch.distributed.get_rank()}: {sampler}\n")
        sys.stdout.flush()
