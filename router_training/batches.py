"""Prepared queries as the BERT router's training reads them: parts mapped into memory, an order of parts and rows per epoch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset, Sampler

from serving.encoder import cut

KEPT_PARTS = 8
"""Parts whose rows are held at once."""


class Parts(Dataset[tuple[str, int]]):
    """(text, label) of Parquet parts with columns ``text`` and ``label``, in their order. Holds the rows of a few parts."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.counts = [pq.read_metadata(path).num_rows for path in self.paths]
        self._ends = np.cumsum([0, *self.counts])
        self._held: OrderedDict[int, tuple[list[str], list[int]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[str, int]:
        part = int(np.searchsorted(self._ends, index, side="right")) - 1
        texts, labels = self._rows(part)
        row = index - int(self._ends[part])
        return texts[row], labels[row]

    def _rows(self, part: int) -> tuple[list[str], list[int]]:
        if part in self._held:
            self._held.move_to_end(part)
        else:
            table = pq.read_table(self.paths[part], columns=["text", "label"], memory_map=True)
            self._held[part] = table["text"].to_pylist(), table["label"].to_pylist()
            if len(self._held) > KEPT_PARTS:
                self._held.popitem(last=False)
        return self._held[part]


class PartOrder(Sampler[int]):
    """Every row once an epoch: parts in an order drawn for the epoch, and within each its rows.

    The first epoch keeps the parts' order, which preparation has mixed. A row is read beside those of its part, so an epoch
    reads every part once; as parts are mixed, what lies beside it says nothing of its label.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self.counts = tuple(counts)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[int]:
        if self.epoch == 0:
            yield from range(len(self))
            return
        generator = np.random.default_rng((self.seed, self.epoch))
        starts = np.cumsum([0, *self.counts])
        for part in generator.permutation(len(self.counts)):
            yield from (int(starts[part] + row) for row in generator.permutation(self.counts[part]))


class Collator:
    """(text, label) pairs as what a model takes: tokenised, cut to ``max_length``, padded to the longest of the batch."""

    def __init__(self, tokenizer: Any, max_length: int, multiple: int | None) -> None:
        """``multiple``: what padded lengths are a multiple of, for devices that are faster so, where ``max_length`` is one."""
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.multiple = multiple if multiple and max_length % multiple == 0 else None

    def __call__(self, rows: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts = [cut(text, self.max_length) for text, _ in rows]
        options: dict[str, Any] = {"padding": True, "pad_to_multiple_of": self.multiple, "return_tensors": "pt"}
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, **options)
        names = self.tokenizer.model_input_names
        return {name: encoded[name] for name in encoded if name in names} | {
            "labels": torch.tensor([label for _, label in rows])
        }
