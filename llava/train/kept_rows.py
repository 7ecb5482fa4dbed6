"""Encoded rows in the user's cache, as arrays that processes share: tokenized once, then mapped into memory."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dama.cache import cache_name, code_digest, shared
from dama.console import writing
from dama.pairs import PreferencePair
from dama.train.rows import EncodedTable
from llava.conversation import Template

MANY = 2000  # pairs from which on their rows are kept
DTYPES = {"ids": np.int32, "supervised": np.bool_, "offsets": np.int64}
SOURCES = (
    "dama/train/rows.py", "llava/conversation.py", "llava/mm_utils.py", "llava/tokenization.py",
    "llava/train/batch_encoding.py", "llava/train/kept_rows.py", "llava/train/preprocess.py",
    "llava/train/word_cache.py",
)  # fmt: skip


def kept_rows(
    make: Callable[[], EncodedTable],
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    answers: Sequence[str],
    *settings: object,
) -> EncodedTable:
    """The table that `make` encodes, or the same one from the cache.

    Args:
        pairs, tokenizer, template, answers, settings: all that the table depends on; settings are JSON values.
    """
    if len(pairs) < MANY:
        return make()
    backend = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    own = [type(tokenizer).__name__, backend, str(tokenizer.eos_token), str(tokenizer.bos_token)]
    name = cache_name("rows", digest_of_texts(pairs, answers), own, repr(template), settings, code_digest(*SOURCES))
    return shared(name, make, read_table, write_table)


def digest_of_texts(pairs: Sequence[PreferencePair], answers: Sequence[str]) -> str:
    """SHA-256 of the questions and these answers, each with its length."""
    digest, texts = hashlib.sha256(repr(answers).encode()), attrgetter("question", *answers)
    for pair in pairs:
        contents = [text.encode("utf-8", "surrogatepass") for text in texts(pair)]
        digest.update(b"".join([b"%d:%b" % (len(content), content) for content in contents]))
    return digest.hexdigest()


def write_table(table: EncodedTable, folder: Path) -> None:
    """Write the arrays, each a .npy file, into a folder that appears whole. Raises OSError."""
    arrays = {name: getattr(table, name) for name in DTYPES}
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        with writing(folder, sum(array.nbytes for array in arrays.values())):
            partial.mkdir()
            for name, array in arrays.items():
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
            shutil.rmtree(folder, ignore_errors=True)  # one that is damaged
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_table(folder: Path) -> EncodedTable | None:
    """The table of a folder, its arrays mapped into memory page by page; None where it is absent or damaged."""
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in DTYPES}
    except (OSError, ValueError, EOFError):
        return None
    table = EncodedTable(**{name: np.asarray(array) for name, array in arrays.items()})
    sizes = len(table.ids), len(table.supervised)
    whole = all(array.dtype == DTYPES[name] and array.ndim == 1 for name, array in arrays.items())
    return table if whole and len(table.offsets) and sizes == (table.offsets[-1],) * 2 else None
