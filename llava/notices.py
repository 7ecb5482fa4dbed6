"""Notices of libraries that are held back until what they are about is used."""

from __future__ import annotations

import logging


class HeldBack(logging.Filter):
    """Keep a library's log records for later instead of printing them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.released = False

    def filter(self, record: logging.LogRecord) -> bool:
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
