"""What each method can be combined with: asked before a run, printed at its start, and written to docs/capabilities.md."""

from __future__ import annotations

from open_instruct.methods import Method

# Columns of the table. Whether packing is exact also depends on the model, which a probe decides at the start of a run.
PACKING, CHECKPOINTING, PADDED_CHECKPOINTING = "packing", "gradient checkpointing", "gradient checkpointing, padded"
EIGHT_BITS, FOUR_BITS = "8-bit base", "4-bit base"
DDP, ZERO_2, ZERO_3, FSDP = "DDP", "ZeRO-2", "ZeRO-3", "FSDP"
FEATURES = (PACKING, CHECKPOINTING, PADDED_CHECKPOINTING, EIGHT_BITS, FOUR_BITS, DDP, ZERO_2, ZERO_3, FSDP)


def obstacle(method: Method, feature: str) -> str | None:
    """Why a method can't be combined with a feature, and what to do; None if it can."""
    if feature == PADDED_CHECKPOINTING and method.name == "prefix_tuning":
        return "PEFT passes a prefix through the cache, which checkpointing has to drop: leave --packing on, or checkpointing off"
    if feature in (EIGHT_BITS, FOUR_BITS) and method.name == "full":
        return "quantised weights can't be trained in full: choose another method, for example --use_lora"
    if feature == EIGHT_BITS and method.needs_quantised_base:
        return "its base is held in 4 bits: drop --load_in_8bit, or use --use_lora"
    if feature in (ZERO_3, FSDP) and method.needs_quantised_base:
        return "quantised weights can't be shared out: use DDP or ZeRO-2"
    if feature == ZERO_3 and method.name == "ia3":
        return "DeepSpeed loses track of IA3's factors, which stand outside of modules: use DDP, ZeRO-2 or FSDP"
    return None


def line(method: Method) -> str:
    """The method's row of the table, for the log."""
    can = [feature for feature in FEATURES if obstacle(method, feature) is None]
    cannot = [feature for feature in FEATURES if obstacle(method, feature)]
    return f"{method.title} works with {', '.join(can)}" + (f"; not with {', '.join(cannot)}" if cannot else "")
