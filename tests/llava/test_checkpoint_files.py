"""Files that stand for other files: hub repositories of every layout, indexes, Git LFS pointers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from llava.model.builder import load_llava
from llava.model.llava_arch import load_projector
from llava.model.source import fetch
from llava.model.utils import read_file, weight_files
from llava.train import train
from llava.train.checkpoints import keep_tower_inside
from tests.llava.tiny import PROJECTOR, arguments, edit_config, load, lora_folder, shard


class Hub:
    """Repositories by name; a download brings the files that match the patterns, as huggingface_hub's does.

    The cache is laid out as huggingface_hub lays it out: a snapshot of symbolic links to blobs.
    """

    def __init__(self, folder):
        self.repositories, self.cache, self.brought = {}, folder / "cache", []

    def snapshot_download(self, name, allow_patterns=None, cache_dir=None):
        source = self.repositories[name]
        snapshot = self.cache / name.replace("/", "--") / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True, exist_ok=True)
        files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            link = snapshot / file
            if not link.exists():
                blob = self.cache / "blobs" / f"{name}/{file}".replace("/", "--")
                blob.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, blob)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)
                self.brought.append(file)
        return str(snapshot)


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def as_bin(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def in_shards(folder, kind):
    """The released LLaVA-v1.5's layout with `kind` bin: shards, their index and mm_projector.bin beside them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: weights[name] for name in PROJECTOR}, folder / "mm_projector.bin")
    return shard(weights, folder, kind)


FULL = {
    "safetensors": lambda folder: ["model.safetensors"],
    "bin": lambda folder: as_bin(folder) and ["pytorch_model.bin"],
    "bin shards": lambda folder: in_shards(folder, "bin"),
    "safetensors shards": lambda folder: in_shards(folder, "safetensors"),
}


@pytest.mark.parametrize("also_bin", [False, True])
@pytest.mark.parametrize("layout", FULL)
def test_full_models_of_every_layout_come_from_the_hub(checkpoint, hub, layout, also_bin):
    """The shards that the index names, and no second copy of the weights as a pickle or under another name."""
    want = load_file(checkpoint / "model.safetensors")
    files = FULL[layout](checkpoint)
    if also_bin:
        (checkpoint / "consolidated.safetensors").write_bytes(b"another copy")
        if "safetensors" in layout:
            torch.save(want, checkpoint / "pytorch_model.bin")
    hub.repositories["owner/tiny"] = checkpoint
    model = load("owner/tiny")[1]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in want.items())
    heavy = [f for f in hub.brought if f.endswith((".bin", ".safetensors")) and "/" not in f]
    assert sorted(heavy) == sorted(files)
    assert model.name_or_path == "owner/tiny"  # what an adapter trained on it will name as its base
    assert model.get_vision_tower().is_loaded


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("projector", [True, False])
def test_adapters_come_from_the_hub_with_what_trained_beside_them(checkpoint, hub, suffix, projector):
    adapter = checkpoint.parent / "adapter"
    lora_folder(adapter, checkpoint, suffix)
    if not projector:
        (adapter / "non_lora_trainables.bin").unlink()
    hub.repositories |= {"owner/base": checkpoint, "owner/adapter": adapter}
    here, there = load(adapter, checkpoint)[1], load("owner/adapter", "owner/base")[1]
    assert all(torch.equal(value, there.state_dict()[name]) for name, value in here.state_dict().items())


@pytest.mark.parametrize("form", ["safetensors", "bin shards"])
def test_a_projector_comes_from_the_hub_on_a_base_of_its_own_layout(checkpoint, hub, form):
    folder = checkpoint.parent / "projector"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    torch.save({name: torch.full_like(t, 0.01) for name, t in load_file(checkpoint / "model.safetensors").items()
                if name in PROJECTOR}, folder / "mm_projector.bin")  # fmt: skip
    FULL[form](checkpoint)
    hub.repositories |= {"owner/base": checkpoint, "owner/projector": folder}
    model = load("owner/projector", "owner/base")[1]
    assert (model.get_model().mm_projector[2].weight == 0.01).all()


def test_llava_hf_comes_from_the_hub(checkpoint, hub):
    from llava.model import export

    export.main(["--to", "hf", str(checkpoint), "exported"])
    want = load("exported")[1].state_dict()
    shard(load_file("exported/model.safetensors"), Path("exported"), "safetensors")
    Path("exported/model.safetensors").unlink()
    hub.repositories["owner/hf"] = Path("exported")
    got = load("owner/hf")[1].state_dict()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_pickled_tower_inside_a_repository_comes_along(checkpoint, hub):
    as_bin(checkpoint / "clip-vit-tiny-patch14-56")
    hub.repositories["owner/tiny"] = checkpoint
    tower = load("owner/tiny")[1].get_vision_tower()
    assert tower.is_loaded and "snapshots/0123abc/clip-vit-tiny" in tower.folder


def test_a_bare_tower_is_fetched_whatever_its_form(checkpoint, hub):
    tower = checkpoint / "clip-vit-tiny-patch14-56"
    as_bin(tower)
    hub.repositories["owner/clip"] = tower
    assert (fetch("owner/clip", is_tower=True) / "pytorch_model.bin").is_file()


# --- Indexes ---------------------------------------------------------------------------------------------------------

OUTSIDE = [
    "../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors",
    "C:\\secret.safetensors", "*.safetensors", "model.safetensors/..", "config.json", "",
]  # fmt: skip


def with_index(folder, fields, kind="safetensors"):
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / f"{stem}.{kind}.index.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leads_out_of_the_folder_is_refused(checkpoint, hub, name):
    save_file(load_file(checkpoint / "model.safetensors"), checkpoint.parent / "secret.safetensors")
    with_index(checkpoint, {"weight_map": {"model.norm.weight": name}})
    message = "expected the names of .safetensors or .bin files inside the checkpoint's folder"
    with pytest.raises(ValueError, match=message):
        load(checkpoint)
    hub.repositories["owner/tiny"] = checkpoint
    with pytest.raises(ValueError, match=message):
        load("owner/tiny")


def test_a_towers_index_that_leads_out_of_the_folder_is_refused(checkpoint):
    tower = checkpoint / "clip-vit-tiny-patch14-56"
    names = list(load_file(tower / "model.safetensors"))
    shutil.copy(tower / "model.safetensors", checkpoint.parent / "secret.safetensors")
    with_index(tower, {"metadata": {}, "weight_map": dict.fromkeys(names, "../../secret.safetensors")})
    with pytest.raises(ValueError, match="expected the names of .safetensors or .bin files inside"):
        load(checkpoint)


@pytest.mark.parametrize("fields", ["{", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "{}", "\xff\xfe"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_damaged_index_is_named(checkpoint, fields, kind):
    with_index(checkpoint, fields, kind)
    with pytest.raises(ValueError, match=r"index '.*index.json': expected (JSON|weight_map)"):
        weight_files(checkpoint)


def test_shards_in_a_folder_below_are_read(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "parts").mkdir()
    save_file(weights, checkpoint / "parts" / "one.safetensors")
    with_index(checkpoint, {"weight_map": dict.fromkeys(weights, "parts/one.safetensors")})
    assert load_llava(str(checkpoint)).num_parameters() > 0


def test_a_tower_named_outside_the_checkpoint_is_not_copied_out_of_the_saved_model(checkpoint, tmp_path):
    shutil.move(checkpoint / "clip-vit-tiny-patch14-56", tmp_path / "clip")
    edit_config(checkpoint, mm_vision_tower="../clip")
    model = load(checkpoint)[1]
    saved = tmp_path / "runs" / "saved"
    saved.mkdir(parents=True)
    keep_tower_inside(model, saved)
    assert not (tmp_path / "runs" / "clip").exists() and not any(saved.iterdir())
    assert Path(model.config.mm_vision_tower) == tmp_path / "clip"  # found from anywhere


# --- Git LFS ---------------------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 9976576152\n".format("0" * 64)


def pointer(path):
    path.write_text(POINTER)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "clip-vit-tiny-patch14-56/model.safetensors"])
def test_a_git_lfs_pointer_is_named_when_a_model_is_loaded(checkpoint, name):
    pointer(checkpoint / name)
    with pytest.raises(ValueError, match=rf"expected the content of {Path(name).name}, got Git LFS .* `git lfs "):
        load(checkpoint)


def test_git_lfs_pointers_of_every_shard_are_named_at_once(checkpoint):
    for name in in_shards(checkpoint, "bin"):
        pointer(checkpoint / name)
    with pytest.raises(ValueError, match=r"pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin, got"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "non_lora_trainables.bin"])
def test_a_git_lfs_pointer_of_an_adapter_is_named(checkpoint, name):
    lora_folder(checkpoint.parent / "x", checkpoint)
    pointer(checkpoint.parent / "x" / name)
    with pytest.raises(ValueError, match=f"expected the content of {name}, got Git LFS"):
        load("x", checkpoint)


def test_a_git_lfs_pointer_of_a_projector_is_named(checkpoint):
    pointer(Path("mm_projector.bin"))
    with pytest.raises(ValueError, match="expected the content of mm_projector.bin, got Git LFS"):
        load_projector(torch.nn.Linear(2, 2), "mm_projector.bin")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_training_names_a_git_lfs_pointer_before_anything_else(in_golden, tmp_path, name):
    base = tmp_path / "base"
    shutil.copytree(in_golden / "llava-v1.5-tiny", base)
    pointer(base / name)
    with pytest.raises(ValueError, match=f"expected the content of {name}, got Git LFS"):
        train.run(arguments(tmp_path / "out", "--model_name_or_path", str(base)))


def test_a_small_file_that_is_no_pointer_is_read(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "small.bin")
    assert list(read_file(tmp_path / "small.bin")) == ["a"]


# --- Projector files -------------------------------------------------------------------------------------------------


def test_a_projector_of_another_kind_or_size_is_named_key_by_key(tmp_path):
    torch.save({"model.mm_projector.weight": torch.zeros(3, 2), "lm_head.weight": torch.zeros(1)}, tmp_path / "p.bin")
    with pytest.raises(ValueError, match=r"projector '.*p.bin': .* bias \(2,\) got None; weight \(2, 2\) got \(3, 2\)"):
        load_projector(torch.nn.Linear(2, 2), str(tmp_path / "p.bin"))
