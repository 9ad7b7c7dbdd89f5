"""What happens before the first step: processes, output folder, forward pass, hyperparameters, plan, optimizer."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import PretrainedConfig, PreTrainedTokenizerBase, get_scheduler, set_seed

from open_instruct.adapters import folders as adapters
from open_instruct.arguments import FinetuneArguments
from open_instruct.data import chat
from open_instruct.data.collate import Batching, Packing
from open_instruct.data.plan import Plan
from open_instruct.errors import InputError
from open_instruct.methods import METHODS, ModelFacts
from open_instruct.model import loading, memory
from open_instruct.model.chunked_loss import rows_at_once
from open_instruct.quiet import silence_transformers
from open_instruct.training import capabilities, engines, packing
from open_instruct.training.auto_rate import RangeTest, range_test
from open_instruct.training.checkpoint import Progress, complete_checkpoints, find_checkpoint, read_progress
from open_instruct.training.doctor import Patient
from open_instruct.training.examples import Data, max_sequence_length, num_virtual_tokens
from open_instruct.training.faults import warn
from open_instruct.training.loop import FitSettings
from open_instruct.training.model_setup import method_settings
from open_instruct.training.packing import Forward, PackingSettings


def make_accelerator(a: FinetuneArguments) -> Accelerator:
    """Processes, devices, trackers and seeds."""
    silence_transformers()
    trackers: Any = None
    if a.with_tracking:
        trackers = "all" if a.report_to == ["all"] else a.report_to
        if any(name in ("all", "wandb") for name in a.report_to):
            check_wandb()
    bf16 = loading.choose_dtype(a.dtype) == torch.bfloat16
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            log_with=trackers,
            project_dir=a.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=a.timeout))],
        )
    except ValueError as error:
        if not a.with_tracking:
            raise
        raise InputError(
            f"--report_to {' '.join(a.report_to)} can't be used ({error}): install the tracker or name another"
        ) from None
    set_seed(a.seed)
    engines.start(accelerator)
    return accelerator


def check_capabilities(a: FinetuneArguments, engine: str | None) -> None:
    """Refuse what the method can't be combined with.

    Args:
        a: the flags.
        engine: of several processes, as `engines.engine_of` names it.

    Raises:
        InputError: naming every obstacle at once.
    """
    method = METHODS[a.method]
    wanted = {
        capabilities.PADDED_CHECKPOINTING: a.gradient_checkpointing and not a.packing,
        capabilities.FOUR_BITS: a.load_in_4bit,
        capabilities.EIGHT_BITS: a.load_in_8bit,
        engine: engine is not None,
    }
    reasons = {feature: capabilities.obstacle(method, feature) for feature, on in wanted.items() if feature and on}
    problems = [
        f"{method.title} does not work with {feature}: {reason}" for feature, reason in reasons.items() if reason
    ]
    if engines.shares_weights(engine) and (a.load_in_4bit or a.load_in_8bit):
        problems.append(
            f"quantised weights can't be shared out by {engine}: use DDP or ZeRO-2, or drop --load_in_{4 if a.load_in_4bit else 8}bit"
        )
    if engines.shares_weights(engine) and "screened" in (a.prompt_tuning_init, a.prefix_init):
        problems.append(
            f"a screened start needs a whole model, which no process holds under {engine}: use the initialisation text"
        )
    if engines.shares_weights(engine) and a.auto_lr:
        problems.append(
            f"--auto_lr needs a whole model, which no process holds under {engine}: use DDP or ZeRO-2, or run it alone first"
        )
    if engine == capabilities.FSDP and a.use_8bit_optimizer:
        problems.append(
            "--use_8bit_optimizer does not know the shared parameters of FSDP: drop it, or use another engine"
        )
    if problems:
        raise InputError("; ".join(problems))


def check_wandb() -> None:
    """Weights & Biases asks for a key on the terminal, or fails in the middle of the start: say it before."""
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.login(prompt=False):
        raise InputError(
            "wandb has no key: run `wandb login`, set WANDB_MODE=offline, or name another tracker with --report_to"
        )


def check_output_dir(a: FinetuneArguments) -> Path | None:
    """Refuse to touch a folder that holds another run.

    Returns:
        The checkpoint to resume from, or None to start at step 0.

    Raises:
        InputError: the folder holds a run, and neither overwriting nor resuming it was asked for.
    """
    folder = Path(a.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: name a folder")
    if a.model_name_or_path and folder.resolve() == Path(a.model_name_or_path).resolve():
        raise InputError(
            f"--output_dir {folder} is the base model's own folder, which a run would overwrite: name another folder"
        )
    if a.adapter_name_or_path and folder.resolve() == Path(a.adapter_name_or_path).resolve():
        raise InputError(
            f"--output_dir {folder} is the adapter's own folder, which a run would overwrite: name another folder"
        )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} can't be written ({error.strerror}): name another folder") from None
    if a.resume_from_checkpoint and a.overwrite_output_dir:
        raise InputError("--resume_from_checkpoint and --overwrite_output_dir contradict each other: drop one")
    if (folder / "summary.json").exists() and not a.overwrite_output_dir:
        raise InputError(
            f"--output_dir {folder} holds a finished run: name another folder, or pass --overwrite_output_dir"
        )
    if a.resume_from_checkpoint:
        return find_checkpoint(a.resume_from_checkpoint, folder)
    if not a.overwrite_output_dir:
        steps = [path.name for path in complete_checkpoints(folder / "checkpoints")]
        if steps:
            raise InputError(
                f"--output_dir {folder} holds an unfinished run with checkpoint {steps[-1]}: continue it with "
                "--resume_from_checkpoint, name another folder, or pass --overwrite_output_dir"
            )
        if any((folder / name).exists() for name in ("adapter_model.safetensors", "config.json", "model.safetensors")):
            raise InputError(
                f"--output_dir {folder} holds a model: name another folder, or pass --overwrite_output_dir"
            )
    return None


def load_tokenizer_and_config(a: FinetuneArguments) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Everything about the model that is not its weights."""
    assert a.model_name_or_path
    remote = {"trust_remote_code": a.trust_remote_code}
    extra = json.loads(a.additional_model_arguments or "{}")
    config = loading.load_config(a.config_name or a.model_name_or_path, revision=a.model_revision, **remote, **extra)
    name = a.tokenizer_name_or_path or a.model_name_or_path
    tokenizer = loading.load_tokenizer(name, revision=a.tokenizer_revision or a.model_revision, **remote)
    chat.set_chat_template(tokenizer, a.chat_template_name, a.add_bos)
    if a.adapter_name_or_path and (own := adapters.chat_template(Path(a.adapter_name_or_path))) not in (
        None,
        tokenizer.chat_template,
    ):
        warn(
            f"the adapter was trained with another chat template (it starts with {str(own)[:60]!r}): see --chat_template_name"
        )
    loading.check_weights(a.model_name_or_path, a.allow_pickle)
    return tokenizer, config


def choose_forward(
    a: FinetuneArguments,
    origins: dict[str, str],
    data: Data,
    config: PretrainedConfig,
    model: Any,
    accelerator: Accelerator,
    pad: int,
) -> Forward:
    """Packed if the model allows it exactly. Says so, and why not otherwise."""
    settings = PackingSettings(
        packing=a.packing,
        asked_for="packing" in origins,
        max_tokens_per_microbatch=a.max_tokens_per_microbatch,
        attn_backend=a.attn_backend,
        use_flash_attn=a.use_flash_attn is not False,
        max_seq_length=max_sequence_length(a, config),
        num_virtual_tokens=num_virtual_tokens(a),
        train_batch_size=a.per_device_train_batch_size,
        eval_batch_size=a.per_device_eval_batch_size or a.per_device_train_batch_size,
        pad_token_id=pad,
        gradient_checkpointing=a.gradient_checkpointing,
        compile_layers=a.compile,
    )
    packing.check_rows(
        settings, max(int(examples.lengths.max()) for examples in (data.train, data.held_out) if examples)
    )
    dtype = loading.choose_dtype(a.dtype)
    engine = engines.engine_of(accelerator)

    def tell(found: tuple[str, str | None]) -> tuple[str, str | None]:
        reason, head = engines.told(found) if engines.shares_weights(engine) else found
        return (
            reason,
            None if engine == capabilities.ZERO_3 else head,
        )  # which gathers the head in each piece, of which processes differ

    with torch.autocast(
        packing.base_of(model).device.type.replace("meta", "cpu"), dtype, enabled=dtype == torch.bfloat16
    ):
        forward = packing.choose_forward(model, METHODS[a.method], settings, accelerator.device, dtype, tell)
    accelerator.print(f"forward pass: {forward.description}")
    return forward


def find_rate(
    a: FinetuneArguments,
    origins: dict[str, str],
    accelerator: Accelerator,
    forward: Forward,
    data: Data,
    plan: Plan,
    resume_from: Path | None,
) -> RangeTest | None:
    """Choose the learning rate as --auto_lr asks, on the main process; a resumed run keeps the one that was chosen."""
    if not a.auto_lr or a.dry_run:
        return None
    recipe_rate, test = a.learning_rate, None
    assert recipe_rate is not None and a.clip_grad_norm is not None
    if resume_from:
        a.learning_rate = read_progress(resume_from)[0].identity["learning_rate"]
    else:
        packing.start(forward, a.gradient_checkpointing, False)
        if accelerator.is_main_process:
            test = range_test(
                accelerator, forward.model, data.train, plan, forward.training, recipe_rate, a.clip_grad_norm, a.seed
            )
        test = engines.told(test)
        a.learning_rate = test.chosen
        accelerator.print(f"auto_lr: {test.chosen:.3g}, the recipe's is {recipe_rate:.3g}; {test.why}")
    origins["learning_rate"] = "auto_lr"
    return test


def hyperparameters(a: FinetuneArguments) -> dict[str, Any]:
    """The resolved values that decide how a run learns, for the terminal."""
    names = ["learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "clip_grad_norm"]
    names += ["num_virtual_tokens"] if METHODS[a.method].is_soft_prompt else []
    names += {
        "prompt_tuning": ["prompt_tuning_init"],
        "prefix_tuning": ["prefix_init", "prefix_projection"],
        "lora": ["lora_rank", "lora_alpha", "lora_dropout"],
        "qlora": ["lora_rank", "lora_alpha", "lora_dropout"],
    }.get(a.method, [])
    if a.adapter_name_or_path:
        names = [name for name in names if not name.endswith("_init")]
    return {name: getattr(a, name) for name in names}


def make_plan(a: FinetuneArguments, num_examples: int, num_processes: int) -> Plan:
    """Which examples each step holds, and how many steps there are."""
    examples_per_step = a.per_device_train_batch_size * a.gradient_accumulation_steps * num_processes
    num_steps = a.max_train_steps or a.num_train_epochs * math.ceil(num_examples / examples_per_step)
    return Plan(num_examples, examples_per_step, num_steps, a.seed)


def fit_settings(a: FinetuneArguments, plan: Plan, batching: Batching) -> FitSettings:
    """The plain values of the loop."""
    assert a.clip_grad_norm is not None
    return FitSettings(
        batching=batching,
        accumulation_steps=a.gradient_accumulation_steps,
        clip_grad_norm=a.clip_grad_norm,
        seed=a.seed,
        logging_steps=a.logging_steps,
        eval_steps=max(1, plan.num_steps // 5) if a.eval_steps is None else a.eval_steps,
        checkpoint_every=plan.steps_per_epoch if a.checkpointing_steps == "epoch" else int(a.checkpointing_steps or 0),
        sum_loss=a.reduce_loss == "sum",
        sync_each_batch=a.sync_each_batch,
    )


def dry_run_text(
    a: FinetuneArguments,
    data: Data,
    plan: Plan,
    model: Any,
    config: PretrainedConfig,
    batching: Batching,
    sharing: memory.Sharing,
) -> str:
    """The plan of a run: steps, tokens, parameters, memory."""
    sizes = memory.counts(model)
    vocab_size, device = config.get_text_config().vocab_size, next(model.parameters()).device
    batches = [
        batching.micro_batches(plan.examples(step).tolist(), data.train.lengths, 0, 1)
        for step in range(min(plan.num_steps, 20))
    ]
    largest = max(
        batching.positions(rows, data.train.lengths, num_virtual_tokens(a)) for step in batches for rows in step
    )
    logit_rows = (
        min(largest, rows_at_once(device, vocab_size, a.method == "full")) if isinstance(batching, Packing) else largest
    )
    estimate = memory.estimate_mb(
        model,
        config,
        largest,
        logit_rows,
        a.gradient_checkpointing,
        a.use_8bit_optimizer,
        loading.choose_dtype(a.dtype).itemsize,
        "full" if a.method == "full" else "soft prompt" if METHODS[a.method].is_soft_prompt else "layers",
        dropout=a.lora_dropout > 0 and a.method in ("lora", "qlora"),
        sharing=sharing,
    )
    parts = ", ".join(f"{name} {value:,.1f}" for name, value in estimate.items() if name != "total")
    share = sizes["trainable_parameters"] / sizes["total_parameters"]
    return "\n".join(
        [
            "plan (dry run: nothing is trained or written):",
            f"  steps                {plan.num_steps:,} of {plan.examples_per_step} examples ({plan.epoch(plan.num_steps):.2f} epochs)",
            f"  tokens per step      {data.train.lengths.mean() * plan.examples_per_step:,.0f} on average, "
            f"{data.train.label_counts.mean() * plan.examples_per_step:,.0f} of them labelled",
            f"  trained parameters   {sizes['trainable_parameters']:,} of {sizes['total_parameters']:,} ({share:.3%})",
            f"  memory per process   about {estimate['total']:,.0f} MB ({parts})",
        ]
    )


def make_optimizer(a: FinetuneArguments, model: torch.nn.Module, num_steps: int) -> tuple[Any, Any]:
    """AdamW on what is trained, and its schedule. The schedule is not prepared: it advances once a step, by hand."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": a.learning_rate, "weight_decay": a.weight_decay}
    if a.use_8bit_optimizer:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise InputError("--use_8bit_optimizer needs bitsandbytes: pip install '.[quant]'") from None
        optimizer: Any = AdamW8bit(parameters, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=a.fused_optimizer, **options)
    assert a.warmup_ratio is not None and a.lr_scheduler_type is not None
    warmup = math.ceil(a.warmup_ratio * num_steps)
    schedule_steps = num_steps
    if a.final_lr_ratio:
        if a.lr_scheduler_type != "linear" or a.final_lr_ratio == 1:
            raise InputError(
                f"--final_lr_ratio {a.final_lr_ratio} works with --lr_scheduler_type linear and below 1: drop one of them"
            )
        schedule_steps = warmup + math.ceil((num_steps - warmup) / (1 - a.final_lr_ratio))
    try:
        schedule = get_scheduler(
            a.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=schedule_steps
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"--lr_scheduler_type {a.lr_scheduler_type} can't be used: {error}") from None
    return optimizer, schedule


def prepare(a: FinetuneArguments, accelerator: Accelerator, forward: Forward, num_steps: int) -> tuple[Any, Any, Any]:
    """Model, optimizer and schedule for the engine: shared out, wrapped, checkpointed, compiled."""
    engines.configure_deepspeed(accelerator, a.clip_grad_norm)
    packing.start(forward, a.gradient_checkpointing, a.compile)
    if engines.shares_weights(engines.engine_of(accelerator)):
        engines.share_out(forward.model, packing.decoder_layers(packing.base_of(forward.model.model)), accelerator)
    optimizer, schedule = make_optimizer(a, forward.model, num_steps)
    return *engines.prepare(accelerator, forward.model, optimizer), schedule


def best_text(progress: Progress) -> str:
    """Why the saved parameters are not the last ones."""
    return (
        f"the held-out loss was lowest after step {progress.best_step} ({progress.best_eval_loss:.4f}; at the end it is "
        f"{progress.final_eval_loss:.4f}): the parameters of that step are saved (--keep_best False saves the last)"
    )


def patient(a: FinetuneArguments, data: Data, plan: Plan, facts: ModelFacts, start: torch.Tensor | None) -> Patient:
    """What the loss doctor is told beforehand. `start`: the soft prompt [P, D], where there is one of embeddings."""
    assert a.learning_rate is not None and a.clip_grad_norm is not None and a.warmup_ratio is not None
    return Patient(
        method=a.method,
        learning_rate=a.learning_rate,
        num_steps=plan.num_steps,
        warmup_steps=math.ceil(a.warmup_ratio * plan.num_steps),
        clip_grad_norm=a.clip_grad_norm,
        labelled_share=float(data.train.label_counts.sum() / data.train.lengths.sum()),
        embedding_std=facts.embedding_std,
        vocabulary_norm=facts.embedding_norm,
        prompt_norm=math.nan if start is None else start.norm(dim=1).median().item(),
    )


def run_identity(a: FinetuneArguments, data: Data, config: PretrainedConfig, plan: Plan) -> dict[str, Any]:
    """What a resumed run must share with the run that wrote the checkpoint."""
    assert a.model_name_or_path
    names = (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_ratio",
        "final_lr_ratio",
        "weight_decay",
        "clip_grad_norm",
        "seed",
        "reduce_loss",
        "keep_best",
    )
    shape = {name: value for name, value in asdict(method_settings(a)).items() if value is not None}
    return {
        "method": a.method,
        "model": loading.weights_key(a.model_name_or_path, config),
        "data": data.fingerprints(),
        "examples": len(data.train),
        "examples_per_step": plan.examples_per_step,
        "num_steps": plan.num_steps,
        **shape,
        **{name: getattr(a, name) for name in names},
    }
