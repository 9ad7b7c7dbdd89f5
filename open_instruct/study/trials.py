"""One trial: train, measure on rows that nothing was chosen by, leave a run folder that says it all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from open_instruct.adapters.answer_metrics import exact_matches
from open_instruct.adapters.generation import greedy_answers
from open_instruct.adapters.scoring import answer_losses
from open_instruct.arguments import FinetuneArguments, check_arguments
from open_instruct.command_line import parse
from open_instruct.data import dataset, reading
from open_instruct.errors import InputError
from open_instruct.files import write_json
from open_instruct.finetune_peft import run
from open_instruct.model import loading
from open_instruct.study.config import Study
from open_instruct.study.search import Trial
from open_instruct.training import model_setup, setup
from open_instruct.training.checkpoint import complete_checkpoints
from open_instruct.training.examples import Data, fill_virtual_tokens, load_data
from open_instruct.training.faults import Preempted

FAILED = "failed.json"
SCORED_AT_ONCE = 16  # rows
OTHER_ROWS = 200  # at most, of the text that measures forgetting


@dataclass(frozen=True)
class Task:
    """What a worker needs to know of a study to run one trial."""

    trial: Trial
    output_dir: Path
    questions: int
    max_new_tokens: int
    answer_regex: str | None
    normalise: str
    other_text: Path | None
    keep_full_weights: bool

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output_dir / "trials" / self.trial.key


def task(study: Study, trial: Trial) -> Task:
    """A trial with what the study measures."""
    return Task(
        trial,
        study.output_dir,
        study.questions,
        study.max_new_tokens,
        study.answer_regex,
        study.normalise,
        study.other_text,
        study.keep_full_weights,
    )


def arguments(task: Task, check: bool = True) -> tuple[FinetuneArguments, dict[str, str]]:
    """The trainer's flags of a trial.

    Raises:
        InputError: the flags are wrong.
    """
    a, origins = parse([*task.trial.words, "--output_dir", str(task.folder)])
    if check:
        check_arguments(a)
    return a, origins


def result(task: Task) -> dict[str, Any] | None:
    """What a finished trial left: its summary, or {"failed": reason}; None where it has not finished."""
    for name in ("summary.json", FAILED):
        if (task.folder / name).exists():
            found: dict[str, Any] = json.loads((task.folder / name).read_text(encoding="utf-8"))
            return found
    return None


def run_trial(task: Task, bases: model_setup.Bases) -> dict[str, Any]:
    """Run a trial, unless it is done. A kill leaves it undone; it starts anew, or from its newest checkpoint if it keeps any.

    Returns:
        `result`.

    Raises:
        InputError: what every trial shares is wrong. What goes wrong in one alone is its result.
    """
    done = result(task)
    if done is not None:
        return done
    a, origins = arguments(task)
    task.folder.mkdir(parents=True, exist_ok=True)
    if complete_checkpoints(task.folder / "checkpoints"):
        a.resume_from_checkpoint = "newest"
    else:
        a.overwrite_output_dir = True
    with (
        (task.folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
        base_figures(task, a, bases)  # wrong data or a wrong model end the study
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            run(a, origins, bases, functools.partial(measure, task))
        except InputError as error:  # diverged, or out of memory: a finding of the study, not its end
            bases.kept.clear()
            write_json(task.folder / FAILED, {"failed": str(error)})
        except Preempted:  # its checkpoint is written, and the next start goes on from there
            raise KeyboardInterrupt from None
    if a.method == "full" and not task.keep_full_weights:
        for path in task.folder.glob("model*.safetensors*"):
            path.unlink()
    shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)
    found = result(task)
    assert found is not None
    return found


def measure(task: Task, model: Any, tokenizer: Any, data: Data) -> dict[str, Any]:
    """Figures of a model as it is: on the rows for choosing, on those for the report, and on other text.

    Returns:
        {"study": {device, rows: [[summed loss, labelled tokens], …] of every held-out row, choosing: indices of rows, test: indices,
        exact: [0 or 1, …] of the questions, other: [[summed loss, tokens], …]}}.
    """
    was_training = model.training
    model.eval()
    held_out = data.held_out
    assert held_out is not None
    examples = [held_out[i] for i in range(len(held_out))]
    rows = scored(model, examples)
    choosing, test = halves(len(rows))
    exact: list[float] = []
    if task.questions:
        asked = [examples[i] for i in test[: task.questions]]
        starts = [example["spans"][-2] for example in asked]
        prompts = [example["input_ids"][:start] for example, start in zip(asked, starts, strict=True)]
        ends = [example["spans"][-1] for example in asked]
        references = [
            tokenizer.decode(example["input_ids"][start:end], skip_special_tokens=True).strip()
            for example, start, end in zip(asked, starts, ends, strict=True)
        ]
        room = loading.context_length(model.config)
        answers = greedy_answers(model, tokenizer, prompts, task.max_new_tokens, room and room - model_length(model))
        exact = exact_matches(answers, references, task.answer_regex, task.normalise).tolist()
    other = scored(model, other_examples(task, tokenizer, max(len(example["input_ids"]) for example in examples)))
    model.train(was_training)
    device = next(model.parameters()).device.type
    found = {"device": device, "rows": rows, "choosing": choosing, "test": test, "exact": exact, "other": other}
    return {"study": found, "data": data.fingerprints()}


def model_length(model: Any) -> int:
    """Virtual tokens of a model."""
    config = getattr(model, "active_peft_config", None)
    return getattr(config, "num_virtual_tokens", None) or 0


def scored(model: Any, examples: list[dict[str, Any]]) -> list[list[float]]:
    """[summed loss, labelled tokens] of each example, by PEFT's own forward pass."""
    spans = [list(zip(example["spans"][::2], example["spans"][1::2], strict=True)) for example in examples]
    return [
        [loss, count] for loss, count in answer_losses(model, [e["input_ids"] for e in examples], spans, SCORED_AT_ONCE)
    ]


def halves(number: int) -> tuple[list[int], list[int]]:
    """Held-out rows for choosing among points, and those for the report, drawn once and for all."""
    mixed = np.random.default_rng(0x7E57).permutation(number)
    return sorted(mixed[: number // 2].tolist()), sorted(mixed[number // 2 :].tolist())


def other_examples(task: Task, tokenizer: Any, longest: int) -> list[dict[str, Any]]:
    """The text that measures forgetting: plain text, a passage a line, all of it labelled; or conversations, answers labelled."""
    if task.other_text is None:
        return []
    if task.other_text.suffix == ".txt":
        lines = [line for line in task.other_text.read_text(encoding="utf-8").splitlines() if line.strip()]
        ids = [tokenizer(line)["input_ids"][:longest] for line in lines[:OTHER_ROWS]]
        return [{"input_ids": row, "spans": [1, len(row)]} for row in ids if len(row) > 1]
    named = reading.conversations(reading.read_files([task.other_text]), "messages")
    found = dataset.build(named, tokenizer, longest, "", None)
    return [found[i] for i in range(min(OTHER_ROWS, len(found)))]


def base_figures(task: Task, a: FinetuneArguments, bases: model_setup.Bases) -> dict[str, Any]:
    """The same figures of the base, measured once for each way in which it is held."""
    path = base_path(task, a)
    if not path.exists():
        accelerator = setup.make_accelerator(a)
        tokenizer, config = setup.load_tokenizer_and_config(a)
        fill_virtual_tokens(a, config)
        data = load_data(a, accelerator, tokenizer, config)
        if data.held_out is None or len(data.held_out) < 4:
            raise InputError(
                "a study needs 4 held-out rows at least, half of them for choosing: give a longer validation_file"
            )
        with torch.no_grad():
            base = bases.take(a, config, tokenizer, accelerator)
            write_json(path, {"quantised": model_setup.quantisation(a), **measure(task, base, tokenizer, data)})
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def base_path(task: Task, a: FinetuneArguments) -> Path:
    """Where the base's figures stand."""
    return task.output_dir / f"base-{hashlib.sha256(model_setup.base_key(a).encode()).hexdigest()[:8]}.json"
