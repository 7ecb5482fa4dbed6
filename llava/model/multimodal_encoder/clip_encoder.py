"""The CLIP vision tower: images to patch features of one hidden layer, frozen unless it is asked for otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dama.notices import without_loading_bars
from llava.model.utils import validate_no_lfs_pointers, weight_files


class CLIPVisionTower(nn.Module):
    """LLaVA's view of a CLIPVisionModel. With `delay_load` only the config is read; `load_model` brings the weights.

    Args:
        vision_tower: folder or hub name of a CLIPVisionModel.
        args: has `mm_vision_select_layer` (index into the hidden states, -2 in LLaVA-v1.5) and optionally
            `mm_vision_select_feature` ('patch' without the class token, or 'cls_patch' with it).
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer: int = args.mm_vision_select_layer
        self.select_feature: str = getattr(args, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature: expected 'patch' or 'cls_patch', got {self.select_feature!r}")
        # A model under construction on the meta device must not load another: LlavaMetaModel always delays.
        self.cfg_only: CLIPVisionConfig | None = None
        self.folder = vision_tower  # where the weights came from: a folder, or a hub name
        self.inside_checkpoint = False
        if not delay_load:
            self.load_model()

    def load_model(
        self, device_map: Any = None, *, folder: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Reads weights and image processor, once. `folder` overrides the name when the tower lies elsewhere."""
        if self.is_loaded:
            return
        source = self.folder = folder or self.vision_tower_name
        if Path(source).is_dir():
            validate_no_lfs_pointers(source)
            weight_files(source)  # transformers would follow whatever names its index has
        validate_tower_type(CLIPVisionConfig.get_config_dict(source)[0].get("model_type"), source)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(source)
        with without_loading_bars():
            self.vision_tower = CLIPVisionModel.from_pretrained(
                source, device_map=device_map, dtype=dtype or torch.float32
            )
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def feature_select(self, image_forward_outs: Any) -> Tensor:
        """[N, P, width] of the selected hidden layer, P patches (one more with the class token)."""
        features = image_forward_outs.hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """[N, 3, H, W] to [N, P, width]; a list of [3, H, W] to a list of [1, P, width]. No gradient when frozen."""
        if isinstance(images, list):
            return list(self._encode(torch.stack(images)).split(1))
        return self._encode(images)

    @property
    def is_frozen(self) -> bool:
        """Whether no parameter of the tower is trained."""
        return not any(p.requires_grad for p in self.vision_tower.parameters())

    def _encode(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.is_frozen and torch.is_grad_enabled()):
            outputs = self.vision_tower(images.to(self.device, self.dtype), output_hidden_states=True)
        return self.feature_select(outputs).to(images.dtype)

    @property
    def dummy_feature(self) -> Tensor:
        """[1, D] zeros."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_tower.device

    @property
    def config(self) -> CLIPVisionConfig:
        """CLIP's config, read from the folder where the tower is not loaded yet."""
        if self.is_loaded:
            return self.vision_tower.config
        if self.cfg_only is None:
            self.cfg_only = CLIPVisionConfig.from_pretrained(self.folder)
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of an image."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.num_patches_per_side**2

    @property
    def tokens_per_image(self) -> int:
        """Positions that one image takes in the language model's input."""
        return self.num_patches + (self.select_feature == "cls_patch")


def validate_tower_type(kind: str | None, source: str) -> None:
    """Raises unless it is a CLIP: weights of another model would be left at random."""
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(
            f"vision tower '{source}': expected a CLIP model (model_type 'clip' or 'clip_vision_model' in its "
            f"config.json), got {kind!r}. Name the right tower in mm_vision_tower or with --vision_tower."
        )
