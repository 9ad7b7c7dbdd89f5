"""What makes two runs, or two processes of one run, the same: compared before a run resumes, and before it starts.

Flags are compared as their declaration says (`on_resume`): by value, or by what comes of them (rows, weights, steps).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from open_instruct.adapters.folders import WEIGHTS, AdapterFolder
from open_instruct.data.context import Context, RowContexts
from open_instruct.data.plan import Plan
from open_instruct.errors import InputError, input_faults
from open_instruct.files import sha256
from open_instruct.flags import belongs, names_with
from open_instruct.model import loading
from open_instruct.model.configuration import parse_arguments
from open_instruct.training.continuing import NETWORK
from open_instruct.training.load_data import Data
from open_instruct.training.output import package_versions

if TYPE_CHECKING:
    from open_instruct.training.checkpoint import Checkpoint
    from open_instruct.training.settings import Resolved, Settings

# Flags that the recipe fills: compared when it has.
OF_THE_RECIPE = ("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "clip_grad_norm")
# Flags that may differ between processes: names of folders and files, whose content is compared, and work on this one.
OF_ONE_PROCESS = (
    "model_name_or_path",
    "config_name",
    "tokenizer_name_or_path",
    "tokenizer_name",
    "adapter_name_or_path",
    "peft_config",
    "quantisation_config",
    "train_file",
    "validation_file",
    "distill_context",
    "template",
    "hard_prompt",
    "dataset_name",
    "dataset_mixer",
    "dataset_mixer_list",
    "dataset_local_cache_dir",
    "overwrite_cache",
    "preprocessing_num_workers",
    "resume_from_checkpoint",
    "run_name",
)


def of_processes(settings: Settings, saved: Checkpoint | None) -> dict[str, Any]:
    """Return what all processes of a run must share before they read data: flags, packages, checkpoint."""
    flags = asdict(settings.flags)
    return {
        **{f"--{name}": value for name, value in flags.items() if name not in OF_ONE_PROCESS},
        **{f"version of {name}": version for name, version in package_versions().items()},
        "checkpoint to resume from": saved and f"step {saved.state.step}",
    }


def of_data(
    settings: Settings,
    data: Data,
    context: Context | RowContexts | None,
    config: PretrainedConfig,
    plan: Plan,
    num_processes: int,
) -> dict[str, Any]:
    """Return what a resumed run must share with the one that wrote the checkpoint, as far as it is known without model.

    Names are those of flags, or words for what several flags lead to.
    """
    flags = settings.flags
    names = [item for item in names_with("on_resume", "same") if belongs(item, flags.methods)]
    evaluations_count = (flags.keep_best or flags.patience is not None) and data.held_out is not None
    return {
        "method": settings.method.name,
        "configuration of the adapter": settings.method.configuration,
        "base model": loading.weights_key(settings.model.name, config),
        "configuration of the base": loading.config_key(config),
        "further arguments of the base": parse_arguments(settings.model.arguments),
        "quantisation of the base": settings.model.configured,
        "adapter to continue": settings.adapter and adapter_key(settings.adapter),
        "training and held-out data": data.contents(),
        "context to distil": context and context.key,
        "hard prompt": settings.data.hard_prompt and settings.data.hard_prompt.tokens.key,
        "examples": len(data.train),
        "examples_per_step": plan.examples_per_step,
        "examples of the sources": plan.mixture and plan.mixture.key,
        "num_steps": plan.num_steps,
        **{item: getattr(flags, item) for item in names if item not in OF_THE_RECIPE},
        "num_virtual_tokens": settings.num_virtual_tokens,
        "dtype": str(settings.compute_dtype),
        "final_lr_ratio": flags.final_lr_ratio or 0.0,
        "split_seed": settings.data.seed,
        # Evaluations choose the parameters that are saved, and may end the run.
        "eval_steps": settings.eval_steps(plan) if evaluations_count else None,
        # A loss that is summed over tokens is divided by the number of micro-batches.
        "micro-batches of a step": (
            flags.gradient_accumulation_steps * num_processes if flags.reduce_loss == "sum" else None
        ),
    }


def of_run(identity: Mapping[str, Any], resolved: Resolved, attention: str) -> dict[str, Any]:
    """Return the identity `of_data` with what only the model decides: the recipe's values, and the attention."""
    recipe = {name: getattr(resolved.optimizer, name) for name in OF_THE_RECIPE}
    return {**identity, **recipe, "attention": attention}


def adapter_key(folder: AdapterFolder) -> str:
    """Return a hash of a trained adapter's content, without the names of folders in it."""
    settings = {name: value for name, value in folder.settings.items() if name != "base_model_name_or_path"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in (WEIGHTS, NETWORK):
        if (folder.path / name).is_file():
            digest.update(f"{name} {sha256(folder.path / name)}".encode())
    return digest.hexdigest()[:16]


def check_resumed(checkpoint: Checkpoint, current: Mapping[str, Any]) -> None:
    """Refuse to resume another run.

    What only one of them has is not compared: versions of this project add entries. Numbers may differ by rounding, as
    a recipe computes them from the base's weights, on one device or another.

    Raises:
        InputError: naming what differs, with both values.
    """
    saved = checkpoint.state.identity
    with input_faults(f"checkpoint {checkpoint.path}", "resume from another one"):
        different = [
            f"{name} was {saved[name]!r} and is now {value!r}"
            for name, value in json.loads(json.dumps(dict(current), default=str)).items()  # as it would be saved
            if name in saved and not is_same(saved[name], value)
        ]
    if different:
        raise InputError(
            f"checkpoint {checkpoint.path} belongs to another run ({'; '.join(different)}): give the same values, or a "
            "new --output_dir"
        )
    step, num_steps = checkpoint.state.step, current["num_steps"]
    if step > num_steps:
        raise InputError(f"checkpoint {checkpoint.path} is at step {step} of {num_steps}: resume from another one")


def is_same(first: Any, second: Any) -> bool:
    """Return whether two values of JSON are equal, numbers up to rounding."""
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6)
    return bool(first == second)
