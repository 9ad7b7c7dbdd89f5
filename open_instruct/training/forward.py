"""Packed or padded: which forward pass a run takes, and whether it may."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from open_instruct.data import packing
from open_instruct.data.packing import Batching, Packing, Padding
from open_instruct.errors import BUGS, InputError, one_line
from open_instruct.methods import Feature, Method
from open_instruct.model import backends
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.model.precision import autocast
from open_instruct.model.shared_prefix import CannotPack, SoftPrompt
from open_instruct.model.training_model import PackedModel, PaddedModel, TrainingModel, causal_of
from open_instruct.training import engines
from open_instruct.training.faults import is_out_of_memory
from open_instruct.training.forward_settings import ROW_TOKENS, ForwardSettings

# Under which configurations name the positions that a token sees. (Llama 4's chunks: `longest_exact_row`.)
WINDOW_NAMES = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "local_attention")

# Largest difference of the probe's loss from the model's own, relative to its size. Attention to a neighbour or a wrong
# position changes the loss by tenths; rounding in float32, in 16 bits and in quantised products by less than this.
PROBED_TOKENS = 32  # of a hard prompt, and of what all examples begin with
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Forward:
    """Module that a run trains, and the batching of its micro-batches in training and in evaluation."""

    model: TrainingModel
    training: Batching
    evaluation: Batching
    attention: str  # which forward pass, and what computes its attention
    description: str

    @property
    def caches_masks(self) -> bool:
        """Whether attention keeps masks on the device."""
        return isinstance(self.model, PackedModel) and self.model.backend in (backends.blocked, backends.sdpa)

    def __enter__(self) -> Forward:
        """Give the model the run's attention."""
        if isinstance(self.model, PackedModel):
            self.model.activate()
        return self

    def __exit__(self, *error: object) -> None:
        """Give the model its own attention and forward pass back, for generation and saving."""
        if isinstance(self.model, PackedModel):
            self.model.release()
        causal = causal_of(self.model.model)
        if causal.is_gradient_checkpointing:
            causal.gradient_checkpointing_disable()
        for layer in decoder_layers(causal):
            layer._compiled_call_impl = None


def choose_forward(
    model: nn.Module,
    method: Method,
    settings: ForwardSettings,
    accelerator: Accelerator,
    dtype: torch.dtype,
    pad_token_id: int,
) -> Forward:
    """Choose the packed forward pass if it is exact for this model, else PEFT's padded one.

    Args:
        model: base with adapter; on the meta device where another process probes.
        method: the method that wrapped it.
        settings: plain values of the forward pass.
        accelerator: joins the run's processes.
        dtype: precision in which attention is computed.
        pad_token_id: token that fills padded rows.

    Raises:
        InputError: packing, a back end, or a feature that needs packing was requested and is not possible.
    """
    engine = engines.engine_of(accelerator)
    reason = "--packing False"
    if settings.packing:
        name, head, reason = choose_packed(model, partial(method.soft_prompt, model), settings, accelerator, dtype)
        if not reason:
            if engine == Feature.ZERO_3:
                head = None  # each piece of the loss would gather it, and processes have different numbers of pieces
            packed = PackedModel(
                model, partial(method.soft_prompt, model), backends.BACKENDS[name], head, settings.hard_prompt
            )
            bound = settings.max_row_tokens
            training, evaluation = (
                Packing(bound - settings.num_before - len(beginning), beginning=beginning)
                for beginning in (settings.beginning, settings.held_out_beginning)
            )
            description = f"packed, rows of at most {bound:,} tokens, attention by {name}{settings.describe_shared()}"
            ready = in_precision(packed, accelerator, dtype)
            return Forward(ready, training, evaluation, f"packed, by {name}", description)
        if settings.packing_requested:
            raise InputError(f"--packing is not possible ({reason}): use --packing False")
    elif causal_of(model).device.type != "meta":
        with evaluating(model), autocast(causal_of(model).device.type, dtype):
            own_loss(model, probe_rows(model))  # says in a line what PEFT can't run
    unpacked_checkpointing = method.obstacles.get(Feature.PADDED_CHECKPOINTING)
    if settings.gradient_checkpointing and unpacked_checkpointing:
        raise InputError(
            f"--gradient_checkpointing with {method.title} needs the packed forward pass, which is not possible "
            f"({reason}): drop one of the flags"
        )
    if settings.compile_layers:
        raise InputError(
            f"--compile needs the packed forward pass, which is not possible ({reason}): drop one of the flags"
        )
    why = f"the packed one would not be exact for this model: {reason}" if settings.packing else "PEFT's own"
    return Forward(
        in_precision(PaddedModel(model), accelerator, dtype),
        Padding(settings.train_batch_size, pad_token_id, settings.hard_prompt),
        Padding(settings.eval_batch_size, pad_token_id, settings.hard_prompt),
        f"padded, by {causal_of(model).config._attn_implementation}",
        f"padded, {settings.train_batch_size} rows; {why}",
    )


def in_precision(model: TrainingModel, accelerator: Accelerator, dtype: torch.dtype) -> TrainingModel:
    """Make a module's forward pass compute in the run's precision, whatever wraps the module later."""
    cast: Any = autocast(accelerator.device.type, dtype)
    model.forward = cast(model.forward)
    return model


def choose_packed(
    model: nn.Module,
    soft_prompt: Callable[[], SoftPrompt | None],
    settings: ForwardSettings,
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> tuple[str, str | None, str]:
    """Find the fastest back end that runs here and is exact for a model.

    Returns:
        The back end's name, the form of the model's head (see `PackedModel`), and the reason against packing; "" if
        there is none.

    Raises:
        InputError: a back end was requested and does not run here.
    """
    device, causal = accelerator.device, causal_of(model)
    probe_device, shape = causal.device.type, backends.head_shape(causal.config)
    size, longest = shape.size if shape else None, settings.max_length + settings.num_before
    names = backends.backend_names(settings.attn_backend, device, dtype, settings.use_flash_attn, size)
    for name in names:
        problem = backends.trial(name, device, dtype, shape) if device.type != "cpu" else ""
        if problem and settings.attn_backend:
            raise InputError(f"--attn_backend {name} can't be used: {problem}")
        head, structure = None, ""
        if not problem and probe_device != "meta":
            # Before weights are sharded, they lie on the main process's CPU.
            probed = name if probe_device == device.type else "blocked"
            try:
                with autocast(probe_device, dtype):
                    shared = settings.hard_prompt + settings.beginning
                    head, problem = probe(model, soft_prompt, probed, dtype, longest, shared)
            except CannotPack as obstacle:
                structure = str(obstacle)
        if engines.is_sharded(engines.engine_of(accelerator)):
            problem, head, structure = engines.broadcast((problem, head, structure))
        if structure or not problem:
            return name, head, structure
        if name != names[-1]:
            accelerator.print(f"attention by {name} is left out: {problem}")
    return name, None, problem


def probe(
    model: Any,
    soft_prompt: Callable[[], SoftPrompt | None],
    backend: str,
    dtype: torch.dtype,
    max_length: int = ROW_TOKENS,
    hard_prompt: tuple[int, ...] = (),
) -> tuple[str | None, str]:
    """Find out whether the packed forward pass is exact for a model. Call it under the run's autocast.

    The probe is a row of three examples: its loss must be the model's own for each example alone, and the last two
    examples' loss must have a gradient of exactly zero at the first one's tokens.

    Args:
        model: base with adapter.
        soft_prompt: see `PackedModel`.
        backend: a key of BACKENDS.
        dtype: precision in which attention is computed.
        max_length: positions of the longest example, all that stands before it included.
        hard_prompt: see `PackedModel`; the probe takes its beginning.

    Returns:
        The form of the model's head (see `PackedModel`), and the reason against this back end; "" if there is none.

    Raises:
        CannotPack: no back end would be exact.
        InputError: PEFT can't run this method on this model at all.
    """
    causal, rows, beginning = causal_of(model), probe_rows(model), hard_prompt[:PROBED_TOKENS]
    with evaluating(model):
        own = own_loss(model, [packing.behind_context({**row, "context": beginning}, 0) for row in rows])
        if not getattr(causal, "_supports_attention_backend", False):
            kind = causal.config.model_type
            raise CannotPack(f"the attention of a {kind} model does not go through transformers' AttentionInterface")
        try:
            packed = PackedModel(model, soft_prompt, backends.BACKENDS[backend], hard_prompt=beginning)
            with packed:
                batch = packing.to_device(packing.pack(rows), causal.device)
                with torch.no_grad():
                    together = packed(**batch)[0].item()
                model.train()  # so that attention dropout shows
                unlabelled = [{**rows[0], "spans": []}, *rows[1:]]
                leak, within = sensitivity(packed, packing.to_device(packing.pack(unlabelled), causal.device))
        except (CannotPack, InputError, *BUGS):
            raise
        except Exception as error:  # whatever an unusual structure or a kernel raises, the padded way is still there
            if is_out_of_memory(error):
                raise
            kind = causal.config.model_type
            return None, f"it does not run on this {kind} model ({type(error).__name__}: {one_line(error, 200)})"
    if not abs(together - own) < tolerance(causal, dtype) * own:
        return None, f"its packed loss on a probe differs from its own by {together / own - 1:+.1%}"
    if leak or not within:
        return None, "an example's loss depends on the example before it"
    window = unseen_window(causal.config, packed.windows)
    if window and max_length > window:
        raise CannotPack(f"its window of {window:,} positions reaches the layers only through their mask")
    return packed.head_name, ""


def tolerance(causal: Any, dtype: torch.dtype) -> float:
    """Return the largest relative difference of a probe's loss from the model's own that can be rounding."""
    return 5e-2 if getattr(causal, "is_quantized", False) else TOLERANCE[dtype]


def unseen_window(config: Any, windows: set[int]) -> int | None:
    """Return the window that a configuration names if no layer got one as an argument, else None.

    The probe's examples are shorter than most windows, so it can't see whether a model applies its window; a model that
    does so by its mask alone attends to everything in a packed row.

    Args:
        config: configuration of a causal language model.
        windows: those that layers passed to their attention.
    """
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    if windows or (types and set(types) == {"full_attention"}):
        return None
    named = [getattr(text, name, None) for name in WINDOW_NAMES]
    return min((window for window in named if isinstance(window, int) and window > 0), default=None)


def probe_rows(model: Any) -> list[dict[str, Any]]:
    """Return three short examples of random tokens, all of them labelled."""
    generator = torch.Generator().manual_seed(0)
    causal = causal_of(model)
    rows = causal.get_input_embeddings().weight.shape[0]
    vocabulary = min(rows, getattr(causal.config.get_text_config(), "vocab_size", None) or rows)
    draws = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (5, 16, 9)]
    return [{"input_ids": ids, "spans": [1, len(ids)]} for ids in draws]


@torch.no_grad()
def own_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Return the summed loss in nats of examples, each computed alone by PEFT's forward pass.

    Raises:
        InputError: PEFT can't run this method on this model at all.
    """
    padded = PaddedModel(model)
    try:
        batches = [packing.to_device(packing.pad([row], 0), next(model.parameters()).device) for row in rows]
        return sum(padded(**batch)[0].item() for batch in batches)
    except BUGS:
        raise
    except Exception as error:  # models and PEFT refuse each other in many ways
        if is_out_of_memory(error):
            raise
        kind = causal_of(model).config.model_type
        raise InputError(
            f"the adapter does not run on a {kind} model ({one_line(error, 200)}): choose another method"
        ) from error


def sensitivity(packed: PackedModel, batch: dict[str, Any]) -> tuple[float, float]:
    """Return the largest gradient of a row's loss at its first example's embeddings, and at those of the others."""
    embeddings: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output if output.requires_grad else output.detach().requires_grad_())
        return embeddings[-1]

    hook = packed.causal.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(packed(**batch)[0], embeddings[-1:])
    finally:
        hook.remove()
    start = len(packed.hard_prompt)
    end = start + batch["lengths"][0]
    return gradient[0, start:end].abs().max().item(), gradient[0, end:].abs().max().item()


def switch_on(forward: Forward, gradient_checkpointing: bool, compile_layers: bool) -> None:
    """Switch on checkpointing and compilation. Leaving `Forward`'s context undoes it.

    Raises:
        InputError: there is no compiler.
    """
    causal = causal_of(forward.model.model)
    if gradient_checkpointing:  # before it wraps the model, PEFT would refuse prefix tuning with it
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    if compile_layers:
        if causal.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise InputError(
                "--compile needs a C++ compiler on CPU, and g++ is not on the PATH: install one, set CXX, or drop the "
                "flag"
            )
        for layer in decoder_layers(causal):
            layer.compile(dynamic=True)  # rows of any length use one graph


def decoder_layers(causal: Any) -> list[nn.Module]:
    """Return the decoder's layers, whatever the architecture calls them."""
    return [module for module in causal.modules() if isinstance(module, GradientCheckpointingLayer)]
