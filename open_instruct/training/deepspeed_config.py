"""What a DeepSpeed configuration says, made to agree with the run: "auto" is filled in, and the trainer's part is its.

Batches, gradients, precision, optimizer and schedule belong to the trainer, whose flags set them for every engine
alike. DeepSpeed gets one micro-batch a step and an accumulation of 1, because it would divide the gradient by both.
"""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

from accelerate import DeepSpeedPlugin
from accelerate.state import AcceleratorState

from open_instruct.errors import InputError, input_faults, warn

# Entries that belong to the trainer, and the flag that sets each; None: nothing needs to be set.
TRAINERS_ENTRIES = {
    "train_batch_size": "--per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--clip_grad_norm",
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "bf16": "--dtype",
    "fp16": "--dtype",
    "amp": "--dtype",
    "torch_autocast": "--dtype",
    "optimizer": "--learning_rate and --weight_decay",
    "scheduler": "--lr_scheduler_type",
}
ONE_MICRO_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
REMEDY = "see configs/ds_configs for files that work"


def make_plugin(hidden_size: int | None) -> DeepSpeedPlugin | None:
    """Return accelerate's plugin for the DeepSpeed configuration of the launch, or None where it uses no DeepSpeed.

    Raises:
        InputError: DeepSpeed is not installed, or it can't use the configuration.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if "deepspeed_plugins" in AcceleratorState._shared_state:
        return None  # an earlier run of this process made it, and accelerate takes no second one
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    what = "the DeepSpeed configuration of accelerate" if file == "none" else f"--deepspeed_config_file {file}"
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(f"--use_deepspeed needs deepspeed ({error}): pip install '.[deepspeed]'") from None
    with input_faults(what, REMEDY):
        plugin = DeepSpeedPlugin()
        ignored = take_over(plugin.deepspeed_config, hidden_size)
        plugin.hf_ds_config.set_stage_and_offload()
        plugin.zero_stage = plugin.deepspeed_config["zero_optimization"]["stage"]
        plugin.gradient_accumulation_steps = 1
        deepspeed.DeepSpeedConfig(deepcopy(plugin.deepspeed_config))
    if ignored and os.environ.get("RANK", "0") == "0":
        warn(f"{what}: without effect here are {', '.join(ignored)}")
    return plugin


def take_over(config: dict[str, Any], hidden_size: int | None) -> list[str]:
    """Fill "auto" and the trainer's entries into a DeepSpeed configuration.

    Args:
        config: the configuration, changed in place.
        hidden_size: width of the model, from which accelerate computes sizes; None: DeepSpeed's defaults stay.

    Returns:
        The entries whose values had to give way, each with what decides instead.

    Raises:
        InputError: its stage is none of DeepSpeed's.
    """
    zero, ignored = config["zero_optimization"], []
    for name, flag in TRAINERS_ENTRIES.items():
        value = config.pop(name, "auto")
        off = isinstance(value, dict) and value.get("enabled", value.get("type")) in ("auto", False, None)
        if value not in ("auto", ONE_MICRO_BATCH.get(name)) and not off:
            ignored.append(f"{name} ({flag} decides)" if flag else name)
    if zero.get("stage") in (0, None, "auto"):
        ignored += [] if zero.get("stage") is None else [f"stage {zero['stage']} (ZeRO begins with stage 1)"]
        zero["stage"] = 1
    if zero["stage"] not in (1, 2, 3):
        raise InputError(f"zero_optimization.stage {zero['stage']!r} is none of 1, 2 and 3: choose one")
    if hidden_size:  # the sizes that accelerate takes where it knows the model
        sizes = {
            "reduce_bucket_size": hidden_size**2,
            "stage3_prefetch_bucket_size": hidden_size**2 * 9 // 10,
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        zero |= {name: size for name, size in sizes.items() if zero.get(name) == "auto"}
    without_auto(config)
    # Offloaded moments are updated by the run's own AdamW, so that they are the same under every engine, and nothing
    # has to be compiled.
    config |= {**ONE_MICRO_BATCH, "zero_force_ds_cpu_optimizer": False}
    return ignored


def without_auto(config: dict[str, Any]) -> None:
    """Take out every entry that is "auto" on any level: DeepSpeed knows no such value, and has defaults."""
    for name, value in list(config.items()):
        if value == "auto":
            del config[name]
        elif isinstance(value, dict):
            without_auto(value)
