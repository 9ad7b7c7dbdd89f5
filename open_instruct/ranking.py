"""The order of losses wherever one is chosen: what is not finite comes last."""

from __future__ import annotations

import math


def finite_or_inf(loss: float | None) -> float:
    """Return the loss, or infinity in place of NaN or None: `min` and `sorted` would prefer a NaN that comes first."""
    return loss if loss is not None and math.isfinite(loss) else math.inf
