"""dama.synth with real models on tiny random weights: a diffusers pipeline, HF rewards, a responder, CLIP, servers."""

import base64
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dama.chat import ChatSettings
from dama.hardness.split import split_statements
from dama.synth.images import NOT_FINITE, REFUSED, DiffusersPainter, picture_of
from dama.synth.respond import HfResponder, Question, Sampling, ServedResponder
from dama.synth.rewards import (
    ClipReward,
    EndpointReward,
    ImageTextReward,
    Judged,
    JudgeReward,
    TextReward,
    read_grade,
)
from tests.dama.tiny_clip import write_tiny_clip
from tests.openai_server import ScriptedServer, failure

QUESTION_WORDS = ["what", "is", "see", "there", "user", "assistant", ":", ".", "?", "<image>"]
WORDS = [*QUESTION_WORDS, "a", "an", "the", "red", "blue", "dog", "cat", "car", "next", "to", "two"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
VISION_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}assistant :"
)
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE = {"image_size": 32, "patch_size": 16}
TEXT_IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def word_tokenizer(length=40):
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length,
    )  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


# ----------------------------------------------------------------------------------------------------------- pictures


def write_pipeline(folder, *, refuse=False, broken=False):
    """StableDiffusionPipeline with all its parts, a few thousand random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    text = CLIPTextConfig(max_position_embeddings=40, **TEXT_IDS, **TOWER)
    vision = CLIPVisionConfig(**PICTURE, **TOWER)
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(),
                                                      projection_dim=16))  # fmt: skip
    checker.concept_embeds_weights.data.fill_(-10.0 if refuse else 10.0)  # the cosine above which it refuses
    checker.special_care_embeds_weights.data.fill_(10.0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 8],
        norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    if broken:  # what happens to some decoders in half precision
        vae.decoder.conv_out.bias.data.fill_(math.nan)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), word_tokenizer(), unet, DDIMScheduler(clip_sample=False, steps_offset=1), checker,
        CLIPImageProcessor(size=32, crop_size=32),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return DiffusersPainter(str(folder), steps=2)


def test_diffusers_draws_by_seed_and_guidance(tmp_path):
    artist = write_pipeline(tmp_path)
    both = artist.draw(["a red dog", "a blue car"], 7.0, [3, 4])
    assert [drawn.error for drawn in both] == ["", ""] and both[0].picture.size == (32, 32)
    alone = artist.draw(["a blue car"], 7.0, [4])[0].picture
    # A neighbour in the batch changes rounding, never the picture.
    assert np.abs(np.asarray(alone, int) - np.asarray(both[1].picture, int)).max() <= 1
    assert artist.draw(["a blue car"], 7.0, [5])[0].picture.tobytes() != alone.tobytes()
    assert artist.draw(["a blue car"], 11.0, [4])[0].picture.tobytes() != alone.tobytes()
    assert artist.identity()["model"] == tmp_path.name and artist.identity()["files"]


def test_diffusers_safety_checker_refuses(tmp_path):
    drawn = write_pipeline(tmp_path, refuse=True).draw(["a dog", "a cat"], 5.0, [0, 1])
    assert [(one.picture, one.error) for one in drawn] == [(None, REFUSED)] * 2


def test_diffusers_values_that_are_no_numbers(tmp_path):
    drawn = write_pipeline(tmp_path, broken=True).draw(["a dog"], 5.0, [0])
    assert (drawn[0].picture, drawn[0].error) == (None, NOT_FINITE)


def test_pixels_on_paper():
    """0 -> 0, 0.5 -> 128 (127.5 to even), 1 -> 255; beyond is cut off."""
    picture = picture_of(np.array([[[0, 0.5, 1]], [[-1, 2, 0.2]]])).picture
    assert np.asarray(picture).tolist() == [[[0, 128, 255]], [[0, 255, 51]]]


# ------------------------------------------------------------------------------------------------------------ rewards


def write_text_reward(folder, labels=1, template=TEMPLATE):
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=24, num_labels=labels, num_key_value_heads=2, **TEXT_IDS, **TOWER)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return TextReward(str(folder))


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat template", "pair"])
def test_a_text_reward_is_the_models_logit(template, tmp_path, picture):
    reward = write_text_reward(tmp_path / "reward", template=template)
    items = [
        Judged(picture, "what is there ?", text) for text in ("a red dog", "a blue car next to two cat", "a red dog")
    ]
    scores = reward.score(items)
    tokenizer, model = word_tokenizer(), LlamaForSequenceClassification.from_pretrained(tmp_path / "reward")
    for item, score in zip(items, scores):
        if template:
            ids = tokenizer(f"user : {item.question} assistant : {item.text}", add_special_tokens=False).input_ids
        else:
            ids = tokenizer(item.question, item.text).input_ids
        assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-6)
    assert scores[0] == scores[2] != scores[1]
    assert not reward.sees_image and reward.identity()["files"]


def test_a_text_beyond_the_rewards_positions_has_no_score(tmp_path, picture):
    reward = write_text_reward(tmp_path / "reward")
    assert math.isnan(reward.score([Judged(picture, "what", "dog " * 30)])[0])


def test_a_classifier_of_several_labels_is_no_reward(tmp_path, picture):
    with pytest.raises(ValueError, match="3 outputs, expected one\nRemedy"):
        write_text_reward(tmp_path / "reward", labels=3).score([Judged(picture, "what", "a dog")])


def test_an_output_named_score_is_taken(tmp_path, picture, monkeypatch):
    """ArmoRM's own code computes `score` from its many logits."""
    reward = write_text_reward(tmp_path / "reward", labels=3)
    forward = LlamaForSequenceClassification.forward

    def with_score(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output["score"] = output.logits.sum(-1)
        return output

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", with_score)
    assert math.isfinite(reward.score([Judged(picture, "what", "a dog")])[0])


ANSWER = "There is a red dog. The car is blue."


def test_clip_reward_is_the_mean_cosine_of_the_statements(tmp_path, picture):
    reward = ClipReward(str(write_tiny_clip(tmp_path / "clip")))
    scorer = reward.scorer
    cosines = (scorer.encode_texts(split_statements(ANSWER)) @ scorer.encode_images([picture])[0]).tolist()
    assert len(cosines) == 2
    assert reward.score([Judged(picture, "", ANSWER)]) == pytest.approx([sum(cosines) / 2])
    worst = ClipReward(str(tmp_path / "clip"), reduction="min")
    assert worst.score([Judged(picture, "q", ANSWER)]) == pytest.approx([min(cosines)])
    assert reward.sees_image and math.isnan(reward.score([Judged(picture, "", " ")])[0])


def write_image_text_reward(folder):
    torch.manual_seed(0)
    text = CLIPTextConfig(max_position_embeddings=24, **TEXT_IDS, **TOWER)
    vision = CLIPVisionConfig(**PICTURE, **TOWER)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()
    processor = CLIPProcessor(CLIPImageProcessor(size=32, crop_size=32), word_tokenizer(24))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor, model


def test_image_text_reward_is_the_models_logit(tmp_path, picture):
    processor, model = write_image_text_reward(tmp_path / "clip")
    parts = split_statements(ANSWER)
    inputs = processor(text=parts, images=Image.open(picture), return_tensors="pt", padding="max_length")
    expected = model(**inputs).logits_per_image.mean().item()
    reward = ImageTextReward(str(tmp_path / "clip"))
    assert reward.score([Judged(picture, "", ANSWER)]) == pytest.approx([expected], abs=1e-4)
    assert reward.sees_image


def test_a_judge_grades_and_is_asked_again_for_a_number(tmp_path, picture):
    def handler(call):
        if "cat" in call.text:
            return failure(400, "content policy")
        return "80/100" if "dog" in call.text or call.attempt else "I like it"

    items = [Judged(picture, "what?", text) for text in ("a dog", "a car", "a cat")]
    server = ScriptedServer(handler)
    with server as url:
        judge = JudgeReward(ChatSettings(url, "judge", max_tokens=8), tmp_path / "replies.jsonl")
        scores = judge.score(items)
    assert scores[:2] == [80, 80] and math.isnan(scores[2])
    parts = server.calls[0].body["messages"][0]["content"]
    assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (judge.name, judge.sees_image) == ("judge:judge", True)
    with ScriptedServer(lambda call: "never asked") as url:  # an interrupted run has the replies in its cache
        assert JudgeReward(ChatSettings(url, "judge", max_tokens=8), tmp_path / "replies.jsonl").score(items[:2]) == [
            80,
            80,
        ]


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("73", 73),
        (" 73.5 ", 73.5),
        ("73/100", 73),
        ("Grade: 8.", 8),
        ("", None),
        ("none", None),
        ("120", None),
        ("7 or 8", None),
    ],
)
def test_read_grade(text, grade):
    assert read_grade(text) == grade


class _Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen = body["items"]
        scores = [len(item["text"]) if item["text"] != "x" else None for item in body["items"]][self.server.left_out :]
        content = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), _Endpoint)
    server.left_out = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_sent_pictures_and_texts(endpoint, picture):
    url = f"http://127.0.0.1:{endpoint.server_port}/score"
    scores = EndpointReward(url).score([Judged(picture, "q", "abc"), Judged(picture, "q", "x")])
    assert scores[0] == 3 and math.isnan(scores[1])
    assert base64.b64decode(endpoint.seen[0]["image"]) == picture.read_bytes()
    EndpointReward(url, sees_image=False).score([Judged(picture, "q", "abc")])
    assert endpoint.seen == [{"image": None, "question": "q", "text": "abc"}]
    endpoint.left_out = 1
    with pytest.raises(ValueError, match="1 scores for 2 items\nRemedy"):
        EndpointReward(url).score([Judged(picture, "q", "abc"), Judged(picture, "q", "y")])


# --------------------------------------------------------------------------------------------------------- responders


def write_responder(folder):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(512)
    tokenizer.chat_template = VISION_TEMPLATE
    token = tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**PICTURE, **TOWER),
        text_config=LlamaConfig(max_position_embeddings=64, num_key_value_heads=2, **TEXT_IDS, **TOWER),
        image_token_index=token, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size=32, crop_size=32), tokenizer, patch_size=16, vision_feature_select_strategy="default",
        chat_template=VISION_TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return HfResponder(str(folder))


def test_an_image_text_to_text_model_answers(tmp_path, picture):
    model = write_responder(tmp_path / "model")
    questions = [Question("1", picture.name, "what is there ?"), Question("2", picture.name, "what is red")]
    sampling = Sampling(samples=3, max_new_tokens=6)
    answers = model.answer(questions, picture.parent, sampling, seed=1)
    assert [len(texts) for texts in answers] == [3, 3] and len({text for texts in answers for text in texts}) > 3
    assert model.answer(questions, picture.parent, sampling, seed=1) == answers
    assert "assistant" not in answers[0][0].split(":")[0]  # the prompt is not part of the answer
    model.release()
    assert model.answer(questions, picture.parent, sampling, seed=2) != answers


def test_a_served_model_answers_and_failures_are_empty(tmp_path, picture, capsys):
    def handler(call):
        return failure(400, "content policy") if "two" in call.text else f"seed {call.body['seed']}"

    questions = [Question("1", picture.name, "one?"), Question("2", picture.name, "two?")]
    with ScriptedServer(handler) as url:
        answers = ServedResponder("vlm", url, tmp_path / "replies.jsonl").answer(
            questions, picture.parent, Sampling(samples=2, temperature=0.7), 5
        )
    assert answers == [["seed 5", "seed 1005"], ["", ""]]
    assert "2 of 4 requests without answer" in capsys.readouterr().out
