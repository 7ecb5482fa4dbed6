"""A model that needs more than its config says costs one file, as docs/howto/add_model_family.md writes it.

Nothing else names it.
"""

import json
from types import SimpleNamespace

import pytest

from dama.cli import main as dama
from dama.models import families
from dama.models.family import HubFamily
from llava.generation.hub import HubAnswerer
from llava.generation.request import Decoding, Request
from llava.model.write_hf import chat_template
from llava.train import train_hub
from llava.train.arguments import parse_arguments
from tests.conftest import GOLDEN
from tests.howto import code_of
from tests.models.test_training import PAIRS, words_of
from tests.models.tiny_hub import build


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny LLaVA whose processor has no chat template."""
    model, processor = build("llava")
    processor.chat_template = None
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def family_file(tmp_path, monkeypatch):
    """The page's file, where the package looks for families."""
    (tmp_path / "families").mkdir()
    code = code_of("add_model_family.md", "dama/models/families/llava.py")
    (tmp_path / "families/llava.py").write_text(code)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    yield
    families.__dict__.pop("llava", None)


def reference(checkpoint, out):
    """The exit status of the reference stage on the golden pairs."""
    flags = {"--model": checkpoint, "--data": PAIRS, "--image_folder": "images", "--device": "cpu", "--out": out}
    return dama(["reference", *(str(word) for pair in flags.items() for word in pair)])


def test_without_its_file_it_is_refused(in_golden, checkpoint, tmp_path, capsys):
    assert reference(checkpoint, tmp_path / "reference") != 0
    assert "chat template: expected one in the checkpoint's processor, got none" in capsys.readouterr().err


def test_its_file_is_enough_to_train_and_to_answer(in_golden, checkpoint, family_file, tmp_path):
    """Reference stage and training by their commands, then answers of the model that was trained."""
    assert reference(checkpoint, tmp_path / "reference") == 0
    words = words_of(tmp_path / "out", checkpoint, "--reference", str(tmp_path / "reference"))
    trainer = train_hub.run(parse_arguments(words))
    assert type(trainer.family) is not HubFamily and trainer.family.max_tokens == 1000
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-4) and losses[-1] < 0.5 * losses[0]
    image = json.loads((GOLDEN / PAIRS).read_text())[0]["image_path"]
    assert (tmp_path / "out/chat_template.jinja").is_file()
    answerer = HubAnswerer(str(tmp_path / "out"), device="cpu")
    question = Request("0", "What is this?", image)
    assert answerer.prompter.texts(answerer.token_ids([question], GOLDEN / "images"))[0].endswith("? ASSISTANT:")
    assert len(answerer.answer([question], GOLDEN / "images", Decoding(4))[0]) == 1


def test_its_template_is_that_of_the_export():
    """The page's template writes what llava.model.export puts beside the weights, so log-probs are the same."""
    names = {"__name__": "page"}
    exec(code_of("add_model_family.md", "dama/models/families/llava.py"), names)
    _, processor = build("llava")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    answer, system = ({"role": role, "content": [{"type": "text", "text": "Yes."}]} for role in ("assistant", "system"))
    for turns in ([asked], [asked, answer], [system, asked, answer, asked]):
        for asks in (True, False):
            texts = [
                processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=asks)
                for template in (names["TEMPLATE"], chat_template())
            ]
            assert texts[0] == texts[1] and "USER: <image>\nWhat" in texts[0]


@pytest.mark.parametrize("model_type", ["os", "../llava", "a.b", "", "no-such-model"])
def test_other_models_need_no_file(model_type):
    assert families.family_of(SimpleNamespace(model_type=model_type)) is HubFamily
