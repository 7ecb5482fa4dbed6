"""TinyCOCO's tokenizer: SentencePiece BPE in LLaMA's style, on this world's captions, questions and LLaVA's prompts."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

from dama.console import write_atomic, write_json
from playground.tinycoco.captions import PLACES, QUESTIONS, noisy_caption, one_word_edit, truthful_caption
from playground.tinycoco.questions import SHORT, training_turns
from playground.tinycoco.scenes import sample_scene
from playground.tinycoco.vocabulary import CATEGORIES

VOCABULARY_SIZE = 960
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def corpus(scenes: int = 3000) -> list[str]:
    """The sentences of descriptions; prompts are repeated so that their words become whole pieces as well.

    `USER` only follows a full stop without a space. So it becomes one piece while a space and `USER` stay two, as in
    LLaMA's vocabulary, on which the label arithmetic of the original LLaVA relies.
    """
    lines = []
    for index in range(scenes):
        scene, rng = sample_scene(index, "train"), random.Random(f"tokenizer/{index}")
        caption = truthful_caption(scene, rng)
        lines += [caption, noisy_caption(scene, rng, 1.0), one_word_edit(caption, scene, rng)]
    presence = [f"Is there a {category} {place}? Yes, there is. No, there is no {category}." for category in CATEGORIES
                for place in ("in the image", *PLACES.values())]  # fmt: skip
    prompts = [f"{SYSTEM_PROMPT}USER: {question} ASSISTANT: {SHORT.lstrip()}" for question in QUESTIONS]
    return lines + presence + prompts * (scenes // 50)


def questions(scenes: int = 300) -> list[str]:
    """Questions of fine-tuning with their right answers."""
    asked = (training_turns(sample_scene(i, "train"), random.Random(f"asked/{i}"), noise=0.0) for i in range(scenes))
    return [f"{question} {answer}" for turns in asked for question, answer in turns]


def train_tokenizer(folder: str | Path, vocabulary_size: int = VOCABULARY_SIZE) -> None:
    """Writes tokenizer.model, tokenizer_config.json and special_tokens_map.json as a LLaVA-v1.5 checkpoint has them."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus() + questions()), model_writer=model, model_type="bpe",
        vocab_size=vocabulary_size, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    folder = Path(folder)
    write_atomic(folder / "tokenizer.model", model.getvalue())
    write_json(folder / "tokenizer_config.json", _tokenizer_config())
    write_json(folder / "special_tokens_map.json", {
        "bos_token": _special("<s>"), "eos_token": _special("</s>"), "pad_token": "<unk>",
        "unk_token": _special("<unk>"),
    })  # fmt: skip


def _special(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _tokenizer_config() -> dict[str, Any]:
    def added(content: str) -> dict[str, Any]:
        return {"__type": "AddedToken", **_special(content)}

    return {
        "add_bos_token": True, "add_eos_token": False, "bos_token": added("<s>"), "clean_up_tokenization_spaces": False,
        "eos_token": added("</s>"), "legacy": False, "model_max_length": 2048, "pad_token": None,
        "padding_side": "right", "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer", "unk_token": added("<unk>"),
    }  # fmt: skip
