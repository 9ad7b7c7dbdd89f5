"""Distillation in a run: the context is read and checked, and the forward pass gets its teacher."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.data.context import Context, context_of, read_context
from open_instruct.data.dataset import Examples
from open_instruct.errors import InputError, warn
from open_instruct.model import loading
from open_instruct.model.distillation import DistillationSettings, DistilledModel, Measure, teacher_problem
from open_instruct.model.precision import autocast
from open_instruct.model.training_model import PackedModel
from open_instruct.training import engines, forward
from open_instruct.training.evaluation import held_out_loss
from open_instruct.training.forward import Forward

FLAG = "--distill_context"
LEAST_USE = 0.02  # share of the loss by which a context that is used lowers it
MEASURES: tuple[Measure, ...] = ("student", "teacher")


def read(settings: DistillationSettings | None, tokenizer: PreTrainedTokenizerBase) -> Context | None:
    """Return the context, or None where nothing is distilled; `tokenizer` has its chat template.

    Raises:
        InputError: the context can't be read.
    """
    return context_of(read_context(settings.file, FLAG), tokenizer) if settings else None


def check_room(context: Context | None, longest: int, config: PretrainedConfig) -> None:
    """Refuse examples that don't fit behind the context.

    Args:
        context: None where nothing is distilled.
        longest: tokens of the longest example.
        config: the base's.

    Raises:
        InputError: the longest does not.
    """
    positions = loading.context_length(config)
    if context is None or not positions:
        return
    most = positions - len(context.ids) + context.num_shared
    if longest > most:
        remedy = f"cut examples with --max_seq_length {most}, or shorten the text" if most > 1 else "shorten the text"
        raise InputError(
            f"{FLAG} has {len(context.ids):,} tokens, and with the longest example, of {longest:,}, it needs "
            f"{positions + longest - most:,} positions of the model's {positions:,}: {remedy}"
        )


def distilled(
    chosen: Forward,
    settings: DistillationSettings | None,
    context: Context | None,
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> Forward:
    """Return the run's forward pass with the context's teacher in it, after comparing that with the base's own.

    Raises:
        InputError: the model can't be packed, or the teacher would be wrong.
    """
    if settings is None or context is None:
        return chosen
    packed = chosen.model
    if not isinstance(packed, PackedModel):
        raise InputError(f"{FLAG} needs the packed forward pass, which is not possible ({chosen.description})")
    model = DistilledModel(packed.model, packed.soft_prompt, packed.backend, packed.head_name, context, settings)
    problem = ""
    device = model.causal.device.type
    if device == accelerator.device.type:  # else its weights are still to be sharded
        with autocast(device, dtype):
            probe = forward.probe_rows(model.model)[1]["input_ids"]
            problem = teacher_problem(model, probe, forward.tolerance(model.causal, dtype))
    if engines.is_sharded(engines.engine_of(accelerator)):
        problem = engines.broadcast(problem)
    if problem:
        raise InputError(f"{FLAG} is not possible ({problem}): use another model or --attn_backend")
    return replace(chosen, model=forward.in_precision(model, accelerator, dtype))


def worth_of_context(
    accelerator: Accelerator, prepared: torch.nn.Module, chosen: Forward, examples: Examples | None
) -> dict[str, float | int]:
    """Measure what the context does for the held-out answers, print it, and warn where it is next to nothing.

    Args:
        accelerator: joins the run's processes, which all call this.
        prepared: the run's module, as the engine prepared it.
        chosen: the run's forward pass.
        examples: held-out examples, or None.

    Returns:
        Entries of summary.json; losses in nats per labelled token. Empty where nothing is distilled or held out.
    """
    model = chosen.model
    if not isinstance(model, DistilledModel) or examples is None:
        return {}
    losses = []
    for measure in MEASURES:
        with model.measuring(measure):
            losses.append(held_out_loss(accelerator, prepared, examples, chosen.evaluation, adapter=False)[0])
    base, teacher = losses
    accelerator.print(f"held-out answers: loss {base:.4f} for the base, {teacher:.4f} with the context before them")
    if not teacher < (1 - LEAST_USE) * base and accelerator.is_main_process:
        warn(
            f"this context does not help the base with the held-out answers (loss {base:.4f} without it, {teacher:.4f} "
            "with it): the adapter learns to answer as the base does behind it, and no better"
        )
    return {"context_tokens": len(model.context.ids), "base_answer_loss": base, "teacher_answer_loss": teacher}
