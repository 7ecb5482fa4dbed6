"""What a training starts from: refused or completed before its weights are read, and what is saved can be loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.estimate.disk import trial_save
from llava.model.builder import load_pretrained_model
from llava.train import train, train_dpo
from llava.train.arguments import parse_arguments
from tests.conftest import GOLDEN
from tests.llava.tiny import arguments, flags

STEP = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--save_strategy", "steps", "--save_steps", "1"]
WAYS = {
    "full": [],
    "lora": ["--lora_enable", "True", "--lora_r", "4"],
    "projector": ["--tune_mm_mlp_adapter", "True"],
}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
BRACKETS = ["<im_start>", "<im_end>"]


@pytest.fixture()
def base(in_golden, tmp_path):
    """A copy of the tiny checkpoint, to be changed."""
    folder = tmp_path / "base"
    shutil.copytree(in_golden / "llava-v1.5-tiny", folder)
    return folder


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def with_rows(folder, rows):
    weights = load_file(folder / "model.safetensors")
    for name in TABLES:
        more = torch.zeros(max(0, rows - len(weights[name])), 64)
        weights[name] = torch.cat([weights[name], more])[:rows].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, vocab_size=rows)


def with_pad_token(folder, token="<pad>"):
    """As in early Llama-2 tokenizers: a pad token right after the last row of the table."""
    (folder / "added_tokens.json").write_text(json.dumps({token: 1000}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    entry = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
             "special": True}  # fmt: skip
    config["added_tokens_decoder"] = config.get("added_tokens_decoder", {}) | {"1000": entry}
    config["pad_token"] = token
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    edit(folder, pad_token_id=1000)


def run(base, out, *more):
    return train.run(arguments(out, "--model_name_or_path", str(base), *STEP, *more))


def reload(folder, base):
    return load_pretrained_model(str(folder), str(base), "x", device="cpu", dtype=torch.float32)[:2]


def assert_reloads(trainer, folder, base, tokens):
    """The saved model, and each checkpoint, load with as many rows as tokens and the trained model's values."""
    trained = trainer.model
    if trainer.args.lora_enable:
        trained = trained.merge_and_unload()
    want = {name: value for name, value in trained.state_dict().items() if "vision_tower" not in name}
    for place in (folder, folder / "checkpoint-1"):
        tokenizer, model = reload(place, base)
        got = model.state_dict()
        assert len(tokenizer) == tokens and len(got[TABLES[0]]) == tokens, place
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, msg=f"{place}: {name}")


# --- Tokens and rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_pad_token_beyond_the_table_gets_a_row(base, tmp_path, way):
    with_pad_token(base)
    trainer = run(base, tmp_path / "out", *WAYS[way])
    assert_reloads(trainer, tmp_path / "out", base, 1001)


@pytest.mark.parametrize("rows", [1000, 1024])
@pytest.mark.parametrize("way", ["full", "lora"])
def test_image_tokens_that_training_adds_are_saved_with_their_rows(base, tmp_path, way, rows):
    with_rows(base, rows)
    trainer = run(base, tmp_path / "out", "--mm_use_im_start_end", "True", *WAYS[way])
    tokenizer, model = reload(tmp_path / "out", base)
    assert tokenizer.convert_tokens_to_ids(BRACKETS) == [1000, 1001] and model.config.mm_use_im_start_end
    if rows == 1000:
        assert_reloads(trainer, tmp_path / "out", base, 1002)


@pytest.mark.parametrize("way", WAYS)
def test_the_patch_token_is_saved_with_its_row(base, tmp_path, way):
    trainer = run(base, tmp_path / "out", "--mm_use_im_patch_token", "True", *WAYS[way])
    assert_reloads(trainer, tmp_path / "out", base, 1001)


@pytest.mark.parametrize("task", ["LM", "DPO"])
@pytest.mark.parametrize("rows", [999, 1025, 2000])
def test_a_tokenizer_of_another_model_is_refused_before_training(base, tmp_path, rows, task):
    with_rows(base, rows)
    more = ["--model_name_or_path", str(base), "--task", task]
    parsed = parse_arguments(flags(tmp_path, *more)) if task == "DPO" else arguments(tmp_path / "out", *more)
    with pytest.raises(ValueError, match=f"got a tokenizer of 1000 and a table of {rows}"):
        (train_dpo if task == "DPO" else train).run(parsed)
    assert not (tmp_path / "out").exists()


def test_preference_training_keeps_the_row_of_a_pad_token_too(base, tmp_path):
    with_pad_token(base)
    more = ["--model_name_or_path", str(base), *STEP, "--check_reference", "False"]
    trainer = train_dpo.run(parse_arguments(flags(tmp_path, *more)))
    assert_reloads(trainer, tmp_path / "out", base, 1001)


# --- How the model sees images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: expected patch or cls_patch, got 'cls'"),
        ({"mm_patch_merge_type": "unpad"}, "mm_patch_merge_type: expected flat, spatial or spatial_unpad, got 'unpad'"),
        ({"mm_projector_type": "perceiver"}, "mm_projector_type: expected 'linear', .* got 'perceiver'"),
        ({"mm_vision_select_layer": -30}, r"mm_vision_select_layer: expected -\d+ to \d+, .* got -30"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio: expected pad, square or anyres, got 'anyres_max"),
        ({"mm_vision_tower": "gone"}, "vision tower 'gone' .*: expected a folder with a config.json, found none"),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
            "image_aspect_ratio anyres with mm_patch_merge_type spatial_unpad: not supported for training",
        ),
    ],
)
def test_what_the_checkpoint_says_about_images_is_checked_like_the_flags(base, tmp_path, fields, message):
    edit(base, **fields)
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [["--mm_vision_select_layer", "-30"], ["--mm_projector_type", "mlp0x_gelu"]])
def test_flags_are_checked_against_the_tower_and_projector(base, tmp_path, flag):
    with pytest.raises(ValueError, match=flag[0].removeprefix("--")):
        run(base, tmp_path / "out", *flag)


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_an_anyres_checkpoint_is_refused_for_preference_training(base, tmp_path, merge):
    edit(base, image_aspect_ratio="anyres", mm_patch_merge_type=merge, image_grid_pinpoints=[[56, 112]])
    words = [w for w in flags(tmp_path, "--model_name_or_path", str(base), *STEP) if w != "--image_aspect_ratio"]
    words.remove("square")
    with pytest.raises(ValueError, match="image_aspect_ratio anyres: not supported for --task DPO"):
        train_dpo.run(parse_arguments(words))


def test_every_error_is_reported_at_once(base, tmp_path):
    with_rows(base, 999)
    edit(base, mm_vision_select_feature="cls", mm_vision_select_layer=9)
    with pytest.raises(ValueError, match=r"3 error\(s\) of the checkpoint '.*' for this training"):
        run(base, tmp_path / "out")


# --- Flags that follow the checkpoint --------------------------------------------------------------------------------


@pytest.fixture()
def bracketed(base, tmp_path):
    """A checkpoint that was trained with <im_start> and <im_end>."""
    run(base, tmp_path / "bracketed", "--mm_use_im_start_end", "True", "--save_strategy", "no")
    return tmp_path / "bracketed"


def test_fine_tuning_follows_the_checkpoints_image_tokens(bracketed, tmp_path):
    trainer = run(bracketed, tmp_path / "out", "--learning_rate", "0")
    ids = trainer.train_dataset[0]["input_ids"].tolist()
    assert ids[ids.index(-200) - 1 : ids.index(-200) + 2] == [1000, -200, 1001]
    assert trainer.model.config.mm_use_im_start_end
    before, after = (load_file(folder / "model.safetensors")[TABLES[0]] for folder in (bracketed, tmp_path / "out"))
    assert torch.equal(before, after)


def test_preference_training_follows_the_checkpoints_image_tokens(bracketed, tmp_path):
    more = ["--model_name_or_path", str(bracketed), *STEP, "--check_reference", "False"]
    trainer = train_dpo.run(parse_arguments(flags(tmp_path, *more)))
    ids = trainer.train_dataset[0].chosen.input_ids.tolist()
    assert ids[ids.index(-200) - 1 : ids.index(-200) + 2] == [1000, -200, 1001]
    card = json.loads((tmp_path / "out" / "dama_provenance.json").read_text())
    assert card["flags"]["mm_use_im_start_end"] is True


def test_a_flag_that_is_given_wins_over_the_checkpoint(bracketed, tmp_path):
    trainer = run(bracketed, tmp_path / "out", "--mm_use_im_start_end", "False")
    assert 1000 not in trainer.train_dataset[0]["input_ids"].tolist()
    assert trainer.model.config.mm_use_im_start_end is False


def projector_file(folder, **tables):
    weights = load_file(GOLDEN / "llava-v1.5-tiny" / "model.safetensors")
    chosen = {name: value for name, value in weights.items() if "mm_projector" in name}
    torch.save(chosen | tables, folder / "mm_projector.bin")
    return folder / "mm_projector.bin"


@pytest.mark.parametrize("rows", [2, 1002])
@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("way", ["full", "lora"])
def test_rows_of_image_tokens_in_a_projector_file_are_taken_over(base, tmp_path, rows, output, way):
    """LLaVA saves the input table, in full or the rows of the two tokens; the output table where it trained, too."""
    table = torch.arange(rows * 64.0).view(rows, 64)
    tables = {TABLES[0]: table} | ({TABLES[1]: -table} if output else {})
    file = projector_file(tmp_path, **tables)
    more = ["--mm_use_im_start_end", "True", "--pretrain_mm_mlp_adapter", str(file), "--learning_rate", "0"]
    trainer = run(base, tmp_path / "out", *more, *WAYS[way])
    model = trainer.model
    assert torch.equal(model.get_input_embeddings().weight[-2:], table[-2:])
    mean = model.get_output_embeddings().weight[:-2].mean(dim=0)
    expected = -table[-2:] if output else mean.expand(2, -1)
    torch.testing.assert_close(model.get_output_embeddings().weight[-2:], expected)
    assert_reloads(trainer, tmp_path / "out", base, 1002)


def test_rows_for_another_vocabulary_are_refused(base, tmp_path):
    file = projector_file(tmp_path, **{TABLES[0]: torch.zeros(500, 64)})
    with pytest.raises(ValueError, match="with the 2 rows of <im_start> and <im_end>, or all 1002, got 500"):
        run(base, tmp_path / "out", "--mm_use_im_start_end", "True", "--pretrain_mm_mlp_adapter", str(file))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.mm_projector.weight": torch.zeros(64, 32)}, "expected the weights of a mlp2x_gelu projector"),
        (
            {f"model.mm_projector.{i}.{kind}": torch.zeros(*((8, 8) if kind == "weight" else (8,)))
             for i in (0, 2) for kind in ("weight", "bias")},
            r"expected a projector to the language model's width 64, got \[8\]",
        ),
    ],
)  # fmt: skip
def test_a_projector_file_that_does_not_fit_is_refused_before_the_model_is_loaded(base, tmp_path, weights, message):
    torch.save(weights, tmp_path / "p.bin")
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path / "out", "--pretrain_mm_mlp_adapter", str(tmp_path / "p.bin"))


@pytest.mark.parametrize("rows", [2, 1002])
def test_llavas_projector_with_rows_of_image_tokens_loads_on_its_base(base, tmp_path, rows):
    """As LLaVA saves it: the projector and the input table, config.json and tokenizer beside it."""
    folder = tmp_path / "projector"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    edit(folder, mm_use_im_start_end=True, vocab_size=1002)
    table = torch.arange(rows * 64.0).view(rows, 64)
    projector_file(folder, **{TABLES[0]: table})
    tokenizer, model = reload(folder, base)
    assert torch.equal(model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(BRACKETS)], table[-2:])


# --- The trial save --------------------------------------------------------------------------------------------------


def test_the_trial_save_is_loaded(base, tmp_path):
    state = torch.get_rng_state()
    parsed = arguments(tmp_path / "out", "--model_name_or_path", str(base), "--mm_use_im_start_end", "True")
    assert trial_save(tmp_path / "out", parsed) > 0 and not (tmp_path / "out").exists()
    assert torch.equal(torch.get_rng_state(), state)  # no random number is drawn


@pytest.mark.parametrize(("field", "value"), [("mm_vision_select_feature", "cls"), ("mm_projector_type", "perceiver")])
def test_a_trial_save_that_cannot_be_loaded_is_named(base, tmp_path, field, value):
    edit(base, **{field: value})
    parsed = arguments(tmp_path / "out", "--model_name_or_path", str(base))
    with pytest.raises(ValueError, match=field):
        trial_save(tmp_path / "out", parsed)
    assert not (tmp_path / "out").exists()
