"""What tests of the tiny model share: command lines of short trainings, prepared data, checkpoints and their edits."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dama.train.data import data_fingerprint, hardness_of_pairs, join_pairs, read_checked_pairs
from dama.train.reference import reference_of_pairs
from llava.model.builder import load_pretrained_model
from llava.train.arguments import parse_arguments
from llava.train.family import LlavaFamily
from llava.train.setup_model import setup_model
from tests.conftest import GOLDEN

# --- Command lines, relative to tests/golden -------------------------------------------------------------------------

DELTA_BAR = "0.0482190464911681"
PAPER = ["--variant", "paper", "--learning_rate", "5e-4", "--logging_steps", "1", "--num_train_epochs", "4"]
SAVES = ["--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1"]


def flags(tmp_path, *more):
    """Flags of preference training on the tiny model, with output in `tmp_path / "out"`."""
    return [
        "--task", "DPO", "--model_name_or_path", "llava-v1.5-tiny", "--version", "v1", "--image_aspect_ratio", "square",
        "--data_path", "dama/rlaifv_records.json", "--image_folder", "images", "--output_dir", str(tmp_path / "out"),
        "--variant", "released", "--delta_bar", DELTA_BAR, "--per_device_train_batch_size", "4", "--use_cpu", "True",
        "--learning_rate", "1e-3", "--disable_tqdm", "True", *more,
    ]  # fmt: skip


def flags_of(tmp_path, *more):
    """Flags of supervised fine-tuning of the tiny model, with output in `tmp_path` itself."""
    return [
        "--model_name_or_path", "llava-v1.5-tiny", "--version", "v1", "--data_path", "sft/records.json",
        "--image_folder", "images", "--output_dir", str(tmp_path), "--use_cpu", "True", "--learning_rate", "1e-3",
        "--disable_tqdm", "True", *map(str, more),
    ]  # fmt: skip


def arguments(tmp_path, *more):
    """Parsed `flags_of`."""
    return parse_arguments(flags_of(tmp_path, *more))


def prepare(arguments):
    """Model, tokenizer and joined data of a preference training, from its parsed arguments."""
    pairs, _ = read_checked_pairs(arguments[1])
    model, tokenizer, _ = setup_model(arguments)
    fingerprint = data_fingerprint(pairs, arguments[1])
    hardness = hardness_of_pairs(pairs, None, fingerprint, True)
    family = LlavaFamily.of(arguments, model, tokenizer)
    reference = reference_of_pairs(pairs, *arguments[1:], fingerprint, family)
    data = join_pairs(pairs, hardness, reference, family, arguments[1], arguments[2])
    return model, tokenizer, data


# --- Checkpoints -----------------------------------------------------------------------------------------------------

LORA = json.loads((GOLDEN / "k_extras.json").read_text())["lora"]
PROJECTOR = [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]


def load(folder, base=None, **kwargs):
    """LLaVA's (tokenizer, model, image processor, context length), on the CPU in float32."""
    options = {"device": "cpu", "dtype": torch.float32} | kwargs
    return load_pretrained_model(str(folder), base and str(base), Path(folder).name, **options)


def edit_config(folder, **fields):
    """Set fields of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def edit_weights(folder, change):
    """Apply `change` to the dictionary of weights in model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(weights, folder, kind):
    """Write two files and their index, as transformers shards; the files' names."""
    names = sorted(weights)
    parts, suffix = [names[: len(names) // 2], names[len(names) // 2 :]], "bin" if kind == "bin" else "safetensors"
    stem = "pytorch_model" if kind == "bin" else "model"
    files = {f"{stem}-0000{i}-of-00002.{suffix}": part for i, part in enumerate(parts, 1)}
    for file, part in files.items():
        chosen = {name: weights[name] for name in part}
        torch.save(chosen, folder / file) if kind == "bin" else save_file(chosen, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return list(files)


def tower_weights(prefix):
    """The vision tower's weights plus one, their names prefixed."""
    weights = load_file(GOLDEN / "clip-vit-tiny-patch14-56" / "model.safetensors")
    return {f"{prefix}{name}": tensor + 1 for name, tensor in weights.items()}


def lora_folder(folder, base, suffix="safetensors"):
    """Write an adapter with the keys and shapes of the original's files, random, and the projector beside it."""
    shapes = LORA["lora_state_keys"]
    generator = torch.Generator().manual_seed(0)

    def random(shape):
        return torch.randn(shape, generator=generator) * 0.1

    adapter = {name: random(shapes[name.replace(".weight", ".default.weight")]) for name in LORA["adapter_model_keys"]}
    beside = {name: random(shape) for name, shape in LORA["non_lora_trainables_bin_keys"].items()}
    folder.mkdir()
    config = LORA["adapter_config"] | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if suffix == "bin":
        torch.save(adapter, folder / "adapter_model.bin")
    else:
        save_file(adapter, folder / "adapter_model.safetensors")
    torch.save(beside, folder / "non_lora_trainables.bin")
    shutil.copy(base / "config.json", folder)
    return adapter, beside


def merged_by_hand(base, adapter, beside):
    """W + (alpha / r) B A = W + 2 B A, and what trained beside it as it is."""
    weights = load_file(base / "model.safetensors")
    for name in [n for n in adapter if "lora_A" in n]:
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[target] = weights[target] + 2 * adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
    return weights | {name.removeprefix("base_model.model."): tensor for name, tensor in beside.items()}
