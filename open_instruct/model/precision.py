"""The precision in which a run computes."""

from __future__ import annotations

import torch


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """Return a context that computes in bfloat16 what allows it, if that is the run's precision, and nothing else.

    In float16 and float32 the base is held in that precision, and nothing has to be cast.
    """
    return torch.autocast(device_type, torch.bfloat16, enabled=dtype == torch.bfloat16)
