"""Preference training of Hugging Face models: as LLaVA-1.5's own path trains the same weights.

Resumed to the bit, saved as ordinary checkpoints, over two ranks.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dama.models import setup
from dama.models.loading import HubCheckpoint
from dama.models.trainer import HubTrainer
from dama.train.provenance import PROVENANCE_FILE
from llava.eval.generate import main as generate
from llava.model.export import main as export
from llava.train import train_dpo, train_hub
from llava.train.arguments import parse_arguments
from llava.train.train_mem import main as train_mem
from scripts.merge_lora_weights import main as merge
from tests.conftest import GOLDEN
from tests.llava.test_distributed import launch, training_log
from tests.models.tiny_hub import build

PAIRS = "dama/rlaifv_records.json"


def words_of(folder, model, *more):
    """Flags of a short training on the golden pairs, relative to tests/golden."""
    return [
        "--task", "DPO", "--model_name_or_path", str(model), "--data_path", PAIRS, "--image_folder", "images",
        "--output_dir", str(folder), "--per_device_train_batch_size", "4", "--use_cpu", "True", "--logging_steps", "1",
        "--num_train_epochs", "5", "--learning_rate", "1e-3", "--disable_tqdm", "True", "--report_to", "none",
        "--save_strategy", "no", *more,
    ]  # fmt: skip


def saved(folder, name):
    model, processor = build(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl")


def reference(model, out, *more):
    from dama.cli import main

    words = ["reference", "--model_name_or_path", str(model), "--data", PAIRS, "--image_folder", "images", "--device",
             "cpu", "--batch_size", "3", "--out", str(out), *more]  # fmt: skip
    assert main(words) == 0
    rows = [json.loads(line) for line in (out / "reference.jsonl").read_text().splitlines()]
    return {row["id"]: row for row in rows}


def mixed(file):
    """The golden pairs, of which some are of texts alone, one of two images, and one a conversation."""
    rows = json.loads((GOLDEN / PAIRS).read_text())
    for number in (0, 1, 4, 7):
        rows[number] = {name: value for name, value in rows[number].items() if name != "image_path"} | {"images": []}
    rows[2] |= {"image_path": ["square.png", "wide.png"], "question": "<image> or <image>, which is square?"}
    turns = [("system", "Be brief."), ("user", "<image>What is it?"), ("assistant", "A dot."), ("user", "Which color?")]
    rows[3] |= {"prompt": [{"role": role, "content": text} for role, text in turns]}
    del rows[3]["question"]
    file.write_text(json.dumps(rows))
    return str(file)


@pytest.fixture
def without_added_rows(monkeypatch):
    """llava-hf's layout has 64 more tokens, among which every probability is shared: here their logits are left out."""
    load, rows = setup.setup_family, json.loads((GOLDEN / "llava-v1.5-tiny" / "config.json").read_text())["vocab_size"]

    def load_without(*args, **kwargs):
        family = load(*args, **kwargs)
        head = family.model.lm_head
        head.weight = torch.nn.Parameter(head.weight[:rows].detach().clone())
        return family

    monkeypatch.setattr(setup, "setup_family", load_without)
    monkeypatch.setattr(train_hub, "setup_family", load_without)


def test_the_exported_llava_trains_as_in_its_own_layout(in_golden, tmp_path, without_added_rows):
    """Reference log-probs and 10 steps of DAMA: the golden checkpoint by LLaVA's code, its export by its processor."""
    export(["--to", "hf", "llava-v1.5-tiny", str(tmp_path / "hf")])
    pad = ["--image_aspect_ratio", "pad"]  # what the export prepares images as
    own = reference("llava-v1.5-tiny", tmp_path / "own_reference", *pad)
    pil = ["--processor_option", 'backend="pil"']  # as LLaVA's code scales images; torchvision rounds otherwise
    hub = reference(tmp_path / "hf", tmp_path / "hub_reference", *pil)
    for pair, row in own.items():
        for name in ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"):
            assert hub[pair][name] == pytest.approx(row[name], rel=1e-5, abs=1e-4), (pair, name)
    common = ["--reference", str(tmp_path / "own_reference")]
    one = train_dpo.run(parse_arguments(words_of(tmp_path / "own", "llava-v1.5-tiny", *pad, *common)))
    common = ["--reference", str(tmp_path / "hub_reference")]
    two = train_hub.run(parse_arguments(words_of(tmp_path / "hub", tmp_path / "hf", *common, *pil)))
    rows = [[row for row in t.state.log_history if "loss" in row] for t in (one, two)]
    assert len(rows[0]) == 10
    for single, other in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "dama/R_bar", "dama/alpha_M", "dama/selected"):
            assert other[name] == pytest.approx(single[name], rel=2e-4, abs=2e-5), name


class Killed(Exception):
    """Stands for a kill right after a save."""


@pytest.mark.parametrize("kind", ["full", "lora", "mixed"])
def test_killed_and_resumed_ends_in_the_same_bits(in_golden, qwen, tmp_path, monkeypatch, kind):
    """With mdpo, whose second image is made by the pair, or mixed pairs; the saved model loads in a fresh process."""
    data = ["--data", mixed(tmp_path / "pairs.json")] if kind == "mixed" else []
    views = [] if kind == "mixed" else ["--loss", "mdpo", "--corruption", "mask_patches"]
    way = ["--lora_enable", "True", "--lora_r", "4"] if kind == "lora" else []
    reference(qwen, tmp_path / "reference", *views, *data)
    views += ["--data_path", *data[1:]] if data else []
    common = ["--reference", str(tmp_path / "reference"), *views, *way, "--save_strategy", "steps", "--save_steps", "1"]
    whole = train_hub.run(parse_arguments(words_of(tmp_path / "whole", qwen, *common)))
    words = words_of(tmp_path / "parts", qwen, *common)
    save = HubTrainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        if self.state.global_step == 4:
            raise Killed

    monkeypatch.setattr(HubTrainer, "_save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        train_hub.run(parse_arguments(words))
    monkeypatch.setattr(HubTrainer, "_save_checkpoint", save)
    resumed = train_hub.run(parse_arguments(words))
    for (name, value), (_, again) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(value, again), name
    assert train_hub.run(parse_arguments(words)) is None  # finished
    if kind != "mixed":
        in_a_fresh_process(tmp_path / "whole", qwen if way else None)


def in_a_fresh_process(folder, base):
    """The checkpoint loads with transformers (and peft) alone, processor included, and it answers."""
    program = f"""
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(base or folder)!r})
if {base is not None}:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, {str(folder)!r})
processor = AutoProcessor.from_pretrained({str(folder)!r})
turns = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What?"}}]}}]
prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
inputs = processor(text=[prompt], images=[[Image.new("RGB", (40, 30))]], return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr[-2000:]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl"])
def on_one_rank(request, tmp_path_factory):
    """(log of a training of 1 x 4 pairs, checkpoint that it started from, flags that other layouts share)."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(GOLDEN)
        model, data = saved(folder / "model", request.param), mixed(folder / "pairs.json")
        reference(model, folder / "reference", "--data", data)
        common = ["--reference", str(folder / "reference"), "--logp_chunk", "64", "--num_train_epochs", "2"]
        common += ["--data_path", data]
        train_hub.run(parse_arguments(words_of(folder / "one", model, *common)))
    return training_log(folder / "one"), model, common


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_take_the_steps_of_one(tmp_path, on_one_rank, zero):
    """1 x 4 and 2 x 1 x 2 on 8 pairs; log-probs in chunks whose number differs between the ranks.

    Half of the pairs are of texts alone, so that a rank's micro-batch has images where the other's has none.
    """
    rows, model, common = on_one_rank
    two = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    done = launch(words_of(tmp_path / "two", model, *common, *two), zero, "torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    for single, double in zip(rows, training_log(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "dama/R_bar", "dama/alpha_M", "dama/selected"):
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=5e-5), key


def test_an_adapter_is_named_and_merged_before_it_is_trained_on(in_golden, qwen, tmp_path, capsys):
    """The error names its base; the merged model trains on."""
    lora = ["--lora_enable", "True", "--lora_r", "4", "--freeze_mm_mlp_adapter", "True", "--reference", "base"]
    assert train_mem(words_of(tmp_path / "adapter", qwen, *lora, "--strategy", "model", "--max_steps", "2")) == 0
    more = ["--loss", "simpo", "--strategy", "none", "--max_steps", "1"]
    capsys.readouterr()
    assert train_mem(words_of(tmp_path / "out", tmp_path / "adapter", *more)) == 2
    said = f"--model_name_or_path '{tmp_path / 'adapter'}': expected a full model, got an adapter of '{qwen}'"
    assert said in capsys.readouterr().err
    merge(["--model-path", str(tmp_path / "adapter"), "--model-base", str(qwen), "--save-model-path",
           str(tmp_path / "merged"), "--dtype", "float32"])  # fmt: skip
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    wanted = HubCheckpoint(str(tmp_path / "adapter")).model(device="cpu", dtype=torch.float32).state_dict()
    assert all(torch.equal(merged[name], weight) for name, weight in wanted.items())
    before = AutoModelForImageTextToText.from_pretrained(qwen).state_dict()
    assert any(not torch.equal(merged[name], weight) for name, weight in before.items())
    assert train_mem(words_of(tmp_path / "out", tmp_path / "merged", *more)) == 0


@pytest.mark.parametrize(
    "said", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.0}, {"length_penalty": 0.5}]
)
def test_a_base_whose_decoding_has_no_effect_is_saved(in_golden, tmp_path, said):
    """Nothing that transformers refuses to save is left of its generation config."""
    base = saved(tmp_path / "model", "qwen2_5_vl")
    (base / "generation_config.json").write_text(json.dumps(said))
    words = words_of(tmp_path / "out", base, "--loss", "simpo", "--strategy", "none", "--max_steps", "1")
    assert train_mem(words) == 0
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not kept.keys() & said.keys() - {"do_sample"}


@pytest.mark.distributed
def test_adapters_over_half_precision_under_zero3(in_golden, qwen, tmp_path):
    """As for LLaVA-1.5 in tests/llava/test_distributed.py; the adapters can be loaded again."""
    lora = ["--bf16", "True", "--lora_enable", "True", "--lora_r", "4", "--freeze_mm_mlp_adapter", "True"]
    common = [*lora, "--lora_dropout", "0", "--num_train_epochs", "2", "--reference", "base"]
    train_hub.run(parse_arguments(words_of(tmp_path / "one", qwen, *common)))
    two = words_of(tmp_path / "two", qwen, *common, "--per_device_train_batch_size", "2")
    done = launch(two, 3, "torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[row["loss"] for row in training_log(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    asked = ["--model-path", str(tmp_path / "two"), "--question-file", str(tmp_path / "q.jsonl"), "--image-folder",
             "images", "--max-new-tokens", "4", "--out", str(tmp_path / "answers")]  # fmt: skip
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "image": "wide.png", "text": "What is it?"}))
    assert generate(asked) == 0


def test_an_aligned_llava_hf_answers(in_golden, tmp_path):
    """It keeps what LLaVA's own code, through which that layout answers, needs of the base."""
    export(["--to", "hf", "llava-v1.5-tiny", str(tmp_path / "hf")])
    words = words_of(tmp_path / "out", tmp_path / "hf", "--loss", "sft", "--strategy", "none", "--max_steps", "1")
    assert train_mem(words) == 0
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "image": "wide.png", "text": "What is it?"}))
    asked = ["--model-path", str(tmp_path / "out"), "--question-file", str(tmp_path / "q.jsonl"), "--image-folder",
             "images", "--max-new-tokens", "4", "--out", str(tmp_path / "answers")]  # fmt: skip
    assert generate(asked) == 0
    assert len((tmp_path / "answers/answers.jsonl").read_text().splitlines()) == 1


def test_train_mem_knows_the_model_by_its_config(in_golden, qwen, tmp_path, capsys):
    """The same command as for LLaVA-1.5; the base as the reference on the fly, under LoRA."""
    lora = ["--lora_enable", "True", "--lora_r", "4", "--freeze_mm_mlp_adapter", "True", "--reference", "base"]
    words = words_of(tmp_path / "out", qwen, *lora, "--num_train_epochs", "1", "--strategy", "model")
    assert train_mem(words) == 0
    assert "read by shared prefix (causal attention in every layer)" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    card = json.loads((tmp_path / "out" / PROVENANCE_FILE).read_text())
    assert card["flags"]["lora_r"] == 4 and card["base"] == str(qwen)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_aspect_ratio", "pad"], "--image_aspect_ratio: expected with LLaVA-1.5 only"),
        (["--version", "plain", "--vision_tower", "x"], "--version, --vision_tower: expected with LLaVA-1.5 only"),
        (["--processor_option", "do_resize=maybe"], "--processor_option do_resize=maybe: expected NAME=VALUE"),
    ],
)
def test_flags_that_mean_nothing_are_refused(in_golden, qwen, tmp_path, capsys, flags, message):
    assert train_mem(words_of(tmp_path / "out", qwen, *flags, "--strategy", "none", "--loss", "sft")) == 2
    assert message in capsys.readouterr().err


def test_fewer_pixels_are_another_reference(in_golden, qwen, tmp_path, capsys):
    """--max_pixels shortens the rows, and a training without it refuses the log-probs."""
    few = reference(qwen, tmp_path / "few", "--max_pixels", "256")
    many = reference(qwen, tmp_path / "many")
    assert few["0"]["chosen_logp"] != many["0"]["chosen_logp"]
    assert train_mem(words_of(tmp_path / "out", qwen, "--reference", str(tmp_path / "few"))) == 2
    assert "image processor" in capsys.readouterr().err


def test_a_saved_model_keeps_its_weights_and_processor(in_golden, qwen, tmp_path):
    train_hub.run(parse_arguments(words_of(tmp_path / "out", qwen, "--loss", "sft", "--strategy", "none")))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    base = AutoModelForImageTextToText.from_pretrained(qwen)
    changed = {n for (n, p), (_, q) in zip(model.named_parameters(), base.named_parameters()) if not torch.equal(p, q)}
    assert changed and not any(".visual." in name for name in changed)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.chat_template == AutoProcessor.from_pretrained(qwen).chat_template
