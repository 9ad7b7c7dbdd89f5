"""Distillation in a run: the context is read and checked, and the forward pass gets its teacher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.data.chat import PROBE
from open_instruct.data.context import Context, ContextSource, RowContexts, context_of
from open_instruct.data.dataset import Examples
from open_instruct.data.packing import Packing, PackingBehindContexts
from open_instruct.errors import InputError, warn
from open_instruct.model import loading
from open_instruct.model.distillation import DistillationSettings, DistilledModel, Measure, teacher_problem
from open_instruct.model.precision import autocast
from open_instruct.model.training_model import PackedModel
from open_instruct.training import engines, forward
from open_instruct.training.evaluation import held_out_loss
from open_instruct.training.forward import Forward
from open_instruct.training.load_data import Data

FLAG = "--distill_context"
LEAST_USE = 0.02  # share of the loss by which a context that is used lowers it
MEASURES: tuple[Measure, ...] = ("student", "teacher")


def context_of_run(
    source: ContextSource | None, data: Data, tokenizer: PreTrainedTokenizerBase
) -> Context | RowContexts | None:
    """Return the context that stands before all conversations, or what is known of the rows' own.

    Args:
        source: None where nothing is distilled.
        data: training and held-out examples.
        tokenizer: with its chat template.

    Raises:
        InputError: no row has a context.
    """
    if source is None:
        return None
    if source.text is not None:
        return context_of(source.text, tokenizer)
    lengths = data.train.context_lengths
    if not lengths.any():
        raise InputError(
            "--distill_system: no training row begins with a system message: give rows that do, or name one text for "
            f"all of them with {FLAG}"
        )
    num_shared = context_of(PROBE[0]["content"], tokenizer).num_shared
    sample = tuple(data.train[int(lengths.argmax())]["context"])
    if all(examples.has_one_context(sample) for examples in (data.train, data.held_out_answers) if examples):
        return Context(sample, num_shared, source.column is None)
    return RowContexts(num_shared, sample, len(lengths), int((lengths > 0).sum()), float(lengths[lengths > 0].mean()))


def check_room(context: Context | RowContexts | None, data: Data, config: PretrainedConfig) -> None:
    """Refuse examples that don't fit behind their context.

    Args:
        context: None where nothing is distilled.
        data: training and held-out examples.
        config: the base's.

    Raises:
        InputError: one does not.
    """
    positions = loading.context_length(config)
    if context is None or not positions:
        return
    for examples in (data.train, data.held_out_answers):
        if examples is None:
            continue
        before = examples.context_lengths if isinstance(context, RowContexts) else len(context.ids)
        needed = examples.lengths + before - context.num_shared * np.sign(before)
        worst = int(needed.argmax())
        if needed[worst] > positions:
            own = int(examples.lengths[worst])
            most = own - int(needed[worst]) + positions
            remedy = f"cut examples with --max_seq_length {most}, or shorten" if most > 1 else "shorten"
            raise InputError(
                f"a context of {int(needed[worst]) - own + context.num_shared:,} tokens is to be distilled, and with "
                f"an example of {own:,} it needs {needed[worst]:,} positions of the model's {positions:,}: {remedy} "
                "the context"
            )


def distilled(
    chosen: Forward,
    settings: DistillationSettings | None,
    context: Context | RowContexts | None,
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
    changed = replace(chosen, model=forward.in_precision(model, accelerator, dtype))
    if isinstance(context, Context):
        return changed
    batchings = [
        PackingBehindContexts(batching.max_tokens, context.num_shared)
        for batching in (chosen.training, chosen.evaluation)
        if isinstance(batching, Packing)
    ]
    return replace(changed, training=batchings[0], evaluation=batchings[1])


def worth_of_context(
    accelerator: Accelerator, prepared: torch.nn.Module, chosen: Forward, examples: Examples | None
) -> dict[str, float | int]:
    """Measure what the context does for the held-out answers, print it, and warn where it is next to nothing.

    Args:
        accelerator: joins the run's processes, which all call this.
        prepared: the run's module, as the engine prepared it.
        chosen: the run's forward pass.
        examples: held-out examples with their answers labelled, or None.

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
    context = model.context
    length = len(context.ids) if isinstance(context, Context) else round(context.mean_length)
    return {"context_tokens": length, "base_answer_loss": base, "teacher_answer_loss": teacher}
