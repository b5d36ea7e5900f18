"""The merge methods by the names a recipe calls them."""

from __future__ import annotations

from dataclasses import replace

from pipeline.kernels.forms import WHOLE
from pipeline.kernels.methods import average, byom, dare, dare_ties, slerp, task_arithmetic, ties
from pipeline.kernels.methods.interface import Method, whole

METHODS = {
    "average": average.METHOD,
    "task_arithmetic": task_arithmetic.METHOD,
    "ties": ties.METHOD,
    "dare": dare.METHOD,
    "dare_ties": dare_ties.METHOD,
    "slerp": slerp.METHOD,
}


def method(name: str, density: float, residual: str) -> Method:
    """The method of this name; with density 1 TIES and DARE prune nothing."""
    if name == "byom":
        return byom.METHODS[residual]
    found = METHODS[name]
    return found if density < 1 else replace(found, prune=whole, form=(WHOLE, found.form[1]))
