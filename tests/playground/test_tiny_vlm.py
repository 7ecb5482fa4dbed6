"""dama_tiny.sh --model vlm: the fine-tuning of its tiny LLaVA-OneVision, and its smoke form from end to end."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from dama.stage import StageError
from playground.tinycoco import vlm

ROOT = Path(__file__).parents[2]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_only_the_caption_and_the_end_of_its_turn_are_supervised():
    processor = vlm.new_processor()
    examples = [vlm.Captions(4, 0)[index] for index in range(3)]
    batch = vlm.Collator(processor)(examples)
    for ids, labels, example in zip(batch["input_ids"], batch["labels"], examples, strict=True):
        assert processor.tokenizer.decode(labels[labels != -100]) == f"{example['caption']}<|im_end|>"
        text = processor.tokenizer.decode(ids).replace("<image>", "")
        assert f"<|im_start|>user\n\n{example['question']}<|im_end|>\n<|im_start|>assistant\n" in text
        assert int((ids == processor.image_token_id).sum()) == 49 + 7 * 8  # the image; a crop with ends of lines


def test_the_start_has_the_llavas_weights():
    processor = vlm.new_processor()
    model = vlm.new_model(processor.tokenizer)
    llava = load_file(vlm.LLAVA / "model.safetensors")
    own = llava["model.layers.3.mlp.down_proj.weight"].float()
    assert torch.equal(model.model.language_model.layers[3].mlp.down_proj.weight, own)
    rows = model.lm_head.weight
    assert rows.shape[0] == len(processor.tokenizer) == 964 and torch.equal(rows[960], rows[963])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any("vision_tower" in name for name in trained)


def test_fine_tuning_goes_on_after_a_kill_and_is_done_once(tmp_path, monkeypatch):
    """Three steps, killed after the second: the same bits as without."""
    monkeypatch.setattr(vlm, "CHECKPOINTS", 1)
    vlm.build(tmp_path / "whole", 48)
    save = hf.Trainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(hf.Trainer, "_save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        vlm.build(tmp_path / "parts", 48)
    monkeypatch.setattr(hf.Trainer, "_save_checkpoint", save)
    vlm.build(tmp_path / "parts", 48)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not (tmp_path / "parts/training").exists()
    monkeypatch.setattr(vlm, "fine_tune", None)  # not called again
    vlm.build(tmp_path / "parts", 48)
    with pytest.raises(StageError, match="scenes"):
        vlm.build(tmp_path / "parts", 64)


def run(folder, *words):
    return subprocess.run(
        ["bash", str(ROOT / "scripts/dama_tiny.sh"), *words], env=os.environ | {"RUN": str(folder)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_an_unknown_model_is_named(tmp_path):
    for words in (["--model", "gpt"], ["--model"]):
        done = run(tmp_path / "run", *words)
        assert done.returncode == 2 and "--model: expected llava or vlm, got" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_smoke_form_runs_to_its_table_and_skips_what_is_done(tmp_path):
    folder = tmp_path / "run"
    done = run(folder, "--model", "vlm", "--smoke")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "LlavaOnevisionForConditionalGeneration, read by shared prefix" in done.stdout
    assert "Smoke run: it shows that the stages work" in done.stdout
    for name in ("sft", "dama"):
        results = json.loads((folder / "captions" / name / "results.json").read_text())
        assert "response_level" in json.dumps(results)
    assert (folder / "report/report.html").is_file()
    trained = load_file(folder / "dama/model.safetensors")
    before = weights(folder / "sft")
    assert trained.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert changed and not any("vision_tower" in name for name in changed)
    hf.AutoProcessor.from_pretrained(folder / "dama")
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    again = run(folder, "--model", "vlm", "--smoke")
    assert again.returncode == 0, again.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == stamps
