"""Flags → settings, resolved once: what a run does, in values that nothing writes to afterwards.

There are three moments. `before_data` knows the flags, the adapter and the base's configuration, and gives `Settings`.
`with_recipe` knows the base's scales as well, and gives `Resolved`, in which no hyperparameter is missing.
`with_learning_rate` replaces the rate by the one that --auto_lr chose. Origins record where each value comes from.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from open_instruct.adapters import loaded
from open_instruct.adapters.folders import AdapterFolder
from open_instruct.data.chat import PLAIN
from open_instruct.data.context import source_of
from open_instruct.data.plan import Plan
from open_instruct.data.rendering_flags import OF_RENDERING, rendering_of
from open_instruct.data.sources import Mixture
from open_instruct.errors import InputError
from open_instruct.flags import FIELDS, Flags, belongs, names_with
from open_instruct.flags.declare import wrong_model_problems
from open_instruct.methods import Feature, Method, ModelFacts, method_of
from open_instruct.model import loading
from open_instruct.model.distillation import DistillationSettings
from open_instruct.model.quantised import stored_quantisation
from open_instruct.training.base_model import BaseModelSettings, TokenizerSettings, base_model_settings
from open_instruct.training.checkpoint import Checkpoint
from open_instruct.training.doctor import RunInfo
from open_instruct.training.engines import ProcessSettings, is_sharded
from open_instruct.training.forward_settings import ForwardSettings
from open_instruct.training.load_data import Data, DataSettings, conversation_length, mixture_members
from open_instruct.training.loop import LoopSettings
from open_instruct.training.optimizer import OptimizerSettings
from open_instruct.training.output import OutputSettings
from open_instruct.training.tracking import TrackingSettings


@dataclass(frozen=True)
class Settings:
    """All that a run needs before it reads data."""

    flags: Flags
    origins: Mapping[str, str]
    method: Method
    adapter: AdapterFolder | None  # trained adapter to continue
    num_virtual_tokens: int  # 0 for methods without a soft prompt
    answer_length: int | None  # positions for a prompt and its answer; None: unlimited
    compute_dtype: torch.dtype
    model: BaseModelSettings
    tokenizer: TokenizerSettings
    data: DataSettings
    processes: ProcessSettings
    forward: ForwardSettings
    distillation: DistillationSettings | None
    output: OutputSettings
    tracking: TrackingSettings

    def plan(self, num_examples: int, num_processes: int, mixture: Mixture | None = None) -> Plan:
        """Return the plan: the examples of each step, and the number of steps."""
        flags, num_examples = self.flags, mixture.num_examples if mixture else num_examples
        per_step = flags.per_device_train_batch_size * flags.gradient_accumulation_steps * num_processes
        num_steps = flags.max_train_steps or flags.num_train_epochs * -(-num_examples // per_step)
        return Plan(num_examples, per_step, num_steps, flags.seed, mixture)

    def eval_steps(self, plan: Plan) -> int:
        """Return the steps between held-out evaluations; 0: none between start and end."""
        return max(1, plan.num_steps // 5) if self.flags.eval_steps is None else self.flags.eval_steps

    def check_engine(self, engine: Feature | None) -> None:
        """Refuse combinations of method, engine and base that don't work.

        Raises:
            InputError: naming every obstacle.
        """
        flags, method = self.flags, self.method
        obstacles = method.obstacles_of(method.settings(asdict(flags)))
        wanted = {
            Feature.PADDED_CHECKPOINTING: flags.gradient_checkpointing and not flags.packing,
            Feature.FOUR_BITS: self.model.bits == "4bit",
            Feature.EIGHT_BITS: flags.load_in_8bit or self.model.bits == "8bit",
            engine: engine is not None,
        }
        problems = [
            f"{method.title} does not work with {feature}: {obstacles[feature]}"
            for feature, is_wanted in wanted.items()
            if feature and is_wanted and feature in obstacles
        ]
        if method.causal_only and self.tokenizer.makes_pairs:
            problems.append(f"{method.title} can't be trained together on an encoder–decoder: choose one of the two")
        if method.trains_base and self.model.is_quantised and not self.model.bits:
            problems.append("quantised weights can't be trained in full: choose another method, as --use_prompt_tuning")
        problems += wrong_model_problems(flags, FIELDS.values(), self.origins, self.tokenizer.makes_pairs)
        if is_sharded(engine):
            if self.model.is_quantised and not method.quantises_base:
                problems.append(f"quantised weights can't be sharded by {engine}: use DDP or ZeRO-2, or a whole base")
            if method.init_flag and getattr(flags, method.init_flag) == "screened":
                problems.append(
                    f"a screened start needs the full model, which no process holds under {engine}: use the "
                    "initialisation text"
                )
            if flags.auto_lr:
                problems.append(
                    f"--auto_lr needs the full model, which no process holds under {engine}: use DDP or ZeRO-2, or "
                    "choose the rate on one process first"
                )
        if engine == Feature.FSDP and flags.use_8bit_optimizer:
            problems.append(
                "--use_8bit_optimizer does not support the sharded parameters of FSDP: drop it, or use another engine"
            )
        if problems:
            raise InputError("; ".join(problems))


@dataclass(frozen=True)
class Resolved(Settings):
    """Settings with every hyperparameter resolved: all that a run needs before its first step."""

    method_settings: Any  # an instance of the method's `settings_class`
    optimizer: OptimizerSettings
    recipe_sources: str

    def values(self) -> dict[str, Any]:
        """Return the value of every flag as the run uses it."""
        optimizer = self.optimizer
        return asdict(self.flags) | {
            "num_virtual_tokens": self.num_virtual_tokens or None,
            "learning_rate": optimizer.learning_rate,
            "lr_scheduler_type": optimizer.lr_scheduler_type,
            "warmup_ratio": optimizer.warmup_ratio,
            "weight_decay": optimizer.weight_decay,
            "clip_grad_norm": optimizer.clip_grad_norm,
            **asdict(self.method_settings),
        }

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups."""
        return self.method.parameter_groups(model, self.method_settings, self.optimizer.learning_rate)

    def shown(self) -> dict[str, Any]:
        """Return the hyperparameters that are printed before the first step."""
        values = self.values()
        shown = [item for item in names_with("shown") if belongs(item, self.flags.methods)]
        found = {item: values[item] for item in shown if not (self.adapter and item == self.method.init_flag)}
        return found | self.method.further_rates(self.method_settings, self.optimizer.learning_rate)

    def record(
        self, data: Data, num_processes: int, engine: Feature | None, saved: Checkpoint | None
    ) -> dict[str, Any]:
        """Return the entries of run.json about the settings: everything that is needed to repeat the run."""
        return {
            "flags": {
                name: {"value": value, "origin": self.origins.get(name, "default")}
                for name, value in sorted((self.values() | self.model.as_found).items())
            },
            "method": self.method.name,
            "recipe_sources": self.recipe_sources,
            "world_size": num_processes,
            "engine": engine and str(engine),
            "seed": self.flags.seed,
            **data.record(),
            "resumed_from": saved and str(saved.path),
        }

    def run_info(self, data: Data, plan: Plan, facts: ModelFacts) -> RunInfo:
        """Return what the loss doctor knows of the run before its first step."""
        return RunInfo(
            learning_rate=self.optimizer.learning_rate,
            num_steps=plan.num_steps,
            warmup_steps=self.optimizer.warmup_steps(plan.num_steps),
            clip_grad_norm=self.optimizer.clip_grad_norm,
            labelled_share=float(data.train.label_counts.sum() / data.train.lengths.sum()),
            num_read=data.train.num_read,
            num_truncated=data.train.num_truncated,
            num_skipped=data.train.num_skipped,
            max_length=self.data.max_length,
            trains_prompt_directly=self.method.trains_prompt_directly,
            has_network=self.method.keeps_network(self.method_settings),
            embedding_std=facts.embedding_std,
            vocabulary_norm=facts.embedding_norm,
        )

    def loop(self, plan: Plan) -> LoopSettings:
        """Return the plain values of the loop."""
        flags = self.flags
        checkpoint_every = int(flags.checkpointing_steps or 0) if flags.checkpointing_steps != "epoch" else None
        return LoopSettings(
            accumulation_steps=flags.gradient_accumulation_steps,
            clip_grad_norm=self.optimizer.clip_grad_norm,
            seed=flags.seed,
            logging_steps=flags.logging_steps,
            eval_steps=self.eval_steps(plan),
            checkpoint_every=plan.steps_per_epoch if checkpoint_every is None else checkpoint_every,
            keep_checkpoints=flags.keep_last_n_checkpoints,
            keep_best=flags.keep_best,
            patience=flags.patience,
            sum_loss=flags.reduce_loss == "sum",
            sync_each_batch=flags.sync_each_batch,
            in_float16=self.compute_dtype == torch.float16,
        )

    def with_learning_rate(self, rate: float) -> Resolved:
        """Return the settings with the rate that --auto_lr chose: the third moment."""
        optimizer = replace(self.optimizer, learning_rate=rate)
        return replace(self, optimizer=optimizer, origins={**self.origins, "learning_rate": "auto_lr"})


def before_data(
    flags: Flags, origins: Mapping[str, str], config: PretrainedConfig, adapter: AdapterFolder | None = None
) -> Settings:
    """Resolve what is known before data is read: the first moment.

    Args:
        flags: checked flags, with the values that the adapter decides.
        origins: origins of the given flags.
        config: the base model's configuration.
        adapter: trained adapter to continue, or None.

    Raises:
        InputError: virtual tokens and conversations do not fit into the model's context.
    """
    method = method_of(flags.method, flags.peft_config)
    model = replace(base_model_settings(flags), stored=stored_quantisation(config))
    context = loading.context_length(config)
    makes_pairs, is_chosen = bool(config.is_encoder_decoder), "chat_template_name" in origins
    num_virtual_tokens = flags.num_virtual_tokens or 0
    if method.is_soft_prompt and not num_virtual_tokens:
        num_virtual_tokens = method.recommended_virtual_tokens(
            context, flags.max_seq_length, makes_pairs, flags.soft_prompt_at
        )
        origins = {**origins, "num_virtual_tokens": "recipe"}
    length = conversation_length(context, num_virtual_tokens, flags.max_seq_length)
    seed = flags.seed if flags.split_seed is None else flags.split_seed
    members = mixture_members(flags.dataset_mixer, flags.dataset_mixer_list)
    sources = (*(flags.train_file or ()), *(name for name, _ in members), flags.validation_file, flags.dataset_name)
    distilled = source_of(flags.distill_context, flags.distill_column, flags.distill_system)
    how = flags.distill_context, flags.distill_column, flags.distill_loss, flags.distill_weight, flags.distill_offload
    trackers = tuple(flags.report_to) if flags.with_tracking and flags.report_to != ["none"] else ()
    inputs = {
        "the base model": flags.model_name_or_path,
        "the adapter": flags.adapter_name_or_path,
        "the tokenizer": flags.tokenizer_name_or_path,
        "the configuration": flags.config_name,
        "the context": flags.distill_context,
        "the hard prompt": flags.hard_prompt,
    }
    repository = flags.hf_repo_id or flags.run_name or f"{flags.exp_name}-{method.name}"
    if flags.hf_entity and "/" not in repository:
        repository = f"{flags.hf_entity}/{repository}"
    return Settings(
        flags=flags,
        origins=origins,
        method=method,
        adapter=adapter,
        num_virtual_tokens=num_virtual_tokens,
        answer_length=loaded.max_length(config, num_virtual_tokens),
        compute_dtype=model.compute_dtype,
        model=model,
        tokenizer=TokenizerSettings(
            name=flags.tokenizer_name_or_path or model.name,
            revision=flags.tokenizer_revision or flags.model_revision,
            trust_remote_code=flags.trust_remote_code,
            chat_template_name=flags.chat_template_name if is_chosen or not makes_pairs else PLAIN,
            add_bos=flags.add_bos,
            makes_pairs=makes_pairs,
            new_tokens=model.new_tokens,
        ),
        data=DataSettings(
            train_files=tuple(flags.train_file or ()),
            dataset_name=flags.dataset_name,
            dataset_config_name=flags.dataset_config_name,
            mixture=members,
            mixture_splits=tuple(flags.dataset_mixer_list_splits),
            messages_key=flags.sft_messages_key,
            skip_bad_rows=flags.bad_rows == "skip",
            validation_file=flags.validation_file,
            validation_fraction=flags.validation_fraction,
            max_eval_samples=flags.max_eval_samples,
            max_train_samples=flags.max_train_samples,
            drop_held_out_duplicates=flags.drop_held_out_duplicates,
            seed=seed,
            max_length=length,
            num_workers=flags.preprocessing_num_workers,
            cache_dir=None if flags.dataset_skip_cache else Path(flags.dataset_local_cache_dir),
            overwrite_cache=flags.overwrite_cache,
            labels=flags.labels,
            context=distilled,
            rendering=rendering_of(seed, *(getattr(flags, name) for name in OF_RENDERING)),
        ),
        processes=ProcessSettings(
            compute_dtype=model.compute_dtype,
            seed=flags.seed,
            timeout=flags.timeout,
            trackers=trackers,
            output_dir=flags.output_dir,
            hidden_size=getattr(config.get_text_config(), "hidden_size", None),
        ),
        forward=ForwardSettings(
            packing=flags.packing,
            packing_requested="packing" in origins,
            max_tokens_per_microbatch=flags.max_tokens_per_microbatch,
            attn_backend=flags.attn_backend,
            use_flash_attn=flags.use_flash_attn is not False,
            max_length=length,
            num_virtual_tokens=num_virtual_tokens,
            train_batch_size=flags.per_device_train_batch_size,
            eval_batch_size=flags.per_device_eval_batch_size or flags.per_device_train_batch_size,
            gradient_checkpointing=flags.gradient_checkpointing,
            compile_layers=flags.compile,
            # Not where rows stand behind contexts of their own, or an encoder reads their beginning with the rest.
            share_beginning=flags.share_beginning and not distilled and not makes_pairs,
        ),
        distillation=DistillationSettings(*how) if distilled else None,
        output=OutputSettings(
            folder=Path(flags.output_dir),
            writes=not (flags.dry_run or flags.cache_dataset_only),
            overwrite=flags.overwrite_output_dir,
            resume_from=flags.resume_from_checkpoint,
            inputs={what: name for what, name in inputs.items() if name},
            data=[name for name in sources if name],
            clean_checkpoints_at_end=flags.clean_checkpoints_at_end,
            upload_to=repository if flags.push_to_hub else None,
            upload_revision=flags.hf_repo_revision,
        ),
        tracking=TrackingSettings(
            trackers=trackers,
            project=flags.wandb_project_name,
            entity=flags.wandb_entity,
            run_name=flags.run_name or f"{flags.exp_name}__{method.name}__{flags.seed}__{int(time.time())}",
        ),
    )


def with_recipe(settings: Settings, facts: ModelFacts, sharded: bool) -> Resolved:
    """Fill the hyperparameters that the user left unset from the method's recipe: the second moment.

    Args:
        settings: result of `before_data`.
        facts: scales of the base.
        sharded: no process holds the full model, so starts can't be compared, and a screened start uses the text.
    """
    flags, method, origins = settings.flags, settings.method, dict(settings.origins)
    given = asdict(flags) | {"num_virtual_tokens": settings.num_virtual_tokens or None}
    recipe = method.recipe(facts, given)
    values: dict[str, Any] = {}
    if flags.learning_rate is None and flags.learning_rate_factor != 1:
        values["learning_rate"] = flags.learning_rate_factor * recipe.learning_rate
        origins["learning_rate"] = f"recipe × {flags.learning_rate_factor:g}"
    if method.init_flag and given[method.init_flag] is None and flags.prompt_tuning_init_text:
        values[method.init_flag], origins[method.init_flag] = "text", "flag prompt_tuning_init_text"
    for name, value in recipe.values(method.init_flag, sharded).items():
        if given[name] is None and name not in values:
            values[name], origins[name] = value, "recipe"
    known = given | values
    method_settings = method.settings(known)
    origins |= dict.fromkeys(method.further_rates(method_settings, 1), "a multiple of learning_rate")
    return Resolved(
        **{name: getattr(settings, name) for name in Settings.__dataclass_fields__ if name != "origins"},
        origins=origins,
        method_settings=method_settings,
        optimizer=OptimizerSettings(
            learning_rate=known["learning_rate"],
            lr_scheduler_type=known["lr_scheduler_type"],
            warmup_ratio=known["warmup_ratio"],
            final_lr_ratio=flags.final_lr_ratio or 0.0,
            weight_decay=known["weight_decay"],
            clip_grad_norm=known["clip_grad_norm"],
            fused=flags.fused_optimizer,
            eight_bits=flags.use_8bit_optimizer,
        ),
        recipe_sources=recipe.sources,
    )
