"""A tiny LLaVA-OneVision before alignment, made from the tiny LLaVA by a short fine-tuning in Hugging Face's own way.

The vision tower, projector and decoder of playground/tinycoco/weights/llava become those of transformers'
LlavaOnevisionForConditionalGeneration with a Qwen2 decoder. New are its tokens <|im_start|>, <|im_end|> and <image>,
its chat template, and how it shows an image: whole, and again as a crop whose lines end in a token of their own.
Supervised fine-tuning on TinyCOCO's captions, some of which name absent things, teaches it these.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

from dama.console import digest_of, digest_of_file, log
from dama.logps import IGNORE_INDEX
from dama.models.trainer import read_weights
from dama.stage import open_stage
from playground.tinycoco.scenes import draw, sample_scene
from playground.tinycoco.sft import NOISE, described

LLAVA = Path(__file__).parent / "weights" / "llava"
ADDED = ("<|im_start|>", "<|im_end|>", "<image>", "<video>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_SCENE = 20_000  # of the training stream; those before it are the LLaVA's
BATCH = 16
LEARNING_RATE = 1e-3
CHECKPOINTS = 50  # steps that a kill can cost


def build(out: Path, scenes: int, seed: int = 0) -> None:
    """Write the fine-tuned model and its processor to out/model; continue an interrupted call, skip a finished one."""
    fingerprint = {
        "llava": digest_of_file(LLAVA / "model.safetensors"), "scenes": scenes, "seed": seed,
        "settings": digest_of([TEMPLATE, ADDED, BATCH, LEARNING_RATE, NOISE, FIRST_SCENE]),
    }  # fmt: skip
    with open_stage(out, "model", fingerprint, [1]) as stage:
        if stage.complete:
            return
        torch.manual_seed(seed)
        processor = new_processor()
        model = new_model(processor.tokenizer)
        fine_tune(model, processor, out / "training", scenes, seed)
        model.save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
        stage.append([{"parameters": sum(parameter.numel() for parameter in model.parameters())}])
        stage.finish({"scenes": scenes})
    shutil.rmtree(out / "training", ignore_errors=True)


# --- The model before fine-tuning ------------------------------------------------------------------------------------


def new_processor() -> Any:
    """The LLaVA's tokenizer with the tokens of a chat, its image preparation, and a template."""
    tokenizer = hf.AutoTokenizer.from_pretrained(
        LLAVA, eos_token=ADDED[1], extra_special_tokens={"image_token": ADDED[2], "video_token": ADDED[3]}
    )
    tokenizer.add_tokens(list(ADDED), special_tokens=True)
    tower = hf.CLIPVisionConfig.from_pretrained(LLAVA / "vision_tower")
    size = {"height": tower.image_size, "width": tower.image_size}
    images = hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[tower.image_size, tower.image_size]])
    clip = hf.CLIPImageProcessor.from_pretrained(LLAVA / "vision_tower")
    images.image_mean, images.image_std = clip.image_mean, clip.image_std
    return hf.LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(size=size), chat_template=TEMPLATE,
        num_image_tokens=(tower.image_size // tower.patch_size) ** 2 + 1, vision_feature_select_strategy="default",
    )  # fmt: skip


def new_model(tokenizer: Any) -> Any:
    """LLaVA-OneVision of the LLaVA's weights in fp32, its vision tower frozen."""
    llava = json.loads((LLAVA / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    tower = hf.CLIPVisionConfig.from_pretrained(LLAVA / "vision_tower", dtype="float32")
    image, video = tokenizer.convert_tokens_to_ids(list(ADDED[2:]))
    text = hf.Qwen2Config(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, rope_parameters=llava["rope_parameters"],
        **{name: llava[name] for name in sizes},
    )  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=tower, text_config=text, image_token_index=image, video_token_index=video,
        image_grid_pinpoints=[[tower.image_size, tower.image_size]], vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.LlavaOnevisionForConditionalGeneration(config)
    load_llava(model)
    model.model.vision_tower.requires_grad_(False)
    return model


def load_llava(model: nn.Module) -> None:
    """Copy the LLaVA's weights; a new token's row is the mean of all others.

    Raises:
        ValueError: a weight is missing that the LLaVA should have.
    """
    weights = {new_name(name): value.float() for name, value in load_file(LLAVA / "model.safetensors").items()}
    tower = load_file(LLAVA / "vision_tower" / "model.safetensors")
    weights |= {
        f"model.vision_tower.{name.removeprefix('vision_model.')}": value.float() for name, value in tower.items()
    }
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = _with_new_rows(weights[name], model.state_dict()[name])
    found = model.load_state_dict(weights, strict=False)
    own = {name for name in found.missing_keys if not name.endswith(("_proj.bias", "image_newline"))}
    if own or found.unexpected_keys:
        raise ValueError(
            f"weights of '{LLAVA}': expected those of a tiny LLaVA, got none for {sorted(own)} and no place for "
            f"{found.unexpected_keys}"
        )


def new_name(name: str) -> str:
    """What transformers' model calls a weight of the LLaVA."""
    renamed = {"model.mm_projector.0": "model.multi_modal_projector.linear_1",
               "model.mm_projector.2": "model.multi_modal_projector.linear_2"}  # fmt: skip
    for old, new in renamed.items():
        if name.startswith(old):
            return name.replace(old, new)
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


def _with_new_rows(old: Tensor, wanted: Tensor) -> Tensor:
    return torch.cat([old, old.mean(0).expand(len(wanted) - len(old), -1)])


# --- Fine-tuning -----------------------------------------------------------------------------------------------------


class Captions(Dataset[dict[str, Any]]):
    """Scenes drawn when they are asked for, each with a question and a caption of the noise that the LLaVA learned."""

    def __init__(self, scenes: int, seed: int) -> None:
        self.scenes, self.seed = scenes, seed

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, rng = sample_scene(FIRST_SCENE + index, "train"), random.Random(f"vlm/{self.seed}/{index}")
        ((question, caption),) = described(scene, rng)
        return {"image": draw(scene), "question": question, "caption": caption}


class Collator:
    """Examples as the model's own processor writes them; supervised are the caption and the end of its turn."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Inputs of the model's forward pass with `labels`."""
        prompts = [self._rendered(example, answer=False) for example in examples]
        wholes = [self._rendered(example, answer=True).removesuffix("\n") for example in examples]
        images = [[example["image"]] for example in examples]
        batch = self.processor(text=wholes, images=images, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
        of_images = (batch["input_ids"] == self.processor.image_token_id).sum(1)
        for row, prompt, tokens in zip(labels, prompts, of_images, strict=True):
            row[: len(self.processor.tokenizer(prompt).input_ids) - 1 + int(tokens)] = IGNORE_INDEX
        return {**batch, "labels": labels}

    def _rendered(self, example: dict[str, Any], *, answer: bool) -> str:
        asked = [{"type": "image"}, {"type": "text", "text": example["question"]}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": asked}]
        if answer:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": example["caption"]}]})
        return self.processor.apply_chat_template(turns, add_generation_prompt=not answer)


class Trainer(hf.Trainer):
    """transformers' own, which continues from a checkpoint's weights by the names that they have in its files."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_weights(self.model, resume_from_checkpoint)


def fine_tune(model: Any, processor: Any, folder: Path, scenes: int, seed: int) -> None:
    """One epoch over so many scenes by transformers' Trainer, from its last checkpoint where there is one."""
    flags = hf.TrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.0, adam_beta2=0.98, use_cpu=True, seed=seed,
        save_steps=CHECKPOINTS, save_total_limit=1, logging_steps=10, remove_unused_columns=False,
        dataloader_num_workers=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, flags, Collator(processor), Captions(scenes, seed))
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    finished = [path for path in checkpoints if (path / "trainer_state.json").is_file()]  # which is written last
    trainer.train(resume_from_checkpoint=str(finished[-1]) if finished else None)
    log(f"fine-tuning: {scenes} scenes, mean loss {trainer.state.log_history[-1]['train_loss']:.3f}")
