"""The mixins that make a language model multimodal: they own the vision tower and prepare its input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dama.transfer import to_device
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.multimodal_encoder.builder import build_vision_tower, locate_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import assemble_crops, assign_images, plan_splice, unpad_image
from llava.model.utils import Weights, read_file, stays_inside

IMAGE_BRACKETS = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]  # around each image with mm_use_im_start_end
EMBEDDINGS_KEY = "embed_tokens.weight"


class LlavaMetaModel:
    """Mixin of the decoder (LlamaModel): holds `vision_tower` and `mm_projector`."""

    config: Any
    dtype: Any
    embed_tokens: Any
    vision_tower: Any

    def __init__(self, config: Any) -> None:
        forget_pad_token_without_row(config)
        super().__init__(config)  # type: ignore[call-arg]
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)
            if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
                self.image_newline = nn.Parameter(torch.zeros(config.hidden_size, dtype=self.dtype))

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """Return the vision tower, or None where the config names none."""
        tower = getattr(self, "vision_tower", None)
        # FSDP keeps modules that must not be sharded in a list.
        return tower[0] if isinstance(tower, list) else tower

    def load_vision_tower(self, device: Any = None, dtype: torch.dtype | None = None) -> CLIPVisionTower:
        """Brings the weights of the tower that the config names (a folder beside the checkpoint's files comes first).

        Raises:
            ValueError: the model has no tower. FileNotFoundError: the tower is nowhere.
        """
        tower = self.get_vision_tower()
        if tower is None:
            raise ValueError(
                f"checkpoint '{self.config._name_or_path}': expected mm_vision_tower in config.json, got none; "
                "name the tower with --vision_tower"
            )
        if not tower.is_loaded:
            folder = locate_vision_tower(tower.vision_tower_name, self.config._name_or_path)
            tower.load_model(folder=folder, dtype=dtype)
            beside = Path(self.config._name_or_path) / tower.vision_tower_name
            # A name that leads out of the checkpoint would lead out of the saved model's folder as well.
            tower.inside_checkpoint = folder == str(beside) and stays_inside(tower.vision_tower_name)
            # A saved model must find its tower from any working directory.
            if Path(folder).is_dir() and not tower.inside_checkpoint:
                self.config.mm_vision_tower = str(Path(folder).resolve())
        return tower.to(device=device)

    def initialize_vision_modules(self, model_args: Any, fsdp: Any = None) -> None:
        """Gives a model its tower and projector as ModelArguments name them, and writes them into the config.

        A projector that the checkpoint already has keeps its weights unless `pretrain_mm_mlp_adapter` names others.
        """
        config = self.config
        requested = {
            "mm_vision_tower": model_args.vision_tower,
            "mm_vision_select_layer": model_args.mm_vision_select_layer,
            "mm_vision_select_feature": model_args.mm_vision_select_feature,
            "mm_projector_type": model_args.mm_projector_type,
            "mm_patch_merge_type": model_args.mm_patch_merge_type,
        }
        defaults = {
            "mm_vision_select_layer": -1,
            "mm_vision_select_feature": "patch",
            "mm_projector_type": "linear",
            "mm_patch_merge_type": "flat",
        }
        old_projector = getattr(config, "mm_projector_type", None)
        for name, value in requested.items():
            if value is None:
                value = getattr(config, name, None)
            if value is None:
                value = defaults.get(name)
            setattr(config, name, value)

        if self.get_vision_tower() is None or model_args.vision_tower is not None:
            self.vision_tower = build_vision_tower(config, delay_load=True)
        tower = self.load_vision_tower()
        tower.select_layer, tower.select_feature = config.mm_vision_select_layer, config.mm_vision_select_feature
        config.use_mm_proj = True
        config.mm_hidden_size = tower.hidden_size
        if fsdp:
            self.vision_tower = [tower]

        if getattr(self, "mm_projector", None) is None or old_projector != config.mm_projector_type:
            self.mm_projector = build_vision_projector(config)
        if "unpad" in config.mm_patch_merge_type and not hasattr(self, "image_newline"):
            scale = config.hidden_size**-0.5
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size, dtype=self.dtype) * scale)
        for parameter in self.mm_projector.parameters():
            parameter.requires_grad = True
        if model_args.pretrain_mm_mlp_adapter:
            load_projector(self.mm_projector, model_args.pretrain_mm_mlp_adapter)


def forget_pad_token_without_row(config: Any) -> None:
    """Unset a pad token beyond the embedding table, with which no table can be built; the tokenizer still has it."""
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        config.pad_token_id = None


def load_projector(projector: nn.Module, path: str) -> None:
    """Load `mm_projector.bin` (keys `model.mm_projector.*`).

    Raises:
        ValueError: the file is damaged, or of another kind or size of projector; every key that differs is named.
    """
    given = projector_weights(read_file(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    # Under ZeRO-3 a rank holds a part of each parameter and knows the whole one's shape as ds_shape.
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in projector.named_parameters()}
    if shapes != wanted:
        differing = [f"{k} {wanted.get(k)} got {shapes.get(k)}" for k in sorted({*shapes, *wanted})
                     if shapes.get(k) != wanted.get(k)]  # fmt: skip
        raise ValueError(
            f"projector '{path}': expected the weights of this model's projector; {'; '.join(differing)}. Name its "
            "kind with --mm_projector_type, or use the file of a language model and tower of the same sizes."
        )
    with whole_parameters(*projector.parameters()):
        projector.load_state_dict(given)


def projector_weights(weights: Weights) -> Weights:
    """The projector's own tensors by their names inside it, of a file with LLaVA's names."""
    marker = "mm_projector."
    return {name.split(marker, 1)[1]: tensor for name, tensor in weights.items() if marker in name}


def bracket_rows(path: str, rows: int) -> dict[str, Tensor]:
    """The rows of <im_start> and <im_end> in a projector file, for the vocabulary tables that it has them for.

    Args:
        path: mm_projector.bin, which may hold a whole table, of as many rows as this model's, or two rows.
        rows: of the model's tables.

    Returns:
        {"input": [2, D], "output": [2, D]}, less what the file lacks.

    Raises:
        ValueError: a table of another length.
    """
    found = {}
    for table, ending in (("input", EMBEDDINGS_KEY), ("output", "lm_head.weight")):
        for name, tensor in read_file(path).items():
            if not name.endswith(ending):
                continue
            if len(tensor) not in (len(IMAGE_BRACKETS), rows):
                raise ValueError(
                    f"projector '{path}': expected {name} with the 2 rows of <im_start> and <im_end>, or all {rows}, "
                    f"got {len(tensor)}. The file is of a model with another vocabulary."
                )
            found[table] = tensor[-len(IMAGE_BRACKETS) :]
    return found


def start_rows_as_mean(model: Any, added: int) -> None:
    """Gives the last `added` rows of both embedding tables the mean of the rows before them."""
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        with torch.no_grad(), whole_parameters(table):
            table[-added:] = table[:-added].mean(dim=0, keepdim=True)


def rows_on_cpu(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Ids and labels [B, T] as rows without padding, on the CPU; labels of IGNORE_INDEX where there are none."""
    ids = input_ids.cpu()
    targets = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels.cpu()
    keep = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    return [row[k] for row, k in zip(ids, keep)], [row[k] for row, k in zip(targets, keep)]


def shown_images(rows: list[Tensor], available: int, image_index: Tensor | None) -> list[list[int]]:
    """The images of each row, in the order of its placeholders.

    Args:
        available: number of images. image_index: [M] which of them each placeholder shows; None: in their order.
    """
    counts = [int((ids == IMAGE_TOKEN_INDEX).sum()) for ids in rows]
    if image_index is None:
        return assign_images(counts, available)
    index = image_index.tolist()
    return [index[start : start + count] for start, count in zip([0, *accumulate(counts)], counts)]


def whole_parameters(*parameters: Any) -> AbstractContextManager[Any]:
    """Gather ZeRO-3's parameters on every rank; what the first rank changes is kept. Without ZeRO-3, do nothing."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(list(parameters), modifier_rank=0)


class LlavaMetaForCausalLM(ABC):
    """Mixin of the causal language model: images and token ids to input embeddings."""

    config: Any
    tables_grown = False  # whether the vocabulary tables have rows that the checkpoint lacks
    resize_token_embeddings: Any
    get_input_embeddings: Any
    get_output_embeddings: Any

    @abstractmethod
    def get_model(self) -> LlavaMetaModel:
        """Return the model that has the vision tower and the projector."""

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """Return the vision tower, or None where the config names none."""
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] images to [N, P, D] features in the language model's embedding space."""
        return self.project_features(self.get_model().vision_tower(images))

    def project_features(self, features: Tensor) -> Tensor:
        """[N, P, width] of the vision tower to [N, P, D]."""
        projector = self.get_model().mm_projector
        return projector(features.to(next(projector.parameters(), features).dtype))

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Any,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | list[Tensor] | None,
        image_sizes: Any = None,
        *,
        image_index: Tensor | None = None,
        images_encoded: bool = False,
        padding_side: str | None = None,
    ) -> tuple[None | Tensor, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]:
        """Encode -> splice -> truncate -> pad. What was None on the way in is None on the way out.

        Args:
            input_ids, attention_mask, labels: [B, T]; an image stands as IMAGE_TOKEN_INDEX.
            images: [N, 3, H, W], or a list of [3, H, W] or of [F, 3, H, W] (F crops of one image).
            image_index: [M] which of the N images each placeholder shows, where rows share images.
            images_encoded: `images` are the vision tower's features, [P, width] for each [3, H, W].
            padding_side: 'left' or 'right'; the config's tokenizer_padding_side when None.

        Returns:
            input_ids (None once embedded), position_ids, attention_mask [B, T'], past_key_values,
            inputs_embeds [B, T', D], labels [B, T'].
        """
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        if getattr(self.config, "tune_mm_mlp_adapter", False) and getattr(self.config, "mm_use_im_start_end", False):
            raise NotImplementedError("tune_mm_mlp_adapter together with mm_use_im_start_end: choose one of the two")

        features = self._image_features(images, image_sizes, images_encoded)
        side = padding_side or str(getattr(self.config, "tokenizer_padding_side", "right"))
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        rows = rows_on_cpu(input_ids, attention_mask, labels)
        shown = shown_images(rows[0], len(features), image_index)
        plan = plan_splice(*rows, shown, [len(image) for image in features], limit, side)
        plan = to_device(plan, input_ids.device)
        return (
            None,
            None if position_ids is None else plan.position_ids,
            None if attention_mask is None else plan.mask.to(attention_mask.dtype),
            past_key_values,
            plan.embed(self.get_model().embed_tokens, features),
            None if labels is None else plan.labels,
        )

    def _image_features(
        self, images: Tensor | list[Tensor], image_sizes: Any, images_encoded: bool = False
    ) -> list[Tensor]:
        """One [P, D] for each image; the crops of an image follow one another ('flat' merging)."""
        encode = self.project_features if images_encoded else self.encode_images
        dims = 2 if images_encoded else 3  # of one image that is not in crops
        if isinstance(images, Tensor) and images.ndim == dims + 1:
            return list(encode(images))
        crops = [image[None] if image.ndim == dims else image for image in images]
        encoded = encode(torch.cat(crops)).split([len(crop) for crop in crops])
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge == "flat":
            return [features.flatten(0, 1) for features in encoded]
        if not merge.startswith("spatial"):
            raise ValueError(f"mm_patch_merge_type: expected 'flat', 'spatial' or 'spatial_unpad', got {merge!r}")
        if image_sizes is None:
            raise ValueError(f"mm_patch_merge_type {merge!r}: expected image_sizes, (width, height) of each image")
        return [self._merge_spatially(features, size, merge) for features, size in zip(encoded, image_sizes)]

    def _merge_spatially(self, features: Tensor, size: Any, merge: str) -> Tensor:
        """[F, P, D] of the whole image and its crops to one [P', D] in which rows of the image stay rows."""
        newline = self.get_model().image_newline if "unpad" in merge else None
        if len(features) == 1:
            return features[0] if newline is None else torch.cat([features[0], newline[None]])
        tower = self.get_model().vision_tower
        columns, rows = get_anyres_image_grid_shape(
            tuple(size), self.config.image_grid_pinpoints, tower.config.image_size
        )
        grid = assemble_crops(features[1:], rows, columns, tower.num_patches_per_side)
        if newline is None:
            return torch.cat([features[0], grid.flatten(0, 1)])
        grid = unpad_image(grid.permute(2, 0, 1), tuple(size))
        ends = newline[:, None, None].expand(-1, grid.shape[1], 1).to(grid.device)
        return torch.cat([features[0], torch.cat([grid, ends], dim=2).flatten(1).T])

    def grow_tables(self, rows: int) -> int:
        """Give both vocabulary tables at least that many rows, new ones as the mean of the old; returns how many."""
        added = rows - self.get_input_embeddings().num_embeddings
        if added <= 0:
            return 0
        self.resize_token_embeddings(rows, mean_resizing=False)
        start_rows_as_mean(self, added)
        self.tables_grown = True
        return added

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Adds LLaVA's image tokens where ModelArguments ask for them; new rows start as the mean of the old ones.

        The rows of <im_start> and <im_end> in `pretrain_mm_mlp_adapter` are taken over. Every token of the tokenizer
        has a row afterwards.
        """
        if model_args.mm_use_im_patch_token:
            tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
        self.grow_tables(len(tokenizer))
        if model_args.mm_use_im_start_end:
            tokenizer.add_tokens(IMAGE_BRACKETS, special_tokens=True)
            self.grow_tables(len(tokenizer))
            if file := getattr(model_args, "pretrain_mm_mlp_adapter", None):
                self._load_bracket_rows(tokenizer, file)
            if model_args.tune_mm_mlp_adapter:
                self.get_input_embeddings().requires_grad_(True)
                self.get_output_embeddings().requires_grad_(False)
        elif model_args.mm_use_im_patch_token and model_args.tune_mm_mlp_adapter:
            self.get_input_embeddings().requires_grad_(False)
            self.get_output_embeddings().requires_grad_(False)

    def _load_bracket_rows(self, tokenizer: Any, path: str) -> None:
        """Take the rows of <im_start> and <im_end> from a projector file that has them."""
        tables = {"input": self.get_input_embeddings(), "output": self.get_output_embeddings()}
        rows = bracket_rows(path, len(tokenizer))
        ids = tokenizer.convert_tokens_to_ids(IMAGE_BRACKETS)
        for table, values in rows.items():
            weight = tables[table].weight
            with torch.no_grad(), whole_parameters(weight):
                weight[ids] = values.to(weight)
        self.tables_grown |= bool(rows)
