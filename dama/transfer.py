"""Bundles of small CPU tensors to a device: one pinned copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Bundle = TypeVar("Bundle")


def to_device(bundle: Bundle, device: torch.device) -> Bundle:
    """A frozen dataclass of integer or bool tensors, nested ones included, on another device.

    On CUDA all tensors travel as one pinned int32 buffer, so the copy neither blocks the host nor is repeated for each
    tensor. Values must fit into int32, as token ids and positions do.
    """
    if device.type != "cuda":
        return _rebuilt(bundle, (tensor.to(device) for tensor in _tensors(bundle)))
    tensors = list(_tensors(bundle))
    if all(tensor.device == device for tensor in tensors):
        return bundle
    buffer = torch.cat([tensor.flatten().int() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    pieces = buffer.split([tensor.numel() for tensor in tensors])
    return _rebuilt(bundle, (piece.view(old.shape).to(old.dtype) for piece, old in zip(pieces, tensors)))


def _tensors(bundle: Any) -> Iterator[Tensor]:
    for field in fields(bundle):
        value = getattr(bundle, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _rebuilt(bundle: Any, tensors: Iterator[Tensor]) -> Any:
    changed = {}
    for field in fields(bundle):
        value = getattr(bundle, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = next(tensors)
        elif is_dataclass(value):
            changed[field.name] = _rebuilt(value, tensors)
    return replace(bundle, **changed)
