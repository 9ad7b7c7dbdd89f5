"""What joins several processes, and where it keeps weights and optimizer: DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2.

DDP and ZeRO-2 hold the whole base in every process. ZeRO-3 and FSDP2 share the weights out, and no process but the main one ever
holds a whole base: the main process reads it into its CPU's memory, the others build its structure without memory. What wants whole
weights (facts of the base, an adapter's start, the probe of packing) is done by the main process and told to the others. Then one
layer after another is sent to all, and each keeps its share (`share_out`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from open_instruct.errors import InputError
from open_instruct.model.memory import Sharing
from open_instruct.training import capabilities


def engine_of(accelerator: Accelerator) -> str | None:
    """What joins the processes, as a column of the capability table; None for one process alone."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return capabilities.ZERO_3 if stage == 3 else capabilities.ZERO_2
    if kind == DistributedType.FSDP:
        return capabilities.FSDP
    return capabilities.DDP if accelerator.num_processes > 1 else None


def shares_weights(engine: str | None) -> bool:
    """Whether a process holds only a part of the model."""
    return engine in (capabilities.ZERO_3, capabilities.FSDP)


def sharing(engine: str | None, processes: int) -> Sharing:
    """What an engine splits among its processes. ZeRO keeps originals of its own of what is trained, DDP buffers of its gradients.

    ZeRO-3 keeps up to a billion numbers gathered (`stage3_max_live_parameters`).
    """
    if engine == capabilities.DDP:
        return Sharing(bytes_for_trained=4)
    if engine == capabilities.ZERO_2:
        return Sharing(states=processes, bytes_for_trained=4)
    if engine == capabilities.ZERO_3:
        return Sharing(processes, processes, bytes_for_trained=4, kept_gathered=1e9)
    if engine == capabilities.FSDP:
        return Sharing(processes, processes)
    return Sharing()


def start(accelerator: Accelerator) -> None:
    """Settle what an engine would do by itself, before anything is loaded.

    Raises:
        InputError: FSDP in its first version, whose flat parameters can't hold frozen and trained ones.
    """
    if engine_of(accelerator) == capabilities.ZERO_3:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else transformers shares out while it reads, in every process, before an adapter is there
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise InputError("FSDP runs in its second version only: set fsdp_version: 2 in the accelerate configuration")


def told(value: Any) -> Any:
    """The main process's value, on every process."""
    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def share_out(model: nn.Module, units: list[nn.Module], accelerator: Accelerator) -> None:
    """Send a model from the main process to all, each of which keeps its share. Parameters become others: make the optimizer afterwards.

    Args:
        model: whole on the main process, and without memory (on the meta device) on the others.
        units: parts that are gathered one at a time in each pass: the decoder layers.
        accelerator: of ZeRO-3 or FSDP2.
    """
    zero = engine_of(accelerator) == capabilities.ZERO_3
    mesh = None if zero else init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for unit in (*units, model):
        place(unit, accelerator)
        if zero:
            import deepspeed

            deepspeed.zero.Init(module=unit, config_dict_or_path=accelerator.state.deepspeed_plugin.deepspeed_config)
        else:
            plugin = accelerator.state.fsdp_plugin
            more = {} if unit is model else {"reshard_after_forward": plugin.reshard_after_forward}
            fully_shard(unit, mesh=mesh, offload_policy=plugin.cpu_offload or OffloadPolicy(), **more)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer = buffer.to(accelerator.device)
                dist.broadcast(buffer, src=0)


def place(unit: nn.Module, accelerator: Accelerator) -> None:
    """Put the parameters that are not shared out yet on this process's device, with the main process's values.

    Args:
        unit: a part of a model.
        accelerator: for the device.
    """
    known: dict[
        nn.Parameter, nn.Parameter
    ] = {}  # new for old ones: tied ones stay tied. Kept longer, it would hold whole weights
    for module in unit.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(old, DTensor) or hasattr(old, "ds_id"):
                continue
            if old not in known:
                value = (
                    old.detach().to(accelerator.device)
                    if accelerator.is_main_process
                    else torch.empty_like(old, device=accelerator.device)
                )
                dist.broadcast(value, src=0)
                known[old] = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(module, name, known[old])


def whole(parameters: dict[str, nn.Parameter], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Full values of parameters on the main process's CPU, and nothing on the others. Every process calls this."""
    found = {}
    for name, parameter in parameters.items():
        value = whole_tensor(parameter)
        if accelerator.is_main_process:
            found[name] = value.contiguous().cpu()
    return found


def whole_tensor(tensor: Any) -> Any:
    """The full value of a tensor, whoever holds it, a collective where it is shared out; anything else as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def zero_optimizer(optimizer: Any) -> Any | None:
    """DeepSpeed's optimizer, of which each process holds a part, inside accelerate's wrapper; None where there is none."""
    inner = getattr(optimizer, "optimizer", None)
    return (
        inner
        if hasattr(inner, "single_partition_of_fp32_groups") or hasattr(inner, "fp32_partitioned_groups_flat")
        else None
    )


def part_name(accelerator: Accelerator) -> str | None:
    """File name of this process's part of the optimizer in a checkpoint; None where one file holds it all."""
    if engine_of(accelerator) not in (capabilities.ZERO_2, capabilities.ZERO_3):
        return None
    return f"optimizer_{accelerator.process_index}_of_{accelerator.num_processes}.pt"


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """State of a torch optimizer with full tensors. Every process calls this."""
    state = optimizer.state_dict()
    moments = {
        key: {name: whole_tensor(value) for name, value in values.items()} for key, values in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`: every process takes its share."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        if isinstance(parameter, DTensor):
            for name, value in values.items():
                if value.shape == parameter.shape and value.dim():
                    local = value.to(parameter.device_mesh.device_type)
                    values[name] = distribute_tensor(local, parameter.device_mesh, parameter.placements)
    optimizer.load_state_dict(state)


def zero_state(zero: Any) -> dict[str, Any]:
    """This process's part of a ZeRO optimizer: moments, and the float32 originals of what it trains."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
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
    """The inverse of `zero_state`."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        rest = zero.state_dict()  # what this run does not change: scale of the loss, overflow
        mine = {**rest, "optimizer_state_dict": state["optimizer"], "fp32_flat_groups": state["parameters"]}
        zero.load_state_dict({dist.get_rank(): mine})
        return
    zero.optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for part, saved in zip(zero.single_partition_of_fp32_groups, state["parameters"], strict=True):
            part.copy_(saved)


def configure_deepspeed(accelerator: Accelerator, clip_grad_norm: float | None) -> None:
    """Write into DeepSpeed's configuration what it would decide otherwise.

    It clips at 1.0 if its configuration says nothing; 0 is no clipping. And its own bfloat16 would round the adapter, which stays in
    float32 here under every engine: `prepare` casts in the forward pass instead.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.deepspeed_config["gradient_clipping"] = max(clip_grad_norm or 0.0, 0.0)
        plugin.deepspeed_config["bf16"] = {"enabled": False}


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """Model and optimizer for the engine.

    Under FSDP2 the model is already what it has to be. accelerate would share it out anew, cast the adapter to the base's precision,
    and lose tied weights on the way.
    """
    engine = engine_of(accelerator)
    if (
        engine in (capabilities.ZERO_2, capabilities.ZERO_3, capabilities.FSDP)
        and accelerator.mixed_precision == "bf16"
    ):
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(
            model.forward
        )  # as accelerate does for DDP
    return (model, optimizer) if engine == capabilities.FSDP else accelerator.prepare(model, optimizer)
