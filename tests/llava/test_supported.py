"""Models that a command does not run are refused by their config.json, before anything large is imported or read."""

import json
import subprocess
import sys

import pytest

from dama.__main__ import main as dama_main
from llava.eval import run_llava
from llava.eval.generate import main as generate
from llava.model import export
from llava.model.builder import load_pretrained_model
from llava.serve import cli, gradio_web_server
from llava.supported import SUPPORTED, validate_supported_model
from llava.train import train_mem
from tests.conftest import GOLDEN

EXPECTED = r"expected a LLaVA-1.5 model .*llava-hf's .*got model_type qwen2_5_vl"
# Commands that run any model of images and text; what is no such model they refuse in other words.
ANY_VLM = ("align", "reference", "generate", "page", "cli", "chat")


def checkpoint(folder, model_type="qwen2_5_vl", name="config.json", **fields):
    """A folder with a config alone: what is refused has not been read any further."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"model_type": model_type} | fields))
    return str(folder)


def commands(other, out):
    """Each command as a newcomer calls it, with an unsupported checkpoint."""
    training = ["--model_name_or_path", other, "--data_path", "sft/records.json", "--image_folder", "images"]
    answering = ["--model-path", other, "--question-file", "q.jsonl", "--image-folder", "images", "--out", out]
    pairs = ["--data", "dama/rlaifv_records.json", "--image_folder", "images", "--out", out]
    return {
        "train": lambda: train_mem.main([*training, "--output_dir", out]),
        "align": lambda: train_mem.main([f"--model-name-or-path={other}", "--task", "DPO"]),
        "reference": lambda: dama_main(["reference", "--model_name_or_path", other, *pairs]),
        "generate": lambda: generate(answering),
        "base": lambda: generate(["--model-base", other, *answering[:1], "llava-v1.5-tiny", *answering[2:]]),
        "export": lambda: export.main(["--to", "hf", other, out]),
        "chat": lambda: run_llava.main(["--model-path", other, "--image-file", "images/wide.png", "--query", "?"]),
        "page": lambda: gradio_web_server.main(["--model-path", other]),
        "cli": lambda: cli.main(
            cli.build_parser().parse_args(["--model-path", other, "--image-file", "images/wide.png"])
        ),
    }


def refused(capsys, tmp_path, command, other):
    """What a command says on standard error when it refuses a checkpoint."""
    try:
        status = commands(other, str(tmp_path / "out"))[command]()
    except SystemExit as end:
        status = end.code
    assert status and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("command", sorted(commands("", "").keys() - set(ANY_VLM)))
def test_every_command_of_llava_alone_refuses(in_golden, tmp_path, capsys, command):
    said = refused(capsys, tmp_path, command, checkpoint(tmp_path / "other"))
    assert said.count("expected a LLaVA-1.5 model") == 1
    assert "got model_type qwen2_5_vl" in said and "liuhaotian/llava-v1.5-7b" in said


@pytest.mark.parametrize("command", ANY_VLM)
def test_what_is_no_model_of_images_and_text_is_refused_everywhere(in_golden, tmp_path, capsys, command):
    said = refused(capsys, tmp_path, command, checkpoint(tmp_path / "other", "bert"))
    assert said.count("expected LLaVA-1.5, or a model of images and text that transformers loads") == 1
    assert "got model_type bert" in said


@pytest.mark.parametrize("command", ["page", "cli"])
def test_a_checkpoint_without_its_files_is_named(in_golden, tmp_path, capsys, command):
    said = refused(capsys, tmp_path, command, checkpoint(tmp_path / "other"))
    assert "other': expected a folder or the name of a model on the hub, with weights" in said


def test_training_refuses_before_torch_is_imported(in_golden, tmp_path):
    other = checkpoint(tmp_path / "other", "llava_onevision")
    program = (
        "import sys; from llava.train.train_mem import main; status = main(sys.argv[1:]); "
        "sys.exit('imported' if {'torch', 'transformers'} & set(sys.modules) else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--model_name_or_path", other], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("train_mem.py: error: --model_name_or_path") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_next", "llava_onevision", "llava_mistral", "mistral", "clip"])
def test_kinds_that_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"--model-path '.*other': expected .*got model_type {kind}\. Other"):
        validate_supported_model(checkpoint(tmp_path / "other", kind), "--model-path")
    with pytest.raises(ValueError, match=f"got model_type {kind}"):
        load_pretrained_model(str(tmp_path / "other"), None, "x", device="cpu")


@pytest.mark.parametrize("kind", SUPPORTED)
def test_kinds_that_are_not(tmp_path, kind):
    validate_supported_model(checkpoint(tmp_path / "other", kind), "--model-path")


def test_an_adapter_is_of_its_base(tmp_path):
    base = checkpoint(tmp_path / "base")
    adapter = checkpoint(tmp_path / "adapter", None, "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ValueError, match=EXPECTED):
        validate_supported_model(adapter, "--model-path")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model_type": null}', "version https://git-lfs.github.com/spec/v1"]
)
def test_what_has_no_kind_is_left_to_the_loading(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for source in (str(tmp_path), str(tmp_path / "none"), "no/such/folder", "org/name", None, str(GOLDEN)):
        validate_supported_model(source, "--model-path")
