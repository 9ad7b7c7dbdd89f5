"""Training and held-out examples: read, checked, tokenised, split."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.arguments import FinetuneArguments
from open_instruct.data import dataset, forms, reading
from open_instruct.data.dataset import Examples
from open_instruct.errors import InputError
from open_instruct.methods import METHODS
from open_instruct.model import loading

DEFAULT_MAX_SEQ_LENGTH = 4096


def num_virtual_tokens(a: FinetuneArguments) -> int:
    """Virtual tokens of the run, after `fill_virtual_tokens`."""
    return a.num_virtual_tokens or 0


def fill_virtual_tokens(a: FinetuneArguments, config: PretrainedConfig) -> bool:
    """Take the recipe's number where no flag gives one: it decides how long examples may be. Returns whether it did."""
    method = METHODS[a.method]
    if a.num_virtual_tokens or not method.is_soft_prompt:
        return False
    a.num_virtual_tokens = method.recommended_virtual_tokens(loading.context_length(config), a.max_seq_length)
    return True


def max_sequence_length(a: FinetuneArguments, config: PretrainedConfig) -> int:
    """Tokens of a conversation that are kept.

    Raises:
        InputError: they don't fit into the model's context beside the virtual tokens.
    """
    context, virtual = loading.context_length(config), num_virtual_tokens(a)
    if context is None:
        return a.max_seq_length or DEFAULT_MAX_SEQ_LENGTH
    if virtual + (a.max_seq_length or 2) > context:
        asked = f"--max_seq_length {a.max_seq_length}" if a.max_seq_length else "a conversation"
        raise InputError(
            f"{virtual} virtual tokens and {asked} need more than the model's context of {context} positions: "
            f"use --max_seq_length {max(context - virtual, 2)} or fewer virtual tokens"
            if virtual < context
            else f"--num_virtual_tokens {virtual} fills the model's context of {context} positions: use fewer"
        )
    return a.max_seq_length or min(DEFAULT_MAX_SEQ_LENGTH, context - virtual)


@dataclass(frozen=True)
class Data:
    """Training examples, and held-out examples (None: no held-out data)."""

    train: Examples
    held_out: Examples | None

    def fingerprints(self) -> dict[str, Any]:
        """What identifies the data in run.json and in checkpoints."""
        return {"train": self.train.fingerprint, "held_out": self.held_out and self.held_out.fingerprint}


def load_data(
    a: FinetuneArguments, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> Data:
    """Read, check, tokenise and split. The main process goes first, and the others find its cache."""
    length = max_sequence_length(a, config)
    if a.preprocessing_num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(a.preprocessing_num_workers)  # of the Rust tokenizer
    with accelerator.main_process_first():
        rows, key = training_source(a)
        train = build_examples(a, said(rows, accelerator, a.sft_messages_key), key, tokenizer, length)
        held_out = None
        if a.validation_file:
            if any(Path(a.validation_file).resolve() == Path(name).resolve() for name in a.train_file or []):
                raise InputError(
                    f"--validation_file {a.validation_file} is the training file: name another, or use --validation_fraction"
                )
            files = reading.files_of(a.validation_file)
            held_out = build_examples(a, reading.read_files(files), dataset.file_key(files), tokenizer, length)
            held_out = dataset.draw(held_out, a.max_eval_samples, a.data_seed)
        else:
            train, held_out = dataset.hold_out(train, a.validation_fraction, a.max_eval_samples, a.data_seed)
    return Data(dataset.draw(train, a.max_train_samples, a.data_seed), held_out)


def said(rows: Any, accelerator: Accelerator, key: str) -> Any:
    """The rows, unchanged; the first one's form is printed when it is read."""
    for number, (place, row) in enumerate(rows):
        if number == 0:
            accelerator.print(f"reading {place}: form {forms.form_of(place, row, key)}")
        yield place, row


def training_source(a: FinetuneArguments) -> tuple[Any, str | None]:
    """Rows of the training data, unread, and a key of their content (None where it can't be known without reading)."""
    if a.train_file:
        files = [path for source in a.train_file for path in reading.files_of(source)]
        return reading.read_files(files), dataset.file_key(files)
    if a.dataset_name:
        return reading.read_hub_rows(a.dataset_name, a.dataset_config_name, "train"), None
    if a.dataset_mixer:
        members = [(name, str(amount)) for name, amount in json.loads(a.dataset_mixer).items()]
    else:
        words = a.dataset_mixer_list or []
        if len(words) % 2:
            raise InputError(
                f"--dataset_mixer_list has {len(words)} words: give pairs of NAME_OR_FILE and COUNT_OR_SHARE"
            )
        members = list(zip(words[::2], words[1::2], strict=True))
    splits = a.dataset_mixer_list_splits
    files = [path for name, _ in members for path in reading.files_of(name, splits[0])] if len(splits) == 1 else []
    key = dataset.file_key(files) + json.dumps([members, a.data_seed]) if files else None
    return reading.read_mixture(members, splits, a.data_seed), key


def build_examples(
    a: FinetuneArguments, rows: Any, key: str | None, tokenizer: PreTrainedTokenizerBase, length: int
) -> Examples:
    """Rows → examples, through the cache where the content is known."""
    cache = Path(a.dataset_local_cache_dir) if key and not a.dataset_skip_cache else None
    named = reading.conversations(rows, a.sft_messages_key)
    return dataset.build(named, tokenizer, length, f"{key} {a.sft_messages_key}", cache, a.overwrite_cache)
