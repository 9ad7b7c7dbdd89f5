"""Error messages for a run that is out of memory or has lost contact with other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from open_instruct.errors import InputError, one_line
from open_instruct.training.checkpoint import complete_checkpoints
from open_instruct.training.state import TrainState


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def out_of_memory(accelerator: Any, step: int) -> InputError:
    """Return the error of a run that can't lower its need of memory by itself."""
    return InputError(
        f"out of memory in step {step + 1} on process {accelerator.process_index}: set --gradient_checkpointing, lower "
        "--max_tokens_per_microbatch (padded: --per_device_train_batch_size, with more --gradient_accumulation_steps), "
        "or lower --max_seq_length; --dry_run estimates the memory that a setting needs"
    )


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process ended or was late."""
    words = (
        "connection closed by peer",
        "connection reset by peer",
        "timed out",
        "broken pipe",
        "socket",
        "remote process exited",
    )
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def lost_contact(error: BaseException, accelerator: Any, step: int) -> InputError:
    """Return the error of a process that has lost contact with the others."""
    cause = one_line(error, 10_000)[-200:]
    return InputError(
        f"process {accelerator.process_index} of {accelerator.num_processes} lost contact with the others in step "
        f"{step + 1} ({cause}): another process ended, or needed longer than --timeout; continue with "
        "--resume_from_checkpoint"
    )


@contextmanager
def explained_faults(accelerator: Accelerator, state: TrainState, checkpoints: Path) -> Iterator[None]:
    """Add the last good checkpoint to an error of the block, and turn lost contact to other processes into one line.

    Raises:
        InputError: the block raised one, or lost contact.
    """
    try:
        yield
    except InputError as error:
        finished = complete_checkpoints(checkpoints)
        newest = finished[-1] if finished else "none (set --checkpointing_steps)"
        raise InputError(f"{error}; last good checkpoint: {newest}") from None
    except RuntimeError as error:
        if accelerator.num_processes > 1 and is_lost_contact(error):
            raise lost_contact(error, accelerator, state.step) from error
        raise
