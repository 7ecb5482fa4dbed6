"""What holds for every objective: a step does not depend on ranks and micro-batches, nor a run on a kill."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dama.losses import MIXTURES, OBJECTIVES
from dama.train.arguments import PreferenceArguments, objective_errors
from dama.train.trainer import PreferenceTrainer
from dama.weighting import Strategy
from tests.conftest import ROOT
from tests.dama.test_family import colored, rows_of, train, trainer_of, world  # noqa: F401  (a fixture)
from tests.dama.test_token_weights import Letters
from tests.llava.test_resume import free_port

NAMES = [*OBJECTIVES, *MIXTURES]
COMPARED = ("loss", "grad_norm", "dama/R_bar", "dama/beta", "rewards/margins")
# One of every kind: a state and a mixture, a second image, a second answer, no reference, weights of both kinds.
ON_TWO_RANKS = {
    "mpo": {"loss": "mpo"},
    "bco_pair": {"loss": "bco_pair"},
    "mdpo": {"loss": "mdpo"},
    "symmpo": {"loss": "symmpo"},
    "simpo": {"loss": "simpo"},
    "orpo": {"loss": "orpo"},
    "segments": {"loss": "dpo", "token_weights": "segments:5"},
    "visual": {"loss": "bco_pair", "token_weights": "visual"},
}
STEPS = {"num_train_epochs": 6}
SAVED = STEPS | {"save_strategy": "steps", "save_steps": 1}


class SavedLetters(Letters):
    """A tokenizer that a checkpoint needs no file of."""

    def save_pretrained(self, folder):
        """Nothing."""


class Killed(Exception):
    """Stands for a kill right after a save."""


def settings(loss, **more):
    """DAMA with an objective, where it has a beta; steps of 6 pairs in all."""
    has_beta = loss in MIXTURES or OBJECTIVES[loss].has_beta
    strategy = {"strategy": "both"} if has_beta else {"strategy": "none", "selection": "nearest"}
    return {"loss": loss, "corruption": "other_image", "tokenizer": SavedLetters()} | strategy | more


def layout(size, accumulation=1):
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}


def assert_same_steps(whole, parts):
    assert len(whole) == len(parts) and whole[-1]["loss"] < whole[0]["loss"]
    for one, other in zip(whole, parts, strict=True):
        for name in COMPARED:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=2e-5), name


@pytest.mark.fast
@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("loss", NAMES)
def test_every_strategy_combines_with_every_objective_that_has_a_beta(tmp_path, loss, strategy):
    """Where beta does not exist, the flag and the remedy are named."""
    args = PreferenceArguments(output_dir=str(tmp_path), use_cpu=True, loss=[loss], strategy=strategy)
    refused = strategy is not Strategy.NONE and loss in ("sft", "orpo")
    assert objective_errors(args) == refused * [
        f"--strategy {strategy}: sets beta, and --loss {loss} has none; give --strategy none, under which --selection "
        "still chooses pairs"
    ]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss": ["bco_pair"], "variant": "released"}, "--variant released: decides for each gathered micro-batch"),
        ({"strategy": "model", "hardness_from": "vote"}, "--hardness_from vote: says where delta comes from, and"),
        ({"loss": ["cdpo"], "label_smoothing": 0.5}, "--label_smoothing: expected a share in [0, 0.5), got 0.5"),
    ],
)
def test_combinations_without_a_meaning_are_refused(tmp_path, flags, message):
    (error,) = objective_errors(PreferenceArguments(output_dir=str(tmp_path), use_cpu=True, **flags))
    assert error.startswith(message)


@pytest.mark.parametrize("loss", NAMES)
def test_a_step_does_not_depend_on_its_micro_batches(world, loss):  # noqa: F811
    """6 pairs at once = 3 x 2 = 1 x 6, with beta and selection by DAMA."""
    _, whole = train(world, **settings(loss), **layout(6), **STEPS)
    for parts in (layout(3, 2), layout(1, 6)):
        assert_same_steps(whole, train(world, **settings(loss), **parts, **STEPS)[1])


def check_resumed(world, folder, **given):  # noqa: F811
    """A run that is killed after the save of its third step and resumed; the undisturbed run, bit for bit the same."""
    whole = trainer_of(world, **given, **SAVED, output_dir=str(folder / "whole"))
    whole.train()
    with pytest.MonkeyPatch.context() as patch:
        save = PreferenceTrainer._save_checkpoint

        def save_and_die(self, *args):
            save(self, *args)
            if self.state.global_step == 3:
                raise Killed

        patch.setattr(PreferenceTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            trainer_of(world, **given, **SAVED, output_dir=str(folder / "parts")).train()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # of the ranks, only the first one writes most of a checkpoint
    resumed = trainer_of(world, **given, **SAVED, output_dir=str(folder / "parts"))
    resumed.train(resume_from_checkpoint=str(folder / "parts" / "checkpoint-3"))
    for (name, value), (_, again) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(value, again), name
    assert (resumed.weighting_state, resumed.loss_state) == (whole.weighting_state, whole.loss_state)
    assert (resumed.loss_state.count > 0) == whole.loss.has_state
    logs = [[row["loss"] for row in rows_of(trainer)] for trainer in (whole, resumed)]
    assert logs[0] == logs[1] and len(set(logs[0])) == 6
    return whole


@pytest.mark.parametrize("loss", NAMES)
def test_killed_and_resumed_is_never_killed(world, tmp_path, loss):  # noqa: F811
    check_resumed(world, tmp_path, **settings(loss), **layout(3, 2))


@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one_and_resume(world, tmp_path):  # noqa: F811
    """2 x 1 x 3 and 1 x 6; every kind of objective in one start of two ranks, which runs this file as a module."""
    single = {name: train(world, **settings(**given), **layout(6), **STEPS)[1] for name, given in ON_TWO_RANKS.items()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command = [*launcher, str(free_port()), "-m", __name__, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, rows in single.items():
        assert_same_steps(rows, json.loads((tmp_path / f"{name}.json").read_text()))


def on_a_rank(folder):
    """Every kind of objective: resumed on two ranks to the bit; the log of the undisturbed run for the test."""
    torch.distributed.init_process_group("gloo")
    for name, given in ON_TWO_RANKS.items():
        rows = resumed_on_two_ranks(folder, name, given)
        if torch.distributed.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(rows))
    gc.collect()  # a trainer that outlives the group waits, with the GIL, for Gloo's thread, which may wait for that
    torch.distributed.destroy_process_group()


def resumed_on_two_ranks(folder, name, given):
    whole = check_resumed(colored(folder), folder / name, **settings(**given), **layout(1, 3))
    assert whole.args.world_size == 2
    return rows_of(whole)


if __name__ == "__main__":
    on_a_rank(Path(sys.argv[1]))
