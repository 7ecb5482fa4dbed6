"""Encoded rows: prompt and answer as token ids and labels, one by one or as flat arrays that processes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dama.logps import IGNORE_INDEX


@dataclass(frozen=True)
class EncodedRow:
    """Prompt and answer for the model: ids [T], and labels [T], IGNORE_INDEX where nothing is supervised."""

    input_ids: Tensor
    labels: Tensor

    @property
    def supervised(self) -> int:
        """Number of supervised tokens: the answer's, with its end token."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def unsupervised(self) -> int:
        """Number of tokens before the first supervised one."""
        return int((self.labels != IGNORE_INDEX).nonzero()[0])


@dataclass(frozen=True)
class EncodedTable:
    """Encoded rows as flat arrays, which worker processes share and which take 5 bytes a token.

    Attributes:
        ids: int32 [T], all rows one after the other, IMAGE_TOKEN_INDEX for an image.
        supervised: bool [T], whether the token is part of an answer.
        offsets: int64 [R + 1], where each row begins, and the end of the last.
    """

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> EncodedRow:
        """Ids and labels of one row, as new tensors. Raises IndexError."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row}: expected 0 to {len(self) - 1}")
        part = slice(self.offsets[row], self.offsets[row + 1])
        ids = torch.from_numpy(self.ids[part].astype(np.int64))
        return EncodedRow(ids, ids.where(torch.from_numpy(self.supervised[part].copy()), IGNORE_INDEX))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row [R], an image counted as one."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TableRows(Sequence[EncodedRow]):
    """Some rows of a table, built when they are asked for.

    Args:
        indices: of the rows in the table.
    """

    table: EncodedTable
    indices: tuple[int, ...]

    @overload
    def __getitem__(self, i: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, i: slice) -> TableRows: ...

    def __getitem__(self, i: int | slice) -> EncodedRow | TableRows:
        if isinstance(i, slice):
            return TableRows(self.table, self.indices[i])
        return self.table[self.indices[i]]

    def __len__(self) -> int:
        return len(self.indices)


RowsOfPair = tuple[EncodedRow, ...] | TableRows


def longest(rows: RowsOfPair) -> int:
    """Ids of a pair's longest row."""
    if isinstance(rows, TableRows):
        offsets = rows.table.offsets
        return max(int(offsets[i + 1] - offsets[i]) for i in rows.indices)
    return max(len(row.input_ids) for row in rows)
