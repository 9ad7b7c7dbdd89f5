"""Flags of training and held-out data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_instruct.flags import combinations as checks
from open_instruct.flags.declare import flag

BAD_ROWS = (
    "what to do with rows that can't be used (malformed, without text, without an answer …): error: count them, name "
    "the first three, and stop; skip: count them and leave them out"
)
COLUMNS = (
    "columns of rows in a form of their own: prompt=COLUMN answer=COLUMN, and system=COLUMN for a system message; any "
    "other NAME=COLUMN gives a column the name by which a template knows it"
)
TEMPLATE = (
    "file of the question's text, with fields as {dialogue} for columns, or in Jinja if its name ends in .jinja; "
    "several templates are separated by lines of ---, and each row gets one of them, drawn by seed"
)
SHOTS = "exemplars before each question, drawn by seed from training rows, never the row itself, and never learned"
MAX_SHOTS = 63  # see `rendering.MAX_EXEMPLARS`
MAX_ROWS = 10**12


@dataclass(frozen=True)
class DataFlags:
    """Training and held-out data.

    Exactly one of train_file, dataset_name, dataset_mixer and dataset_mixer_list is needed.
    """

    train_file: list[str] | None = flag(
        None,
        "training conversations: one or several JSON Lines, JSON array, Arrow or Parquet files, folders or globs",
        in_study="same",
        on_resume="content",
    )
    dataset_name: str | None = flag(
        None, "data set on the Hub, or a local folder that `datasets` can load", in_study="same", on_resume="content"
    )
    dataset_config_name: str | None = flag(
        None, "configuration of dataset_name", needs="dataset_name", in_study="same", on_resume="content"
    )
    dataset_mixer: str | None = flag(
        None,
        "JSON object that maps data sets or files to rows (2000) or shares (0.5): '{\"a.jsonl\": 0.5}'",
        in_study="same",
        check=lambda flags: checks.bad_mixer(flags.dataset_mixer),
        on_resume="content",
        form="json",
    )
    dataset_mixer_list: list[str] | None = flag(
        None,
        "the same as a list: NAME_OR_FILE COUNT_OR_SHARE NAME_OR_FILE …; 1.0 takes all rows",
        in_study="same",
        check=lambda flags: checks.bad_mixture(flags.dataset_mixer_list),
        differs="no data set is downloaded unless named",
        on_resume="content",
    )
    dataset_mixer_list_splits: list[str] = flag(
        ["train"],
        "split of each member of the mixture, or one split for all",
        in_study="same",
        check=lambda flags: (
            None if flags.dataset_mixer_list or flags.dataset_mixer else "it needs a mixture: remove it"
        ),
        on_resume="content",
    )
    sft_messages_key: str = flag(
        "messages", "column that holds the conversation", in_study="same", differs="the same", on_resume="content"
    )
    columns: list[str] | None = flag(None, COLUMNS, in_study="same", check=checks.columns_of_rows, on_resume="content")
    template: str | None = flag(None, TEMPLATE, in_study="same", on_resume="content")
    all_templates: bool = flag(
        False,
        "each row makes an example with every template; none of a row's examples is held out unless all are",
        needs="template",
        in_study="same",
        on_resume="content",
    )
    shots: int = flag(0, SHOTS, at_least=0, at_most=MAX_SHOTS, in_study="same", on_resume="content")
    labels: Literal["answers", "last", "all"] = flag(
        "answers",
        "what is learned of a conversation, and measured by the held-out loss. answers: all of the assistant's turns; "
        "last: the last one; all: every token but the first, which nothing predicts, exemplars included",
        on_resume="same",
        causal_only=True,
    )
    bad_rows: Literal["error", "skip"] = flag("error", BAD_ROWS, in_study="same", on_resume="free")
    validation_file: str | None = flag(
        None,
        "held-out conversations, a file or folder like train_file; never trained on",
        in_study="same",
        on_resume="content",
    )
    validation_fraction: float = flag(
        0.02,
        "share of the training rows held out (drawn by seed) where there is no validation_file",
        at_least=0,
        below=1,
        in_study="same",
        check=lambda flags: (
            "it has no effect beside --validation_file: remove one"
            if flags.validation_file and flags.validation_fraction
            else None
        ),
        on_resume="content",
    )
    max_eval_samples: int = flag(
        500,
        "largest number of held-out rows used",
        at_least=1,
        in_study="same",
        on_resume="content",
        at_most=MAX_ROWS,
    )
    drop_held_out_duplicates: bool = flag(
        False,
        "leave rows that stand in the training data, too, out of the held-out rows, also those that are equal but for "
        "case, white space and punctuation",
        in_study="same",
        check=lambda flags: (
            None
            if flags.validation_file or flags.validation_fraction
            else "no rows are held out: remove it, or set --validation_fraction or --validation_file"
        ),
        on_resume="same",
    )
    max_train_samples: int | None = flag(
        None,
        "largest number of training rows used, drawn by seed",
        at_least=1,
        in_study="same",
        on_resume="content",
        at_most=MAX_ROWS,
    )
    source_weights: list[str] | None = flag(
        None,
        "NAME=WEIGHT …: an epoch takes WEIGHT times the rows that have NAME in their column `source` (2: each twice; "
        "0.5: half of them, in turns; 0: none); sources that are not named: 1",
        check=lambda flags: checks.bad_weights(flags.source_weights),
        on_resume="same",
    )
    mixture_temperature: float | None = flag(
        None,
        "T: an epoch of as many rows takes a share of n^(1/T) of a source with n rows; 1: in proportion; the larger, "
        "the more equal",
        at_least=1,
        at_most=10**6,
        check=lambda flags: (
            "it decides the shares of the sources, and so does --source_weights: drop one"
            if flags.source_weights
            else None
        ),
        on_resume="same",
    )
    hard_prompt: str | None = flag(
        None,
        "text that stands between the soft prompt and every example, as its system message if the chat template can "
        "write one; or a .json file of messages (instructions, exemplars). It is computed once a packed row",
        in_study="same",
        check=checks.bad_hard_prompt,
        on_resume="content",
        causal_only=True,
    )
    max_seq_length: int | None = flag(
        None,
        "tokens kept of a conversation, without virtual tokens; unset: 4096, or as many as the context allows",
        at_least=2,
        in_study="same",
        on_resume="content",
        at_most=10**9,
    )
    preprocessing_num_workers: int | None = flag(
        None,
        "threads that tokenise; unset: all cores",
        at_least=1,
        on_resume="free",
        at_most=1024,
    )
    cache_dataset_only: bool = flag(False, "tokenise, fill the cache, and stop", in_study="decided", on_resume="free")
    overwrite_cache: bool = flag(False, "tokenise again even if the cache holds the result", on_resume="free")
    dataset_skip_cache: bool = flag(
        False,
        "neither read nor write the cache of tokenised data",
        check=checks.contradicts_cache,
        on_resume="free",
    )
    dataset_local_cache_dir: str = flag(
        "local_dataset_cache", "folder of the cache of tokenised data", on_resume="free"
    )
