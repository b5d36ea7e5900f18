"""The plan: what every tensor of every checkpoint becomes, and in which blocks the work is done. Pure.

``pipeline.drafting`` makes it from headers and the recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline import memory
from pipeline.recipe import AUTO
from pipeline.roles import layer_of
from storage.layout import DTYPES, SHARD_BYTES, chunk_rows
from storage.tensors import TensorInfo


@dataclass(frozen=True)
class TensorPlan:
    """What one tensor becomes."""

    name: str
    policy: str
    """merge, private or base."""
    groups: int | Literal["auto"]
    """K; 0 unless the policy is merge."""
    base: TensorInfo | None
    """The base's rows; of a tied head or embedding, the partner's. None when only experts have the tensor."""
    experts: Mapping[str, TensorInfo]
    """The experts that have it, in order of name."""
    kind: str = "linear"
    """What it is, see ``pipeline.roles``."""
    reason: str = ""
    """Why it has its policy."""

    @property
    def reference(self) -> TensorInfo:
        return self.base or next(iter(self.experts.values()))

    @property
    def dtype(self) -> str:
        """The pool's data type: the base's."""
        return self.reference.dtype

    @property
    def width(self) -> int:
        return self.reference.width

    @property
    def base_rows(self) -> int:
        return self.base.rows if self.base else 0

    @property
    def rows(self) -> int:
        """Channels, over all experts."""
        return max(info.rows for info in self.experts.values())

    @property
    def is_clustered(self) -> bool:
        """Whether its experts are to be grouped: neither all together nor each alone."""
        return self.policy == "merge" and (self.groups == AUTO or 1 < self.groups < len(self.experts))

    @property
    def is_combined(self) -> bool:
        """Whether deltas meet: not where every expert has a group of its own."""
        return self.policy == "merge" and (self.groups == AUTO or self.groups < len(self.experts))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reference.shape

    @property
    def channel_axis(self) -> int:
        return self.reference.channel_axis

    @property
    def matrix_rows(self) -> int:
        """Rows that cannot be read without others: none, as the plan's tensors are read from the store."""
        return 0

    @property
    def slab_bytes(self) -> int:
        """Bytes of the largest matrix that is read whole to be transposed."""
        return max(info.slab_bytes for info in (self.reference, *self.experts.values()))

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, which depend on the width alone once there are enough rows."""
        return chunk_rows(self.rows, self.width)


def pool_rows(tensor: TensorPlan, experts: int) -> tuple[int, int]:
    """Rows of a tensor's pool, at most: of channels that the base has, and beyond."""
    if tensor.policy == "base":
        return tensor.base_rows, 0
    extra = sum(max(info.rows - tensor.base_rows, 0) for info in tensor.experts.values())
    if tensor.policy == "merge" and tensor.groups != AUTO:
        return min(tensor.groups, experts) * tensor.base_rows, extra
    return sum(info.rows for info in tensor.experts.values()) - extra, extra


class Tall(Protocol):
    """What can be cut into blocks: a tensor plan, or one expert's tensor."""

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def chunk_rows(self) -> int: ...
    @property
    def matrix_rows(self) -> int: ...


WAVES = 8
"""Waves of a model whose pool is neither small nor large."""
LEAST_WAVE_BYTES = 256 << 20
"""Pool bytes below which a wave is not worth its own file."""

MATRICES = 8
"""Matrices stored (in, out) in one piece, at least: where a piece ends inside of one, both its neighbours read it whole."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """The unit of work of a task: pieces of one layer, each of whole chunks."""

    label: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class MergePlan:
    """Everything the stages need to know; small, and it pickles."""

    experts: tuple[str, ...]
    """Sorted names."""
    tensors: Mapping[str, TensorPlan]
    """In natural order of name."""
    memory: int
    """Bytes one task may use."""
    ties: Mapping[str, Mapping[str, str]]
    """Expert -> its tied tensors and the tensor each is a copy of."""
    renamed: Mapping[str, Mapping[str, str]]
    """Expert -> tensor -> its name in the expert's own checkpoint, where that is another."""
    notes: tuple[str, ...]
    """What a user should know: casts, larger vocabularies."""

    @property
    def merged(self) -> list[TensorPlan]:
        return [tensor for tensor in self.tensors.values() if tensor.policy == "merge"]

    @property
    def clustered(self) -> list[TensorPlan]:
        """Merged tensors whose experts are to be grouped: neither all together nor each alone."""
        return [tensor for tensor in self.merged if tensor.is_clustered]

    @property
    def combined(self) -> list[TensorPlan]:
        """Merged tensors where deltas meet: all but those with a group for each expert."""
        return [tensor for tensor in self.merged if tensor.is_combined]

    @property
    def waves(self) -> list[list[TensorPlan]]:
        """The plan's tensors in runs that go through all stages together, see ``plan_waves``."""
        return plan_waves(self.tensors.values(), len(self.experts))

    def blocks(self, tensors: Iterable[Tall]) -> list[Block]:
        """Blocks over these tensors, sized so that a worker has several and the memory budget holds."""
        return plan_blocks(tensors, memory.block_elements(self.memory, len(self.experts)))


def plan_waves(tensors: Iterable[TensorPlan], experts: int) -> list[list[TensorPlan]]:
    """Cut the plan into runs of tensors, in order, that go through all stages together and make one file of the pool each.

    A wave is merged while later ones still come in. Pool bytes are bounds from above, known before anything is clustered;
    a tensor beyond the limit is a wave of its own.
    """
    sized = [(tensor, sum(pool_rows(tensor, experts)) * tensor.width * DTYPES[tensor.dtype].size) for tensor in tensors]
    limit = min(SHARD_BYTES, max(LEAST_WAVE_BYTES, sum(size for _, size in sized) // WAVES))
    waves: list[list[TensorPlan]] = [[]]
    used = 0
    for tensor, size in sized:
        if waves[-1] and used + size > limit:
            waves.append([])
            used = 0
        waves[-1].append(tensor)
        used += size
    return waves


def plan_blocks(tensors: Iterable[Tall], max_elements: int) -> list[Block]:
    """Cut tensors into pieces of whole chunks and gather small ones of one layer. Every row is in exactly one piece."""
    blocks: list[Block] = []
    for layer, members in itertools.groupby(tensors, key=lambda tensor: layer_of(tensor.name)):
        pieces: list[Piece] = []
        size = 0
        for tensor in members:
            chunks = max(
                max_elements // (tensor.chunk_rows * tensor.width), -(-MATRICES * tensor.matrix_rows // tensor.chunk_rows), 1
            )
            step = chunks * tensor.chunk_rows
            for start in range(0, tensor.rows, step):
                piece = Piece(tensor.name, start, min(start + step, tensor.rows))
                elements = (piece.stop - piece.start) * tensor.width
                if pieces and size + elements > max_elements:
                    blocks.append(_block(layer, pieces))
                    pieces, size = [], 0
                pieces.append(piece)
                size += elements
        blocks.append(_block(layer, pieces))
    return blocks


def _block(layer: str, pieces: Sequence[Piece]) -> Block:
    names = {piece.tensor for piece in pieces}
    label = names.pop() if len(names) == 1 else layer
    return Block(label, tuple(pieces))
