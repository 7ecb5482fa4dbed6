"""A new objective is one function and one row of the table, as docs/howto/add_objective.md writes them.

Everything else reads the table. So it is with a new corruption.
"""

import json

import pytest
import torch

from dama import corruptions, losses
from dama.losses import Loss
from dama.train.arguments import PreferenceArguments, objective_errors
from dama.views import CHOSEN_CORRUPTED, PAIR_VIEWS
from tests.dama.test_family import train, world  # noqa: F401  (a fixture)
from tests.howto import code_of

PAGE = "add_objective.md"


def row_of(module, file):
    """The row that the page adds to a module's table, by its name there."""
    names = dict(vars(module))
    exec(code_of(PAGE, file, "above"), names)
    return eval("{" + code_of(PAGE, file, "below") + "}", names)


@pytest.fixture
def objective(monkeypatch):
    ((name, row),) = row_of(losses, "dama/losses.py").items()
    monkeypatch.setitem(losses.OBJECTIVES, name, row)


def test_it_is_known_by_its_name(objective, tmp_path):
    loss = Loss.parse(["dpo:0.5", "image_only"])
    assert loss.name == "dpo:0.5 image_only:1" and loss.views == (*PAIR_VIEWS, CHOSEN_CORRUPTED)
    args = PreferenceArguments(output_dir=str(tmp_path), use_cpu=True, loss=["image_only"], corruption="blank")
    assert objective_errors(args) == []


def test_it_trains_with_damas_betas_from_a_reference_stage_of_its_views(objective, world):  # noqa: F811
    _, rows = train(world, "image_only", per_device_train_batch_size=6, corruption="other_image")
    assert rows[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/chosen"] > rows[-1]["rewards/chosen_corrupted"]


def test_it_trains_on_a_new_corruption(objective, world, monkeypatch):  # noqa: F811
    """`inverted` is a function and a row; the stage records it, and training reads it: red images against cyan ones."""
    ((name, inverted),) = row_of(corruptions, "dama/corruptions.py").items()
    monkeypatch.setitem(corruptions.PIXEL_CORRUPTIONS, name, inverted)
    trainer, rows = train(world, "image_only", per_device_train_batch_size=6, corruption="inverted")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    manifest = json.loads((world[2] / "reference_image_only/manifest.json").read_text())
    assert manifest["fingerprint"]["corruption"] == "inverted, seed 0"
    assert objective_errors(trainer.args) == []
