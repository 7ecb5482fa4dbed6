"""Checkpoints for the terminal and the browser, by the flags of both."""

from __future__ import annotations

import argparse

from llava.generation.flags import is_hub_answerer, processor_options
from llava.serve.chat import DEFAULT_CONV_MODE
from llava.serve.hub_model import HubModel
from llava.serve.local_model import LocalModel


def open_model(args: argparse.Namespace, path: str, base: str | None) -> LocalModel | HubModel:
    """Load a checkpoint of any family. Raises ValueError for one that nothing here runs, and for flags of others."""
    loading = {"device": args.device, "load_8bit": args.load_8bit, "load_4bit": args.load_4bit}
    if is_hub_answerer(argparse.Namespace(**vars(args) | {"model_path": path, "model_base": base})):
        return HubModel(path, base, options=processor_options(args), **loading)
    return LocalModel(path, base, conv_mode=args.conv_mode or DEFAULT_CONV_MODE, **loading)
