"""Shard weights and optimizer state as the engine does, and gather or load their full values.

With R processes and a parameter θ of n numbers:

    DDP      every process holds θ and its optimizer's moments.
    ZeRO-2   every process holds θ; process r holds the moments, and a float32 copy, of the r-th part of n/R numbers.
    ZeRO-3   process r holds only the r-th part of θ (`parameter.ds_tensor`; between uses the parameter is empty).
    FSDP2    process r holds only the r-th rows of θ, as a DTensor.

Under ZeRO-3 and FSDP2 only the main process ever holds the full base: it reads the base into CPU memory, and the others
build its structure without memory, on the meta device. Whatever needs full weights (facts of the base, the adapter's
start, the probe of packing) is computed by the main process, which broadcasts the result. Then `shard` sends one
decoder layer after another to all processes. Each keeps its part, so no device ever holds more than one full layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from open_instruct.methods import Feature
from open_instruct.training.engines import engine_of


def shard(model: nn.Module, units: list[nn.Module], accelerator: Accelerator) -> None:
    """Send a model from the main process to all; each keeps its part.

    Parameters are replaced, so the optimizer must be made afterwards.

    Args:
        model: full model on the main process, on the meta device on the others.
        units: modules that are gathered one at a time in each pass: the decoder layers.
        accelerator: joins the run's processes by ZeRO-3 or FSDP2.
    """
    zero = engine_of(accelerator) == Feature.ZERO_3
    mesh = None if zero else init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for unit in (*units, model):  # the model last: it owns the parameters outside of the layers
        broadcast_params(unit, accelerator)
        if zero:
            import deepspeed

            deepspeed.zero.Init(module=unit, config_dict_or_path=accelerator.state.deepspeed_plugin.deepspeed_config)
        else:
            plugin = accelerator.state.fsdp_plugin
            # The root's parameters (embedding, head) are used again at once: resharding them would only cost time.
            options = {} if unit is model else {"reshard_after_forward": plugin.reshard_after_forward}
            fully_shard(unit, mesh=mesh, offload_policy=plugin.cpu_offload or OffloadPolicy(), **options)
    for module in model.modules():  # buffers (rotary frequencies) are small: every process holds them
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer = buffer.to(accelerator.device)
                dist.broadcast(buffer, src=0)


def broadcast_params(unit: nn.Module, accelerator: Accelerator) -> None:
    """Move the parameters that are not sharded yet to this process's device, with the main process's values.

    Args:
        unit: a part of a model.
        accelerator: knows the process and its device.
    """
    # Old → new parameter, so that tied ones stay tied. It must not outlive this call: it keeps full weights alive.
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in unit.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(old, DTensor) or hasattr(old, "ds_id"):
                continue  # sharded with an earlier unit
            if old not in replaced:
                if accelerator.is_main_process:
                    value = old.detach().to(accelerator.device)
                else:
                    value = torch.empty_like(old, device=accelerator.device)
                dist.broadcast(value, src=0)
                replaced[old] = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(module, name, replaced[old])


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return a parameter's shape before it was sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_tensor(tensor: Any) -> Any:
    """Return the full value of a tensor, through a collective where it is sharded; anything else as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def local_part(parameter: Any) -> Any:
    """Return the part of a parameter that this process holds."""
    part = getattr(parameter, "ds_tensor", parameter)
    return part.to_local() if isinstance(part, DTensor) else part


def gather_full(parameters: Mapping[str, nn.Parameter], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return full values on the main process's CPU, and nothing on the others. Every process calls this."""
    prepared = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if prepared is not None:  # after an evaluation, ZeRO-3 may be on its way to fetch a layer that nobody will use
        prepared.engine.empty_partition_cache()
    gathered = {}
    for name, parameter in parameters.items():
        value = full_tensor(parameter)
        if accelerator.is_main_process:
            gathered[name] = value.contiguous().cpu()
    return gathered


@torch.no_grad()
def load_full(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Put full values into parameters, sharded or not: the inverse of `gather_full`. Every process has the values."""
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            device = parameter.device_mesh.device_type
            parameter.copy_(distribute_tensor(values[name].to(device), parameter.device_mesh, parameter.placements))
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # rank 0's value is scattered on exit
                parameter.copy_(values[name])
        else:
            parameter.copy_(values[name])


def zero_optimizer(optimizer: Any) -> Any | None:
    """Return DeepSpeed's optimizer, partitioned over the processes, from accelerate's wrapper; None without one."""
    inner = getattr(optimizer, "optimizer", None)
    partitioned = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")  # ZeRO-2, ZeRO-3
    return inner if any(hasattr(inner, name) for name in partitioned) else None


def part_name(accelerator: Accelerator) -> str | None:
    """Return the checkpoint file of this process's part of the optimizer; None where one file holds all of it."""
    if engine_of(accelerator) not in (Feature.ZERO_2, Feature.ZERO_3):
        return None
    return f"optimizer_{accelerator.process_index}_of_{accelerator.num_processes}.pt"


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of a torch optimizer with full tensors. Every process calls this."""
    state = optimizer.state_dict()
    moments = {
        key: {name: full_tensor(value) for name, value in values.items()} for key, values in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned: every process takes its part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        if isinstance(parameter, DTensor):
            for name, value in values.items():
                if value.shape == parameter.shape and value.dim():  # a moment; the step count is a scalar
                    local = value.to(parameter.device_mesh.device_type)
                    values[name] = distribute_tensor(local, parameter.device_mesh, parameter.placements)
    optimizer.load_state_dict(state)


def zero_state(zero: Any) -> dict[str, Any]:
    """Return this process's part of a ZeRO optimizer: moments, and the float32 copies of the trained parameters."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-2
        return {
            "optimizer": zero.optimizer.state_dict(),
            "parameters": [part.detach().cpu() for part in zero.single_partition_of_fp32_groups],
        }
    state = zero.state_dict()
    return {
        "optimizer": state["optimizer_state_dict"],
        "parameters": [part.detach().cpu() for part in state["fp32_flat_groups"]],
    }


def load_zero_state(zero: Any, state: dict[str, Any]) -> None:
    """Load what `zero_state` returned."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        unchanged = zero.state_dict()  # loss scale and overflow flags
        part = {**unchanged, "optimizer_state_dict": state["optimizer"], "fp32_flat_groups": state["parameters"]}
        zero.load_state_dict({dist.get_rank(): part})
        return
    zero.optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for part, saved in zip(zero.single_partition_of_fp32_groups, state["parameters"], strict=True):
            part.copy_(saved)
