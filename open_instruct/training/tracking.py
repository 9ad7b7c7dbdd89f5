"""Reports of a running training: rows of metrics.jsonl, terminal lines, a progress bar, experiment trackers."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from open_instruct.errors import InputError, input_faults, reason_of, warn
from open_instruct.files import json_text, write_text
from open_instruct.training.state import TrainState

METRICS = "metrics.jsonl"
OF_SOURCE = "eval_loss/"  # begins the names of sources' held-out losses
NUMBERS = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")  # that plots and reports read


@dataclass(frozen=True)
class TrackingSettings:
    """Experiment trackers."""

    trackers: tuple[str, ...]  # names that accelerate knows, or all; empty: none
    project: str
    entity: str | None
    run_name: str


def check_trackers(settings: TrackingSettings) -> None:
    """Refuse Weights & Biases without a key: it would prompt on the terminal, or fail during start-up.

    Raises:
        InputError: wandb is requested and has no key.
    """
    if not {"all", "wandb"} & set(settings.trackers):
        return
    import wandb

    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.login(prompt=False):
        raise InputError(
            "wandb has no key: run `wandb login`, set WANDB_MODE=offline, or name another tracker with --report_to"
        )


def start_trackers(settings: TrackingSettings, accelerator: Accelerator, flags: dict[str, Any]) -> None:
    """Open the experiment trackers with the run's flags."""
    if settings.trackers:
        config = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in flags.items()
        }
        wandb_options = {"name": settings.run_name, "entity": settings.entity}
        with input_faults(f"--report_to {' '.join(settings.trackers)}", "mend the tracker's settings, or drop it"):
            accelerator.init_trackers(settings.project, config=config, init_kwargs={"wandb": wandb_options})


def end_trackers(accelerator: Accelerator) -> None:
    """Close the trackers. The run's result is written already, so that a tracker that fails is only said."""
    try:
        accelerator.end_training()
    except Exception as error:  # of whatever type a tracker raises
        warn(f"a tracker could not be closed ({reason_of(error)}): the run's own files are complete")


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB: of its GPU if it has one, else resident."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    with suppress(OSError, StopIteration):  # Linux; getrusage would count the process before exec, too
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1.024e-3, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


def reset_peak_memory() -> None:
    """Reset the peak where the system can, so that several runs of one process are measured separately."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Metrics:
    """Appends rows to metrics.jsonl, passes them to trackers, and prints them. Only the main process does any of it."""

    def __init__(self, path: Path, accelerator: Any, total_steps: int, first_step: int = 0) -> None:
        """Open the file. A resumed run first drops the rows after its checkpoint."""
        self.accelerator = accelerator
        self.total_steps = total_steps
        self.tracks = True  # until a tracker fails
        self.is_main = accelerator.is_main_process
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None if self.is_main else True)
        if not self.is_main:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= first_step] if first_step else []
        write_text(path, "".join(json_text(line) + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.is_full = False

    def write(self, row: dict[str, Any]) -> None:
        """Write one row to file and trackers. A full disk costs the row, not the run."""
        if self.is_main:
            try:
                self.file.write(json_text(row) + "\n")
            except OSError as error:
                if not self.is_full:
                    warn(f"{METRICS}: rows from step {row['step']} on could not be written ({error.strerror})")
                self.is_full = True
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        if not self.tracks:
            return
        try:
            self.accelerator.log(numbers, step=row["step"])
        except Exception as error:  # of whatever type a tracker raises; training does not end for it
            self.tracks = False
            warn(f"trackers get no more rows from step {row['step']} on ({reason_of(error)}): metrics.jsonl has all")

    def step_row(
        self, state: TrainState, epoch: float, loss: float, learning_rate: float, grad_norm: float, speed: float
    ) -> None:
        """Write the row and the line of a training step; `speed` is in tokens per second."""
        row = {
            "step": state.step,
            "epoch": epoch,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "examples": state.examples,
            "tokens": state.tokens,
            "label_tokens": state.label_tokens,
            "tokens_per_second": round(speed, 1),
            "peak_memory_mb": peak_memory_mb(),
        }
        self.write(row)
        self.step_line(row)

    def step_line(self, row: dict[str, Any]) -> None:
        """Print a training step: on the progress bar, or about twenty times a run where there is none."""
        text = (
            f"step {row['step']}/{self.total_steps} | epoch {row['epoch']:.2f} | loss {row['loss']:.4f} | "
            f"lr {row['learning_rate']:.2e} | grad norm {row['grad_norm']:.3g} | "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        if not self.bar.disable:
            self.bar.set_postfix_str(text.split(" | ", 2)[2], refresh=False)
        elif self.is_main and (row["step"] % max(1, self.total_steps // 20) == 0 or row["step"] == self.total_steps):
            print(text, flush=True)

    def print(self, text: str) -> None:
        """Print a line that stays on the terminal."""
        if self.is_main:
            self.bar.write(text)
            sys.stdout.flush()

    def __enter__(self) -> Metrics:
        """Return the object itself, which is open already."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End the progress bar and the file."""
        self.bar.close()
        if self.is_main:
            with suppress(OSError):  # a row that a full disk refused, and that was reported
                self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, without what is none: a line that a killed run left incomplete, or damage.

    A number that was not finite, null in the file, is nan.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [row for row in map(row_of, lines) if row is not None]


def row_of(line: bytes) -> dict[str, Any] | None:
    """Return a line of a metrics file as a row, or None: it has a whole step, and what else is known are numbers."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    row = {name: math.nan if value is None else value for name, value in row.items()}
    known = [row["step"], *(row[name] for name in row if name in NUMBERS or name.startswith(OF_SOURCE))]
    is_number = (type(number) is float or (type(number) is int and abs(number) < 2**62) for number in known)
    return row if all(is_number) else None
