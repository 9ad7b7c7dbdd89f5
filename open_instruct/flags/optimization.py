"""Flags of steps, rates, the forward pass and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_instruct.flags import combinations as checks
from open_instruct.flags.declare import flag

ATTENTION_BACKENDS = Literal["blocked", "sdpa", "varlen", "flash_attn"]
SCHEDULES = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
MAX_SEED = 2**32 - 1  # of numpy's generators


@dataclass(frozen=True)
class OptimizationFlags:
    """Steps, rates and limits.

    A step is per_device_train_batch_size × processes × gradient_accumulation_steps examples.
    """

    per_device_train_batch_size: int = flag(
        8,
        "examples of one process in a micro-batch. Packed rows hold more or fewer, but a step holds the same number",
        at_least=1,
        in_study="same",
        on_resume="content",
        at_most=10**6,
    )
    gradient_accumulation_steps: int = flag(
        1,
        "micro-batches of one process in a step",
        at_least=1,
        in_study="same",
        on_resume="content",
        at_most=10**6,
    )
    num_train_epochs: int = flag(
        2,
        "passes over the data",
        at_least=1,
        in_study="same",
        on_resume="content",
        at_most=10**6,
    )
    max_train_steps: int | None = flag(
        None,
        "optimizer steps; overrides num_train_epochs",
        at_least=1,
        in_study="same",
        on_resume="content",
        at_most=10**9,
        aliases=("max_steps",),
    )
    learning_rate: float | None = flag(
        None,
        "peak learning rate; unset: the recipe's",
        above=0,
        shown=True,
        differs="the method's recipe: 2e-5 is right for full fine-tuning only",
        on_resume="same",
        at_most=10**38,
    )
    learning_rate_factor: float = flag(
        1.0,
        "multiplies the recipe's learning rate",
        above=0,
        check=lambda flags: (
            "it multiplies the recipe's rate, and --learning_rate replaces it: drop one"
            if flags.learning_rate is not None and flags.learning_rate_factor != 1
            else None
        ),
        on_resume="content",
        at_most=10**6,
    )
    auto_lr: bool = flag(
        False,
        "choose the learning rate by short trainings on the first micro-batches before the run (not for full "
        "fine-tuning)",
        check=checks.bad_auto_lr,
        on_resume="same",
    )
    lr_scheduler_type: SCHEDULES | None = flag(
        None,
        "schedule of the learning rate after the warm-up; unset: the recipe's",
        shown=True,
        differs="the method's recipe (linear)",
        on_resume="same",
    )
    warmup_ratio: float | None = flag(
        None,
        "share of the steps in which the rate rises from 0; unset: the recipe's",
        at_least=0,
        at_most=1,
        shown=True,
        check=lambda flags: (
            "the constant schedule has no warm-up: use constant_with_warmup"
            if flags.lr_scheduler_type == "constant" and flags.warmup_ratio
            else None
        ),
        differs="the method's recipe",
        on_resume="same",
    )
    final_lr_ratio: float | None = flag(
        None,
        "final learning rate as a share of the peak (linear and cosine schedules); unset: 0",
        at_least=0,
        at_most=1,
        check=lambda flags: (
            f"it works with the linear and the cosine schedule, not with {flags.lr_scheduler_type}: drop one of them"
            if flags.final_lr_ratio and flags.lr_scheduler_type not in (None, "linear", "cosine")
            else None
        ),
        on_resume="same",
    )
    weight_decay: float | None = flag(
        None,
        "AdamW's weight decay per unit of learning rate; unset: the recipe's",
        at_least=0,
        shown=True,
        differs="the method's recipe (0)",
        on_resume="same",
        at_most=10**4,
    )
    clip_grad_norm: float | None = flag(
        None,
        "bound of the gradient's L2 norm; -1: none; unset: the recipe's",
        at_least=-1,
        shown=True,
        differs="the method's recipe (1.0)",
        on_resume="same",
        aliases=("max_grad_norm",),
    )
    fused_optimizer: bool = flag(True, "compute AdamW in one fused kernel", on_resume="free")
    use_8bit_optimizer: bool = flag(False, "AdamW with 8-bit state (needs the quant extra)", on_resume="same")
    gradient_checkpointing: bool = flag(
        False,
        "recompute activations in the backward pass: less memory, about a third more time; with every method",
        on_resume="free",
    )
    packing: bool = flag(
        True,
        "compute a micro-batch as one row without padding, with the virtual tokens once; False: PEFT's own padded "
        "forward pass",
        differs="micro-batches are one row without padding, exact for soft prompts too",
        on_resume="content",
    )
    max_tokens_per_microbatch: int | None = flag(
        None,
        "largest number of tokens of a packed row, virtual tokens included; unset: the larger of 4096 and "
        "max_seq_length, but at most a full padded micro-batch",
        at_least=2,
        check=checks.needs_packing,
        on_resume="free",
        at_most=10**9,
    )
    share_beginning: bool = flag(
        True,
        "compute once a packed row what all examples begin with, as a common system message: 32 tokens or more, none "
        "of them learned; False: with each example",
        check=checks.bad_share,
        on_resume="free",
        causal_only=True,
    )
    attn_backend: ATTENTION_BACKENDS | None = flag(
        None,
        "attention of packed rows; unset: blocked on CPU, else the first that runs of flash_attn, varlen (16 bits on "
        "Ampere or newer) and sdpa",
        check=checks.needs_packing,
        on_resume="content",
        causal_only=True,
    )
    compile: bool = flag(
        False,
        "compile the decoder layers (packed forward pass only; the first steps take minutes)",
        check=checks.needs_packing,
        on_resume="free",
        aliases=("torch_compile",),
        causal_only=True,
    )
    reduce_loss: Literal["mean", "sum"] = flag(
        "mean",
        "mean: mean over the step's labelled tokens; sum: sum over tokens, mean over micro-batches",
        in_study="same",
        on_resume="same",
    )
    sync_each_batch: bool = flag(
        False, "exchange gradients after each micro-batch instead of once a step", on_resume="free"
    )
    timeout: int = flag(
        1800,
        "seconds that a process waits for the others before it gives up",
        at_least=1,
        at_most=10**8,
        on_resume="free",
        aliases=("ddp_timeout",),
    )
    seed: int = flag(
        42,
        "seed of the initialisation, the order of examples and dropout, and the default of split_seed",
        at_least=0,
        at_most=MAX_SEED,
        in_study="decided",
        on_resume="same",
    )
    split_seed: int | None = flag(
        None,
        "seed of the rows that are held out and of those that max_train_samples draws; unset: seed",
        at_least=0,
        at_most=MAX_SEED,
        in_study="same",
        on_resume="content",
    )
