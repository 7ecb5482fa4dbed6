"""Export: transformers' own model and processor give the same logits, and weights come back bit for bit."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
)

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_llava, load_pretrained_model
from llava.model.checkpoint import EMBEDDINGS, grow_table, summarize_names
from llava.model.export import export, main
from llava.model.write_hf import chat_template
from llava.tokenization import load_tokenizer
from tests.conftest import GOLDEN
from tests.llava.tiny import edit_config, edit_weights, lora_folder, merged_by_hand, tower_weights

PROMPTS = [case["prompt"] for case in json.loads((GOLDEN / "b_tokenizer_image_token.json").read_text())["cases"]]
PROMPTS += ["<s>x <image>y</s>USER: z<image>  \n<image><image>w</s>", "a <image>", "<image>\u2581piece"]
BASE = GOLDEN / "llava-v1.5-tiny"
# Other names under which transformers saves LlavaForConditionalGeneration.
STYLES = {
    "flat tower": [(r"^vision_tower\.vision_model\.", "vision_tower.")],
    "under model": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^(vision_tower|multi_modal_projector)", r"model.\1"),
    ],
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN / "clip-vit-tiny-patch14-56", tmp_path / "clip-vit-tiny-patch14-56")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The golden checkpoint in llava-hf's layout, and the differences that the export printed."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-hf"
    before = os.getcwd()
    os.chdir(GOLDEN)
    try:
        return folder, export(str(BASE), folder, "hf")
    finally:
        os.chdir(before)


def copy_of(source, name="model"):
    return Path(shutil.copytree(source, name))


def processor_of(folder):
    return AutoProcessor.from_pretrained(folder, backend="pil")


def same_weights(folder, want):
    got = load_file(Path(folder) / "model.safetensors")
    return got.keys() == want.keys() and all(
        torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want
    )


# --- To llava-hf -----------------------------------------------------------------------------------------------------


def test_logits_agree(exported):
    """Bit for bit with PIL's images; torchvision resizes in another arithmetic (bound: 1e-3 of logits up to 7)."""
    _, differences = exported
    assert differences["pil"] == 0
    assert 0 < differences["torchvision"] < 1e-3


@pytest.mark.parametrize("name", ["wide", "tall", "square", "tiny_wide", "exact", "gray", "rgba"])
def test_pixels_agree_on_every_picture(exported, name):
    picture = Image.open(GOLDEN / "images" / f"{name}.png").convert("RGB")
    _, model, processor, _ = load_pretrained_model(str(BASE), None, "", device="cpu")
    theirs = processor_of(exported[0]).image_processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(theirs, process_images([picture], processor, model.config))


def test_generation_agrees(exported):
    tokenizer, model, images, _ = load_pretrained_model(str(BASE), None, "", device="cpu", dtype=torch.float32)
    theirs = LlavaForConditionalGeneration.from_pretrained(exported[0], dtype=torch.float32)
    processor = processor_of(exported[0])
    picture = Image.open(GOLDEN / "images" / "wide.png").convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([picture], images, model.config)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    want = model.generate(ids, images=pixels, **options)[0].tolist()
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    assert theirs.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist() == want


@pytest.mark.parametrize("legacy", [False, True])
def test_token_ids_are_llavas(exported, legacy):
    """The text after <image> is tokenised as LLaVA does, by itself; an image of 3 tokens is 3 times <image>."""
    if legacy:
        source = copy_of(BASE)
        shutil.copy(GOLDEN / "tokenizer-legacy" / "tokenizer_config.json", source)
        export(str(source), "hf", "hf")
    folder = "hf" if legacy else exported[0]
    ours, theirs = load_tokenizer("model" if legacy else BASE), AutoTokenizer.from_pretrained(folder)
    assert ours.legacy is legacy and theirs.convert_tokens_to_ids(["<image>", "<pad>"]) == [1000, 1001]
    for prompt in PROMPTS:
        want = [i for i in tokenizer_image_token(prompt, ours) for _ in range(3 if i == -200 else 1)]
        got = theirs(prompt.replace("<image>", "<image>" * 3)).input_ids
        assert got == [1000 if i == -200 else i for i in want], prompt


def test_files_are_in_the_hubs_style(exported):
    folder, _ = exported
    names = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector", "vision_tower"}
    assert {"language_model.lm_head.weight", "vision_tower.vision_model.post_layernorm.bias"} <= names.keys()
    config = json.loads((folder / "config.json").read_text())
    wanted = {"model_type": "llava", "image_token_index": 1000, "pad_token_id": 1001, "image_seq_length": 16,
              "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
              "projector_hidden_act": "gelu", "architectures": ["LlavaForConditionalGeneration"]}  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    assert config["text_config"]["vocab_size"] == 1024  # 1000 tokens, <image> and <pad>, to a multiple of 64
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert (images["do_pad"], images["image_processor_type"]) == (True, "LlavaImageProcessor")
    assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == list(range(1000, 1024))
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_model_that_crops(tmp_path):
    source = copy_of(BASE)
    edit_config(source, image_aspect_ratio="square")
    assert export(str(source), "hf", "hf")["pil"] == 0
    assert processor_of("hf").image_processor.do_pad is False


@pytest.mark.parametrize("start_end", [False, True])
def test_chat_template_gives_vicunas_prompts(exported, start_end):
    conversation = conv_templates["vicuna_v1"].copy()
    image = "<im_start><image><im_end>" if start_end else "<image>"
    turns = [f'{image}\nWhat\'s "this"?', "A dog.", "And that?", None]
    for i, turn in enumerate(turns):
        conversation.append_message(conversation.roles[i % 2], turn)
    first = [{"type": "text", "text": 'What\'s "this"?'}, {"type": "image"}]  # an image comes first wherever it stands
    contents = [first, "A dog.", [{"type": "text", "text": "And that?"}]]
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    template = chat_template(start_end)
    prompt = processor_of(exported[0]).apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
    assert prompt == conversation.get_prompt()
    system = processor_of(exported[0]).apply_chat_template([{"role": "system", "content": "Be brief."}, *messages[1:2]])
    assert system == "Be brief. ASSISTANT: A dog.</s>"


def test_new_rows_on_paper():
    """The mean of [1, 2] and [3, 6] is [2, 4]; its logit is the mean of theirs, so never the largest."""
    assert grow_table(torch.tensor([[1.0, 2], [3, 6]]), 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]


def test_a_tower_that_comes_with_its_text_side():
    """As OpenAI's CLIP repositories do: the text side and the tables that a model computes itself stay behind."""
    vision = CLIPVisionConfig.from_pretrained("clip-vit-tiny-patch14-56").to_dict()
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    whole.save_pretrained("whole-clip")
    shutil.copy("clip-vit-tiny-patch14-56/preprocessor_config.json", "whole-clip")
    weights = load_file("whole-clip/model.safetensors")
    positions = {f"{side}_model.embeddings.position_ids": torch.arange(17)[None] for side in ("text", "vision")}
    torch.save(weights | positions, "whole-clip/pytorch_model.bin")
    Path("whole-clip/model.safetensors").unlink()
    source = copy_of(BASE)
    edit_config(source, mm_vision_tower="whole-clip")
    assert export(str(source), "hf", "hf")["pil"] == 0
    tower = {name for name in load_file("hf/model.safetensors") if name.startswith("vision_tower.")}
    assert tower == {f"vision_tower.{name}" for name in weights if name.startswith("vision_model.")}


# --- And back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_identical(dtype):
    source = copy_of(BASE)
    edit_weights(source, lambda w: w.update({name: tensor.to(dtype) for name, tensor in w.items()}))
    edit_config(source, torch_dtype=str(dtype).removeprefix("torch."))
    assert export(str(source), "hf", "hf")["pil"] == 0
    assert export("hf", "back", "llava")["pil"] == 0
    assert same_weights("back", load_file(source / "model.safetensors"))
    tower = "clip-vit-tiny-patch14-56/model.safetensors"
    assert same_weights("back/vision_tower", load_file(GOLDEN / tower))
    made = json.loads(Path("back/config.json").read_text())
    given = json.loads((source / "config.json").read_text())
    same = ["architectures", "model_type", "hidden_size", "vocab_size", "rms_norm_eps", "torch_dtype", "pad_token_id"]
    same += ["rope_theta", "rope_scaling", "mm_projector_type", "mm_hidden_size", "mm_vision_select_layer"]
    same += ["mm_vision_select_feature", "image_aspect_ratio", "mm_use_im_start_end", "mm_use_im_patch_token"]
    assert {key: made[key] for key in same} == {key: given[key] for key in same}
    for name in ("tokenizer.model", "special_tokens_map.json"):
        assert (Path("back") / name).exists()
    ours, theirs = load_tokenizer(source), load_tokenizer("back")
    assert (theirs.legacy, theirs.model_max_length) == (ours.legacy, ours.model_max_length)
    assert [tokenizer_image_token(p, theirs) for p in PROMPTS] == [tokenizer_image_token(p, ours) for p in PROMPTS]


def test_grouped_queries_tied_output_and_other_rope():
    def change(weights):
        for name in [n for n in weights if "k_proj" in n or "v_proj" in n]:
            weights[name] = weights[name][:32].clone()
        del weights["lm_head.weight"]

    source = copy_of(BASE)
    edit_weights(source, change)
    rope = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    edit_config(source, num_key_value_heads=2, tie_word_embeddings=True, **rope)
    assert export(str(source), "hf", "hf")["pil"] < 1e-5
    assert export("hf", "back", "llava")["pil"] < 1e-5
    assert same_weights("back", load_file(source / "model.safetensors"))
    made = json.loads(Path("back/config.json").read_text())
    assert (made["num_key_value_heads"], made["tie_word_embeddings"]) == (2, True)
    assert (made["rope_theta"], made["rope_scaling"]) == (rope["rope_theta"], rope["rope_scaling"])


def test_image_tokens_in_the_vocabulary_come_back():
    source = copy_of(BASE)
    edit_config(source, mm_use_im_start_end=True, mm_use_im_patch_token=True, vocab_size=1003)
    edit_weights(
        source, lambda w: w.update({n: torch.cat([w[n], w[n][:3]]) for n in w if "lm_head" in n or "embed" in n})
    )
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(source)
    assert export(str(source), "hf", "hf")["pil"] == 0
    assert export("hf", "back", "llava")["pil"] == 0
    assert same_weights("back", load_file(source / "model.safetensors"))
    made = json.loads(Path("back/config.json").read_text())
    assert made["mm_use_im_start_end"] and made["mm_use_im_patch_token"]


def test_lora_is_merged_on_the_way():
    base = copy_of(BASE, "base")
    want = merged_by_hand(base, *lora_folder(Path("adapter"), base))
    assert export("adapter", "hf", "hf", str(base))["pil"] < 1e-5
    assert export("adapter", "merged", "llava")["pil"] < 1e-5  # the base is named by the adapter
    got = load_file("merged/model.safetensors")
    assert got.keys() == want.keys() and max((got[n] - want[n]).abs().max() for n in want) < 1e-6
    theirs = load_file("hf/model.safetensors")["language_model.model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(theirs, got["model.layers.1.mlp.up_proj.weight"])


def test_lora_on_a_tied_output_layer():
    base = copy_of(BASE, "base")
    edit_weights(base, lambda w: w.pop("lm_head.weight"))
    edit_config(base, tie_word_embeddings=True)
    want = merged_by_hand(base, *lora_folder(Path("adapter"), base))
    assert export("adapter", "merged", "llava")["pil"] < 1e-5
    assert load_file("merged/model.safetensors").keys() == want.keys()


def test_a_trained_tower_goes_along():
    source = copy_of(BASE)
    inside = tower_weights("model.vision_tower.vision_tower.")
    edit_weights(source, lambda w: w.update(inside))
    edit_config(source, unfreeze_mm_vision_tower=True)
    assert export(str(source), "hf", "hf")["pil"] < 1e-5
    export(str(source), "back", "llava")
    for folder, prefix in (("hf", "vision_tower."), ("back/vision_tower", "")):
        got = load_file(f"{folder}/model.safetensors")[f"{prefix}vision_model.post_layernorm.bias"]
        assert torch.equal(got, inside["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"])
    assert load_llava("back").config.mm_vision_tower == "vision_tower"


# --- llava-hf checkpoints loaded as they are -------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["hub", *STYLES])
def test_llava_hf_loads_directly(exported, style):
    folder = copy_of(exported[0], "any-name")
    if style != "hub":
        weights = load_file(folder / "model.safetensors")
        for pattern, replacement in STYLES[style]:
            weights = {re.sub(pattern, replacement, name): tensor for name, tensor in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), None, "", device="cpu", dtype=torch.float32)
    want = load_pretrained_model(str(BASE), None, "", device="cpu", dtype=torch.float32)[1].state_dict()
    got = model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert (len(tokenizer), type(processor).__name__) == (1000, "CLIPImageProcessorPil")
    assert model.config.image_aspect_ratio == "pad"
    with pytest.raises(ValueError, match="python -m llava.model.export --to llava any-name NEW_FOLDER"):
        load_llava(str(folder))


def test_a_processor_that_does_not_pad_is_believed_and_said(exported, capsys):
    folder = copy_of(exported[0])
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text((folder / name).read_text().replace('"do_pad": true', '"do_pad": false'))
    model = load_pretrained_model(str(folder), None, "", device="cpu")[1]
    assert model.config.image_aspect_ratio == "square"
    assert "its image processor crops instead of padding" in capsys.readouterr().out


def edit_text(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | fields}))


def test_llava_hf_of_another_family(exported):
    folder = copy_of(exported[0])
    edit_config(folder, projector_hidden_act="relu")
    edit_text(folder, model_type="mistral")
    wanted = r"expected text_config.model_type 'llama', got 'mistral'; projector_hidden_act 'gelu', got 'relu'"
    with pytest.raises(ValueError, match=wanted):
        load_pretrained_model(str(folder), None, "", device="cpu")


def test_llava_hf_faults(exported):
    folder = copy_of(exported[0])
    edit_config(folder, image_token_index=990)
    with pytest.raises(ValueError, match="expected <image> right after the tokenizer's 1000 own tokens, got .* 990"):
        load_pretrained_model(str(folder), None, "", device="cpu")
    edit_config(folder, image_token_index=1000)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"image_newline": torch.zeros(64)}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match="expected weights of language model, projector and tower, got 'image_newline'"
    ):
        load_pretrained_model(str(folder), None, "", device="cpu")
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="expected tokenizer.model, LLaMA's sentencepiece file, found none"):
        load_pretrained_model(str(folder), None, "", device="cpu")


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten():
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new or empty folder to write to, got 'full'"):
        export(str(BASE), "full", "hf")
    assert os.listdir("full") == ["notes.txt"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "expected image_aspect_ratio 'pad' .*got 'anyres'"),
        ({"mm_patch_merge_type": "spatial"}, "expected mm_patch_merge_type 'flat' .*got 'spatial'"),
        ({"mm_vision_tower": "nowhere"}, "vision tower 'nowhere'"),
    ],
)
def test_what_llava_hf_cannot_hold_is_refused_and_leaves_nothing(fields, message):
    source = copy_of(BASE)
    edit_config(source, **fields)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export(str(source), "out", "hf")
    assert not [name for name in os.listdir() if "out" in name]


def test_a_linear_projector_is_refused():
    source = copy_of(BASE)
    edit_config(source, mm_projector_type="linear")

    def change(weights):
        for kind in ("weight", "bias"):
            weights[f"model.mm_projector.{kind}"] = weights.pop(f"model.mm_projector.0.{kind}")
            del weights[f"model.mm_projector.2.{kind}"]

    edit_weights(source, change)
    with pytest.raises(ValueError, match="expected mm_projector_type 'mlp2x_gelu' .*got 'linear'"):
        export(str(source), "out", "hf")


def test_a_full_disk(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"expected 1.0 GB free for the export, got 0.0"):
        export(str(BASE), "out", "hf")


def test_an_export_that_answers_otherwise_is_not_kept(monkeypatch):
    monkeypatch.setattr("llava.model.export.hf_logits", lambda *a: torch.full((100, 1024), 9.0))
    monkeypatch.setattr("llava.model.export.llava_logits", lambda *a: torch.ones(100, 1000))
    with pytest.raises(ValueError, match="expected the same logits within 0.0001, got a difference of 8; not written"):
        export(str(BASE), "out", "hf")
    assert not [name for name in os.listdir() if "out" in name]


def test_the_command(capsys):
    main(["--to", "hf", str(BASE), "out"])
    said = capsys.readouterr().out
    assert re.search(r"pil images: 0\n.*torchvision images: \S+e-0\d\nwritten: out\n", said)
    with pytest.raises(SystemExit):
        main(["--to", "gguf", str(BASE), "other"])


def test_names_in_one_line():
    assert summarize_names(["b.0.w", "b.11.w", "a", "c.3.x"]) == "a, b.{0,11}.w, c.3.x"
    assert EMBEDDINGS in load_file(BASE / "model.safetensors")
