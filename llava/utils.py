"""Small helpers that LLaVA's scripts import by name."""

from __future__ import annotations

import json
import logging
import os
import urllib.request
from pathlib import Path
from typing import Any

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."

MODERATION_URL = "https://api.openai.com/v1/moderations"


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """A logger that writes to standard error and to LOGDIR/`logger_filename`; called again, it is the same one."""
    from llava.constants import LOGDIR

    logger = logging.getLogger(logger_name)
    if logger.handlers:
        return logger
    logger.setLevel(logging.INFO)
    formatter = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S")
    folder = Path(LOGDIR)
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / logger_filename, encoding="utf-8")
    for handler in (logging.StreamHandler(), file):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def disable_torch_init() -> None:
    """Leaves the weights of new Linear and LayerNorm layers as allocated: they are about to be loaded anyway."""
    import torch

    def keep(_: Any) -> None:
        return None

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        setattr(layer, "reset_parameters", keep)  # noqa: B010 - replaces a method


def violates_moderation(text: str) -> bool:
    """Whether OpenAI's moderation service (OPENAI_API_KEY) flags the text.

    Raises:
        KeyError: no OPENAI_API_KEY.
        URLError: the service cannot be reached; nobody is told that an unread text is harmless.
    """
    request = urllib.request.Request(
        MODERATION_URL,
        data=json.dumps({"input": text}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    with urllib.request.urlopen(request, timeout=5) as reply:
        return json.load(reply)["results"][0]["flagged"]


def pretty_print_semaphore(semaphore: Any) -> str:
    """An asyncio.Semaphore's free places, for the logs of the servers."""
    return "None" if semaphore is None else f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"
