"""dama.remote_code: no checkpoint's own code runs, and nobody is asked, unless --trust_remote_code is given."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import dynamic_module_utils

from dama.hardness.clip import load_clip
from dama.hardness.split_llm import local_splitter
from dama.prepare.command import load_lengths
from dama.remote_code import RemoteCodeError, remote_code_refused
from dama.synth import rewards
from dama.synth.images import DiffusersPainter
from dama.synth.respond import HfResponder
from llava.model.checkpoint import hf_image_processor
from llava.tokenization import load_tokenizer
from tests.dama.prepare_sets import prepare, rlaifv_row, write_parquet
from tests.dama.tiny_clip import MODEL_CFG, write_tiny_clip

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parents[1] / "golden"
CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PreTrainedTokenizerFast, PretrainedConfig, PreTrainedModel, ProcessorMixin, BaseImageProcessor
class Tokenizer(PreTrainedTokenizerFast): pass
class Config(PretrainedConfig): model_type = "foreign"
class Model(PreTrainedModel): config_class = Config
class Processor(ProcessorMixin): pass
class ImageProcessor(BaseImageProcessor): pass
"""
MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForImageTextToText")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Exists once the foreign code has run."""
    return tmp_path / "ran"


@pytest.fixture
def foreign(tmp_path: Path, mark: Path) -> Path:
    """A checkpoint each part of which names code of its own; somebody at the keyboard says yes to everything."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    shutil.copy(GOLDEN / "llava-v1.5-tiny/tokenizer.model", folder)
    configs: dict[str, dict[str, Any]] = {
        "config.json": {
            "model_type": "foreign", "auto_map": {"AutoConfig": "evil.Config", **dict.fromkeys(MODELS, "evil.Model")},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]},
        },
        "processor_config.json": {"processor_class": "Processor", "auto_map": {"AutoProcessor": "evil.Processor"}},
        "preprocessor_config.json": {
            "image_processor_type": "ImageProcessor", "auto_map": {"AutoImageProcessor": "evil.ImageProcessor"},
        },
        "model_index.json": {"_class_name": ["evil", "Pipeline"]},
    }  # fmt: skip
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def a_hasty_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))


def with_foreign_tokenizer(clip: Path, foreign: Path) -> str:
    """A CLIP of open_clip whose tokenizer is the foreign one, in the CLIP's own folder as open_clip writes it."""
    config = json.loads(json.dumps(MODEL_CFG))
    config["text_cfg"]["hf_tokenizer_name"] = str(foreign)
    write_tiny_clip(clip, config=config)
    for name in ("evil.py", "config.json", "tokenizer_config.json"):
        shutil.copy(foreign / name, clip)
    return str(clip)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "prepare": lambda folder: load_lengths(str(folder)),
    "splitter": lambda folder: local_splitter(folder, folder / "cache"),
    "text reward": lambda folder: rewards.TextReward(str(folder))._loaded,
    "image-text reward": lambda folder: rewards.ImageTextReward(str(folder))._loaded,
    "clip reward": lambda folder: rewards.ClipReward(with_foreign_tokenizer(folder / "clip", folder)).scorer,
    "hardness": lambda folder: load_clip(with_foreign_tokenizer(folder / "clip", folder), None, "cpu"),
    "responder": lambda folder: HfResponder(str(folder))._loaded,
    "text-to-image": lambda folder: DiffusersPainter(str(folder)).pipeline,
    "tokenizer": load_tokenizer,
    "export": hf_image_processor,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_is_refused_without_a_question(
    loader: str, foreign: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RemoteCodeError, match="would run code that comes with it.*\nRemedy: ") as caught:
        LOADERS[loader](foreign)
    assert "checkpoint" in str(caught.value)  # the folder's name
    assert not mark.exists()
    assert sys.stdin.read() == "y\n" * 50
    assert "Do you wish to run" not in capsys.readouterr().out


def test_prepare_runs_it_where_the_flag_says_so(tmp_path: Path, foreign: Path, mark: Path) -> None:
    shutil.copy(GOLDEN.parents[1] / "playground/tinycoco/weights/clip/tokenizer.json", foreign)
    (foreign / "config.json").unlink()
    words = (write_parquet(tmp_path / "a.parquet", [rlaifv_row(0)]), "--tokenizer", foreign)
    with pytest.raises(RemoteCodeError, match="--tokenizer .*\nRemedy: .*--trust_remote_code"):
        prepare(*words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not mark.exists()
    prepare(*words, "--out", tmp_path / "out", "--trust_remote_code")
    assert mark.exists() and (tmp_path / "out/pairs.jsonl").exists()


def test_a_reward_runs_it_where_the_flag_says_so_whatever_its_name(tmp_path: Path, foreign: Path, mark: Path) -> None:
    named = foreign.rename(tmp_path / "ArmoRM-checkpoint")
    with pytest.raises(RemoteCodeError):
        _ = rewards.TextReward(str(named))._loaded
    assert not mark.exists()
    with pytest.raises((ValueError, OSError)):  # it has no weights, but its code ran before that
        _ = rewards.TextReward(str(named), trust_remote_code=True)._loaded
    assert mark.exists()


def test_other_errors_pass_and_the_setting_is_put_back() -> None:
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with pytest.raises(ValueError, match="^something else$"), remote_code_refused("x", "y"):
        raise ValueError("something else")
    assert before == dynamic_module_utils.TIME_OUT_REMOTE_CODE
