"""Every flag of the trainer, once: typed fields with their unit in the help, in the groups that `--help` shows.

Names, types and defaults are open-instruct's unless `docs/flags.md` lists the difference. A hyperparameter that is None
here is filled by the method's recipe (`open_instruct/methods`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from open_instruct.errors import InputError

METHOD_FLAGS = ("use_lora", "use_qlora", "use_prefix_tuning", "use_prompt_tuning", "use_p_tuning", "use_ia3")
PEFT_INITS = Literal["screened", "text", "sample_vocab", "random"]
PREFIX_INITS = Literal["screened", "text", "zero", "random"]
ATTENTION_BACKENDS = Literal["blocked", "sdpa", "varlen", "flash_attn"]


def flag(default: Any, description: str, **argparse_options: Any) -> Any:
    """A dataclass field whose metadata becomes the options of its argparse argument."""
    metadata = {"help": description.replace("%", "%%"), **argparse_options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelFlags:
    """Base model and tokenizer."""

    model_name_or_path: str | None = flag(None, "base model: a local folder or a name on the Hugging Face Hub")
    config_name: str | None = flag(None, "model configuration, if not the one beside the weights")
    model_revision: str | None = flag(None, "branch, tag or commit of the model on the Hub")
    additional_model_arguments: str | None = flag(None, "JSON object of further arguments for from_pretrained")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "precision of the frozen base; auto: bfloat16 on a GPU that has it, float32 elsewhere. Adapters are always float32",
    )
    load_in_4bit: bool = flag(False, "frozen base in 4-bit NormalFloat (needs the quant extra); adapters stay float32")
    load_in_8bit: bool = flag(False, "frozen base in 8 bits (needs the quant extra); adapters stay float32")
    use_flash_attn: bool | None = flag(
        None,
        "the package flash-attn (needs the flash extra and a GPU); unset: where installed; False: never",
        nargs="?",
        const=True,
    )
    use_liger_kernel: bool = flag(False, "Liger's fused kernels (needs liger-kernel and a GPU)")
    allow_pickle: bool = flag(
        False, "load weights that exist only as pickle files; loading one can run code that is in it"
    )
    tokenizer_name_or_path: str | None = flag(None, "tokenizer, if not the one beside the model")
    tokenizer_name: str | None = flag(None, "older name of tokenizer_name_or_path")
    tokenizer_revision: str | None = flag(None, "branch, tag or commit of the tokenizer on the Hub")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")
    add_bos: bool = flag(
        False, "put the beginning-of-sequence token before every conversation, if the template does not"
    )
    chat_template_name: str = flag(
        "tulu", "tulu, chatml, zephyr or simple_chat; tokenizer: the tokenizer's own; or the path of a Jinja file"
    )


@dataclass
class DataFlags:
    """Training and held-out data. Exactly one of train_file, dataset_name, dataset_mixer and dataset_mixer_list."""

    train_file: list[str] | None = flag(
        None,
        "training conversations: JSON Lines, JSON array, Arrow or Parquet files, folders of them, or globs; one or several",
    )
    dataset_name: str | None = flag(None, "data set on the Hub, or a local folder that `datasets` can load")
    dataset_config_name: str | None = flag(None, "configuration of dataset_name")
    dataset_mixer: str | None = flag(
        None, "JSON object, data set or file → rows (2000) or share (0.5): '{\"a.jsonl\": 0.5}'"
    )
    dataset_mixer_list: list[str] | None = flag(
        None, "the same as a list: NAME_OR_FILE COUNT_OR_SHARE NAME_OR_FILE …; 1.0 is all"
    )
    dataset_mixer_list_splits: list[str] = flag(["train"], "split of each member of dataset_mixer_list, or one for all")
    sft_messages_key: str = flag("messages", "column that holds the conversation")
    validation_file: str | None = flag(None, "held-out conversations, a file or folder as train_file; never trained on")
    validation_fraction: float = flag(
        0.02, "share of the training rows held out (drawn by seed) when there is no validation_file"
    )
    max_eval_samples: int = flag(500, "held-out rows used at most")
    max_train_samples: int | None = flag(None, "training rows used at most, drawn by seed")
    max_seq_length: int | None = flag(
        None, "tokens of a conversation kept, virtual tokens not counted; unset: 4096 or what the context allows"
    )
    preprocessing_num_workers: int | None = flag(None, "threads that tokenise; unset: all cores")
    cache_dataset_only: bool = flag(False, "tokenise, fill the cache, and stop")
    overwrite_cache: bool = flag(False, "tokenise again even if the cache holds the result")
    dataset_skip_cache: bool = flag(False, "neither read nor write the cache of tokenised data")
    dataset_local_cache_dir: str = flag("local_dataset_cache", "folder of the cache of tokenised data")


@dataclass
class MethodFlags:
    """The fine-tuning method; none of the use_ flags means full fine-tuning."""

    use_lora: bool = flag(False, "LoRA: low-rank updates of the linear layers")
    use_qlora: bool = flag(False, "LoRA on a base quantised to 4 bits (needs the quant extra)")
    use_prefix_tuning: bool = flag(False, "prefix tuning: trained keys and values before every layer's own")
    use_prompt_tuning: bool = flag(False, "prompt tuning: trained embeddings before the input")
    use_p_tuning: bool = flag(False, "P-tuning: prompt tuning whose embeddings come from a small trained network")
    use_ia3: bool = flag(False, "IA3: trained scaling of keys, values and feed-forward activations")
    adapter_name_or_path: str | None = flag(
        None,
        "trained adapter to go on from, in PEFT's format; unset: a new one. Its method, size and base are taken where no flag names them",
    )
    num_virtual_tokens: int | None = flag(None, "length of the soft prompt, in tokens; unset or 0: the recipe's")
    prompt_tuning_init: PEFT_INITS | None = flag(
        None,
        "start of a soft prompt: a text's embeddings, random tokens', noise; screened: of the text and 15 draws of random tokens the one "
        "with the lowest loss; unset: the recipe's",
    )
    prompt_tuning_init_text: str | None = flag(None, "text that prompt or prefix tuning starts from with init `text`")
    prefix_init: PREFIX_INITS | None = flag(
        None,
        "start of a prefix: a text's keys and values, zeros, noise; screened: of the text's and 15 draws of random tokens' the ones "
        "with the lowest loss; unset: the recipe's",
    )
    prefix_projection: bool = flag(False, "compute the prefix by a trained two-layer network (Li and Liang 2021)")
    encoder_hidden_size: int | None = flag(
        None, "width of the network of P-tuning or prefix_projection; unset: the model's hidden size"
    )
    lora_rank: int = flag(64, "rank of the LoRA update")
    lora_alpha: float = flag(16, "LoRA scale: the update is multiplied by alpha / rank")
    lora_dropout: float = flag(0.1, "dropout on the input of LoRA, a probability")


@dataclass
class OptimizationFlags:
    """Steps, rates and limits. A step is per_device_train_batch_size × processes × gradient_accumulation_steps examples."""

    per_device_train_batch_size: int = flag(
        8, "examples of one process in a micro-batch; packed rows hold more or fewer, a step the same"
    )
    gradient_accumulation_steps: int = flag(1, "micro-batches per process in a step")
    num_train_epochs: int = flag(2, "passes over the data")
    max_train_steps: int | None = flag(None, "optimizer steps; overrides num_train_epochs")
    learning_rate: float | None = flag(None, "peak learning rate; unset: the recipe's")
    learning_rate_factor: float = flag(1.0, "multiplies the recipe's learning rate")
    auto_lr: bool = flag(
        False, "choose the learning rate by short trainings on the first micro-batches, before the run (not in full)"
    )
    lr_scheduler_type: str | None = flag(
        None, "linear, cosine, constant, constant_with_warmup, polynomial, …; unset: the recipe's"
    )
    warmup_ratio: float | None = flag(None, "share of the steps in which the rate rises from 0; unset: the recipe's")
    final_lr_ratio: float | None = flag(None, "rate at the end as a share of the peak (linear schedule only); unset: 0")
    weight_decay: float | None = flag(None, "AdamW's decay, per unit of learning rate; unset: the recipe's")
    clip_grad_norm: float | None = flag(None, "bound of the gradient's L2 norm, -1: none; unset: the recipe's")
    fused_optimizer: bool = flag(True, "AdamW in one fused kernel")
    use_8bit_optimizer: bool = flag(False, "AdamW with 8-bit state (needs the quant extra)")
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, about a third more time; with every method"
    )
    packing: bool = flag(
        True,
        "compute micro-batches as one row without padding, virtual tokens once; False: PEFT's own padded forward pass",
    )
    max_tokens_per_microbatch: int | None = flag(
        None,
        "tokens of a packed row at most, virtual ones included; unset: 4096 or max_seq_length, at most a full padded micro-batch",
    )
    attn_backend: ATTENTION_BACKENDS | None = flag(
        None, "attention of packed rows; unset: blocked on CPU, flash_attn or varlen on a GPU in 16 bits, else sdpa"
    )
    compile: bool = flag(False, "compile the decoder layers (packed forward pass only; the first steps take minutes)")
    reduce_loss: Literal["mean", "sum"] = flag(
        "mean", "mean: over the step's labelled tokens; sum: over tokens, mean over micro-batches"
    )
    sync_each_batch: bool = flag(False, "exchange gradients after each micro-batch instead of once a step")
    timeout: int = flag(1800, "seconds that a process waits for the others")
    seed: int = flag(42, "seed of initialisation, order, dropout, and of split_seed")
    split_seed: int | None = flag(
        None, "seed of which rows are held out, and of which are drawn by max_train_samples; unset: seed"
    )


@dataclass
class RunFlags:
    """What a run writes, reports and resumes."""

    output_dir: str = flag("output/", "folder of the run")
    overwrite_output_dir: bool = flag(False, "replace the run that output_dir holds")
    exp_name: str = flag("finetune_peft", "name of the experiment, for trackers")
    run_name: str | None = flag(None, "name of the run, for trackers; unset: the experiment, method, seed and time")
    logging_steps: int = flag(1, "steps between rows of metrics.jsonl")
    eval_steps: int | None = flag(
        None, "steps between held-out evaluations; unset: a fifth of the run; 0: only at the start and the end"
    )
    per_device_eval_batch_size: int | None = flag(
        None, "examples in a padded held-out micro-batch; unset: as in training"
    )
    keep_best: bool = flag(
        True, "save the parameters of the evaluation with the lowest held-out loss; False: the last ones"
    )
    num_sample_answers: int = flag(
        3, "held-out questions answered by base and tuned model at the end (three shown, exact match over all)"
    )
    checkpointing_steps: str | None = flag(None, "steps between checkpoints, or `epoch`; unset: none")
    keep_last_n_checkpoints: int = flag(3, "checkpoints kept, -1: all")
    clean_checkpoints_at_end: bool = flag(False, "delete the checkpoints when the run has finished")
    resume_from_checkpoint: str | None = flag(
        None,
        "continue from this checkpoint; without a path, from the newest complete one of output_dir",
        nargs="?",
        const="newest",
    )
    dry_run: bool = flag(False, "do everything up to the first step, print the plan, and stop")
    with_tracking: bool = flag(False, "report to experiment trackers")
    report_to: list[str] = flag(["all"], "trackers: wandb, tensorboard, trackio, … or all that are installed")
    wandb_project_name: str = flag("open_instruct_internal", "project of the tracker")
    wandb_entity: str | None = flag(None, "entity (team) of Weights & Biases")
    push_to_hub: bool = flag(False, "upload the result to the Hugging Face Hub")
    save_to_hub: str | None = flag(None, "older form of push_to_hub: the repository's name")
    hf_entity: str | None = flag(None, "user or organisation of the upload; unset: the logged-in one")
    hf_repo_id: str | None = flag(None, "repository of the upload; unset: the run's name")
    hf_repo_revision: str | None = flag(None, "branch of the upload; unset: main")


@dataclass
class AcceptedFlags:
    """Flags of open-instruct that have no effect here; using one prints a warning with the reason."""

    low_cpu_mem_usage: bool = flag(False, "transformers 5 always loads this way")
    use_slow_tokenizer: bool = flag(False, "loss masks need the fast tokenizer's offsets")
    use_fast: bool = flag(True, "loss masks need the fast tokenizer's offsets")
    get_tokenizer_fn: str | None = flag(None, "there is one way to load a tokenizer here")
    tokenizer_files_hash: list[str] | None = flag(None, "the cache key is computed")
    ground_truths_key: str | None = flag(None, "used in reinforcement learning only")
    dataset_transform_fn: list[str] | None = flag(
        None, "rows are always tokenised, truncated, and dropped when no label is left"
    )
    dataset_target_columns: list[str] | None = flag(None, "the columns of the token cache are fixed")
    dataset_cache_mode: str | None = flag(None, "the cache is always local")
    dataset_config_hash: str | None = flag(None, "the cache key is computed")
    dataset_mix_dir: str | None = flag(None, "the mixture is read where it lies; run.json records its fingerprint")
    do_not_randomize_output_dir: bool = flag(True, "output_dir is always used as given")
    hf_repo_url: str | None = flag(None, "computed from hf_entity and hf_repo_id")
    hf_metadata_dataset: str | None = flag(None, "an internal results data set of AI2")
    try_launch_beaker_eval_jobs: bool = flag(False, "Beaker is AI2's cluster")
    try_auto_save_to_beaker: bool = flag(False, "Beaker is AI2's cluster")
    gs_bucket_path: str | None = flag(None, "AI2's bucket")
    oe_eval_tasks: list[str] | None = flag(None, "belongs to Beaker evaluation jobs")
    oe_eval_max_length: int | None = flag(None, "belongs to Beaker evaluation jobs")
    verbose: bool = flag(False, "metrics.jsonl always holds everything")
    load_balancing_loss: bool = flag(False, "the router of a mixture-of-experts model stays frozen or unregularised")
    load_balancing_weight: float | None = flag(None, "belongs to load_balancing_loss")
    sequence_parallel_size: int = flag(1, "sequences are not split over processes")


GROUPS: tuple[Any, ...] = (ModelFlags, DataFlags, MethodFlags, OptimizationFlags, RunFlags, AcceptedFlags)


@dataclass
class FinetuneArguments(ModelFlags, DataFlags, MethodFlags, OptimizationFlags, RunFlags, AcceptedFlags):
    """All flags of `finetune_peft.py`, flat."""

    def __post_init__(self) -> None:
        """Older names and zero values that mean "unset"."""
        self.tokenizer_name_or_path = self.tokenizer_name_or_path or self.tokenizer_name
        self.num_virtual_tokens = self.num_virtual_tokens or None
        if self.save_to_hub:
            self.push_to_hub, self.hf_repo_id = True, self.hf_repo_id or self.save_to_hub

    @property
    def method(self) -> str:
        """Name of the chosen method, a key of `methods.METHODS`."""
        return next((name.removeprefix("use_") for name in METHOD_FLAGS if getattr(self, name)), "full")

    @property
    def data_seed(self) -> int:
        """Seed of which rows are held out and drawn."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def data_sources(self) -> dict[str, Any]:
        """The flags that name training data and are set."""
        names = ("train_file", "dataset_name", "dataset_mixer", "dataset_mixer_list")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def check_arguments(arguments: FinetuneArguments) -> None:
    """Find what is wrong with the flags alone, without opening a file.

    Raises:
        InputError: naming every problem at once.
    """
    a = arguments
    problems = []
    methods = [f"--{name}" for name in METHOD_FLAGS if getattr(a, name)]
    if len(methods) > 1:
        problems.append(f"{' and '.join(methods)} exclude each other: choose one method")
    if not a.model_name_or_path:
        problems.append("--model_name_or_path is missing: give a local folder or a name on the Hub")
    sources = a.data_sources
    if len(sources) != 1:
        seen = " and ".join(f"--{name}" for name in sources) or "none is set"
        problems.append(
            f"exactly one source of training data is needed ({seen}): use --train_file, --dataset_name or --dataset_mixer_list"
        )
    at_least: dict[str, float] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
    }
    at_least |= {
        "max_train_steps": 1,
        "max_train_samples": 1,
        "max_eval_samples": 1,
        "max_seq_length": 2,
        "logging_steps": 1,
    }
    at_least |= {
        "num_virtual_tokens": 1,
        "lora_rank": 1,
        "eval_steps": 0,
        "num_sample_answers": 0,
        "per_device_eval_batch_size": 1,
    }
    at_least |= {
        "encoder_hidden_size": 1,
        "preprocessing_num_workers": 1,
        "keep_last_n_checkpoints": -1,
        "weight_decay": 0.0,
        "timeout": 1,
        "max_tokens_per_microbatch": 2,
        "seed": 0,
        "split_seed": 0,
    }
    for name, bound in at_least.items():
        value = getattr(a, name)
        if value is not None and value < bound:
            problems.append(f"--{name} {value} is too small: it must be at least {bound}")
    for name in ("validation_fraction", "lora_dropout"):
        if not 0 <= getattr(a, name) < 1:
            problems.append(f"--{name} {getattr(a, name)} is out of range: it must be at least 0 and below 1")
    for name in ("warmup_ratio", "final_lr_ratio"):
        value = getattr(a, name)
        if value is not None and not 0 <= value <= 1:
            problems.append(f"--{name} {value} is out of range: it must lie between 0 and 1")
    if a.learning_rate is not None and not 0 < a.learning_rate < float("inf"):
        problems.append(f"--learning_rate {a.learning_rate} is not a rate: it must be positive and finite")
    if not 0 < a.learning_rate_factor < float("inf"):
        problems.append(
            f"--learning_rate_factor {a.learning_rate_factor} is not a factor: it must be positive and finite"
        )
    if a.checkpointing_steps not in (None, "epoch") and not (
        a.checkpointing_steps.isdigit() and int(a.checkpointing_steps) > 0
    ):
        problems.append(
            f"--checkpointing_steps {a.checkpointing_steps} is neither a positive number of steps nor `epoch`"
        )
    problems += unused_method_flags(a) + contradictions(a)
    if a.sequence_parallel_size != 1:
        problems.append(f"--sequence_parallel_size {a.sequence_parallel_size} is not supported: leave it at 1")
    if a.load_balancing_loss:
        problems.append(
            "--load_balancing_loss is not supported: the auxiliary loss of mixture-of-experts models is not computed"
        )
    for name in ("dataset_mixer", "additional_model_arguments"):
        try:
            parsed = json.loads(getattr(a, name) or "{}")
        except json.JSONDecodeError as error:
            parsed = str(error)
        if not isinstance(parsed, dict):
            problems.append(f"--{name} is not a JSON object: {parsed}")
    if problems:
        raise InputError("; ".join(problems))


def contradictions(arguments: FinetuneArguments) -> list[str]:
    """Flags that exclude each other."""
    a = arguments
    problems = []
    if a.auto_lr and a.learning_rate is not None:
        problems.append("--auto_lr chooses a rate and --learning_rate sets one: drop one")
    if a.auto_lr and a.method == "full":
        problems.append(
            "--auto_lr would need a second copy of all weights in full fine-tuning: choose an adapter method, or drop it"
        )
    if a.learning_rate is not None and a.learning_rate_factor != 1:
        problems.append(
            "--learning_rate_factor multiplies the recipe's rate, and --learning_rate replaces it: drop one"
        )
    if a.load_in_4bit and a.load_in_8bit:
        problems.append("--load_in_4bit and --load_in_8bit exclude each other: choose one")
    if not a.packing:
        for name in ("max_tokens_per_microbatch", "attn_backend", "compile"):
            if getattr(a, name):
                problems.append(f"--{name} belongs to the packed forward pass: remove it, or drop --packing False")
    return problems


def unused_method_flags(arguments: FinetuneArguments) -> list[str]:
    """Flags that belong to a method that is not the chosen one: ignoring them would be silent."""
    soft_prompts = ("prefix_tuning", "prompt_tuning", "p_tuning")
    belongs = {
        "num_virtual_tokens": soft_prompts,
        "prompt_tuning_init": ("prompt_tuning",),
        "prompt_tuning_init_text": ("prompt_tuning", "prefix_tuning"),
        "prefix_init": ("prefix_tuning",),
        "prefix_projection": ("prefix_tuning",),
        "encoder_hidden_size": ("p_tuning", "prefix_tuning"),
    }
    problems = [
        f"--{name} has no meaning for {arguments.method}: remove it, or choose {' or '.join('--use_' + m for m in methods)}"
        for name, methods in belongs.items()
        if getattr(arguments, name) and arguments.method not in methods
    ]
    if arguments.prefix_projection and arguments.prefix_init in ("text", "screened"):
        problems.append(
            f"--prefix_init {arguments.prefix_init} can't start a projected prefix: use zero, or drop --prefix_projection"
        )
    init = arguments.prefix_init if arguments.method == "prefix_tuning" else arguments.prompt_tuning_init
    if arguments.prompt_tuning_init_text and init not in (None, "text", "screened"):
        problems.append(
            f"--prompt_tuning_init_text is given but the initialisation is {init}: use init text, or drop the text"
        )
    return problems
