"""Engines that join several processes (DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2): how a run starts and prepares them.

Where the engine keeps weights and optimizer is the subject of `sharding.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import set_seed

from open_instruct.errors import InputError, one_line, warn
from open_instruct.flags.quantisation import title_of
from open_instruct.methods import Feature
from open_instruct.model.memory import Sharing
from open_instruct.training import deepspeed_config

# What `accelerate launch` sets for a run, with the values that it sets where nobody asked for anything.
LAUNCH_DEFAULTS = {
    "MIXED_PRECISION": ("no",),
    "GRADIENT_ACCUMULATION_STEPS": ("1", "auto"),
    "GRADIENT_CLIPPING": ("auto",),
    "DYNAMO_BACKEND": ("no",),
    "USE_DEEPSPEED": ("false",),
    "USE_FSDP": ("false",),
}

# Variables in which launchers say how many processes there are, in the order in which accelerate reads them.
LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class ProcessSettings:
    """Plain values that decide how processes run together."""

    compute_dtype: torch.dtype
    seed: int
    timeout: int  # seconds
    trackers: tuple[str, ...]  # names that accelerate knows; empty: none
    output_dir: str
    hidden_size: int | None = None  # of the base, for the "auto" sizes of a DeepSpeed configuration


def make_accelerator(settings: ProcessSettings) -> Accelerator:
    """Start processes, devices and trackers, and seed the generators.

    Raises:
        InputError: a tracker is not installed, DeepSpeed can't use its configuration, accelerate is configured for
            FSDP1, or it does not see all processes.
    """
    plugin: Any = deepspeed_config.make_plugin(settings.hidden_size)
    try:
        accelerator = Accelerator(
            mixed_precision="no",  # `forward.choose_forward` casts, under every engine alike
            dynamo_backend="no",
            deepspeed_plugin=plugin,
            log_with=("all" if settings.trackers == ("all",) else list(settings.trackers)) or None,
            project_dir=settings.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=settings.timeout))],
        )
    except ValueError as error:
        if not settings.trackers:
            raise
        raise InputError(
            f"--report_to {' '.join(settings.trackers)} can't be used ({error}): install the tracker, or name another"
        ) from None
    check_launch(accelerator.num_processes)
    # Each step divides its own loss (`loop.step_gradient`): what a launcher's flag or variable sets would divide again.
    accelerator.gradient_accumulation_steps = 1
    set_seed(settings.seed)
    if engine_of(accelerator) == Feature.ZERO_3:
        from transformers.integrations import unset_hf_deepspeed_config

        # Otherwise transformers shards while it reads, in every process, before there is an adapter.
        unset_hf_deepspeed_config()
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:  # flat parameters can't hold frozen and trained ones
        raise InputError("only FSDP2 is supported: set fsdp_version: 2 in the accelerate configuration")
    if accelerator.is_main_process:
        warn_of_overridden(accelerator, settings.compute_dtype)
    return accelerator


def check_launch(num_processes: int) -> None:
    """Refuse a launch whose processes don't find each other: each would be a run of its own in the same folder.

    Raises:
        InputError: naming the variable to set.
    """
    sizes = {name: os.environ[name] for name in LAUNCHED if os.environ.get(name, "").isdecimal()}
    name, size = next(iter(sizes.items()), ("", str(num_processes)))
    if int(size) != num_processes:
        raise InputError(
            f"{name}={size} says that {size} processes were launched, and accelerate joins {num_processes}: on CPUs "
            f"set ACCELERATE_USE_CPU=true; for a run of one process, unset {name}"
        )
    # With --cpu, `accelerate launch` starts one process whatever --num_processes says; only these variables tell.
    is_cpu_launch = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if not sizes and is_cpu_launch and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise InputError(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says: use ACCELERATE_USE_CPU=true "
            "torchrun --nproc_per_node N; for a run of one process, pass --num_processes 1 and unset MASTER_ADDR"
        )


def check_agreement(accelerator: Accelerator, values: Mapping[str, Any]) -> None:
    """Refuse to start processes that would not train the same. Every process calls this, and every one raises.

    Args:
        accelerator: joins the run's processes.
        values: what all must share, by a name that users know.

    Raises:
        InputError: naming what differs, and in which processes.
    """
    if accelerator.num_processes == 1:
        return
    everyone: list[dict[str, Any]] = gather_object([dict(values)])
    different = []
    for name in dict.fromkeys(name for each in everyone for name in each):
        ranks: dict[str, list[int]] = {}
        for rank, each in enumerate(everyone):
            ranks.setdefault(one_line(repr(each.get(name)), 80), []).append(rank)
        if len(ranks) > 1:
            different.append(f"{name} is {' and '.join(f'{value} in {numbers(of)}' for value, of in ranks.items())}")
    if different:
        raise InputError(f"the processes of this run differ: {'; '.join(different)}: start all with the same")


def numbers(ranks: Sequence[int]) -> str:
    """Return "process 3", or "processes 0, 1, 2 …"."""
    shown = ", ".join(map(str, ranks[:4])) + (" …" if len(ranks) > 4 else "")
    return f"process{'es' if len(ranks) > 1 else ''} {shown}"


def warn_of_overridden(accelerator: Accelerator, compute_dtype: torch.dtype) -> None:
    """Name on one line the settings of `accelerate launch` that this run does not follow, and what decides instead.

    Values that are accelerate's defaults can't be told from those that nobody gave, and are not named.
    """
    value = {name: os.environ.get(f"ACCELERATE_{name}", "").lower() for name in LAUNCH_DEFAULTS}
    given = {name for name, defaults in LAUNCH_DEFAULTS.items() if value[name] not in ("", "none", *defaults)}
    engine, problems = engine_of(accelerator), []
    if (
        "MIXED_PRECISION" in given
        and {"bf16": torch.bfloat16, "fp16": torch.float16}.get(value["MIXED_PRECISION"]) != compute_dtype
    ):
        problems.append(f"--mixed_precision {value['MIXED_PRECISION']} (--dtype decides: {dtype_name(compute_dtype)})")
    if "GRADIENT_ACCUMULATION_STEPS" in given:
        problems.append("--gradient_accumulation_steps before the script (give it after the script)")
    if "GRADIENT_CLIPPING" in given:
        problems.append("--gradient_clipping (--clip_grad_norm decides)")
    if "DYNAMO_BACKEND" in given:
        problems.append("--dynamo_backend (--compile decides)")
    for name, engines in (("DEEPSPEED", (Feature.ZERO_2, Feature.ZERO_3)), ("FSDP", (Feature.FSDP,))):
        if f"USE_{name}" in given and engine not in engines:
            device = accelerator.device.type
            problems.append(f"--use_{name.lower()} (not on {device}: this run is {engine or 'one process without it'})")
    if problems:
        warn(f"of accelerate's settings, without effect are {'; '.join(problems)}")


def describe(accelerator: Accelerator, dtype: torch.dtype, quantise: str | None, compute_dtype: torch.dtype) -> str:
    """Return one line on processes, engine, device and precision."""
    count, engine = accelerator.num_processes, engine_of(accelerator)
    processes = f"{count} {'processes' if count > 1 else 'process'}" + (f" ({engine})" if engine else "")
    base = title_of(quantise) or dtype_name(dtype)
    computed = "" if quantise is None and dtype == compute_dtype else f", computed in {dtype_name(compute_dtype)}"
    return f"{processes} on {accelerator.device.type}, base in {base}{computed}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return a type's name as --dtype takes it."""
    return str(dtype).removeprefix("torch.")


def engine_of(accelerator: Accelerator) -> Feature | None:
    """Return the engine that joins the processes; None for one process alone."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return Feature.ZERO_3 if stage == 3 else Feature.ZERO_2
    if kind == DistributedType.FSDP:
        return Feature.FSDP
    return Feature.DDP if accelerator.num_processes > 1 else None


def is_sharded(engine: Feature | None) -> bool:
    """Whether a process holds only a part of the model."""
    return engine in (Feature.ZERO_3, Feature.FSDP)


def sharing(engine: Feature | None, num_processes: int) -> Sharing:
    """Return what an engine splits among its processes, for an estimate of memory.

    ZeRO keeps its own float32 copies of the trained parameters, and DDP keeps buffers for their gradients. ZeRO-3 keeps
    up to a billion numbers gathered (`stage3_max_live_parameters`).
    """
    if engine == Feature.DDP:
        return Sharing(bytes_for_trained=4)
    if engine == Feature.ZERO_2:
        return Sharing(states=num_processes, bytes_for_trained=4)
    if engine == Feature.ZERO_3:
        return Sharing(num_processes, num_processes, bytes_for_trained=4, kept_gathered=1e9)
    if engine == Feature.FSDP:
        return Sharing(num_processes, num_processes)
    return Sharing()


def broadcast(value: Any) -> Any:
    """Return the main process's value on every process."""
    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Any, clip_grad_norm: float) -> tuple[Any, Any]:
    """Return model and optimizer as the engine wants them.

    Under FSDP2 the model is sharded already (`sharding.shard`). accelerate would shard it anew, cast the adapter to the
    base's precision, and untie tied weights on the way.

    Args:
        accelerator: joins the run's processes.
        model: a `TrainingModel`.
        optimizer: optimizer of its trained parameters.
        clip_grad_norm: bound of the gradient's norm; none where not positive.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:  # DeepSpeed clips at 1.0 if its configuration says nothing; 0 is no clipping
        plugin.deepspeed_config["gradient_clipping"] = max(clip_grad_norm, 0.0)
    is_sharded_already = engine_of(accelerator) == Feature.FSDP
    return (model, optimizer) if is_sharded_already else accelerator.prepare(model, optimizer)
