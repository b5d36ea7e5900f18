"""What staying with the loaded expert costs and saves: a trace of queries is routed at several margins. Pure numpy.

To switch an expert moves rows of its weights, so a query that two experts answer about as well is best given to the one that is
there. At margin m the loaded expert stays when the best one's share is larger by less than m (``serving.choice.choose``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARGINS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def sessions(labels: NDArray[Any], length: int, stickiness: float, seed: int) -> NDArray[np.int64]:
    """Positions of a trace of ``length`` queries: the next query is of the same expert's kind with the chance ``stickiness``.

    Otherwise its kind is drawn evenly from the others; the query itself is drawn evenly from those of its kind, repeats
    included. ValueError when there is no query, or no second kind for a stickiness below 1.
    """
    kinds = np.unique(labels)
    if not 0 <= stickiness <= 1 or not len(kinds) or (len(kinds) == 1 and stickiness < 1):
        raise ValueError(f"expected queries of two kinds and a stickiness of 0 to 1, got {len(kinds)} and {stickiness}")
    random = np.random.default_rng(seed)
    steps = np.where(random.random(length) < stickiness, 0, random.integers(1, max(2, len(kinds)), length))
    steps[:1] = random.integers(0, len(kinds), min(1, length))
    wanted = np.cumsum(steps) % len(kinds)
    draws = random.random(length)
    trace = np.zeros(length, np.int64)
    for place, kind in enumerate(kinds):
        mine = np.flatnonzero(labels == kind)
        where = wanted == place
        trace[where] = mine[(draws[where] * len(mine)).astype(np.int64)]
    return trace


def simulate(
    shares: NDArray[np.float64],
    labels: NDArray[Any],
    margins: Sequence[float] = MARGINS,
    thresholds: NDArray[np.float64] | None = None,
    fallback: int | None = None,
) -> list[dict[str, Any]]:
    """Accuracy, and switches per 1000 queries, of a trace: of the oracle, and at every margin; at 0 it is plain argmax.

    ``shares``: (queries, experts) in the order in which they come; ``labels``: (queries). ``thresholds``: (experts); below them
    the ``fallback`` is given the query: its position, or -1 for the base, which never is the right answer; None: no fallback.
    Nothing is loaded before the first query, and to load for it is no switch.
    """
    steps, count = shares.shape
    bounds = np.zeros(count) if fallback is None or thresholds is None else thresholds
    at = np.asarray(margins, np.float64)
    best, most = shares.argmax(axis=1), shares.max(axis=1) if steps else np.zeros(0)
    passes = shares >= bounds
    chosen = np.empty((steps, len(at)), np.int64)
    loaded = np.full(len(at), -1)
    for step in range(steps):
        top = best[step]
        if fallback is not None and not passes[step, top]:
            loaded = np.full(len(at), fallback)
        else:
            stays = (loaded >= 0) & (most[step] - shares[step, loaded] < at) & passes[step, loaded]
            loaded = np.where(stays, loaded, top)
        chosen[step] = loaded
    right = (chosen == np.asarray(labels)[:, None]).sum(axis=0)
    found = [{"choice": "oracle", "margin": None, "accuracy": 1.0, "switches_per_1000": _per_1000(np.asarray(labels))}]
    for place, margin in enumerate(margins):
        found.append(
            {
                "choice": "argmax" if margin == 0 else "margin",
                "margin": float(margin),
                "accuracy": int(right[place]) / steps if steps else None,
                "switches_per_1000": _per_1000(chosen[:, place]),
            }
        )
    return found


def _per_1000(loaded: NDArray[Any]) -> float:
    return 1000 * int((loaded[1:] != loaded[:-1]).sum()) / len(loaded) if len(loaded) else 0.0
