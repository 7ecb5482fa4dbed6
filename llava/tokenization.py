"""Loads tokenizers with the ids, and the decoded text, of LLaVA's set-up: transformers 4.37's slow LlamaTokenizer."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import transformers
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from dama.console import write_json
from dama.remote_code import remote_code_refused

SPACE = "\u2581"  # sentencepiece's visible space


class LlamaTokenizer(transformers.LlamaTokenizer):
    """The fast LlamaTokenizer with sentencepiece's rule for the dummy prefix; saves LLaMA's own files.

    sentencepiece puts one space before the text even where the text starts with a space; the library's pre-tokenizer
    leaves it out there. With `legacy` the space goes before every stretch of text between special tokens, without it
    only before the very first character. The name is the library's, so that what is saved names a class that
    AutoTokenizer knows.
    """

    def __init__(
        self,
        vocab: Any = None,
        merges: Any = None,
        *,
        legacy: bool | None = None,
        add_bos_token: bool = True,
        **kwargs: Any,
    ) -> None:
        # Older checkpoints do not say; LLaVA's library then took the legacy rule.
        legacy = True if legacy is None else legacy
        super().__init__(vocab, merges, legacy=legacy, add_bos_token=add_bos_token, **kwargs)
        # Spaces become visible first, so that the step that prepends a plain space never finds one already there.
        self.backend_tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", prepend_scheme="always" if legacy else "first", split=False),
                pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False),
            ]
        )

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        if not self.legacy:
            return super()._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        special = {str(token) for token in self.added_tokens_decoder.values() if token.special}
        tokens = [str(self.convert_ids_to_tokens(index)) for index in ids]
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in special]
        return self._join_legacy(tokens, special)

    def _join_legacy(self, tokens: list[str], special: set[str]) -> str:
        """Undoes the dummy prefix of every stretch of text, and sets a space before one that a special token ends."""
        if tokens:
            tokens[0] = tokens[0].removeprefix(SPACE)
        runs = [(is_special, list(run)) for is_special, run in groupby(tokens, key=special.__contains__)]
        parts: list[str] = []
        for position, (is_special, run) in enumerate(runs, start=1):
            if is_special:
                parts += run
            else:
                text = self.convert_tokens_to_string([token for token in run if token])
                parts.append(text if position == len(runs) else " " + text)
        return "".join(parts)

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], *_: Any, **__: Any) -> tuple[str, ...]:
        """LLaMA's files, which older libraries read too: tokenizer.model and what is said about it."""
        folder = Path(save_directory)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        for key in ("backend", "extra_special_tokens", "is_local", "local_files_only"):
            config.pop(key, None)  # of this library only; older ones stumble over them
        added = {str(index): token.__getstate__() for index, token in self.added_tokens_decoder.items()}
        config |= {"added_tokens_decoder": added, "legacy": self.legacy}
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", {key: str(v) for key, v in self.special_tokens_map.items()})
        return (*file_names, str(folder / "special_tokens_map.json"), *self.save_vocabulary(str(folder)))


def load_tokenizer(
    folder: str | Path, model_max_length: int | None = None, padding_side: str = "right"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub repository, its side of padding and its pad token always set.

    A LLaMA repository with its sentencepiece model (tokenizer.model) gets the class above. Any other, such as Qwen's or
    one with a tokenizer.json only, is read by AutoTokenizer as it is; code from the repository is never run.

    Args:
        model_max_length: tokens at which text-only rows are cut; None keeps what the checkpoint says.
        padding_side: "right" for training, "left" for batched generation.
    """
    options: dict[str, Any] = {"padding_side": padding_side}
    if model_max_length is not None:
        options["model_max_length"] = model_max_length
    loader = LlamaTokenizer
    if not is_llama_sentencepiece(folder):
        loader, options = AutoTokenizer, options | {"trust_remote_code": False}
    with remote_code_refused(f"tokenizer of '{folder}'", "give a checkpoint whose tokenizer needs no code of its own"):
        tokenizer = loader.from_pretrained(str(folder), **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def is_llama_sentencepiece(folder: str | Path) -> bool:
    """Whether the repository has a tokenizer.model and names LLaMA's tokenizer class (old ones name none at all)."""
    named = get_tokenizer_config(str(folder)).get("tokenizer_class", "LlamaTokenizer")
    if named not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return False
    return cached_file(str(folder), "tokenizer.model", _raise_exceptions_for_missing_entries=False) is not None
