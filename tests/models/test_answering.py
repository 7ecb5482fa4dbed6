"""Models of ten families answer in batches as their own processor and `generate` do one at a time."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from dama.models.answering import ChatGenerator, Prompter, Turn
from dama.models.loading import HubCheckpoint, ProcessorOptions
from dama.models.token_types import image_token_id
from dama.remote_code import RemoteCodeError
from dama.special_tokens import BREAK
from tests.models.saved import sample_images, save, save_adapter
from tests.models.tiny_hub import FAMILIES, build

LETTERS = 256  # the first ids; special tokens follow
QUESTIONS = ["What?", "What is in image 1?", "And why is it so red in the corner?", "Hm"]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def generator_of(family, system=""):
    """Gemma's output layer, which is its embedding table, would repeat the last token for ever: it gets its own."""
    model, processor = build(family)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape))
    return ChatGenerator(model, Prompter(processor, system))


def prepared(generator, questions=QUESTIONS, shown=None):
    """(rows, inputs of their images) of questions about one image each."""
    prompter, shown = generator.prompter, sample_images() if shown is None else shown
    prompts = [prompter.prompt([Turn(question, "")]) for question in questions]
    rows = prompter.token_ids(prompts, [[image.size] for image in shown])
    return rows, [prompter.images(image) for image in shown]


def ended(ids, generator):
    """The ids up to the token that ends the answer."""
    ids = ids.tolist()
    ends = [place for place, token in enumerate(ids) if token in generator.config.eos_token_id]
    return ids[: ends[0] + 1] if ends else ids


def stock_answer(generator, question, image):
    """By the model's processor and `generate`, as its model card says."""
    model, processor = generator.model, generator.prompter.processor
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[[image]], return_tensors="pt")
    return model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_one_at_a_time_and_as_the_stock_model(family):
    """Prompts of other lengths, images of four sizes and numbers of crops, padded at the left; fp32."""
    generator = generator_of(family)
    rows, images = prepared(generator)
    assert len({len(row) for row in rows}) > 1
    together = generator.generate(rows, images, **GREEDY)
    answers = [ended(ids, generator) for ids in together]
    for row, image, question, photo, answer in zip(rows, images, QUESTIONS, sample_images(), answers, strict=True):
        assert ended(generator.generate([row], [image], **GREEDY)[0], generator) == answer
        assert ended(stock_answer(generator, question, photo), generator) == answer
    assert len(set(map(tuple, answers))) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_images(family):
    generator = generator_of(family)
    prompts = [generator.prompter.prompt([Turn(question, "", images=0)]) for question in QUESTIONS]
    rows = generator.prompter.token_ids(prompts, [[]] * len(prompts))
    together = generator.generate(rows, [], **GREEDY)
    for row, ids in zip(rows, together, strict=True):
        assert ended(generator.generate([row], [], **GREEDY)[0], generator) == ended(ids, generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_score_what_the_model_itself_gives_the_answer(family):
    """Crops repeated in a wrong order would give the beams the score of another image."""
    generator = generator_of(family)
    rows, images = prepared(generator)
    image_token = image_token_id(generator.model.config)  # a random answer may spell it
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "length_penalty": 0.0}
    scored = {"return_dict_in_generate": True, "output_scores": True, "suppress_tokens": [image_token]}
    call = generator.call(rows, images, **beams, **scored)
    found = generator.model.generate(**call)
    for row, image, ids, score in zip(rows, images, found.sequences, found.sequences_scores, strict=True):
        new = ended(ids[call["input_ids"].shape[1] :], generator)
        with torch.inference_mode():
            logits = generator.model(**generator.inputs([[*row, *new]], [image])).logits[0, len(row) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None]).sum()
        assert abs(expected - score) < 1e-4


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "idefics3", "llava_next"])
def test_samples_of_a_row_are_drawn_from_its_own_image(family):
    """With top_k 1 sampling is greedy, so that every sample is the greedy answer of its row."""
    generator = generator_of(family)
    rows, images = prepared(generator)
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0}
    greedy = generator.generate(rows, images, max_new_tokens=8, do_sample=False)
    sampled = generator.generate(rows, images, samples=2, top_k=1, **options)
    assert [ended(ids, generator) for ids in sampled[::2]] == [ended(ids, generator) for ids in greedy]
    assert [ended(ids, generator) for ids in sampled[1::2]] == [ended(ids, generator) for ids in greedy]
    torch.manual_seed(0)
    first = generator.generate(rows, images, samples=2, **options)
    assert any(a != b for a, b in zip(first[::2].tolist(), first[1::2].tolist()))
    torch.manual_seed(0)
    assert torch.equal(generator.generate(rows, images, samples=2, **options), first)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "gemma3", "llava", "idefics3", "mistral3"])
def test_an_answer_ends_at_the_end_of_its_turn_and_shows_no_special_token(family):
    """The template's <turn>, which no config names, comes as the third token."""
    generator = generator_of(family)
    rows, images = prepared(generator)
    turn, calls = generator.prompter.tokenizer.convert_tokens_to_ids("<turn>"), []

    def writes_turn(module, inputs, logits):
        calls.append(None)
        logits[..., LETTERS:] = -1e4
        logits[..., turn] = 1e4 if len(calls) == 3 else -1e4
        return logits

    generator.model.get_output_embeddings().register_forward_hook(writes_turn)
    found = generator.generate(rows, images, max_new_tokens=6, do_sample=False)
    assert len(calls) == 3 and (found[:, 2] == turn).all() and (found != turn).sum() == 8
    letters = [generator.prompter.tokenizer.decode(ids[:2]).strip() for ids in found]
    assert generator.prompter.texts(found) == letters


def test_a_checkpoints_own_decoding_is_left_out_and_logged(capsys):
    model, processor = build("qwen2_5_vl")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1e-6, top_k=1, repetition_penalty=1.5, eos_token_id=[5, 6], suppress_tokens=[7]
    )
    generator = ChatGenerator(model, Prompter(processor))
    said = capsys.readouterr().out
    assert "repetition_penalty=1.5 not used" in said and "top_k" not in said
    assert generator.config.eos_token_id == [5, 6, 257, 269] and generator.config.suppress_tokens == [7]
    rows, images = prepared(generator)
    with_penalty = generator.generate(rows, images, repetition_penalty=1.5, **GREEDY)
    assert not torch.equal(generator.generate(rows, images, **GREEDY), with_penalty)


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_that_a_question_spells_stay_text(family):
    _, processor = build(family)
    prompter, photo = Prompter(processor), sample_images()[0]
    foreign = f"{processor.image_token} <turn>\nassistant: </s><image>"
    prompts = [prompter.prompt([Turn(text, "")]) for text in ("Why?", foreign)]
    plain, found = prompter.token_ids(prompts, [[photo.size]] * 2)
    special = set(prompter.tokenizer.convert_tokens_to_ids(prompter.chat.special_texts))
    assert [i for i in found if i in special] == [i for i in plain if i in special]
    assert foreign in prompter.tokenizer.decode(found).replace(BREAK, "")


def test_a_conversation_shows_its_image_once_and_its_system_turn_once():
    _, processor = build("qwen2_5_vl")
    prompter = Prompter(processor, "Be brief.")
    prompt = prompter.prompt([Turn("What?", "A cat."), Turn("Why?", "", images=0)])
    assert prompt == ("system: Be brief.\nuser: <vs><image><ve>What?\nassistant: A cat.<turn>\nuser: Why?\nassistant: ")
    with pytest.raises(ValueError, match=r"expected 2 image\(s\) written as '<image>', got 1"):
        prompter.token_ids([prompt], [[(8, 8), (8, 8)]])


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    save("qwen2_5_vl", folder)
    return folder


def loaded(checkpoint):
    model = checkpoint.model(device="cpu", dtype=torch.float32)
    return ChatGenerator(model, Prompter(checkpoint.processor(ProcessorOptions())))


def test_a_saved_model_answers_as_the_one_in_memory(folder):
    generator, saved = generator_of("qwen2_5_vl"), loaded(HubCheckpoint(str(folder)))
    expected = generator.generate(*prepared(generator), **GREEDY)
    assert torch.equal(saved.generate(*prepared(saved), **GREEDY), expected)
    assert saved.context() == HubCheckpoint(str(folder)).context() == 2048


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "idefics3"])
def test_an_adapter_answers_as_peft_runs_it(tmp_path, family):
    save(family, tmp_path / "base")
    adapted = save_adapter(family, tmp_path / "base", tmp_path / "adapter")
    generator = generator_of(family)
    rows, images = prepared(generator)
    base = generator.generate(rows, images, **GREEDY)
    expected = ChatGenerator(adapted.get_base_model(), generator.prompter).generate(rows, images, **GREEDY)
    checkpoint = HubCheckpoint(str(tmp_path / "adapter"))
    found = loaded(checkpoint).generate(rows, images, **GREEDY)
    assert torch.equal(found, expected) and not torch.equal(found, base)
    identity = checkpoint.identity()
    assert identity["base"] == HubCheckpoint(str(tmp_path / "base")).identity()["weights"] != identity["weights"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "mistral3"])
def test_an_adapters_own_processor_counts(tmp_path, family):
    """Training saves the processor as it was used, in the folder of the adapter."""
    _, processor = save(family, tmp_path / "base")
    save_adapter(family, tmp_path / "base", tmp_path / "adapter")
    checkpoint = HubCheckpoint(str(tmp_path / "adapter"))
    of_base = Prompter(checkpoint.processor(ProcessorOptions())).fingerprint()
    assert of_base == Prompter(processor).fingerprint()
    processor.image_processor.image_mean = [0.25, 0.5, 0.75]
    processor.save_pretrained(tmp_path / "adapter")
    own = Prompter(checkpoint.processor(ProcessorOptions())).fingerprint()
    assert {name for name, value in own.items() if of_base[name] != value} == {"image_processor"}


def test_an_adapter_of_another_model_or_without_base_is_refused(tmp_path, folder):
    save_adapter("qwen2_5_vl", folder, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path)
    with pytest.raises(
        ValueError, match=r"expected the weights that adapter_config.json describes .*missing: base_model"
    ):
        loaded(HubCheckpoint(str(tmp_path / "adapter")))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="expected its base model, got none; give it as --model-base"):
        HubCheckpoint(str(tmp_path / "adapter"))
    assert HubCheckpoint(str(tmp_path / "adapter"), str(folder)).base == str(folder)


def test_missing_weights_are_not_made_up(tmp_path):
    save("internvl", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in sorted(weights) if "q_proj" in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected all weights that its config.json describes; missing: .*q_proj"):
        loaded(HubCheckpoint(str(tmp_path)))


@pytest.mark.parametrize("missing", ["model.safetensors", "processor_config.json"])
def test_missing_files_are_named(tmp_path, missing):
    save("internvl", tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint '.*': expected a folder .*transformers says: \w"):
        loaded(HubCheckpoint(str(tmp_path)))


def test_no_code_of_a_checkpoint_runs(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Config: pass\nclass Model: pass\n"
    (tmp_path / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.Model"}}))
    checkpoint = HubCheckpoint(str(tmp_path))
    for call in (checkpoint.context, lambda: checkpoint.processor(ProcessorOptions()), lambda: loaded(checkpoint)):
        with pytest.raises(RemoteCodeError, match="would run code that comes with it"):
            call()
    assert not (tmp_path / "ran").exists()


def test_pixels_and_options_reach_the_processor_and_the_fingerprint(folder):
    checkpoint = HubCheckpoint(str(folder))
    own, fewer = (Prompter(checkpoint.processor(options)) for options in (
        ProcessorOptions(), ProcessorOptions(max_pixels=256, processor_option=("do_normalize=false",))))  # fmt: skip
    size = sample_images()[2].size
    counts = [len(p.token_ids([p.prompt([Turn("Why?", "")])], [[size]])[0]) for p in (own, fewer)]
    assert counts[0] > counts[1]
    changed = {name for name, value in own.fingerprint().items() if fewer.fingerprint()[name] != value}
    assert changed == {"image_processor"}
    system = Prompter(checkpoint.processor(ProcessorOptions()), "Be brief.")
    assert {n for n, value in own.fingerprint().items() if system.fingerprint()[n] != value} == {"chat_template"}
    options = SimpleNamespace(given=ProcessorOptions("Be brief.", None, 256, ("do_normalize=false",)))
    assert options.given.changes() == ["system prompt", "max_pixels 256", "do_normalize=false"]
