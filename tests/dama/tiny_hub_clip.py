"""Tiny random CLIP, SigLIP and SigLIP 2 in Hugging Face format with their processors, built without a download."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers as hf
from tokenizers import pre_tokenizers

from playground.tinycoco.captions import QUESTIONS

TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
IMAGE = TOWER | dict(image_size=32, patch_size=16)
CONTEXT = 64  # of SigLIP; CLIP's is 77


def clip(folder: Path) -> None:
    """OpenAI's layout: a causal text tower that pools at the end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = hf.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = hf.CLIPTextConfig(vocab_size=len(words), max_position_embeddings=77, projection_dim=24, **ends, **TOWER)
    vision = hf.CLIPVisionConfig(projection_dim=24, **IMAGE)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    save(folder, model, hf.CLIPProcessor(images, tokenizer))


def siglip(folder: Path) -> None:
    """A sentencepiece tokenizer that lowers case and removes punctuation; texts padded to 64 tokens."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([question.lower() for question in QUESTIONS] * 20), model_writer=trained,
        vocab_size=200, model_type="unigram", byte_fallback=False, hard_vocab_limit=False, unk_id=2, pad_id=0,
        eos_id=1, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(trained.getvalue())
    tokenizer = hf.SiglipTokenizer(
        str(folder / "spiece.model"), model_max_length=CONTEXT, model_input_names=["input_ids"]
    )  # no attention mask, as in Google's checkpoints
    text = hf.SiglipTextConfig(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **TOWER)
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=hf.SiglipVisionConfig(**IMAGE)))
    images = hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    save(folder, model, hf.SiglipProcessor(images, tokenizer))


def siglip2(folder: Path) -> None:
    """Images of any shape in up to 16 patches, with a mask and their numbers of rows and columns."""
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{code:02X}>" for code in range(256)), *letters]
    tokenizer = hf.Siglip2Tokenizer({word: i for i, word in enumerate(words)}, [], padding_side="right",
                                    model_max_length=CONTEXT)  # fmt: skip
    text = hf.Siglip2TextConfig(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **TOWER)
    vision = hf.Siglip2VisionConfig(patch_size=16, num_patches=16, **TOWER)
    model = hf.Siglip2Model(hf.Siglip2Config(text_config=text, vision_config=vision))
    images = hf.Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
    save(folder, model, hf.Siglip2Processor(images, tokenizer))


def save(folder: Path, model: Any, processor: Any) -> None:
    """Write both, with weights that tell images and texts apart."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {"clip": clip, "siglip": siglip, "siglip2": siglip2}


def write_hub_clip(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a model of a kind; another seed gives other weights."""
    torch.manual_seed(seed)
    KINDS[kind](folder)
    return folder
