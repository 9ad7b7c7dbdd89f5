"""Packed or padded: which forward pass a run takes, and whether it may."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from open_instruct.data import collate
from open_instruct.data.collate import Batching, Packing, Padding
from open_instruct.errors import InputError
from open_instruct.methods import Method
from open_instruct.model import backends
from open_instruct.model.shared_prefix import CannotPack
from open_instruct.model.training_model import PackedModel, PaddedModel, TrainingModel

ROW_TOKENS = 4096  # tokens that keep a GPU busy, and make 200 virtual tokens 5 % of a row

CPU = torch.device("cpu")

# Largest difference of the probe's losses from the model's own, relative to their size. A neighbour that is seen or a
# position that is off makes tenths; rounding of 16 bits, of quantised products, and of float32 makes less than these.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class PackingSettings:
    """Plain values that decide how micro-batches are computed."""

    packing: bool
    asked_for: bool  # --packing was given, so falling back is an error
    max_tokens_per_microbatch: int | None
    attn_backend: str | None
    use_flash_attn: bool
    max_seq_length: int
    num_virtual_tokens: int
    train_batch_size: int
    eval_batch_size: int
    pad_token_id: int
    gradient_checkpointing: bool
    compile_layers: bool


@dataclass(frozen=True)
class Forward:
    """How a run computes: the module, and how micro-batches for it are made in training and in evaluation."""

    model: TrainingModel
    training: Batching
    evaluation: Batching
    description: str


def row_bound(settings: PackingSettings) -> int:
    """Tokens of a packed row at most, virtual tokens included.

    Unless set: what keeps the machine busy, at least the longest example, and not more than the padded micro-batch that
    the user found room for could hold.
    """
    if settings.max_tokens_per_microbatch:
        return settings.max_tokens_per_microbatch
    most = settings.train_batch_size * settings.max_seq_length
    return min(most, max(ROW_TOKENS, settings.max_seq_length)) + settings.num_virtual_tokens


def check_rows(settings: PackingSettings, longest: int) -> None:
    """Every example must fit into a row.

    Raises:
        InputError: the longest one does not.
    """
    bound = row_bound(settings)
    needed = longest + settings.num_virtual_tokens
    if settings.packing and needed > bound:
        virtual = f" and {settings.num_virtual_tokens} virtual ones" if settings.num_virtual_tokens else ""
        raise InputError(
            f"--max_tokens_per_microbatch {bound} can't hold the longest example, which has {longest} tokens{virtual}: "
            f"raise it to {needed}, or cut examples with --max_seq_length {max(bound - settings.num_virtual_tokens, 2)}"
        )


def choose_forward(
    model: nn.Module,
    method: Method,
    settings: PackingSettings,
    device: torch.device,
    dtype: torch.dtype,
    tell: Callable[[Any], Any] = lambda found: found,
) -> Forward:
    """The packed forward pass if it is exact for this model, else PEFT's padded one. Call it under the run's autocast.

    Args:
        model: base with adapter; on the meta device where another process probes.
        method: that wrapped it.
        settings: plain values.
        device: on which the run computes.
        dtype: in which attention is computed.
        tell: passes the probing process's findings to the others, and returns them.

    Raises:
        InputError: packing, a back end, or something that needs packing was asked for and is not possible.
    """
    reason = "--packing False"
    if settings.packing:
        name = backends.choose(settings.attn_backend, device, dtype, settings.use_flash_attn)
        soft_prompt = partial(method.soft_prompt, model)
        where = base_of(model).device.type
        reason, head = "", None
        if where != "meta":
            probed, reason = try_packed(
                model, soft_prompt, name if where == device.type else backends.choose(None, CPU, dtype, False), dtype
            )
            head = probed and probed.head_name
            if probed is not None:
                probed.release()
        reason, head = tell((reason, head))
        if not reason:
            packed = PackedModel(model, soft_prompt, backends.BACKENDS[name], head)
            bound = row_bound(settings)
            rows = Packing(bound - settings.num_virtual_tokens)
            return Forward(packed, rows, rows, f"packed, rows of at most {bound:,} tokens, attention by {name}")
        if settings.asked_for:
            raise InputError(f"--packing is not possible: {reason}: use --packing False")
    if settings.gradient_checkpointing and method.name == "prefix_tuning":
        raise InputError(
            f"--gradient_checkpointing with prefix tuning needs the packed forward pass, but: {reason}: drop one of the flags"
        )
    if settings.compile_layers:
        raise InputError(f"--compile needs the packed forward pass, but: {reason}: drop one of the flags")
    because = f"because the packed one can't serve this model exactly: {reason}" if settings.packing else "PEFT's own"
    return Forward(
        PaddedModel(model),
        Padding(settings.train_batch_size, settings.pad_token_id),
        Padding(settings.eval_batch_size, settings.pad_token_id),
        f"padded, {settings.train_batch_size} rows; {because}",
    )


def try_packed(
    model: Any, soft_prompt: Callable[[], Any], backend: str, dtype: torch.dtype
) -> tuple[PackedModel | None, str]:
    """A packed model that passes a probe, or None and what is in the way.

    The probe is a row of three examples: its loss must be the model's own for each example alone, and the last two
    examples' loss must have a gradient of exactly zero at the first one's tokens.
    """
    causal = base_of(model)
    if not getattr(causal, "_supports_attention_backend", False):
        return (
            None,
            f"the attention of a {causal.config.model_type} model does not go through transformers' AttentionInterface",
        )
    generator = torch.Generator().manual_seed(0)
    vocabulary = causal.get_input_embeddings().weight.shape[0]
    draws = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (5, 16, 9)]
    rows = [{"input_ids": ids, "spans": [1, len(ids)]} for ids in draws]
    tolerance = 5e-2 if getattr(causal, "is_quantized", False) else TOLERANCE[dtype]
    was_training = model.training
    model.eval()
    own = own_loss(model, rows)
    packed = PackedModel(model, soft_prompt, backends.BACKENDS[backend])
    try:
        batch = collate.to_device(collate.pack(rows), causal.device)
        with torch.no_grad():
            together = packed(**batch)[0].item()
        model.train()  # so that attention dropout shows
        leak, within = sensitivity(
            packed, collate.to_device(collate.pack([{**rows[0], "spans": []}, *rows[1:]]), causal.device)
        )
    except CannotPack as problem:
        packed.release()
        return None, str(problem)
    finally:
        model.train(was_training)
    if not abs(together - own) < tolerance * own:
        reason = f"its packed loss on a probe is {together / own - 1:+.1%} off its own"
    elif leak or not within:
        reason = "an example's loss depends on the example before it"
    else:
        return packed, ""
    packed.release()
    return None, reason


@torch.no_grad()
def own_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Summed loss of examples by PEFT's forward, each alone.

    Raises:
        InputError: PEFT can't run this method on this model at all.
    """
    padded = PaddedModel(model)
    try:
        batches = [collate.to_device(collate.pad([row], 0), next(model.parameters()).device) for row in rows]
        return sum(padded(**batch)[0].item() for batch in batches)
    except (ValueError, RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        kind = base_of(model).config.model_type
        raise InputError(
            f"the adapter does not run on a {kind} model ({' '.join(str(error).split())[:200]}): choose another method"
        ) from error


def sensitivity(packed: PackedModel, batch: dict[str, Any]) -> tuple[float, float]:
    """Largest gradient of a row's loss at the embeddings of its first example, and at those of the others."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output if output.requires_grad else output.detach().requires_grad_())
        return seen[-1]

    hook = packed.causal.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(packed(**batch)[0], seen[-1:])
    finally:
        hook.remove()
    first = batch["lengths"][0]
    return gradient[0, :first].abs().max().item(), gradient[0, first:].abs().max().item()


def base_of(model: Any) -> Any:
    """The causal language model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def start(forward: Forward, gradient_checkpointing: bool, compile_layers: bool) -> None:
    """Switch on what a run wants beside the forward pass itself. `release` undoes it."""
    causal = base_of(forward.model.model)
    if gradient_checkpointing:  # after PEFT has wrapped the model: it refuses prefix tuning with it before
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    if compile_layers:
        if causal.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise InputError(
                "--compile needs a C++ compiler on CPU, and g++ is not on the PATH: install one, set CXX, or drop the flag"
            )
        for layer in decoder_layers(causal):
            layer.compile(dynamic=True)  # rows of any length use one graph


def release(forward: Forward) -> None:
    """Give the model its own attention and forward pass back, for generation and saving."""
    causal = base_of(forward.model.model)
    if isinstance(forward.model, PackedModel):
        forward.model.release()
    if causal.is_gradient_checkpointing:
        causal.gradient_checkpointing_disable()
    for layer in decoder_layers(causal):
        layer._compiled_call_impl = None


def decoder_layers(causal: Any) -> list[nn.Module]:
    """The layers, whatever the architecture calls them."""
    return [module for module in causal.modules() if isinstance(module, GradientCheckpointingLayer)]
