"""Which weights a result was computed with: a digest of a checkpoint's files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dama.console import digest_of, digest_of_file

SAMPLED_BLOCKS = 64
BLOCK_BYTES = 1 << 20


def digest_of_checkpoint(source: str) -> str:
    """Identity of a checkpoint's weights: a hub name with its revision, or a digest of the folder's weight files.

    Files over 64 MiB are read at 64 evenly spaced blocks of 1 MiB, so that 13 GB cost a second.
    """
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            config = cached_file(source, "config.json")
        except OSError as error:
            raise FileNotFoundError(
                f"checkpoint '{source}': expected a folder or the name of a model on the hub, found no such "
                f"folder, and the hub gave none ({str(error).splitlines()[0]})"
            ) from error
        return f"{source}@{Path(str(config)).parent.name}"
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and path.is_file())
    if not weights:
        raise FileNotFoundError(f"checkpoint '{source}': expected weights (*.safetensors or *.bin), found none")
    return digest_of([[path.name, path.stat().st_size, _digest_of_weights(path)] for path in weights])


def _digest_of_weights(path: Path) -> str:
    size = path.stat().st_size
    if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
        return digest_of_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for k in range(SAMPLED_BLOCKS):
            file.seek(k * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1), os.SEEK_SET)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]
