"""The projector that maps patch features to the language model's embedding space."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn


class IdentityMap(nn.Module):
    """Features are passed on as they are."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features unchanged."""
        return x

    @property
    def config(self) -> dict[str, str]:
        """The config field that names this projector."""
        return {"mm_projector_type": "identity"}


class SimpleResBlock(nn.Module):
    """x + MLP(LayerNorm(x)), of one width throughout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels)
        self.proj = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        normed = self.pre_norm(x)
        return normed + self.proj(normed)


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """The module named by `config.mm_projector_type`: linear, mlp{depth}x_gelu or identity."""
    kind = getattr(config, "mm_projector_type", "linear")
    width_in, width_out = config.mm_hidden_size, config.hidden_size
    if kind == "identity":
        return IdentityMap()
    if kind == "linear":
        return nn.Linear(width_in, width_out)
    if mlp := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
        for _ in range(int(mlp[1]) - 1):
            layers += [nn.GELU(), nn.Linear(width_out, width_out)]
        return nn.Sequential(*layers)
    raise ValueError(
        f"mm_projector_type: expected 'linear', 'identity' or 'mlp<depth>x_gelu' such as 'mlp2x_gelu', got {kind!r}. "
        "Correct it in the checkpoint's config.json or with --mm_projector_type."
    )
