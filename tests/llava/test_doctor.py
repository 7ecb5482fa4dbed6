"""The doctor's page on real files, its refusals, the micro-batch that fits, and a preflight that leaves no trace."""

import copy
import json
import random
import re
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch

from dama.pairs import read_pairs
from dama.train.throughput import PairLength
from llava.estimate import machine
from llava.estimate.configs import configs_of
from llava.estimate.disk import checkpoint_bytes, checkpoints_at_a_time, trial_save
from llava.estimate.doctor import main
from llava.estimate.fit import apply_layout, fit_micro_batch
from llava.estimate.lengths import lengths_of
from llava.estimate.memory import estimate_step
from llava.estimate.preflight import preflight
from llava.estimate.sizes import LayerSizes, ModelShape, Training, Zero
from llava.train import train
from llava.train.arguments import parse_arguments
from tests.llava.test_memory import SHAPE
from tests.llava.tiny import arguments as sft_arguments
from tests.llava.tiny import flags
from tests.llava.tiny import flags_of as sft_flags

# --- The page --------------------------------------------------------------------------------------------------------


def page(capsys, *words):
    status = main([str(word) for word in words])
    return status, capsys.readouterr().out


def test_the_page_of_a_training_that_can_start(in_golden, tmp_path, capsys):
    """The first loss of a model that is its own reference is log 2 = 0.6931."""
    status, said = page(capsys, *flags(tmp_path))
    assert status == 0 and said.endswith("all there\n")
    for part in (
        "torch " + version("torch"),
        "attention by scaled_dot_product_attention with the prefix shared, gloo, fp32, no DeepSpeed",
        "8 pairs on 7 images, 0 rows with errors",
        "0: wide.png 120 x 70, 'What is in the picture?', 10 and 10 words",
        "4 pairs = 4 x 1 rank(s) x 1 micro-batch(es)",
        "(tokenized)",
        "micro-batches of up to 4 fit",
        "written, read and removed",
        "4 of the longest pairs forward and backward",
        "loss 0.6931",
    ):
        assert part in said, part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", [[], ["--gradient_checkpointing", "True"], ["--shared_prefix", "False"]])
def test_one_batch_needs_what_is_estimated(in_golden, tmp_path, capsys, way):
    said = page(capsys, *flags(tmp_path, *way))[1]
    used, estimated = re.search(r"([\d.]+) MiB at the peak without optimizer, estimated ([\d.]+) MiB", said).groups()
    assert float(estimated) == pytest.approx(float(used), rel=0.15)


def test_a_page_names_all_faults(in_golden, tmp_path, capsys):
    words = flags(
        tmp_path, "--data_path", "no.json", "--image_folder", "nowhere", "--gamma", "2", "--deepspeed", "z.json"
    )
    status, said = page(capsys, *words, "--model_name_or_path", "no/such-model")
    assert status == 1
    for part in ("5 thing(s) missing", "data: no file 'no.json'", "images: no folder 'nowhere'", "gamma",
                 "model: 'no/such-model'", "--deepspeed: expected a JSON file such as scripts/zero2.json"):  # fmt: skip
        assert part in said, part


def test_bad_rows_are_shown(in_golden, tmp_path, capsys):
    rows = json.loads((in_golden / "dama/rlaifv_records.json").read_text())
    rows[0]["image_path"] = "missing.png"
    del rows[1]["chosen"]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    status, said = page(capsys, *flags(tmp_path), "--data_path", tmp_path / "pairs.json")
    assert status == 1 and "7 pairs on 7 images, 1 rows with errors" in said
    assert "data: row 2: " in said and "images: missing.png: " in said


def test_a_script_without_a_dry_run_is_not_started(tmp_path, capsys):
    script = tmp_path / "start.sh"
    script.write_text(f"touch {tmp_path}/started\n")
    assert main(["--config-of", str(script)]) == 2 and not (tmp_path / "started").exists()
    assert "expected a script with --dry-run, such as scripts/dama_7b.sh" in capsys.readouterr().err
    script.write_text("# --dry-run\necho '+ python -m dama hardness'\n")
    assert main(["--config-of", str(script)]) == 2
    assert "expected it to call train_mem.py, found no call" in capsys.readouterr().err


# --- Sizes -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there_yet_is_known_by_its_name(tmp_path, in_golden):
    """LLaVA-v1.5-7B: 6,738 million parameters of LLaMA, 21 of the projector, 304 of the tower."""
    model_args = parse_arguments(flags(tmp_path))[0]
    model_args.model_name_or_path = "liuhaotian/llava-v1.5-7b"
    shape = ModelShape.of(*configs_of(model_args))
    assert shape.parameters.total(shape.layers) - shape.parameters.projector == 6_738_415_616
    assert round(shape.parameters.projector / 1e6) == 21 and round(shape.tower_parameters / 1e6) == 304
    model_args.model_name_or_path = "somebody/unknown"
    with pytest.raises(OSError, match="somebody/unknown"):
        configs_of(model_args)


def test_a_checkpoint_on_disk():
    """404 parameters and a tower of 100.

    fp32 without DeepSpeed: 404 x (4 + 8). bf16 under ZeRO-2: 404 x (2 + 12), and 504 x 2 of the engine. LoRA of rank 1
    in bf16 without DeepSpeed: 128 x 4 and a projector of 20 x 2, 148 x 8.
    """
    assert checkpoint_bytes(SHAPE, Training("full")) == (404 * 12, 404 * 4)
    assert checkpoint_bytes(SHAPE, Training("full", Zero(2), half=True)) == (404 * 14 + 504 * 2, 404 * 2)
    assert checkpoint_bytes(SHAPE, Training("lora", half=True, lora_rank=1)) == (552 + 148 * 8, 552)
    assert SHAPE.parameters == LayerSizes(40, 20, 150, 44)


@pytest.mark.parametrize("way", [[], ["--lora_enable", "True", "--lora_r", "32"]], ids=["full", "lora"])
def test_a_real_checkpoint_is_as_large(in_golden, tmp_path, way):
    """Within 15 %, what is not tensors left out."""
    arguments = sft_arguments(tmp_path, "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", *way)
    train.run(arguments)
    files = (tmp_path / "checkpoint-1").rglob("*")
    tensors = sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".pt", ".bin"))
    shape = ModelShape.of(*configs_of(arguments[0]))
    expected = checkpoint_bytes(shape, Training.of(arguments, 1, False, False))[0]
    assert expected == pytest.approx(tensors, rel=0.15)


@pytest.mark.parametrize(
    ("more", "count"),
    [
        (["--save_strategy", "no"], 0),
        (["--save_strategy", "epoch", "--num_train_epochs", "4"], 4),  # all are kept
        (["--save_strategy", "epoch", "--num_train_epochs", "4", "--save_total_limit", "1"], 2),  # and the one written
        (["--save_strategy", "epoch", "--num_train_epochs", "4", "--save_total_limit", "1", "--eval_pairs", "1",
          "--eval_strategy", "epoch", "--metric_for_best_model", "eval_loss"], 3),  # ... and the best
        (["--save_strategy", "steps", "--save_steps", "30", "--save_total_limit", "9"], 4),  # 100 steps
    ],
)  # fmt: skip
def test_checkpoints_at_a_time(in_golden, tmp_path, more, count):
    assert checkpoints_at_a_time(parse_arguments(flags(tmp_path, *more))[2], 100) == count


def test_a_trial_save_leaves_nothing(tmp_path):
    assert trial_save(tmp_path / "a" / "b") > 0 and not any(tmp_path.iterdir())
    (tmp_path / "kept").write_text("")
    trial_save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_lengths_without_a_tokenizer_or_data(in_golden, tmp_path):
    """Of 62 tokens, 9 of them before the picture's 16; by characters; or all that --model_max_length leaves."""
    arguments = parse_arguments(flags(tmp_path))
    pairs = read_pairs("dama/rlaifv_records.json")
    longest = max(lengths_of(arguments, pairs, 16)[0], key=lambda pair: pair.tokens)
    assert longest == PairLength.of(62, 25, 13)
    nowhere = copy.deepcopy(arguments)
    nowhere[0].model_name_or_path = str(tmp_path)
    sizes, known = lengths_of(nowhere, pairs, 16)
    assert known == "a token for 3 characters" and sizes[0] == PairLength.of(16 + 64 + 23 // 3, 47 // 3, 48 // 3)
    assert lengths_of(nowhere, [], 16) == ([PairLength.of(80, 1968, 1968)], "--model_max_length")


# --- The micro-batch that fits ---------------------------------------------------------------------------------------


def test_the_largest_micro_batch_that_fits(in_golden, tmp_path):
    """8 pairs a step as 8, 4, 2 or 1 at a time; the memory between two estimates decides."""
    arguments = parse_arguments(flags(tmp_path, "--strategy", "none", "--gradient_accumulation_steps", "2"))
    lengths = [PairLength.of(500, 200, 200)]
    peaks = {
        layout: estimate_step(arguments, SHAPE, lengths, 1, False, layout).peak
        for layout in ((8, 1), (4, 2), (2, 4), (1, 8))
    }
    assert sorted(peaks, key=peaks.__getitem__) == [(1, 8), (2, 4), (4, 2), (8, 1)]
    for layout, peak in peaks.items():
        assert fit_micro_batch(arguments, SHAPE, lengths, 1, False, peak) == layout
    assert fit_micro_batch(arguments, SHAPE, lengths, 1, False, peaks[1, 8] - 1) is None


def test_auto_micro_batch_changes_the_layout_alone(in_golden, tmp_path, monkeypatch, capsys):
    words = flags(tmp_path, "--strategy", "none", "--gradient_accumulation_steps", "2", "--auto_micro_batch", "True")
    pairs = read_pairs("dama/rlaifv_records.json")
    arguments = parse_arguments(words)
    preflight(arguments, pairs)
    assert (arguments[2].per_device_train_batch_size, arguments[2].gradient_accumulation_steps) == (8, 1)
    shape = ModelShape.of(*configs_of(arguments[0]))
    needed = estimate_step(arguments, shape, lengths_of(arguments, pairs, shape.patches)[0], 1, False, (2, 4)).peak
    monkeypatch.setattr(machine, "host_memory", lambda: needed)
    arguments = parse_arguments(words)
    preflight(arguments, pairs)
    assert (arguments[2].per_device_train_batch_size, arguments[2].gradient_accumulation_steps) == (2, 4)
    assert "micro-batches of up to 2 fit" in capsys.readouterr().out
    monkeypatch.setattr(machine, "host_memory", lambda: 1000)
    with pytest.raises(ValueError, match="rank memory: 0.0 MiB on each, about"):
        preflight(parse_arguments(words), pairs)


# --- The start of every training -------------------------------------------------------------------------------------


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_preflight_leaves_no_trace(in_golden, tmp_path, capsys):
    arguments = parse_arguments(flags(tmp_path))
    before, states = copy.deepcopy([vars(group) for group in arguments[:2]]), random_states()
    flags_before = arguments[2].to_dict()
    preflight(arguments, read_pairs("dama/rlaifv_records.json"))
    assert random_states() == states
    assert [vars(group) for group in arguments[:2]] == before and arguments[2].to_dict() == flags_before
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("preflight: about ") and "of the loss" in said[0]
    assert "checkpoint(s)" in said[1] and said[1].endswith("gloo, fp32, no DeepSpeed")


def test_fine_tuning(in_golden, tmp_path, capsys):
    """A training begins with its preflight; the page has one batch, whose loss is the recorded first one."""
    train.train(argv=sft_flags(tmp_path / "model", "--max_steps", "1", "--save_strategy", "no"))
    assert "preflight: about " in capsys.readouterr().out
    status, said = page(capsys, *sft_flags(tmp_path / "page", "--per_device_train_batch_size", "3"))
    assert status == 0, said
    for part in ("6 conversations, ", "3 rows = 3 x 1 rank(s)", "3 of the longest rows forward and backward"):
        assert part in said, part
    used, estimated = re.search(r"([\d.]+) MiB at the peak without optimizer, estimated ([\d.]+) MiB", said).groups()
    assert float(estimated) == pytest.approx(float(used), rel=0.15)


def test_rows_of_fine_tuning_with_faults(in_golden, tmp_path, capsys):
    rows = json.loads((in_golden / "sft/records.json").read_text())
    rows[0]["image"] = "missing.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    status, said = page(capsys, *sft_flags(tmp_path, "--data_path", tmp_path / "rows.json"))
    assert status == 1 and "image missing.png: image is missing" in said


def test_a_folder_that_cannot_be_written_to_is_found_before_the_model_is_loaded(in_golden, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="trial save: '.*out' cannot be written to"):
        preflight(parse_arguments(flags(tmp_path)), read_pairs("dama/rlaifv_records.json"))


def test_a_full_disk(in_golden, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"disk: 0.0 MiB free at '.*', about \d\.\d MiB needed; set OUTPUT"):
        preflight(parse_arguments(flags(tmp_path, "--save_strategy", "epoch")), [])


def test_a_layout_reaches_the_flags(in_golden, tmp_path):
    args = parse_arguments(flags(tmp_path))[2]
    apply_layout(args, (1, 4))
    assert (args.train_batch_size, args.gradient_accumulation_steps) == (1, 4)
