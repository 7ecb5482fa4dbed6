"""LLaVA's layout <-> llava-hf's (LlavaForConditionalGeneration), a LoRA merged on the way, checked by equal logits.

python -m llava.model.export --to hf|llava [--model-base BASE] SRC DST
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from torch import Tensor
from transformers import AutoImageProcessor, CLIPVisionConfig, GenerationConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dama.console import report_error, say, write_json
from dama.remote_code import remote_code_refused
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IMAGE_TOKEN,
)
from llava.conversation import get_template
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.multimodal_encoder.builder import locate_vision_tower
from llava.model.utils import Weights, read_json, read_weights, write_weights
from llava.supported import refuse_unsupported_model
from llava.tokenization import SPACE, LlamaTokenizer, load_tokenizer

EMBEDDINGS = "model.embed_tokens.weight"
VOCABULARY_TABLES = (EMBEDDINGS, "lm_head.weight")
PAD_TOKEN = "<pad>"
TOWER_FOLDER = "vision_tower"

# Both of llava-hf's styles, that of its repositories and that of transformers 5, to LLaVA's names.
TO_LLAVA = (
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"(?:language_model\.)?lm_head\.", "lm_head."),
    (r"(?:language_model\.model|model\.language_model)\.", "model."),
)
TO_HF = (
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.", "language_model.model."),
)
# A tower's weights inside a checkpoint: LLaVA's, llava-hf's, or those of a CLIPVisionModel by itself.
IN_TOWER = re.compile(r"(?:model\.vision_tower\.vision_tower\.|(?:model\.)?vision_tower\.)(?:vision_model\.)?")
# Tables that models compute for themselves; old libraries saved them.
COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")


@dataclass
class Parts:
    """A multimodal checkpoint taken apart, in LLaVA's names."""

    config: LlavaConfig
    weights: Weights  # model.*, lm_head.weight
    tower: Weights = field(default_factory=dict)  # vision_model.*; empty where config.mm_vision_tower has the weights
    tower_config: CLIPVisionConfig | None = None  # with weights that come from a llava-hf checkpoint
    image_processor: CLIPImageProcessorPil | None = None  # likewise


# --- Reading ---------------------------------------------------------------------------------------------------------


def is_hf_layout(config: dict[str, Any]) -> bool:
    """Whether a config.json is of LlavaForConditionalGeneration (LLaVA's first release also said 'llava')."""
    return config.get("model_type") == "llava" and "text_config" in config


def read_parts(folder: str | Path) -> Parts:
    """A full checkpoint of either layout.

    Raises:
        ValueError: of a kind that this repository does not run, or files that are damaged.
    """
    config = read_json(Path(folder) / "config.json")
    weights = {name: t for name, t in read_weights(folder).items() if not COMPUTED.fullmatch(name)}
    if is_hf_layout(config):
        return from_hf(folder, config, weights)
    weights, tower = split_tower(weights)
    llava = LlavaConfig.from_pretrained(folder)
    llava._name_or_path = str(folder)
    if tower and not tower_is_trained(llava):
        say(
            f"checkpoint '{folder}': {len(tower)} weights of its frozen vision tower are left out, the tower comes "
            f"from '{llava.mm_vision_tower}': {collapsed(tower)}"
        )
        tower = {}
    return Parts(llava, weights, tower)


def tower_is_trained(config: Any) -> bool:
    """Whether the config says that the tower's weights in the checkpoint differ from those it came with."""
    parts = getattr(config, "mm_tunable_parts", None) or ""
    return bool(getattr(config, "unfreeze_mm_vision_tower", False)) or "mm_vision_tower" in parts


def split_tower(weights: Weights) -> tuple[Weights, Weights]:
    """(language model and projector, vision tower under hub names `vision_model.*`)."""
    tower = {name: match.end() for name in weights if (match := IN_TOWER.match(name))}
    rest = {name: t for name, t in weights.items() if name not in tower}
    return rest, {f"vision_model.{name[end:]}": weights[name] for name, end in tower.items()}


def from_hf(folder: str | Path, config: dict[str, Any], weights: Weights) -> Parts:
    """LLaVA's parts of a llava-hf checkpoint; rows from <image> on leave the vocabulary."""
    check_hf_config(folder, config)
    hf = transformers.LlavaConfig.from_dict(config)
    rest, tower = split_tower(weights)
    named = {renamed(name, TO_LLAVA, f"llava-hf checkpoint '{folder}'"): t for name, t in rest.items()}
    tokenizer = llava_tokenizer(folder, hf.image_token_index)
    rows = hf.image_token_index
    if len(tokenizer) != rows:
        raise ValueError(
            f"llava-hf checkpoint '{folder}': expected <image> right after the tokenizer's {len(tokenizer)} own "
            f"tokens, got image_token_index {rows} in config.json. The tokenizer's files are of another model."
        )
    named = {name: t[:rows] if name in VOCABULARY_TABLES else t for name, t in named.items()}
    pads, processor = hf_image_processor(folder)
    if not pads:
        say(
            f"llava-hf checkpoint '{folder}': its image processor crops instead of padding (no do_pad), and so it is "
            'used here; set image_aspect_ratio to "pad" in the config for a model that was trained padded'
        )
    llava = config_from_hf(folder, hf, tokenizer, pads)
    return Parts(llava, named, tower, hf.vision_config, processor)


def config_from_hf(folder: str | Path, hf: transformers.LlavaConfig, tokenizer: Any, pads: bool) -> LlavaConfig:
    """LLaVA's fields of a LlavaForConditionalGeneration with LLaVA's tokenizer."""
    fields = hf.text_config.to_dict() | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "dtype": hf.dtype,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": hf.tie_word_embeddings,
        "image_aspect_ratio": "pad" if pads else "square",
        "mm_hidden_size": hf.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": DEFAULT_IMAGE_PATCH_TOKEN in tokenizer.get_vocab(),
        "mm_use_im_start_end": DEFAULT_IM_START_TOKEN in tokenizer.get_vocab(),
        "mm_vision_select_feature": "patch" if hf.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_vision_select_layer": hf.vision_feature_layer,
        "mm_vision_tower": str(Path(folder).resolve()),
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    if tokenizer.model_max_length < 1e9:  # the library's way of saying that there is none
        fields["tokenizer_model_max_length"] = tokenizer.model_max_length
    return LlavaConfig.from_dict(fields)


def check_hf_config(folder: str | Path, config: dict[str, Any]) -> None:
    """Raises, naming all that differs, unless the model is a LLaMA with CLIP and LLaVA-1.5's projector."""
    hf = transformers.LlavaConfig.from_dict(config)
    wanted = {
        "text_config.model_type": (hf.text_config.model_type, "llama"),
        "vision_config.model_type": (hf.vision_config.model_type, "clip_vision_model"),
        "projector_hidden_act": (hf.projector_hidden_act, "gelu"),
        "multimodal_projector_bias": (hf.multimodal_projector_bias, True),
        "vision_feature_layer": (type(hf.vision_feature_layer).__name__, "int"),
    }
    wrong = [f"{name} {want!r}, got {got!r}" for name, (got, want) in wanted.items() if got != want]
    if wrong:
        raise ValueError(
            f"llava-hf checkpoint '{folder}': expected {'; '.join(wrong)} in config.json. "
            "Only LLaMA language models with a CLIP tower run here; use transformers for this one."
        )


def renamed(name: str, table: tuple[tuple[str, str], ...], subject: str) -> str:
    for pattern, replacement in table:
        if match := re.match(pattern, name):
            return replacement + name[match.end() :]
    raise ValueError(f"{subject}: expected weights of language model, projector and tower, got '{name}' besides")


def collapsed(names: Any) -> str:
    """Names in one line; those of several layers once, with the layers' numbers in braces."""
    layers: dict[str, list[str]] = {}
    for name in sorted(names):
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(re.sub(r"\.\d+\.", ".{}.", name, count=1), []).append(number[1] if number else "")
    return ", ".join(name.replace("{}", n[0] if len(n) == 1 else f"{{{','.join(n)}}}") for name, n in layers.items())


def hf_image_processor(folder: str | Path) -> tuple[bool, CLIPImageProcessorPil]:
    """(whether it pads to a square, the same processor without padding as LLaVA uses it)."""
    with remote_code_refused(f"checkpoint '{folder}'", "give a checkpoint whose image processor needs no code"):
        fields = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False).to_dict()
    pads = bool(fields.pop("do_pad", False))
    return pads, CLIPImageProcessorPil.from_dict({k: v for k, v in fields.items() if not k.endswith("_type")})


def llava_tokenizer(folder: str | Path, image_token_index: int) -> Any:
    """The tokenizer of a llava-hf folder as LLaVA has it: its tokenizer.model, without <image> and <pad>.

    Raises:
        FileNotFoundError: no tokenizer.model. ValueError: other tokens than <pad> follow <image>.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(
            f"llava-hf checkpoint '{folder}': expected tokenizer.model, LLaMA's sentencepiece file, found none. "
            "Copy it from the model that this one was made from."
        )
    settings = read_json(folder / "tokenizer_config.json")
    added = load_tokenizer(folder).added_tokens_decoder
    later = [str(token) for index, token in added.items() if index >= image_token_index]
    if set(later) - {DEFAULT_IMAGE_TOKEN, PAD_TOKEN}:
        raise ValueError(f"llava-hf checkpoint '{folder}': expected only <image> and <pad> as last tokens, got {later}")
    options = {key: settings[key] for key in ("legacy", "model_max_length", "add_bos_token") if key in settings}
    with tempfile.TemporaryDirectory() as alone:  # beside its llava-hf files other settings would be found
        shutil.copy(folder / "tokenizer.model", alone)
        tokenizer = LlamaTokenizer.from_pretrained(
            alone, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="right", **options
        )
    own = [(index, token) for index, token in sorted(added.items()) if len(tokenizer) <= index < image_token_index]
    for _, token in own:
        tokenizer.add_tokens([token], special_tokens=token.special)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.vocab_file = str(folder / "tokenizer.model")  # what saving copies
    return tokenizer


# --- Writing llava-hf's layout ---------------------------------------------------------------------------------------


def write_hf(parts: Parts, tokenizer: Any, folder: Path) -> None:
    """Weights, config, generation config, processor and tokenizer as transformers and vLLM read them.

    The vocabulary grows by <image> and <pad> and up to a multiple of 64, as in llava-hf's own repositories; on the way
    back exactly these rows go again, so that weights come back bit for bit.
    """
    tower_config, tower, image_processor = complete_tower(parts)
    rows = len(tokenizer)
    image_id, pad_id, padded_rows = rows, rows + 1, -(-(rows + 2) // 64) * 64
    config = hf_config(parts, tower_config, image_id, padded_rows)
    if (unused := parts.weights[EMBEDDINGS].shape[0] - rows) > 0:
        say(f"{unused} rows of the vocabulary that the tokenizer has no tokens for are left out")
    weights = {
        renamed(name, TO_HF, "LLaVA checkpoint"): grown(t[:rows], padded_rows) if name in VOCABULARY_TABLES else t
        for name, t in parts.weights.items()
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
    write_hf_processor(parts, tokenizer, image_processor, tower_config, folder)


def hf_config(parts: Parts, tower_config: CLIPVisionConfig, image_id: int, rows: int) -> transformers.LlavaConfig:
    llava = parts.config
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
        dtype=parts.weights[EMBEDDINGS].dtype,
    )


def grown(table: Tensor, rows: int) -> Tensor:
    """[V, D] to [rows, D]: the new rows are the mean row, whose logit is never the largest one."""
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def complete_tower(parts: Parts) -> tuple[CLIPVisionConfig, Weights, CLIPImageProcessorPil]:
    """The tower's config, all its weights under hub names, and the image processor, from wherever they are."""
    if not getattr(parts.config, "mm_vision_tower", None):
        raise ValueError(f"'{parts.config._name_or_path}': expected mm_vision_tower in config.json, got none")
    if parts.tower_config is not None and parts.image_processor is not None:
        return parts.tower_config, parts.tower, parts.image_processor
    from llava.model.builder import fetch

    folder = fetch(locate_vision_tower(parts.config.mm_vision_tower, parts.config._name_or_path), is_tower=True)
    weights = parts.tower or {
        f"vision_model.{name.removeprefix('vision_model.')}": t
        for name, t in read_weights(folder).items()
        if not name.startswith(("text_model.", "text_projection", "logit_scale", "visual_projection"))
        and not COMPUTED.fullmatch(name)
    }
    return CLIPVisionConfig.from_pretrained(folder), weights, CLIPImageProcessorPil.from_pretrained(folder)


def write_hf_processor(
    parts: Parts, tokenizer: Any, images: CLIPImageProcessorPil, tower: CLIPVisionConfig, folder: Path
) -> None:
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    fields = {k: v for k, v in images.to_dict().items() if not k.endswith("_type")}
    pads = getattr(parts.config, "image_aspect_ratio", None) == "pad"
    image_processor = LlavaImageProcessorPil.from_dict(fields | {"do_pad": pads})
    whole = getattr(parts.config, "mm_vision_select_feature", None) == "cls_patch"
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=hf_tokenizer(tokenizer),
        patch_size=tower.patch_size,
        num_additional_image_tokens=1,  # the class token
        vision_feature_select_strategy="full" if whole else "default",
        chat_template=chat_template(getattr(parts.config, "mm_use_im_start_end", False)),
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

    LLaVA tokenises the text after an image by itself, where LLaMA's dummy space comes first. The legacy rule does so
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
    image = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}" if start_end else DEFAULT_IMAGE_TOKEN
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


# --- Writing LLaVA's layout ------------------------------------------------------------------------------------------


def write_llava(parts: Parts, tokenizer: Any, folder: Path) -> None:
    """Weights, config.json and tokenizer as LLaVA has them; the tower beside them unless a hub has the same one."""
    name = getattr(parts.config, "mm_vision_tower", None)  # a language model alone has none
    name = name and locate_vision_tower(name, parts.config._name_or_path)
    if parts.tower or (name and Path(name).is_dir()):
        tower_config, tower, image_processor = complete_tower(parts)
        (folder / TOWER_FOLDER).mkdir()
        write_weights(folder / TOWER_FOLDER, tower)
        tower_config.architectures = ["CLIPVisionModel"]
        tower_config.save_pretrained(folder / TOWER_FOLDER)
        image_processor.save_pretrained(folder / TOWER_FOLDER)
        name = TOWER_FOLDER
    write_weights(folder, parts.weights)
    write_json(folder / "config.json", llava_config(parts) | ({"mm_vision_tower": name} if name else {}))
    ids = {key: getattr(parts.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llava_config(parts: Parts) -> dict[str, Any]:
    """config.json with the names that the libraries of LLaVA's time read: torch_dtype, rope_theta, rope_scaling."""
    fields = parts.config.to_diff_dict()
    rope = dict(fields.pop("rope_parameters", None) or {"rope_theta": 10000.0, "rope_type": "default"})
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    fields["rope_theta"] = theta
    fields["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    fields = {key: value for key, value in fields.items() if key not in ("dtype", "_name_or_path")}
    fields["torch_dtype"] = str(parts.weights[EMBEDDINGS].dtype).removeprefix("torch.")
    return fields | {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}


# --- The command -----------------------------------------------------------------------------------------------------


def export(source: str, destination: str | Path, to: str, model_base: str | None = None) -> dict[str, float]:
    """Writes the checkpoint `source` (full, LoRA or projector on a base, either layout) to a new folder.

    Args:
        to: 'hf' or 'llava'.

    Returns:
        the largest difference of a logit between source and export on one picture and prompt, by image backend:
        {"pil": ..., "torchvision": ...}, the latter with `to='hf'` only.
    Raises:
        FileExistsError: the destination is not empty. OSError: the disk is too full.
        ValueError: the two do not agree; nothing is left behind then.
    """
    if to not in ("hf", "llava"):
        raise ValueError(f"--to: expected 'hf' or 'llava', got {to!r}")
    from llava.model.builder import take_apart

    with new_folder(destination) as folder:
        parts, tokenizer = take_apart(source, model_base)
        check_space(parts, folder)
        (write_hf if to == "hf" else write_llava)(parts, tokenizer, folder)
        del parts
        gc.collect()
        differences = compare(source, model_base, folder, to)
    for backend, difference in differences.items():
        say(f"largest difference of a logit, {backend} images: {difference:.3g}")
    say(f"written: {destination}")
    return differences


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """A temporary folder that gets its name when all went well, and is removed when not.

    Raises:
        FileExistsError: something of that name is there already, and no empty folder.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"expected a new or empty folder to write to, got '{destination}': name another")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        os.replace(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_space(parts: Parts, folder: Path) -> None:
    """Raises unless the disk has room for the weights, a new tower and some more."""
    needed = sum(t.nbytes for t in [*parts.weights.values(), *parts.tower.values()]) * 1.02 + 1e9 * (not parts.tower)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"disk of '{folder}': expected {needed / 1e9:.1f} GB free for the export, got {free / 1e9:.1f}")


def compare(source: str, base: str | None, exported: Path, to: str) -> dict[str, float]:
    """Loads both, asks both the same, and refuses an export whose answer is another.

    Rounding is all that may differ: 1e-4 of the largest logit in float32, 2e-2 in half precision.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = llava_logits(source, base, device)
    if to == "hf":
        theirs = {backend: hf_logits(exported, backend, device) for backend in ("pil", "torchvision")}
    else:
        theirs = {"pil": llava_logits(str(exported), None, device)}
    shapes = {backend: tuple(logits.shape) for backend, logits in theirs.items()}
    if any(len(logits) != len(ours) for logits in theirs.values()):
        raise ValueError(f"export of '{source}': expected logits of {tuple(ours.shape)}, got {shapes}; not written")
    width = min(ours.shape[1], *(shape[1] for shape in shapes.values()))
    found = {b: (ours[:, :width].float() - x[:, :width].float()).abs().max().item() for b, x in theirs.items()}
    bound = (1e-4 if ours.dtype == torch.float32 else 2e-2) * ours.float().abs().max().item()
    if not found["pil"] <= bound:
        raise ValueError(
            f"export of '{source}': expected the same logits within {bound:.2g}, got a difference of {found['pil']:.3g}"
            "; not written. Please report it with the checkpoint's config.json."
        )
    return found


def llava_logits(source: str, base: str | None, device: str) -> Tensor:
    """[T, V] logits of this repository's model on the sample picture and prompt, in the checkpoint's own precision."""
    from llava.model.builder import load_pretrained_model

    loaded = load_pretrained_model(source, base, "", device_map={"": device}, device=device, dtype="auto")
    tokenizer, model, processor, _ = loaded
    ids = tokenizer_image_token(sample_prompt(model.config), tokenizer, return_tensors="pt")[None].to(device)
    pixels = process_images([sample_picture()], processor, model.config).to(device, model.dtype)
    with torch.inference_mode():
        return model(ids, images=pixels).logits[0].cpu()


def hf_logits(folder: Path, backend: str, device: str) -> Tensor:
    """[T, V'] logits of transformers' own model and processor on the same."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map={"": device})
    processor = AutoProcessor.from_pretrained(folder, backend=backend, trust_remote_code=False)
    start_end = DEFAULT_IM_START_TOKEN in processor.tokenizer.get_vocab()
    prompt = sample_prompt(argparse.Namespace(mm_use_im_start_end=start_end))
    inputs = processor(images=sample_picture(), text=prompt, return_tensors="pt").to(device, model.dtype)
    with torch.inference_mode():
        return model(**inputs).logits[0].cpu()


def sample_prompt(config: Any) -> str:
    conversation = get_template("vicuna_v1").copy()
    image = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
    conversation.append_message(conversation.roles[0], f"{image}\nWhat is in this picture?")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def sample_picture() -> Image.Image:
    """Stripes and a gradient, wider than high, so that padding, cropping and resizing all show."""
    width, height = 120, 70
    picture = Image.new("RGB", (width, height))
    picture.putdata([(2 * x, 3 * y, 255 * (x // 9 % 2)) for y in range(height) for x in range(width)])
    return picture


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("hf", "llava"), required=True, help="layout of the export")
    parser.add_argument("--model-base", help="base of a LoRA or projector folder; the one it names when left out")
    parser.add_argument("source", metavar="SRC", help="checkpoint: a folder or a hub name")
    parser.add_argument("destination", metavar="DST", help="new folder")
    args = parser.parse_args(argv)
    try:
        refuse_unsupported_model(args.source, "SRC")
        refuse_unsupported_model(args.model_base, "--model-base")
    except ValueError as error:
        report_error(error, "export")
        sys.exit(2)
    export(args.source, args.destination, args.to, args.model_base)


if __name__ == "__main__":
    main()
