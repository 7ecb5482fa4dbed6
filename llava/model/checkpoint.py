"""Read a checkpoint of either layout into memory, under LLaVA's names and in its own precision."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoImageProcessor, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dama.console import log
from dama.remote_code import remote_code_refused
from llava.constants import DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.source import ADAPTER_CONFIG, BESIDE_ADAPTER, PROJECTOR_FILE, Kind, fetch, is_hf_layout
from llava.model.utils import Weights, read_file, read_json, read_weights
from llava.tokenization import LlamaTokenizer, load_tokenizer

EMBEDDINGS = "model.embed_tokens.weight"
VOCABULARY_TABLES = (EMBEDDINGS, "lm_head.weight")
PAD_TOKEN = "<pad>"
# Both of llava-hf's styles, that of its repositories and that of transformers 5, to LLaVA's names.
TO_LLAVA = (
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"(?:language_model\.)?lm_head\.", "lm_head."),
    (r"(?:language_model\.model|model\.language_model)\.", "model."),
)
# A tower's weights inside a checkpoint: LLaVA's, llava-hf's, or those of a CLIPVisionModel by itself.
IN_TOWER = re.compile(r"(?:model\.vision_tower\.vision_tower\.|(?:model\.)?vision_tower\.)(?:vision_model\.)?")
# Tables that models compute for themselves; old libraries saved them.
COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")


@dataclass
class Checkpoint:
    """A multimodal checkpoint taken apart, in LLaVA's names."""

    config: LlavaConfig
    weights: Weights  # model.*, lm_head.weight
    tower: Weights = field(default_factory=dict)  # vision_model.*; empty where config.mm_vision_tower has the weights
    tower_config: CLIPVisionConfig | None = None  # with weights that come from a llava-hf checkpoint
    image_processor: CLIPImageProcessorPil | None = None  # likewise


def read_full_checkpoint(folder: str | Path) -> Checkpoint:
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
        log(
            f"checkpoint '{folder}': {len(tower)} weights of its frozen vision tower are left out, the tower comes "
            f"from '{llava.mm_vision_tower}': {summarize_names(tower)}"
        )
        tower = {}
    return Checkpoint(llava, weights, tower)


def tower_is_trained(config: Any) -> bool:
    """Whether the config says that the tower's weights in the checkpoint differ from those it came with."""
    parts = getattr(config, "mm_tunable_parts", None) or ""
    return bool(getattr(config, "unfreeze_mm_vision_tower", False)) or "mm_vision_tower" in parts


def split_tower(weights: Weights) -> tuple[Weights, Weights]:
    """(language model and projector, vision tower under hub names `vision_model.*`)."""
    tower = {name: match.end() for name in weights if (match := IN_TOWER.match(name))}
    rest = {name: t for name, t in weights.items() if name not in tower}
    return rest, {f"vision_model.{name[end:]}": weights[name] for name, end in tower.items()}


def from_hf(folder: str | Path, config: dict[str, Any], weights: Weights) -> Checkpoint:
    """Checkpoint under LLaVA's names from a llava-hf folder; rows from <image> on leave the vocabulary."""
    check_hf_config(folder, config)
    hf = transformers.LlavaConfig.from_dict(config)
    rest, tower = split_tower(weights)
    named = {rename_weight(name, TO_LLAVA, f"llava-hf checkpoint '{folder}'"): t for name, t in rest.items()}
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
        log(
            f"llava-hf checkpoint '{folder}': its image processor crops instead of padding (no do_pad), and so it is "
            'used here; set image_aspect_ratio to "pad" in the config for a model that was trained padded'
        )
    llava = config_from_hf(folder, hf, tokenizer, pads)
    return Checkpoint(llava, named, tower, hf.vision_config, processor)


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


def rename_weight(name: str, table: tuple[tuple[str, str], ...], subject: str) -> str:
    """Rename a weight by the first pattern that matches its beginning; ValueError where none does."""
    for pattern, replacement in table:
        if match := re.match(pattern, name):
            return replacement + name[match.end() :]
    raise ValueError(f"{subject}: expected weights of language model, projector and tower, got '{name}' besides")


def summarize_names(names: Any) -> str:
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


def grow_table(table: Tensor, rows: int) -> Tensor:
    """[V, D] to [rows, D]: the new rows are the mean row, whose logit is never the largest one."""
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def complete_tables(base: Weights, extra: Weights) -> Weights:
    """`extra` with whole vocabulary tables: rows that were saved alone follow the base's, a missing table gets means.

    LLaVA saves the rows of <im_start> and <im_end> beside a projector: the input table alone, in full or these rows.
    """
    tables = {name: extra[name] for name in VOCABULARY_TABLES if name in extra}
    whole = {
        name: torch.cat([base[name], table.to(base[name])]) if len(table) < len(base[name]) else table
        for name, table in tables.items()
    }
    rows = max((len(table) for table in whole.values()), default=0)
    missing = [name for name in VOCABULARY_TABLES if name in base and name not in whole and rows > len(base[name])]
    return extra | whole | {name: grow_table(base[name], rows) for name in missing}


def named_base(folder: Path, kind: Kind) -> str:
    """Return the base that an adapter's config names; ValueError or FileNotFoundError where it has none."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") if kind is Kind.LORA else None
    if not base:
        raise ValueError(f"'{folder}' holds {kind.value}: expected its base model, got none. Pass --model-base.")
    try:
        fetch(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"LoRA folder '{folder}': its {ADAPTER_CONFIG} names the base '{base}', which is not there. "
            f"Pass --model-base. ({error})"
        ) from error
    return base


def read_beside(folder: Path, kind: Kind) -> tuple[Weights, Weights]:
    """What was trained beside an adapter, or the projector: (language model and projector, vision tower)."""
    file = folder / (PROJECTOR_FILE if kind is Kind.PROJECTOR else BESIDE_ADAPTER)
    if not file.is_file():
        return {}, {}
    named = {}
    for name, tensor in read_file(file).items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        named[name.removeprefix("model.") if name.startswith("model.model.") else name] = tensor
    return split_tower(named)
