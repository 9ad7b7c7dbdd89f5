"""Flags of a run's output, reports and resumption."""

from __future__ import annotations

from dataclasses import dataclass

from open_instruct.flags import combinations as checks
from open_instruct.flags.declare import flag


@dataclass(frozen=True)
class RunFlags:
    """Output, reports and resumption."""

    output_dir: str = flag("output/", "folder of the run", in_study="decided", on_resume="free")
    overwrite_output_dir: bool = flag(
        False, "replace the run that output_dir holds", in_study="decided", on_resume="free"
    )
    exp_name: str = flag(
        "finetune_peft",
        "name of the experiment, for trackers and uploads",
        differs="the same: the script's name",
        on_resume="free",
    )
    run_name: str | None = flag(
        None,
        "name of the run, for trackers and uploads; unset: the experiment, method, seed and time",
        on_resume="free",
    )
    logging_steps: int = flag(
        1,
        "steps between rows of metrics.jsonl",
        at_least=1,
        differs="every step",
        on_resume="free",
        at_most=10**9,
    )
    eval_steps: int | None = flag(
        None,
        "steps between held-out evaluations; unset: a fifth of the run; 0: only at its start and end",
        at_least=0,
        on_resume="content",
        at_most=10**9,
    )
    per_device_eval_batch_size: int | None = flag(
        None,
        "examples in a padded held-out micro-batch; unset: as in training",
        at_least=1,
        on_resume="free",
        at_most=10**6,
    )
    keep_best: bool = flag(
        True,
        "save the parameters with the lowest held-out loss; False: the last ones",
        in_study="decided",
        on_resume="same",
    )
    patience: int | None = flag(
        None,
        "stop after this many held-out evaluations in a row without a loss below the lowest before them; unset: train "
        "all steps",
        at_least=1,
        at_most=10**9,
        in_study="decided",
        check=checks.unused_patience,
        on_resume="same",
    )
    num_sample_answers: int = flag(
        3,
        "held-out questions that the base and the tuned model answer (three are shown, exact match counts all)",
        at_least=0,
        on_resume="free",
        at_most=10**9,
    )
    checkpointing_steps: str | None = flag(
        None,
        "steps between checkpoints, or `epoch`; unset: none",
        check=lambda flags: checks.bad_checkpointing_steps(flags.checkpointing_steps),
        on_resume="free",
        aliases=("save_steps",),
    )
    keep_last_n_checkpoints: int = flag(
        3,
        "number of checkpoints kept; -1: all",
        at_least=-1,
        on_resume="free",
        at_most=10**9,
        aliases=("save_total_limit",),
    )
    clean_checkpoints_at_end: bool = flag(
        False,
        "delete the checkpoints when the run has finished",
        differs="checkpoints are kept by default",
        on_resume="free",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "continue from this checkpoint; without a path, from the newest complete one of output_dir",
        optional_value="newest",
        in_study="decided",
        check=checks.bad_resumption,
        on_resume="free",
    )
    dry_run: bool = flag(
        False,
        "do everything up to the first step, print the plan, and stop; a base that has no weights here is counted from "
        "its config.json",
        in_study="decided",
        on_resume="free",
    )
    with_tracking: bool = flag(False, "report to experiment trackers", on_resume="free")
    report_to: list[str] = flag(
        ["all"],
        "trackers used with --with_tracking: wandb, tensorboard, trackio, …; all: every installed one; none: none",
        warns_without="with_tracking",
        differs="the same, as a list",
        on_resume="free",
    )
    wandb_project_name: str = flag(
        "open_instruct_internal", "project of the tracker", warns_without="with_tracking", on_resume="free"
    )
    wandb_entity: str | None = flag(
        None, "entity (team) of Weights & Biases", warns_without="with_tracking", on_resume="free"
    )
    push_to_hub: bool = flag(
        False, "upload the result to the Hugging Face Hub", differs="nothing is uploaded by default", on_resume="free"
    )
    save_to_hub: str | None = flag(
        None,
        "older form of push_to_hub: the repository's name",
        check=lambda flags: checks.another_name(flags, "save_to_hub", "hf_repo_id"),
        on_resume="free",
    )
    hf_entity: str | None = flag(
        None,
        "user or organisation of the upload; unset: the logged-in user",
        check=lambda flags: checks.without_upload(flags),
        on_resume="free",
    )
    hf_repo_id: str | None = flag(
        None,
        "repository of the upload; unset: the run's name",
        check=lambda flags: checks.without_upload(flags),
        on_resume="free",
        aliases=("hub_model_id",),
    )
    hf_repo_revision: str | None = flag(
        None,
        "branch of the upload; unset: main",
        check=lambda flags: checks.without_upload(flags),
        on_resume="free",
        aliases=("hub_revision",),
    )
