"""AdamW for the trained parameters, and the schedule of its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from open_instruct.errors import InputError


@dataclass(frozen=True)
class OptimizerSettings:
    """Hyperparameters of optimizer and schedule, all resolved."""

    learning_rate: float  # at the peak
    lr_scheduler_type: str
    warmup_ratio: float
    final_lr_ratio: float  # of the peak, at the end of a linear or cosine schedule
    weight_decay: float
    clip_grad_norm: float  # bound of the gradient's L2 norm; none where not positive
    fused: bool = True
    eight_bits: bool = False

    def warmup_steps(self, num_steps: int) -> int:
        """Return the steps of the warm-up. At least one step follows it, so that a run of one step trains."""
        return min(math.ceil(self.warmup_ratio * num_steps), num_steps - 1)


def make_optimizer(groups: list[dict[str, Any]], settings: OptimizerSettings, num_steps: int) -> tuple[Any, Any]:
    """Return optimizer and schedule.

    accelerate does not prepare the schedule, which advances once a step whatever the number of processes.

    Args:
        groups: groups of parameters, see `Method.parameter_groups`.
        settings: hyperparameters.
        num_steps: steps of the run.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.eight_bits:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise InputError("--use_8bit_optimizer needs bitsandbytes: pip install '.[quant]'") from None
        optimizer: Any = AdamW8bit(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=settings.fused, **options)
    return optimizer, make_schedule(optimizer, settings, num_steps)


def make_schedule(optimizer: Any, settings: OptimizerSettings, num_steps: int) -> Any:
    """Return transformers' schedule. A final rate above 0 selects the variant that ends there."""
    name, ratio = settings.lr_scheduler_type, settings.final_lr_ratio
    specific: dict[str, Any] = {}
    if ratio == 1:
        name = "constant_with_warmup"
    elif ratio and name == "linear":
        name, specific = "polynomial", {"power": 1.0, "lr_end": ratio * settings.learning_rate}
    elif ratio:
        name, specific = "cosine_with_min_lr", {"min_lr_rate": ratio}
    warmup = settings.warmup_steps(num_steps)
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps, scheduler_specific_kwargs=specific
    )


def set_step(schedule: Any, step: int) -> None:
    """Put a schedule where it is after `step` steps: the rate is a function of the step alone."""
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step - 1, "_step_count": step + 1})
    schedule.step()


def first_state(optimizer: Any, shape: tuple[int, ...]) -> Any:
    """Return what an optimizer of this kind keeps of a parameter of this shape after its first step.

    torch's own computes that without memory; bitsandbytes' runs on real tensors only.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
    is_torch = isinstance(inner, torch.optim.AdamW)
    device = "meta" if is_torch else inner.param_groups[0]["params"][0].device
    parameter = torch.nn.Parameter(torch.zeros(shape, device=device))
    parameter.grad = torch.zeros_like(parameter)
    scratch = type(inner)([parameter], **({"foreach": False} if is_torch else {}))
    scratch.step()
    return scratch.state_dict()["state"][0]
