"""Files of a run's folder: record, adapter and summary; and their upload, if it was requested."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
from open_instruct.files import check_path, flush, replacing_by_name, write_json
from open_instruct.locks import LOCK, Occupied, locked
from open_instruct.report import pictures
from open_instruct.report.plots import plot_losses, plot_rates
from open_instruct.temporary import share, temporary_folder
from open_instruct.training.checkpoint import WRITE_ERRORS, Checkpoint, complete_checkpoints, find
from open_instruct.training.preemption import RunGuard
from open_instruct.training.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    FORMER,
    LOSS_PLOT,
    MODEL,
    NETWORK,
    RATES,
    RATES_PLOT,
    RUN,
    SUMMARY,
    RunFolder,
    named,
)
from open_instruct.training.sharding import trained_parameters
from open_instruct.training.start import RangeTest
from open_instruct.training.state import TrainState
from open_instruct.training.tracking import METRICS, read_metrics

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
    writes: bool  # False: the run stops before it would write anything there
    overwrite: bool
    resume_from: str | None  # a path, or "newest"
    inputs: Mapping[str, str]  # description → folder that the run reads
    data: Sequence[str]  # files and folders of rows, and names on the Hub
    clean_checkpoints_at_end: bool
    upload_to: str | None  # repository on the Hub
    upload_revision: str | None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS


def occupy_folder(settings: OutputSettings, guard: RunGuard) -> Checkpoint | None:
    """Lock the run's folder, on the main process, and refuse one that holds anything that the run must not touch.

    Returns:
        The checkpoint to resume from, or None to start at step 0.

    Raises:
        InputError: the folder can't be used, or another run is at work there; or it holds files of others, or a run
            that no flag overwrites or resumes.
    """
    what = f"--output_dir {settings.folder}"
    check_path(settings.folder, what)
    check_inputs(settings)
    if settings.writes and is_main_rank():
        guard.enter_context(locked(settings.folder / LOCK, what))
    return check_content(settings, RunFolder.read(settings.folder))


def is_main_rank() -> bool:
    """Return whether this is the main process of the run, before the processes know each other."""
    return os.environ.get("RANK", "0") == "0"


def check_inputs(settings: OutputSettings) -> None:
    """Refuse a folder that the run reads, or one inside of a model's.

    Raises:
        InputError: naming what it is the folder of.
    """
    folder = Path(os.path.realpath(settings.folder))
    for what, name in [*settings.inputs.items(), *(("the data", name) for name in settings.data)]:
        source = Path(os.path.realpath(name))
        if not source.is_dir():
            continue
        if folder == source:
            raise InputError(
                f"--output_dir {settings.folder} is also the folder of {what}, and would be overwritten: name another "
                "folder"
            )
        if what != "the data" and source in folder.parents:
            raise InputError(f"--output_dir {settings.folder} lies inside {name}, the folder of {what}: name another")


def check_content(settings: OutputSettings, own: RunFolder) -> Checkpoint | None:
    """Refuse a folder whose files the run would replace or mix with its own; `own` says which ones it may."""
    folder = settings.folder
    if own.has(SUMMARY) and not settings.overwrite:
        raise InputError(
            f"--output_dir {folder} holds a finished run: name another folder, or pass --overwrite_output_dir"
        )
    saved = find(settings.resume_from, folder) if settings.resume_from else None
    goes_on = saved is not None and same_folder(saved.path.parent, settings.checkpoints)
    foreign = own.foreign(after=saved.state.step if saved and goes_on else -1)
    if foreign:
        what = (
            "a model that the run did not make" if any(is_model_file(name) for name in foreign) else "files of others"
        )
        raise Occupied(f"--output_dir {folder} holds {what} ({named(foreign)}): move them away, or name another folder")
    if goes_on or settings.overwrite:
        return saved
    steps = own.has(f"{CHECKPOINTS}/step_*")
    finished = [path.name for path in complete_checkpoints(settings.checkpoints)]
    if finished:
        remedy = "with --resume_from_checkpoint and no path" if saved else "with --resume_from_checkpoint"
        raise InputError(
            f"--output_dir {folder} holds an unfinished run with checkpoint {finished[-1]}: continue it {remedy}, name "
            "another folder, or pass --overwrite_output_dir"
        )
    if saved and (steps or own.has(METRICS)) and own.record.get("resumed_from") != str(saved.path):
        raise InputError(f"--output_dir {folder} holds another run than {saved.path}: name another folder")
    if not settings.resume_from and any(is_model_file(name) for name in own.has()):
        raise InputError(f"--output_dir {folder} holds a model: name another folder, or pass --overwrite_output_dir")
    return saved


def is_model_file(name: str) -> bool:
    """Return whether a file belongs to a model or an adapter."""
    return any(Path(name).match(pattern) for pattern in (*ADAPTER[:2], *MODEL))


def same_folder(first: Path, second: Path) -> bool:
    """Return whether two paths lead to one folder."""
    return os.path.realpath(first) == os.path.realpath(second)


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
    saved: Checkpoint | None,
) -> RunFolder:
    """Create the folder with its record, a soft prompt's start [P, D] and what --auto_lr measured.

    A resumed run keeps the existing files. What came after its checkpoint is set aside: later checkpoints would be
    mixed with the run's own.

    Returns:
        The folder, which from here on is the run's.
    """
    own = RunFolder.read(settings.folder)
    accelerator.wait_for_everyone()  # every process has checked the folder by now
    if accelerator.is_main_process:
        in_the_way: list[str] = []
        if saved and same_folder(saved.path.parent, settings.checkpoints):
            in_the_way = own.later(saved.state.step)
        elif not settings.overwrite and any(name.startswith(CHECKPOINTS) or is_model_file(name) for name in own.has()):
            in_the_way = [*(name for name in own.has() if name != RUN), RUN]
        elif not saved:
            own.clear()
        if in_the_way:
            aside = own.set_aside(in_the_way, copies=[METRICS])
            accelerator.print(f"{named(in_the_way)} of a former run: moved to {aside}")
        names = {START: prompt_vectors, RATES: rates, RATES_PLOT: rates}
        own.start(record, METRICS, SUMMARY, LOSS_PLOT, *(name for name, value in names.items() if value is not None))
        if saved is None and prompt_vectors is not None:
            with replacing_by_name(own.path / START) as path:
                save_file({"embeddings": prompt_vectors.contiguous()}, path)
        if saved is None and rates is not None:
            write_json(own.path / RATES, asdict(rates))
            with pictures.if_possible(own.path / RATES_PLOT):
                plot_rates(rates.rates, rates.losses, rates.before, rates.chosen, own.path / RATES_PLOT)
    accelerator.wait_for_everyone()
    return own


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, keep_network: bool = False) -> int:
    """Write the adapter (or the full model) and the tokenizer under temporary names, then rename them.

    Args:
        model: a PeftModel, or the full model in full fine-tuning.
        tokenizer: the run's tokenizer.
        folder: the run's folder.
        keep_network: also write the network that computes the soft prompt, which PEFT's format leaves out.

    Returns:
        Size of the weights in bytes.

    Raises:
        InputError: a file that is not the run's has the name of one that is to be written.
    """
    with temporary_folder(folder.path / "model") as working:
        # PEFT would ask the Hub whether the vocabulary grew; it never does here.
        model.save_pretrained(working, **({"save_embedding_layers": False} if isinstance(model, PeftModel) else {}))
        tokenizer.save_pretrained(working)
        for card in working.rglob("README.md"):  # PEFT's card is an empty form
            card.unlink()
        num_bytes = sum(path.stat().st_size for path in working.rglob("*.safetensors"))
        if keep_network:
            network = {name: value.detach().contiguous().cpu() for name, value in trained_parameters(model).items()}
            save_file(network, working / NETWORK)
        share(working)
        files = {path.relative_to(working).as_posix(): path for path in working.rglob("*") if path.is_file()}
        folder.claim(*files)
        for name, path in files.items():
            flush(path)
            target = folder.path / name
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        for parent in {(folder.path / name).parent for name in files} | {folder.path}:
            flush(parent)
    return num_bytes


def save_somewhere(save: Callable[[RunFolder], Any], folder: RunFolder) -> Any:
    """Save into `folder`; where that fails, into a fresh temporary folder, so that no result is lost.

    Raises:
        InputError: the result is in the temporary folder, which the message names, or could not be saved at all.
    """
    try:
        return save(folder)
    except (*WRITE_ERRORS, InputError) as error:
        reason = one_line(error)
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix=f"{folder.path.name[:40]}-"))
        save(RunFolder(elsewhere, folder.record))
    except (*WRITE_ERRORS, InputError) as error:
        raise InputError(
            f"the result could be saved neither in {folder.path} ({reason}) nor in the temporary folder ({error}): "
            "free disk space, and continue from the last checkpoint with --resume_from_checkpoint"
        ) from None
    raise InputError(
        f"the result could not be saved in {folder.path} ({reason}): it is in {elsewhere}, move it from there"
    )


def finish(settings: OutputSettings, own: RunFolder, state: TrainState, summary: dict[str, Any], title: str) -> None:
    """Write summary.json, which marks the run as finished; plot the losses; drop checkpoints and upload."""
    write_json(own.path / SUMMARY, summary)
    with pictures.if_possible(own.path / LOSS_PLOT):
        plot_losses(read_metrics(own.path / METRICS), state.base_eval_loss, title, own.path / LOSS_PLOT)
    if settings.clean_checkpoints_at_end:
        own.remove(*own.has(f"{CHECKPOINTS}/*"))
    if settings.upload_to:
        upload(own.path, settings.upload_to, settings.upload_revision)


def upload(folder: Path, repository: str, revision: str | None) -> None:
    """Upload the folder without its checkpoints. A failure is a warning: the run itself is complete."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(repository, exist_ok=True, private=True).repo_id
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            ignore_patterns=[f"{CHECKPOINTS}/*", f"{FORMER}-*/*", LOCK],
        )
        print(f"uploaded to {repository} (private)")
    except Exception as error:  # the network and the Hub fail in many ways; none may cost the finished run
        warn(f"upload to {repository} failed ({one_line(error)}); everything is in {folder}")
