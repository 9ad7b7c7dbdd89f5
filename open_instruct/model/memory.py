"""Estimated memory of one process, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from open_instruct.model.weights import plain_tensors

# Numbers that a layer keeps for each token, in hidden and in feed-forward sizes: fitted to the growth of a step's peak
# memory over layers and sizes of random Llamas in float32 on CPU (torch 2.13). Frozen matrices need no copy of their
# inputs.
KEPT = {"soft prompt": (6.3, 3.1), "layers": (8.3, 4.0), "full": (10.0, 4.0)}
DROPPED = (9.0, 1.0)  # more with LoRA's dropout: seven layers' inputs after it, and their masks
OPTIMIZER_BYTES = {False: 8, True: 2}  # AdamW's two moments in float32, or in 8 bits


@dataclass(frozen=True)
class Sharing:
    """Number of processes that shard model and optimizer, and the memory that sharding costs each of them."""

    weights: int = 1  # processes among which each weight is split
    states: int = 1  # processes among which gradients and the optimizer's moments are split
    bytes_for_trained: int = 0  # for each trained number: buffers to exchange its gradient, or a second copy of it
    kept_gathered: float = 0  # numbers that an engine keeps gathered at most, where that is more than the parts in use


def estimate_mb(
    model: torch.nn.Module,
    config: PretrainedConfig,
    tokens: int,
    logit_rows: int,
    gradient_checkpointing: bool,
    use_8bit_optimizer: bool,
    activation_bytes: int,
    trains: str,
    dropout: bool = False,
    mask_bytes: int = 0,
    context_bytes: int = 0,
    sharing: Sharing = Sharing(),
    bytes_saved: int = 0,
) -> dict[str, float]:
    """Return the megabytes of one process in a training step, by what they hold.

    Activations are what a pre-norm decoder with a gated feed-forward keeps for the backward pass (`KEPT`). With
    checkpointing they are one hidden size a layer, and one layer that is recomputed. Logits exist three times in
    float32: themselves, their softmax and their gradient. This is an estimate: other architectures, allocators and
    kernels differ by tens of percent.

    Args:
        model: base with adapter.
        config: the base's configuration.
        tokens: positions of a micro-batch, padding and virtual tokens included, B · T.
        logit_rows: positions whose logits exist at once.
        gradient_checkpointing: only layer inputs are kept.
        use_8bit_optimizer: AdamW's moments in 8 bits.
        activation_bytes: bytes of an activation (4 or 2).
        trains: "soft prompt", "layers" (LoRA, VeRA, IA3) or "full", a key of `KEPT`.
        dropout: the adapter drops inputs, and has to keep the rest of them.
        mask_bytes: of attention's masks that stay on the device.
        context_bytes: of the keys and values of a context that is distilled.
        sharing: how several processes shard the model.
        bytes_saved: by quantising weights that are not quantised in `model`.

    Returns:
        weights, gradients, optimizer, activations, logits, masks, a context that is distilled, with sharded weights
        those that are gathered at a time, total; in MB of 10⁶ bytes.
    """
    text = config.get_text_config()
    weights = bytes_of(model) - bytes_saved
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden, layers = text.hidden_size, text.num_hidden_layers
    feed_forward = getattr(text, "intermediate_size", None) or 4 * hidden
    per_hidden, per_feed_forward = KEPT[trains]
    if dropout:
        per_hidden, per_feed_forward = per_hidden + DROPPED[0], per_feed_forward + DROPPED[1]
    full_layer = per_hidden * hidden + per_feed_forward * feed_forward
    kept_by_layer = hidden if gradient_checkpointing else full_layer
    recomputed = full_layer if gradient_checkpointing else 0
    parts = {
        "weights": weights / sharing.weights,
        "gradients": trained * 4 / sharing.states,
        "optimizer": trained * (OPTIMIZER_BYTES[use_8bit_optimizer] + sharing.bytes_for_trained) / sharing.states,
        "activations": tokens * (kept_by_layer * layers + recomputed) * activation_bytes,
        "logits": logit_rows * text.vocab_size * 4 * 3,
        "masks": mask_bytes,
        **({"context": context_bytes} if context_bytes else {}),
    }
    if sharing.weights > 1:  # the weights outside of layers, a layer, and the next one on its way
        in_layers = [bytes_of(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        in_use = weights - sum(in_layers) + 2 * max(in_layers, default=0)
        kept = min(weights, sharing.kept_gathered * activation_bytes)
        parts["gathered"] = max(in_use, kept) * (1 - 1 / sharing.weights)
    parts["total"] = sum(parts.values())
    return {name: round(value / 1e6, 1) for name, value in parts.items()}


def bytes_of(module: torch.nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    parts = (part for parameter in module.parameters() for part in plain_tensors(parameter))
    return sum(part.numel() * part.element_size() for part in parts)


def counts(model: torch.nn.Module) -> dict[str, Any]:
    """Count trained and all parameters; a 4-bit weight counts as the numbers that it stands for."""
    trained = total = 0
    for parameter in model.parameters():
        # ZeRO-3 leaves a sharded weight no elements of its own.
        num_elements = getattr(parameter, "ds_numel", parameter.numel())
        quantisation = getattr(parameter, "quant_state", None)
        if quantisation is not None:
            num_elements = quantisation.shape.numel()
        total += num_elements
        if parameter.requires_grad:
            trained += num_elements - getattr(parameter, "num_fixed", 0)  # see `methods.lora_start`
    return {"trainable_parameters": trained, "total_parameters": total}
