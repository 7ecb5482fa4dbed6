"""Write a checkpoint in llava-hf's layout, as transformers and vLLM read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dama.console import log, write_json
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template, image_placeholder
from llava.model.checkpoint import EMBEDDINGS, PAD_TOKEN, VOCABULARY_TABLES, Checkpoint, grow_table, rename_weight
from llava.model.utils import read_json, write_weights
from llava.model.write import complete_tower
from llava.tokenization import SPACE, LlamaTokenizer

TO_HF = (
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.", "language_model.model."),
)


def write_hf(checkpoint: Checkpoint, tokenizer: Any, folder: Path) -> None:
    """Weights, config, generation config, processor and tokenizer as transformers and vLLM read them.

    The vocabulary grows by <image> and <pad> and up to a multiple of 64, as in llava-hf's own repositories; on the way
    back exactly these rows go again, so that weights come back bit for bit.
    """
    tower_config, tower, image_processor = complete_tower(checkpoint)
    rows = len(tokenizer)
    image_id, pad_id, padded_rows = rows, rows + 1, -(-(rows + 2) // 64) * 64
    config = hf_config(checkpoint, tower_config, image_id, padded_rows)
    if (unused := checkpoint.weights[EMBEDDINGS].shape[0] - rows) > 0:
        log(f"{unused} rows of the vocabulary that the tokenizer has no tokens for are left out")
    weights = {
        rename_weight(name, TO_HF, "LLaVA checkpoint"): grow_table(t[:rows], padded_rows)
        if name in VOCABULARY_TABLES
        else t
        for name, t in checkpoint.weights.items()
    }
    weights |= {f"vision_tower.{name}": t for name, t in tower.items()}
    write_weights(folder, weights)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id,
        suppress_tokens=list(range(rows, padded_rows)),  # rows without a meaning are never an answer
    ).save_pretrained(folder)
    write_hf_processor(checkpoint, tokenizer, image_processor, tower_config, folder)


def hf_config(
    checkpoint: Checkpoint, tower_config: CLIPVisionConfig, image_id: int, rows: int
) -> transformers.LlavaConfig:
    """Return llava-hf's config; ValueError where it has no field for what this model does."""
    llava = checkpoint.config
    known_values = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": ("flat", None),
        "image_aspect_ratio": ("pad", "square", None),
    }
    for name, known in known_values.items():
        if (got := getattr(llava, name, None)) not in known:
            raise ValueError(
                f"export of '{llava._name_or_path}': expected {name} {known[0]!r} in config.json, the only one that "
                f"LlavaForConditionalGeneration has, got {got!r}. Such a model stays in LLaVA's layout."
            )
    of_llama = LlamaConfig().to_dict().keys() - {"model_type", "architectures"}
    text = {name: value for name, value in llava.to_dict().items() if name in of_llama}
    text |= {"vocab_size": rows, "pad_token_id": None}
    vision = tower_config.to_dict()
    strategy = "default" if (getattr(llava, "mm_vision_select_feature", None) or "patch") == "patch" else "full"
    return transformers.LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        text_config=LlamaConfig(**text).to_dict(),
        vision_config=vision,
        image_token_index=image_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2 + (strategy == "full"),
        vision_feature_layer=llava.mm_vision_select_layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        pad_token_id=image_id + 1,
        bos_token_id=llava.bos_token_id,
        eos_token_id=llava.eos_token_id,
        tie_word_embeddings=llava.tie_word_embeddings,
        dtype=checkpoint.weights[EMBEDDINGS].dtype,
    )


def write_hf_processor(
    checkpoint: Checkpoint, tokenizer: Any, images: CLIPImageProcessorPil, tower: CLIPVisionConfig, folder: Path
) -> None:
    """Write tokenizer, image processor and chat template."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    fields = {k: v for k, v in images.to_dict().items() if not k.endswith("_type")}
    pads = getattr(checkpoint.config, "image_aspect_ratio", None) == "pad"
    image_processor = LlavaImageProcessorPil.from_dict(fields | {"do_pad": pads})
    whole = getattr(checkpoint.config, "mm_vision_select_feature", None) == "cls_patch"
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=hf_tokenizer(tokenizer),
        patch_size=tower.patch_size,
        num_additional_image_tokens=1,  # the class token
        vision_feature_select_strategy="full" if whole else "default",
        chat_template=chat_template(getattr(checkpoint.config, "mm_use_im_start_end", False)),
    ).save_pretrained(folder)
    # The name that transformers 4 knows this class by, too.
    settings = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    write_json(folder / "tokenizer_config.json", settings)
    # transformers 4 and vLLM look for the image processor in a file of its own, under the name without a backend.
    settings = json.loads(image_processor.to_json_string()) | {"image_processor_type": "LlavaImageProcessor"}
    write_json(folder / "preprocessor_config.json", settings | {"processor_class": "LlavaProcessor"})
    if isinstance(tokenizer, LlamaTokenizer):
        tokenizer.save_vocabulary(str(folder))


def hf_tokenizer(tokenizer: Any) -> Any:
    """A fast tokenizer, complete in tokenizer.json, that gives LLaVA's ids for a prompt with <image> in it.

    LLaVA tokenizes the text after an image by itself, where LLaMA's dummy space comes first. The legacy rule does so
    after every special token. The other one does not, so the normalizer puts that space after the last <image> of a
    run, provided that text follows.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    spaced = isinstance(tokenizer, LlamaTokenizer) and not tokenizer.legacy
    if spaced:
        last_image = Regex(rf"{DEFAULT_IMAGE_TOKEN}(?!{DEFAULT_IMAGE_TOKEN})(?=[\s\S])")
        after_image = normalizers.Replace(last_image, DEFAULT_IMAGE_TOKEN + SPACE)
        backend.normalizer = normalizers.Sequence([backend.normalizer, after_image])
    options = {"legacy": tokenizer.legacy} if isinstance(tokenizer, LlamaTokenizer) else {}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        **options,
    )
    fast.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=spaced)], special_tokens=True)
    fast.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, special=True, normalized=False)})
    return fast


def chat_template(start_end: bool = False) -> str:
    """vicuna_v1 as Jinja: the same prompts as `conv_templates["vicuna_v1"]`; images before the text, as in LLaVA."""
    template = get_template("vicuna_v1")
    user, assistant = template.roles
    image = image_placeholder(start_end)
    return (
        "{%- macro said(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
        f"{{%- for part in content if part['type'] == 'image' -%}}{{{{- '{image}\\n' -}}}}{{%- endfor -%}}"
        "{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{{{- {json.dumps(template.system)} + '{template.sep}' -}}}}{{%- endif -%}}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] == 'system' -%}}{{{{- said(message['content']) + '{template.sep}' -}}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- '{assistant}: ' + said(message['content']) + '{template.sep2}' -}}}}"
        f"{{%- else -%}}{{{{- '{user}: ' + said(message['content']) + '{template.sep}' -}}}}{{%- endif -%}}"
        f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{- '{assistant}:' -}}}}{{%- endif -%}}"
    )
