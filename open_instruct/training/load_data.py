"""Training and held-out examples: read, checked, tokenised, split."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from open_instruct.data import dataset, duplicates, forms, reading
from open_instruct.data.bad_rows import BadRows
from open_instruct.data.context import ContextSource, ContextTokens
from open_instruct.data.dataset import Examples
from open_instruct.data.hard_prompt import HardPrompt
from open_instruct.data.held_out_groups import hold_out_groups
from open_instruct.data.reading import Row
from open_instruct.data.rendering import Rendering
from open_instruct.data.sources import MAX_MEASURED
from open_instruct.data.spans import Labels
from open_instruct.data.texts import plain
from open_instruct.errors import InputError

DEFAULT_MAX_SEQ_LENGTH = 4096
FEW_ROWS = 30  # fewer held-out rows hardly tell which parameters are best: their mean is off by a fifth of its spread


@dataclass(frozen=True)
class DataSettings:
    """Sources of the examples, and which of them are used."""

    train_files: tuple[str, ...]
    dataset_name: str | None
    dataset_config_name: str | None
    mixture: tuple[tuple[str, str], ...]  # (file or data set, amount)
    mixture_splits: tuple[str, ...]  # one for each member, or one for all
    messages_key: str
    skip_bad_rows: bool  # leave out rows that can't be used; else they are an error
    validation_file: str | None
    validation_fraction: float
    max_eval_samples: int
    max_train_samples: int | None
    drop_held_out_duplicates: bool  # leave rows of the training data out of the held-out ones
    seed: int
    max_length: int  # tokens kept of a conversation
    num_workers: int | None
    cache_dir: Path | None
    overwrite_cache: bool
    labels: Labels = "answers"  # what is learned, and measured on held-out rows
    context: ContextSource | None = None  # of the rows' own contexts, which are distilled
    rendering: Rendering | None = None  # makes conversations of named columns, with templates and exemplars
    hard_prompt: HardPrompt | None = None  # stands before every example


@dataclass(frozen=True)
class Data:
    """Training examples, and held-out examples (None: no held-out data)."""

    train: Examples
    held_out: Examples | None
    # The held-out rows with their answers labelled, whatever is learned: what is asked, and compared by a study.
    held_out_answers: Examples | None
    overlap: duplicates.Overlap | None  # of the held-out rows with the training rows; None: none are held out
    rendering: Rendering | None = None  # with its exemplars; None: rows had a known form
    hard_prompt: tuple[int, ...] = ()  # tokens that stand before every example, and are in none

    def fingerprints(self) -> dict[str, Any]:
        """Return what identifies the data in run.json and in checkpoints."""
        return {"train": self.train.fingerprint, "held_out": self.held_out and self.held_out.fingerprint}

    def bad_rows(self) -> dict[str, str]:
        """Return, for run.json, a line about the rows of each set that were left out because they can't be used."""
        return {name: examples.bad_rows for name, examples in self.files().items() if examples.bad_rows}

    def by_template(self) -> dict[str, list[str]]:
        """Return, for run.json, lines on what the chat template leaves out of each set."""
        return {name: each.by_template.splitlines() for name, each in self.files().items() if each.by_template}

    def files(self) -> dict[str, Examples]:
        """Return the sets that were read from different files, by name."""
        if self.held_out and self.held_out.fingerprint != self.train.fingerprint:
            return {"training": self.train, "held out": self.held_out}
        return {"training": self.train}

    def record(self) -> dict[str, Any]:
        """Return the entries of run.json about the data."""
        return {
            "data": self.fingerprints(),
            "bad_rows": self.bad_rows(),
            "by_template": self.by_template(),
            "held_out_duplicates": self.overlap and self.overlap.counts(),
            "rendering": self.rendering and self.rendering.record(),
        }

    def contents(self) -> dict[str, Any]:
        """Return hashes of the tokens and labels of both sets, in their order: what a resumed run must share."""
        return {"train": self.train.content, "held_out": self.held_out and self.held_out.content}

    def cached(self) -> str:
        """Return a line on where the tokenised data is.

        Raises:
            InputError: it is not in the cache.
        """
        if self.train.entry is None:
            raise InputError(
                "--cache_dataset_only fills the token cache, and nothing could be cached: name a folder that can be "
                "written with --dataset_local_cache_dir, and data whose files are known before they are read"
            )
        return f"tokenised data is in {self.train.entry}"

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(int(examples.lengths.max()) for examples in (self.train, self.held_out_answers) if examples)

    def too_few(self) -> str | None:
        """Return a line where the held-out rows are too few to choose parameters by, or None."""
        if self.held_out is None or len(self.held_out) >= FEW_ROWS:
            return None
        return (
            f"held out: {len(self.held_out)} rows are few to choose the saved parameters by: raise "
            "--validation_fraction, give a --validation_file, or save the last ones with --keep_best False"
        )

    def describe(self) -> str:
        """Return a line of statistics for each set."""
        held_out = self.held_out.describe("held out") if self.held_out else "held out: none (--validation_fraction 0)"
        bad = [f"{name}: {text}" for name, text in self.bad_rows().items()]
        bad += [f"{name}: {line}" for name, lines in self.by_template().items() for line in lines]
        return "\n".join([self.train.describe("training"), held_out, *self.source_lines(), *bad])

    def source_lines(self) -> list[str]:
        """Return a line on the sources of the rows, where there are several."""
        counts = {name: len(rows) for name, rows in self.train.sources.items()}
        held_out = {name: len(rows) for name, rows in self.held_out.sources.items()} if self.held_out else {}
        names = sorted({**counts, **held_out}, key=lambda name: -counts.get(name, 0))
        if len(names) < 2:
            return []
        parts = [
            f"{plain(name)} {counts.get(name, 0):,}" + (f" ({held_out.get(name, 0):,} held out)" if held_out else "")
            for name in names[:MAX_MEASURED]
        ]
        rest = f", and {len(names) - MAX_MEASURED:,} more" if len(names) > MAX_MEASURED else ""
        unmeasured = len(held_out) > MAX_MEASURED
        note = f"; more than {MAX_MEASURED} are not measured one by one" if unmeasured else ""
        return [f"sources: {', '.join(parts)}{rest}{note}"]


def mixture_members(mixer: str | None, words: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Return the (file or data set, amount) pairs of a mixture, from its JSON object or its list of words."""
    if mixer:
        return tuple((name, str(amount)) for name, amount in json.loads(mixer).items())
    return tuple(zip((words or [])[::2], (words or [])[1::2], strict=True))


def conversation_length(context: int | None, num_virtual_tokens: int, max_seq_length: int | None) -> int:
    """Return the largest number of tokens kept of a conversation.

    Args:
        context: positions of the model; None: unlimited.
        num_virtual_tokens: positions that a soft prompt takes.
        max_seq_length: number that the user wants, or None.

    Raises:
        InputError: the conversation does not fit into the context beside the virtual tokens.
    """
    if context is None:
        return max_seq_length or DEFAULT_MAX_SEQ_LENGTH
    if num_virtual_tokens >= context:
        raise InputError(
            f"--num_virtual_tokens {num_virtual_tokens} fills the model's context of {context} positions: use fewer"
        )
    if num_virtual_tokens + (max_seq_length or 2) > context:
        requested = f"--max_seq_length {max_seq_length}" if max_seq_length else "a conversation"
        raise InputError(
            f"{num_virtual_tokens} virtual tokens and {requested} need more than the model's context of {context} "
            f"positions: use --max_seq_length {max(context - num_virtual_tokens, 2)} or fewer virtual tokens"
        )
    return max_seq_length or min(DEFAULT_MAX_SEQ_LENGTH, context - num_virtual_tokens)


def load_data(settings: DataSettings, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, check, tokenise, split and describe the data. The main process goes first; the others use its cache.

    Raises:
        InputError: the data is missing or unusable.
    """
    if settings.num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(settings.num_workers)  # the Rust tokenizer reads it
    settings = replace(settings, overwrite_cache=settings.overwrite_cache and accelerator.is_main_process)
    with accelerator.main_process_first():
        settings = replace(settings, rendering=drawn_rendering(settings))
        bad = BadRows(settings.skip_bad_rows)
        rows, key = training_rows(settings, bad)
        train = build_examples(settings, log_form(rows, accelerator, settings), key, tokenizer, bad)
        held_out = None
        if settings.validation_file:
            path = Path(settings.validation_file)
            if any(path.resolve() == Path(name).resolve() for name in settings.train_files):
                raise InputError(
                    f"--validation_file {path} is the training file: name another, or use --validation_fraction"
                )
            files = reading.files_of(settings.validation_file)
            bad = BadRows(settings.skip_bad_rows)
            rows, key = reading.read_files(files, bad), dataset.file_key(files)
            held_out = build_examples(settings, rows, key, tokenizer, bad)
            held_out = dataset.draw(held_out, settings.max_eval_samples, settings.seed)
        else:
            how = settings.validation_fraction, settings.max_eval_samples, settings.seed
            if settings.rendering and settings.rendering.groups_rows:
                train, held_out = hold_out_groups(train, *how, settings.rendering.exemplar_hashes())
            else:
                train, held_out = dataset.hold_out(train, *how)
    train = dataset.draw(train, settings.max_train_samples, settings.seed)
    overlap = None
    if held_out:
        overlap = duplicates.overlap_of(train.hashes, held_out.hashes, settings.drop_held_out_duplicates)
        accelerator.print(overlap.describe())
        held_out = held_out.subset(overlap.kept)
    # What is learned decides neither the split nor the draw, so runs that differ in it share their rows.
    data = Data(
        train.labelled("training", settings.max_length),
        held_out and held_out.labelled("held-out", settings.max_length),
        held_out and held_out.by_answers(),
        overlap,
        settings.rendering,
        settings.hard_prompt.tokens.ids if settings.hard_prompt else (),
    )
    accelerator.print(data.describe())
    if settings.hard_prompt:
        accelerator.print(settings.hard_prompt.describe())
    return data


def log_form(rows: Iterator[Row], accelerator: Accelerator, settings: DataSettings) -> Iterator[Row]:
    """Yield the rows unchanged, and print the form of the first when it is read."""
    rendering = settings.rendering
    for number, (source, row) in enumerate(rows):
        if number == 0:
            with suppress(InputError):  # whoever uses the row says what is wrong with it
                is_named = rendering and rendering.columns
                form = "" if is_named else f"form {forms.form_of(source, row, settings.messages_key)}"
                described = rendering.describe() if rendering else ""
                accelerator.print(f"reading {source}: {'; '.join(part for part in (form, described) if part)}")
        yield source, row


def drawn_rendering(settings: DataSettings) -> Rendering | None:
    """Return how rows become conversations, with exemplars from the training rows if there are to be some."""
    rendering = settings.rendering
    if rendering is None or not rendering.num_shots:
        return rendering
    rows, _ = training_rows(settings, BadRows(skip=True))
    return rendering.with_exemplars(rows, "the training data")


def training_rows(settings: DataSettings, bad: BadRows) -> tuple[Iterator[Row], str | None]:
    """Return the rows of the training data, unread, and a key of their content (None: unknown without reading)."""
    if settings.train_files:
        files = [path for source in settings.train_files for path in reading.files_of(source)]
        return reading.read_files(files, bad), dataset.file_key(files)
    if settings.dataset_name:
        files = reading.files_of(settings.dataset_name, "train", settings.dataset_config_name)
        return reading.read_files(files, bad), dataset.file_key(files)
    members, splits = list(settings.mixture), list(settings.mixture_splits)
    files = [path for name, _ in members for path in reading.files_of(name, splits[0])] if len(splits) == 1 else []
    key = dataset.file_key(files) + json.dumps([members, settings.seed]) if files else None
    return reading.read_mixture(members, splits, settings.seed, bad), key


def build_examples(
    settings: DataSettings, rows: Iterator[Row], key: str | None, tokenizer: PreTrainedTokenizerBase, bad: BadRows
) -> Examples:
    """Turn rows into examples, through the cache where their content is known; `bad` has those that can't be read."""
    context = settings.context
    named = reading.conversations(rows, settings.messages_key, bad, context, settings.rendering)
    source_key = f"{key} {settings.messages_key}" + (" without bad rows" if bad.skip else "")
    source_key += f" {context.key}" if context else ""
    source_key += f" {settings.rendering.key}" if settings.rendering else ""
    num_left_out = settings.hard_prompt.tokens.num_shared if settings.hard_prompt else 0
    source_key += f" without the first {num_left_out} tokens" if num_left_out else ""
    cache = settings.cache_dir if key else None
    contexts = ContextTokens(tokenizer) if context and context.is_by_row else None
    return dataset.build(
        named,
        tokenizer,
        settings.max_length,
        source_key,
        cache,
        settings.overwrite_cache,
        bad,
        contexts,
        settings.labels,
        num_left_out,
    )
