"""From hidden states to logits as a model's own forward pass makes them.

Some models scale or bound what their last layer gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Finish = Callable[[Tensor], Tensor]


class _Hidden:
    """What a base model returns, with nothing but hidden states in it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def unchanged(logits: Tensor) -> Tensor:
    """Logits of models that do nothing more."""
    return logits


def finishes(config: Any) -> list[Finish]:
    """What models are known to do with the numbers of their config, the usual first."""
    found: list[Finish] = [unchanged]
    if cap := getattr(config, "final_logit_softcapping", None):
        found.append(lambda logits: cap * torch.tanh(logits / cap))
    if divisor := getattr(config, "logits_scaling", None):
        found.append(lambda logits: logits / divisor)
    if factor := getattr(config, "logit_scale", None):
        found.append(lambda logits: logits * factor)
    return found


@torch.no_grad()
def finish_of(model: Any) -> Finish:
    """What a model does with the product of its output layer, seen in its own forward pass on random hidden states.

    Under ZeRO-3, whose weights are not here, the config's soft cap counts.

    Raises:
        ValueError: it does something else, so that log-probs would be wrong.
    """
    config = model.config.get_text_config(decoder=True)
    known, head = finishes(config), model.get_output_embeddings()
    if hasattr(head.weight, "ds_id") or head.weight.is_meta:
        return known[1] if getattr(config, "final_logit_softcapping", None) else unchanged
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, config.hidden_size, generator=generator).to(head.weight.device, model.dtype)
    own = logits_of(model, hidden)
    product = head(hidden)
    for finish in known:
        if torch.allclose(finish(product), own, rtol=1e-2, atol=1e-3):
            return finish
    raise ValueError(
        f"{type(model).__name__}: expected logits that are its output layer's product, scaled or bounded as its config "
        "says, got others in its own forward pass; this model cannot be trained here"
    )


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits that a model's forward pass makes of these hidden states, whatever its input."""
    inner = model.base_model
    own = inner.__dict__.get("forward")
    inner.forward = lambda *_, **__: _Hidden(hidden)
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, return_dict=True).logits
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own
