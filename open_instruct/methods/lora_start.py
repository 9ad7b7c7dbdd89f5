"""Starts of LoRA from the base's weights, which leave the base as it is: PiSSA and OLoRA.

PiSSA (Meng et al. 2024, 2404.02948) and OLoRA (Büyükakyüz 2024, 2406.01775) begin with a part of each weight in the
adapter, and take it out of the base. With the update s B A of rank r, and its value s B₀ A₀ at the start,

    W' = (W - s B₀ A₀) + s B A

Rounding W - s B₀ A₀ to 16 bits changes the base, and a base without that part fits no other adapter. So here the base
stays W, and the adapter holds both products, as one update of rank 2r whose second half is fixed:

    W' = W + s [B, -B₀] [A; A₀]

It is the same function of A and B, so their gradients and the training are the same. At the start the update is zero.
What is saved is a plain LoRA adapter of rank 2r, as PEFT's own conversion
(`path_initial_model_for_weight_conversion`) would make it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from open_instruct.errors import InputError
from open_instruct.flags.lora import iterations_of

if TYPE_CHECKING:
    import torch


def scale_of_doubled(alpha: float, rslora: bool) -> float:
    """Return the alpha with which rank 2r has the scale that `alpha` has with rank r."""
    return alpha * (math.sqrt(2) if rslora else 2)


def start_from_weights(wrapped: Any, init: str, rank: int) -> None:
    """Fill adapters of rank 2r with a start from the weights, and fix their second half.

    Args:
        wrapped: base with an adapter that PEFT made, named "default".
        init: pissa, pissa_niter_N or olora.
        rank: r. Beyond the rank of a weight, rows of A and columns of B are zero, and stay so.

    Raises:
        InputError: a module has no weight of two dimensions, or one that is not finite.
    """
    import torch
    from peft.tuners.lora.layer import LoraLayer

    for name, module in wrapped.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if "default" not in module.lora_A:
            raise InputError(f"--init_lora_weights {init}: {name} is an embedding, which can't start so: use true")
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        with torch.no_grad():
            if A.device.type != "meta":
                weight = module.get_base_layer().weight.detach().float()
                weight = weight.T if module.fan_in_fan_out else weight
                first_A, first_B = factors(weight, init, rank, module.scaling["default"])
                size = len(first_A)
                A.zero_()
                B.zero_()
                A[:size], A[rank : rank + size] = first_A, first_A
                B[:, :size], B[:, rank : rank + size] = first_B, -first_B
        fix_second_half(A, 0)
        fix_second_half(B, 1)


def factors(weight: torch.Tensor, init: str, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A₀ [k, inputs] and B₀ [outputs, k] of a weight [outputs, inputs], with k = min(rank, inputs, outputs).

    PiSSA: W ≈ U S Vᵀ with the k largest singular values; A₀ = √(S/s) Vᵀ, B₀ = U √(S/s). OLoRA: W = Q R; A₀ is the first
    k rows of R, B₀ the first k columns of Q, which the scale s multiplies.
    """
    import torch

    size = min(rank, *weight.shape)
    if init == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:size], Q[:, :size]
    iterations = iterations_of(init)
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, size, niter=iterations)
        Vh = V.T
    root = (S[:size] / scale).sqrt()
    return root[:, None] * Vh[:size], U[:, :size] * root


def fix_second_half(parameter: Any, dim: int) -> None:
    """Give the second half of a parameter along a dimension no gradient, so that AdamW leaves it as it is."""
    import torch

    def without_second_half(gradient: torch.Tensor) -> torch.Tensor:
        first, second = gradient.chunk(2, dim)
        return torch.cat([first, torch.zeros_like(second)], dim)

    parameter.register_hook(without_second_half)
    parameter.num_fixed = parameter.numel() // 2
