"""Token ids of LLaMA text, word by word from a cache: much faster than the tokenizer where words repeat.

LLaMA's tokenizer merges characters over a whole text. None of its pieces has a space after another character, so no
merge crosses the start of a run of spaces, and the ids of a text are those of its words one after the other, each with
the spaces before it. `word_cache` checks that a tokenizer is of this kind.
"""

from __future__ import annotations

import re
from itertools import chain

from tokenizers import models
from transformers import PreTrainedTokenizerBase

from llava.tokenization import SPACE, LlamaTokenizer

WORD = re.compile(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
MAX_WORDS = 1 << 18
MAX_BEGINNINGS = 1 << 10  # system prompts, and the questions that answers share


class _Words(dict[str, list[int]]):
    """Ids of the words met so far; a new one is tokenized when it is looked up."""

    def __init__(self, model: models.Model) -> None:
        super().__init__()
        self.model = model

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= MAX_WORDS:
            self.clear()
        ids = self[word] = [token.id for token in self.model.tokenize(word)]
        return ids


class WordCache:
    """Ids of texts that hold no special or added token, BOS not included.

    Args:
        model: the tokenizer's. added: spellings of its special and added tokens. end: the one that ends answers.
        bos_id, end_id: ids of BOS and of `end`.
    """

    def __init__(self, model: models.Model, added: frozenset[str], end: str, bos_id: int, end_id: int) -> None:
        self.added, self.end, self.bos_id, self.end_id = added, end, bos_id, end_id
        self.words = _Words(model)
        self.beginnings: dict[str, list[int]] = {}

    def ids_of(self, text: str) -> list[int]:
        """Ids of the beginning of a text, before which the tokenizer puts a space; those of the last texts are kept."""
        ids = self.beginnings.get(text)
        if ids is None:
            if len(self.beginnings) >= MAX_BEGINNINGS:
                self.beginnings.clear()
            ids = self.beginnings[text] = self._ids(SPACE + text) if text else []
        return ids

    def ids_within(self, text: str) -> list[int]:
        """Ids of a text that follows another one and begins with a space."""
        return self._ids(text)

    def is_plain(self, text: str) -> bool:
        """Whether the text holds no spelling of a special or added token."""
        return not any(spelling in text for spelling in self.added)

    def ends_plainly(self, text: str) -> bool:
        """Whether the text's only spelling of a special or added token is the end token that it ends with."""
        others = any(spelling in text for spelling in self.added if spelling != self.end)
        return not others and text.find(self.end) == len(text) - len(self.end)

    def _ids(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self.words.__getitem__, WORD.findall(text.replace(" ", SPACE)))))


def word_cache(tokenizer: PreTrainedTokenizerBase) -> WordCache | None:
    """A cache for a tokenizer whose texts can be encoded word by word, None for any other."""
    if not isinstance(tokenizer, LlamaTokenizer) or tokenizer("").input_ids != [tokenizer.bos_token_id]:
        return None
    model = tokenizer.backend_tokenizer.model
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    end = added.get(str(tokenizer.eos_token))
    if not merges_within_words(model, tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)) or end is None:
        return None
    if end.lstrip or end.rstrip or end.single_word or any(SPACE in text or " " in text for text in added):
        return None
    return WordCache(model, frozenset(added), str(end), tokenizer.bos_token_id, int(tokenizer.eos_token_id))


def merges_within_words(model: models.Model, vocabulary: dict[str, int]) -> bool:
    """Whether the tokenizer's model is a BPE of which no piece has a space after another character."""
    return (
        isinstance(model, models.BPE)
        and model.byte_fallback
        and not (model.dropout or model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix)
        and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))  # a character without a piece becomes bytes
        and not any(SPACE in piece.lstrip(SPACE) for piece in vocabulary)
    )
