"""Task arithmetic (Ilharco et al., arXiv 2212.04089): base + lambda * sum(w d), or the weighted mean of the deltas."""

from __future__ import annotations

from pipeline.kernels.forms import SUM, WHOLE
from pipeline.kernels.methods.interface import Method, added, whole

METHOD = Method(prune=whole, combine=added, form=(WHOLE, SUM))
