"""Features that a method may be combined with; its `obstacles` name those that it can't be combined with, and why."""

from __future__ import annotations

from enum import Enum


class Feature(str, Enum):
    """Columns of docs/capabilities.md.

    Whether packing is exact also depends on the model: a probe decides in each run.
    """

    PACKING = "packing"
    CHECKPOINTING = "gradient checkpointing"
    PADDED_CHECKPOINTING = "gradient checkpointing, padded"
    EIGHT_BITS = "8-bit base"
    FOUR_BITS = "4-bit base"
    DDP = "DDP"
    ZERO_2 = "ZeRO-2"
    ZERO_3 = "ZeRO-3"
    FSDP = "FSDP"

    def __str__(self) -> str:
        """Return the column's title."""
        return self.value
