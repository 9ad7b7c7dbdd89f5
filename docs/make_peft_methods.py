"""Write docs/peft_methods.md by trying each of PEFT's types of adapters on the bundled model. It takes some minutes.

Run from the repository root: python -m docs.make_peft_methods
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_instruct.methods.peft_types import OWN_FLAGS, REFUSED

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "peft_methods.md"
MODEL, TRAIN, HELD_OUT = (
    str(ROOT / path) for path in ("assets/tiny-model", "data/sample/train.jsonl", "data/sample/heldout.jsonl")
)
NUM_STEPS, NUM_ROWS = 40, 60
RESUMED_AT = 20

# Fields that are given beside peft_type; None: as PEFT chooses. PEFT's own sizes do not fit layers of 128.
FIELDS: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 64},
    "LN_TUNING": {"target_modules": None},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": list(range(3, 40))},
    "VBLORA": {"vector_length": 64, "num_vectors": 64},
}


@dataclass(frozen=True)
class Trial:
    """What came of one type."""

    type: str
    how: str
    forward: str = ""
    num_trained: int = 0
    rate: float = 0.0
    base_loss: float = 0.0
    loss: float = 0.0
    is_resumed: bool = False  # bit for bit
    is_evaluated: bool = False  # evaluate_peft.py gives the run's loss
    is_continued: bool = False
    merged: str = ""  # "yes", or why it can't be
    problem: str = ""  # why it can't be trained

    @property
    def works(self) -> bool:
        """Whether it trains, resumes and evaluates."""
        return not self.problem and self.loss < self.base_loss and self.is_resumed and self.is_evaluated


def example(kind: str) -> dict[str, Any]:
    """Return the configuration with which a type is tried."""
    fields = {"peft_type": kind, "target_modules": "all-linear", **FIELDS.get(kind, {})}
    return {name: value for name, value in fields.items() if value is not None}


def call(main: Any, *words: str) -> tuple[int, str, str]:
    """Run a command line in this process; return its exit code and what it printed."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue(), err.getvalue()


def train(folder: Path, flags: Sequence[str], num_steps: int = NUM_STEPS) -> tuple[int, str, str]:
    """Run a training on the bundled data."""
    from open_instruct.finetune_peft import main

    return call(
        main, "--model_name_or_path", MODEL, "--train_file", TRAIN, *flags,
        "--validation_file", str(folder.parent / "heldout.jsonl"), "--max_train_steps", str(num_steps),
        "--output_dir", str(folder), "--per_device_train_batch_size", "8", "--eval_steps", "0",
        "--num_sample_answers", "0",
        "--dataset_local_cache_dir", str(folder.parent / "cache"), "--keep_best", "False",
    )  # fmt: skip


def tried(kind: str, folder: Path) -> Trial:
    """Train, resume, evaluate, continue and merge one type."""
    from open_instruct.evaluate_peft import main as evaluate_main
    from open_instruct.merge_peft import main as merge_main

    if kind in OWN_FLAGS:
        flags = how = OWN_FLAGS[kind].partition(",")[0]
    else:
        path = folder / f"{kind}.json"
        path.write_text(json.dumps(example(kind)))
        flags, how = f"--peft_config {path}", json.dumps(example(kind))
        if len(how) > 120:
            how = f"{how[:100]} …"
    if kind in REFUSED:
        return Trial(kind, "", problem=REFUSED[kind])
    run, again = folder / kind, folder / f"{kind}-resumed"
    code, out, err = train(run, [*flags.split(), "--checkpointing_steps", str(RESUMED_AT)])
    if code:
        return Trial(kind, how, problem=err.strip())
    summary = json.loads((run / "summary.json").read_text())
    rate = json.loads((run / "run.json").read_text())["flags"]["learning_rate"]["value"]
    checkpoint = str(run / "checkpoints" / f"step_{RESUMED_AT}")
    train(again, [*flags.split(), "--resume_from_checkpoint", checkpoint])
    weights = "adapter_model.safetensors"
    is_resumed = (again / weights).exists() and (again / weights).read_bytes() == (run / weights).read_bytes()
    figures = folder / f"{kind}-figures"
    words = ["--adapter", f"a={run}", "--file", str(folder / "heldout.jsonl"), "--metrics", "loss"]
    call(evaluate_main, *words, "--output_dir", str(figures))
    evaluated = read_loss(figures / "evaluation.json")
    words = [flag for flag in flags.split() if not flag.startswith("--peft_config") and not flag.endswith(".json")]
    continued, _, _ = train(folder / f"{kind}-continued", [*words, "--adapter_name_or_path", str(run)], num_steps=2)
    merged, _, merge_error = call(merge_main, "--adapter", str(run), "--output", str(folder / f"{kind}-merged"))
    return Trial(
        kind,
        how,
        "packed" if "forward pass: packed" in out else "padded",
        summary["trainable_parameters"],
        rate,
        summary["base_eval_loss"],
        summary["final_eval_loss"],
        is_resumed,
        evaluated is not None and abs(evaluated - summary["final_eval_loss"]) < 1e-4,
        continued == 0,
        "yes" if merged == 0 else merge_error.strip().removeprefix("error: "),
    )


def read_loss(path: Path) -> float | None:
    """Return the loss of the adapter in an evaluation's file, or None."""
    if not path.exists():
        return None
    value: float = json.loads(path.read_text())["figures"]["a"]["loss"]["value"]
    return value


def render(trials: Sequence[Trial], version: str) -> str:
    """Return the text of docs/peft_methods.md."""
    number = sum(trial.works for trial in trials)
    base = next(trial.base_loss for trial in trials if trial.base_loss)
    lines = [
        "# PEFT's methods, tried one by one",
        "",
        "Generated by `python -m docs.make_peft_methods`, which trains each type of PEFT on the bundled model and data",
        f"({NUM_STEPS} steps of 8 examples with the recipe), resumes it from step {RESUMED_AT}, evaluates it,",
        f"continues it and merges it. Of the {len(trials)} types of PEFT {version}, "
        f"**{number} train, resume bit for bit and evaluate** here.",
        "How to use them: [peft.md](peft.md).",
        "",
        f"The base's held-out loss is {base:.4f}. The losses show that each method learns: one seed and",
        f"{NUM_ROWS} rows do not rank them.",
        "",
        "| type | chosen by | forward pass | trained numbers | rate | held-out loss | resumed | evaluated | continued "
        "| merged |",
        "|---" * 10 + "|",
    ]
    notes = []
    for trial in trials:
        if trial.problem:
            continue
        merged = trial.merged
        if merged != "yes":
            notes.append(merged)
            merged = f"no ({len(notes)})"
        how = f"`{trial.how}`" if trial.how.startswith("--") else f"`--peft_config`: `{trial.how}`"
        marks = ["yes" if mark else "no" for mark in (trial.is_resumed, trial.is_evaluated, trial.is_continued)]
        lines.append(
            f"| {trial.type} | {how} | {trial.forward} | {trial.num_trained:,} | {trial.rate:.3g} | {trial.loss:.4f} | "
            f"{' | '.join(marks)} | {merged} |"
        )
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, start=1)), ""]
    lines += ["## Refused", "", "| type | because |", "|---|---|"]
    lines += [f"| {trial.type} | {trial.problem} |" for trial in trials if trial.problem]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try every type and write the page."""
    import peft

    with tempfile.TemporaryDirectory() as name:
        rows = Path(HELD_OUT).read_text(encoding="utf-8").splitlines(keepends=True)[:NUM_ROWS]
        (Path(name) / "heldout.jsonl").write_text("".join(rows), encoding="utf-8")
        trials = []
        for kind in peft.PeftType:
            trial = tried(kind.value, Path(name))
            trials.append(Trial(**{key: clean(value, name) for key, value in vars(trial).items()}))
            print(trials[-1], file=sys.stderr)
    PAGE.write_text(render(trials, peft.__version__))


def clean(value: Any, folder: str) -> Any:
    """Return a text without the temporary folder in it; other values as they are."""
    return value.replace(f"{folder}/", "") if isinstance(value, str) else value


if __name__ == "__main__":
    main()
