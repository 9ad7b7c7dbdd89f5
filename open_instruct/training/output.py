"""Files of a run's folder: record, adapter and summary; and their upload, if it was requested."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters.inspection import START
from open_instruct.errors import InputError, one_line, warn
from open_instruct.files import flush, write_json
from open_instruct.report.plots import plot_losses, plot_rates
from open_instruct.training.checkpoint import WRITE_ERRORS, Checkpoint, complete_checkpoints, find
from open_instruct.training.continuing import NETWORK
from open_instruct.training.sharding import trained_parameters
from open_instruct.training.start import RangeTest
from open_instruct.training.state import TrainState
from open_instruct.training.tracking import METRICS, read_metrics

RUN, SUMMARY, LOSS_PLOT, CHECKPOINTS = "run.json", "summary.json", "loss.png", "checkpoints"
RATES, RATES_PLOT = "auto_lr.json", "auto_lr.png"
RUN_FILES = (RUN, METRICS, SUMMARY, LOSS_PLOT, CHECKPOINTS, START, NETWORK, RATES, RATES_PLOT)
MODEL_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
)
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "deepspeed",
    "flash_attn",
)


@dataclass(frozen=True)
class OutputSettings:
    """The run's folder, and what happens to it."""

    folder: Path
    overwrite: bool
    resume_from: str | None  # a path, or "newest"
    inputs: Mapping[str, str]  # description → folder that the run reads
    clean_checkpoints_at_end: bool
    upload_to: str | None  # repository on the Hub
    upload_revision: str | None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS


def check_folder(settings: OutputSettings) -> Checkpoint | None:
    """Refuse to touch a folder that holds another run, or that the run reads.

    Returns:
        The checkpoint to resume from, or None to start at step 0.

    Raises:
        InputError: the folder can't be used, or holds a run that no flag overwrites or resumes.
    """
    folder = settings.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: name a folder")
    for what, name in settings.inputs.items():
        if folder.resolve() == Path(name).resolve():
            raise InputError(
                f"--output_dir {folder} is also the folder of {what}, and would be overwritten: name another folder"
            )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} can't be written ({error.strerror}): name another folder") from None
    if (folder / SUMMARY).exists() and not settings.overwrite:
        raise InputError(
            f"--output_dir {folder} holds a finished run: name another folder, or pass --overwrite_output_dir"
        )
    saved = find(settings.resume_from, folder) if settings.resume_from else None
    if saved:
        return saved
    if not settings.overwrite:  # a job that may be resumed passes --resume_from_checkpoint from its first start on
        steps = [path.name for path in complete_checkpoints(settings.checkpoints)]
        if steps:
            raise InputError(
                f"--output_dir {folder} holds an unfinished run with checkpoint {steps[-1]}: continue it with "
                "--resume_from_checkpoint, name another folder, or pass --overwrite_output_dir"
            )
        is_own = settings.resume_from and (folder / RUN).exists()  # a run that was stopped before its first checkpoint
        if not is_own and any(list(folder.glob(pattern)) for pattern in MODEL_FILES):
            raise InputError(
                f"--output_dir {folder} holds a model: name another folder, or pass --overwrite_output_dir"
            )
    return None


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that change numbers."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def environment() -> dict[str, Any]:
    """Return the entries of run.json about the code and the machine."""
    return {
        "command": sys.argv,
        "versions": package_versions(),
        "git_commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_commit() -> str | None:
    """Return the commit of the code that runs, or None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def open_folder(
    settings: OutputSettings,
    accelerator: Accelerator,
    record: dict[str, Any],
    prompt_vectors: torch.Tensor | None,
    rates: RangeTest | None,
    resumed: bool,
) -> None:
    """Create the folder with its record, a soft prompt's start [P, D] and what --auto_lr measured.

    A resumed run keeps the existing files.
    """
    folder = settings.folder
    accelerator.wait_for_everyone()  # every process has checked the folder by now
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed:
            clear(folder)
            if prompt_vectors is not None:
                save_file({"embeddings": prompt_vectors.contiguous()}, folder / START)
            if rates is not None:
                write_json(folder / RATES, asdict(rates))
                plot_rates(rates.rates, rates.losses, rates.before, rates.chosen, folder / RATES_PLOT)
        write_json(folder / RUN, record)
    accelerator.wait_for_everyone()


def clear(folder: Path) -> None:
    """Remove a former run's files: those of a full model beside an adapter would mislead any loader."""
    for pattern in (*RUN_FILES, *MODEL_FILES):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, keep_network: bool = False) -> int:
    """Write the adapter (or the full model) and the tokenizer under temporary names, then rename them.

    Args:
        model: a PeftModel, or the full model in full fine-tuning.
        tokenizer: the run's tokenizer.
        folder: the run's folder.
        keep_network: also write the network that computes the soft prompt, which PEFT's format leaves out.

    Returns:
        Size of the weights in bytes.
    """
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as working:
        # PEFT would ask the Hub whether the vocabulary grew; it never does here.
        model.save_pretrained(working, **({"save_embedding_layers": False} if isinstance(model, PeftModel) else {}))
        tokenizer.save_pretrained(working)
        (Path(working) / "README.md").unlink(missing_ok=True)  # PEFT's card is an empty form
        num_bytes = sum(path.stat().st_size for path in Path(working).glob("*.safetensors"))
        if keep_network:
            network = {name: value.detach().contiguous().cpu() for name, value in trained_parameters(model).items()}
            save_file(network, Path(working) / NETWORK)
        for path in Path(working).iterdir():
            if path.is_file():
                flush(path)
                os.replace(path, folder / path.name)
    return num_bytes


def save_somewhere(save: Callable[[Path], Any], folder: Path) -> Any:
    """Save into `folder`; where that fails, into a fresh temporary folder, so that no result is lost.

    Raises:
        InputError: the result is in the temporary folder, which the message names, or could not be saved at all.
    """
    try:
        return save(folder)
    except WRITE_ERRORS as error:
        reason = one_line(error)
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        save(elsewhere)
    except WRITE_ERRORS as error:
        raise InputError(
            f"the result could be saved neither in {folder} ({reason}) nor in the temporary folder ({error}): free "
            "disk space, and continue from the last checkpoint with --resume_from_checkpoint"
        ) from None
    raise InputError(f"the result could not be saved in {folder} ({reason}): it is in {elsewhere}, move it from there")


def finish(settings: OutputSettings, state: TrainState, summary: dict[str, Any], title: str) -> None:
    """Plot the losses; write summary.json, which marks the run as finished; drop checkpoints and upload."""
    folder = settings.folder
    plot_losses(read_metrics(folder / METRICS), state.base_eval_loss, title, folder / LOSS_PLOT)
    write_json(folder / SUMMARY, summary)
    if settings.clean_checkpoints_at_end:
        shutil.rmtree(settings.checkpoints, ignore_errors=True)
    if settings.upload_to:
        upload(folder, settings.upload_to, settings.upload_revision)


def upload(folder: Path, repository: str, revision: str | None) -> None:
    """Upload the folder without its checkpoints. A failure is a warning: the run itself is complete."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(repository, exist_ok=True, private=True).repo_id
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, ignore_patterns=[f"{CHECKPOINTS}/*"]
        )
        print(f"uploaded to {repository} (private)")
    except Exception as error:  # the network and the Hub fail in many ways; none may cost the finished run
        warn(f"upload to {repository} failed ({one_line(error)}); everything is in {folder}")
