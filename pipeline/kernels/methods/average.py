"""Weight averaging, a model soup (Wortsman et al., arXiv 2203.05482): sum(w theta) / sum(w) of the members.

It is task arithmetic whose lambda is 1 / sum(w); a recipe cannot give it another.
"""

from __future__ import annotations

from pipeline.kernels.forms import SUM, WHOLE
from pipeline.kernels.methods.interface import Method, added, whole

METHOD = Method(prune=whole, combine=added, form=(WHOLE, SUM))
