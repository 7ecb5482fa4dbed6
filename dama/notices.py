"""Notices of libraries that are held back until what they are about is used."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


class HeldBack(logging.Filter):
    """Keep a library's log records for later instead of printing them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.released = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Hold a record back until they are released."""
        if not self.released:
            self.records.append(record)
        return self.released

    def release(self) -> None:
        """Print what was held back, and everything from now on."""
        self.released = True
        for record in self.records:
            logging.getLogger(record.name).handle(record)
        self.records.clear()


# PEFT imports bitsandbytes at every start, which then warns about CPU kernels that only quantized weights would use.
QUANTIZATION_NOTICES = HeldBack()


def hold_back_quantization_notices() -> None:
    """Install the filter on the logger of bitsandbytes' CPU operations, before the library is imported."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if QUANTIZATION_NOTICES not in logger.filters:
        logger.addFilter(QUANTIZATION_NOTICES)


# transformers 5 renamed gradient checkpointing in a later release than the oldest that is supported; the old names work
# in all of them. PEFT and this repository's flags use them.
RENAMED_IN_TRANSFORMERS = r"`(gradient_checkpointing|is_gradient_checkpointing)\w*` is deprecated and will be removed"
RENAMED_IN_TORCH = r"`torch\.distributed\.\w+` is deprecated"  # collectives that DeepSpeed and accelerate call
NOTHING_TO_DO = {  # logger -> the beginning of a message that asks nothing of the user
    # About GPUs that a run on CPUs does not look for.
    "DeepSpeed": "Setting accelerator to CPU",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # Every training of a checkpoint whose config and tokenizer name other ends of an answer, as many on the hub do.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}


class Unprinted(logging.Filter):
    """Drop a logger's messages that begin with a given text, and nothing else of it."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop records with this beginning."""
        return not str(record.msg).startswith(self.beginning)


def leave_out_library_notices() -> None:
    """Install filters for notices that a user of this repository can do nothing about; each names its exact text.

    With PYTHONWARNINGS or -W set, warnings are left to the user.
    """
    if not os.environ.get("PYTHONWARNINGS"):
        for message in (RENAMED_IN_TRANSFORMERS, RENAMED_IN_TORCH):
            warnings.filterwarnings("ignore", message, FutureWarning)
    for name, beginning in NOTHING_TO_DO.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, Unprinted) for known in logger.filters):
            logger.addFilter(Unprinted(beginning))


@contextmanager
def without_build_notices() -> Iterator[None]:
    """A block whose lines on standard output come at its end, without DeepSpeed's on each op that it loaded."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        lines = printed.getvalue().splitlines(keepends=True)
        sys.stdout.writelines(line for line in lines if not line.rstrip().endswith("built successfully"))


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """A block in which transformers shows no bars for weights that it loads or saves; those of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown, downloads_shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # the hub's bars as well
    if downloads_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown and downloads_shown:
            transformers_logging.enable_progress_bar()
