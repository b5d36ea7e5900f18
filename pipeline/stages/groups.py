"""From a recipe to what the kernels are told: how the deltas of a slice are pruned, weighed and combined."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels import sizes
from pipeline.kernels.forms import COMBINED, MASK, SUM, TRIM, Combining, PoolRows, Pruning, members, with_keys
from pipeline.kernels.fused import sizes as fused_sizes
from pipeline.kernels.fused import tables as fused_tables
from pipeline.kernels.fused.floats import tagged
from pipeline.kernels.masks import limit_of, mask_key
from pipeline.kernels.methods import catalogue
from pipeline.kernels.methods.byom import kept_per_row
from pipeline.kernels.methods.interface import Method
from pipeline.recipe import MergeSection
from pipeline.stages.slices import Slice


@dataclass(frozen=True)
class Merging:
    """How the groups of a recipe are merged."""

    section: MergeSection
    experts: tuple[str, ...]
    weights: tuple[float, ...]
    fused: bool
    """Whether slices of one data type go the compiled way."""
    device: str

    @property
    def method(self) -> Method:
        return catalogue.method(self.section.method, self.section.density, self.section.residual)

    @property
    def means(self) -> bool:
        """Whether deltas are averaged rather than added."""
        return self.section.scaling == "mean" or self.section.combine == "mean"

    def is_fused(self, part: Slice) -> bool:
        """Whether a slice goes the compiled way: one data type, and a method that has compiled parts."""
        return self.fused and part.stack is not None and self.section.method != "byom"

    def factors(self, users: NDArray[np.uint64]) -> NDArray[np.float32]:
        """(rows,) what the combined delta of these users is multiplied by."""
        scaling = 1.0 if self.section.scaling == "mean" else float(self.section.scaling)
        sets, which = np.unique(users, return_inverse=True)
        divides = self.means and self.method.form[1] == SUM and not self.method.pair_weights
        found = [scaling / (sum(self.weights[n] for n in members(int(one))) if divides else 1) for one in sets]
        with np.errstate(over="ignore"):  # what comes of an infinite factor is counted and refused
            return np.array(found).astype(np.float32)[which.reshape(-1)]

    def pruning(self, part: Slice, thresholds: tuple[float, ...], scales: tuple[float, ...]) -> Pruning:
        """How the deltas of a slice are pruned, given the thresholds and scales of whole tensors where there are any."""
        section, count, width = self.section, len(self.experts), part.tensor.width
        kind = self.method.form[0]
        keys = [mask_key(section.seed, name, part.tensor.name) for name in self.experts] if kind == MASK else [(0, 0)] * count
        limit = kept_per_row(section.keep, width) if section.method == "byom" else limit_of(section.density)
        with np.errstate(over="ignore"):  # of a density this small nothing is kept
            per_expert = np.array(scales or [1 / section.density] * count).astype(np.float32)
        sizes_kept = np.array([thresholds or [0.0] * count], np.float32)
        if kind == TRIM and section.trim_scope == "row":
            sizes_kept = self._row_thresholds(part, round(section.density * width))
        return Pruning(kind, with_keys(keys), limit, per_expert, sizes_kept, part.first * width)

    def _row_thresholds(self, part: Slice, k: int) -> NDArray[np.float32]:
        if self.is_fused(part) and part.stack is not None:
            found = np.empty((len(part), len(self.experts)), np.float32)
            fused_sizes.row_thresholds(tagged(part.base, part.tensor.dtype), part.stack, part.at, k, found)
            return found
        return np.stack([sizes.row_thresholds(delta, k) for delta in part.deltas(self.experts, self.device)], axis=1)

    def combining(self, part: Slice, rows: PoolRows, threads: int) -> Combining:
        """How the members of a slice's groups are combined."""
        weights = np.array([self.weights], np.float32)
        if self.method.pair_weights:
            weights = self._pair_weights(part, rows, threads)
        return Combining(self.method.form[1], self.means, weights)

    def _pair_weights(self, part: Slice, rows: PoolRows, threads: int) -> NDArray[np.float32]:
        """(channels, experts) the weights of every channel's pair; 1 for an expert in a group of one."""
        if self.method.pair_weights is None:
            raise AssertionError("only methods for pairs weigh them")
        if self.is_fused(part) and part.stack is not None:
            gram = fused_tables.table(tagged(part.base, part.tensor.dtype), part.stack, part.at, "gram", threads)
        else:
            import torch

            from pipeline.kernels import tables

            gram = tables.table(torch.stack(part.deltas(self.experts, self.device)), "gram").cpu().numpy()
        weights = np.ones((len(part), len(self.experts)), np.float32)
        channels = np.repeat(np.arange(len(part)), np.diff(rows.starts))
        for users in np.unique(rows.users):
            pair = members(int(users))
            here = channels[(rows.users == users) & (rows.kinds == COMBINED)]
            if len(pair) == 2 and len(here):
                found = self.method.pair_weights(gram[np.ix_(here, pair, pair)], self.section.t)
                weights[np.ix_(here, pair)] = found
        return weights
