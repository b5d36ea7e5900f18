"""SLERP (Shoemake 1985) for groups of two: along the arc between the members' deltas, channel by channel.

The arc lies between the deltas, not between the weights: weights fine-tuned from one base have cosines near 1, where SLERP
is a straight line. Between deltas it keeps their length: at t = 1/2 orthogonal deltas of equal norm merge to (a + b) / sqrt 2,
where the mean is shorter by sqrt 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.kernels.forms import SUM, WHOLE
from pipeline.kernels.methods.interface import Method, added, whole

STRAIGHT = 0.9995
"""From this |cosine| on the arc is a line (as in the original implementations): its formula divides by the sine."""


def pair_weights(gram: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """Weights (rows, 2) of a pair's deltas: sin((1 - t) w) / sin w and sin(t w) / sin w, or 1 - t and t on a line.

    ``gram``: (rows, 2, 2) float64 of the pair's deltas; ``t``: 0 the first, 1 the second. A zero delta is on a line with all.
    """
    norms = np.sqrt(gram[:, 0, 0] * gram[:, 1, 1])
    cosine = np.divide(gram[:, 0, 1], norms, out=np.ones_like(norms), where=norms > 0)
    line = np.abs(cosine) > STRAIGHT
    angle = np.arccos(np.where(line, 0.0, cosine))
    arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], axis=1) / np.sin(angle)[:, None]
    return np.where(line[:, None], np.array([1 - t, t]), arc)


METHOD = Method(prune=whole, combine=added, form=(WHOLE, SUM), pair_weights=pair_weights)
