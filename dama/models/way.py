"""How a model reads a pair: with a shared prefix, or in rows of their own. Its config and classes decide, not its name.

A shared prefix needs an attention that can be replaced, and layers in which nothing flows from one answer to the next
but what attention lets through. Recurrent layers (linear attention, state spaces, convolutions) hand on a state, and
cross-attention reads images beside the row: such models read one row for each answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# Layers, as `layer_types` of a config calls them, in which a token sees others through attention alone.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
CROSS_ATTENTION_FIELDS = ("cross_attention_layers", "cross_layer_interval", "is_encoder_decoder")


class Way(StrEnum):
    """How the answers of a pair are read."""

    KERNEL = "shared prefix"
    MASK = "shared prefix by a dense mask"
    ROWS = "one row per answer"


@dataclass(frozen=True)
class Decided:
    """A way, and the reason for it in a few words."""

    way: Way
    reason: str

    def __str__(self) -> str:
        return f"{self.way} ({self.reason})"


def way_of(model: Any, *, shared_prefix: bool = True) -> Decided:
    """Decide how this model reads pairs.

    Args:
        model: a PreTrainedModel for image-text-to-text.
        shared_prefix: whether it is wanted where it is possible.
    """
    if not shared_prefix:
        return Decided(Way.ROWS, "--shared_prefix False")
    if obstacle := next(obstacles(model), None):
        return Decided(Way.ROWS, obstacle)
    config = model.config.get_text_config(decoder=True)
    if windows := active_windows(config):
        return Decided(Way.MASK, windows)
    if cap := getattr(config, "attn_logit_softcapping", None):
        return Decided(Way.MASK, f"attention scores bounded by {cap:g}")
    if "token_type_ids" in inspect.signature(model.base_model.forward).parameters:
        return Decided(Way.MASK, "tokens of an image or of a prefix see each other")
    return Decided(Way.KERNEL, "causal attention in every layer")


def obstacles(model: Any) -> Iterator[str]:
    """Why a prefix cannot be shared."""
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    for field in CROSS_ATTENTION_FIELDS:
        if getattr(config, field, None) or getattr(model.config, field, None):
            yield f"config has {field}"
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        yield f"layers of {', '.join(sorted(others))}"
    if getattr(model, "_is_stateful", False) or getattr(decoder, "_is_stateful", False):
        yield "layers with a state"
    if not getattr(decoder, "_supports_attention_backend", False):
        yield "its attention cannot be replaced"


def active_windows(config: Any) -> str | None:
    """Name the windows of its attention layers; None where every layer sees everything before."""
    types = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in types:
        return "chunked attention"
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    if types and "sliding_attention" not in types:
        return None
    return f"attention windows of {window} tokens"
