"""Flags of open-instruct and of transformers' Trainer that have no effect, accepted so that launch commands run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from open_instruct.flags import declare

flag = partial(declare.flag, on_resume="free")  # what has no effect changes no run


@dataclass(frozen=True)
class AcceptedFlags:
    """Flags of open-instruct and Trainer that have no effect here; using one prints a warning with the reason."""

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
    auto_find_batch_size: bool = flag(
        False, "packed rows are as long as --max_tokens_per_microbatch allows, and are halved once when memory runs out"
    )
    verbose: bool = flag(False, "metrics.jsonl always holds everything")
    load_balancing_loss: bool = flag(
        False,
        "the router of a mixture-of-experts model stays frozen or unregularised",
        check=lambda flags: "the auxiliary loss of mixture-of-experts models is not computed: remove it",
    )
    load_balancing_weight: float | None = flag(None, "belongs to load_balancing_loss")
    sequence_parallel_size: int = flag(
        1,
        "sequences are not split over processes",
        check=lambda flags: "it is not supported: leave it at 1" if flags.sequence_parallel_size != 1 else None,
    )
