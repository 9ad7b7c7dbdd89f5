"""The plan of a run, without training: steps, tokens, parameters, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from transformers import PretrainedConfig

from open_instruct.data.context import Context
from open_instruct.data.packing import Packing
from open_instruct.data.plan import Plan
from open_instruct.errors import visible
from open_instruct.methods import ModelFacts
from open_instruct.model import attention_masks, memory
from open_instruct.model.backends import head_shape
from open_instruct.model.chunked_loss import rows_at_once
from open_instruct.model.distillation import DistilledModel
from open_instruct.model.training_model import causal_of
from open_instruct.model.without_weights import has_weights, quantised_savings
from open_instruct.training import engines
from open_instruct.training.forward import Forward
from open_instruct.training.load_data import Data
from open_instruct.training.settings import Resolved, Settings, with_recipe

UNKNOWN = "unknown"  # a hyperparameter's value
STEPS_MEASURED = 20  # steps whose micro-batches are examined to find the largest


@dataclass(frozen=True)
class Unweighed:
    """What a base has of its configuration alone.

    Args:
        unknown: hyperparameters that the recipe takes from the weights, with what is shown for them.
        bytes_saved: bytes by which quantising would shrink it.
    """

    unknown: dict[str, str]
    bytes_saved: int


def unweighed(before: Settings, facts: ModelFacts, base: Any) -> Unweighed | None:
    """Return what is unknown of a base whose weights are not here; None where they are.

    A value of the recipe depends on the weights if it changes with what is measured of them.

    Args:
        before: what is resolved before the model is read.
        facts: scales of the base; not numbers, as they were not measured.
        base: the base model, before a method wraps it.
    """
    if base.device.type != "meta" or has_weights(before.model.name, before.model.revision):
        return None
    one, two = (
        with_recipe(before, replace(facts, embedding_std=x, embedding_norm=x, key_std=x), sharded=False).shown()
        for x in (1.0, 2.0)
    )
    unknown = {name: UNKNOWN for name, value in one.items() if two[name] != value}
    return Unweighed(unknown, quantised_savings(base, before.model.quantise))


def plan_text(
    settings: Resolved,
    data: Data,
    plan: Plan,
    model: Any,
    config: PretrainedConfig,
    forward: Forward,
    accelerator: Accelerator,
    unweighed: Unweighed | None = None,
) -> str:
    """Return the text of the plan: steps, tokens per step, parameters, and memory in MB.

    Args:
        settings: the resolved settings.
        data: training and held-out examples.
        plan: the examples of each step.
        model: base with adapter.
        config: the base's configuration.
        forward: makes micro-batches and computes them.
        accelerator: joins the processes that share weights and optimizer.
        unweighed: of a base without weights; None: they are here.
    """
    sizes, lengths, flags = memory.counts(model), data.train.lengths, settings.flags
    vocab_size = config.get_text_config().vocab_size
    device = accelerator.device if unweighed else next(model.parameters()).device
    batching = forward.training
    steps = [plan.examples(step).tolist() for step in range(min(plan.num_steps, STEPS_MEASURED))]
    rows = [row for indices in steps for row in batching.micro_batches(indices, lengths, 0, 1)]
    largest = max(batching.positions(row, lengths, settings.forward.num_before) for row in rows)
    logit_rows = largest
    if isinstance(batching, Packing):
        trains_head = any(p.requires_grad for p in causal_of(model).get_output_embeddings().parameters())
        logit_rows = min(largest, rows_at_once(device, vocab_size, trains_head))
    estimate = memory.estimate_mb(
        model,
        config,
        largest,
        logit_rows,
        flags.gradient_checkpointing,
        flags.use_8bit_optimizer,
        settings.compute_dtype.itemsize,
        settings.method.memory_kind,
        dropout=settings.method.drops_inputs(settings.method_settings),
        mask_bytes=mask_bytes(forward, rows, lengths, settings),
        context_bytes=context_bytes(forward, config, settings.compute_dtype.itemsize),
        sharing=engines.sharing(engines.engine_of(accelerator), accelerator.num_processes),
        bytes_saved=unweighed.bytes_saved if unweighed else 0,
    )
    parts = ", ".join(f"{name} {value:,.1f}" for name, value in estimate.items() if name != "total")
    share = sizes["trainable_parameters"] / sizes["total_parameters"]
    tokens, label_tokens = (plan.mean(x) * plan.examples_per_step for x in (lengths, data.train.label_counts))
    return "\n".join(
        [
            "plan (dry run: nothing is trained or written):",
            f"  steps                {plan.num_steps:,} of {plan.examples_per_step} examples "
            f"({plan.epoch(plan.num_steps):.2f} epochs)",
            f"  tokens per step      {tokens:,.0f} on average, {label_tokens:,.0f} of them labelled",
            f"  trained parameters   {sizes['trainable_parameters']:,} of {sizes['total_parameters']:,} ({share:.3%})",
            f"  memory per process   about {estimate['total']:,.0f} MB ({parts})",
            *(unweighed_lines(unweighed, settings) if unweighed else []),
        ]
    )


def unweighed_lines(unweighed: Unweighed, settings: Resolved) -> list[str]:
    """Return the lines of a plan about a base whose weights are not here."""
    name = settings.model.name
    unknown = [*unweighed.unknown, "whether the weights can be loaded, and are finite"]
    if settings.forward.packing:
        unknown.append("whether packing is exact for this model, which a run finds out by a probe")
    if settings.model.is_quantised:
        unknown.append("what stays whole of the quantised base, and whether a right gradient passes through it")
    return [
        f"  base model           {visible(name)} has no weights here: counted from its config.json",
        f"  {UNKNOWN:<20} until they are there: {'; '.join(unknown)}",
    ]


def context_bytes(forward: Forward, config: PretrainedConfig, itemsize: int) -> int:
    """Return the bytes of the keys and values of a context that is distilled; 0 without one.

    Args:
        forward: the run's forward pass.
        config: the base's configuration.
        itemsize: bytes of a number.
    """
    shape = head_shape(config)
    model = forward.model
    if not isinstance(model, DistilledModel) or shape is None or model.settings.offload:
        return 0
    if not isinstance(model.context, Context):
        return 0
    numbers = 2 * config.get_text_config().num_hidden_layers * shape.num_key_heads * shape.size
    return int(numbers * len(model.context.ids) * itemsize)


def mask_bytes(forward: Forward, rows: list[list[int]], lengths: Any, settings: Resolved) -> int:
    """Return the bytes of the masks that stay on the device, at most: one for each length of an example."""
    if not forward.caches_masks:
        return 0
    different = {int(lengths[index]) for row in rows for index in row}
    needed = sum(length * (length + settings.forward.num_before) for length in different)
    return min(needed * settings.compute_dtype.itemsize, attention_masks.MAX_CACHED_BYTES)
