"""Trained parameters away from their start, so that a probe sees what an adapter does that starts as nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SHARE, LEAST = 0.1, 0.02  # noise, as a share of a parameter's root mean square, and at least


@contextmanager
def away_from_start(model: Any) -> Iterator[None]:
    """Add noise to the trained parameters for as long as the context lasts; then they are as before, bit for bit.

    An update that starts at zero hides how its layers compute: a layer that mixes the tokens of a batch would look as
    if it did not. Parameters without values, on the meta device, stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_meta and p.is_floating_point()]
    values = [parameter.detach().clone() for parameter in trained]
    try:
        with torch.no_grad():
            for parameter in trained:
                size = max(SHARE * parameter.float().pow(2).mean().sqrt().item(), LEAST)
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.add_(noise.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
