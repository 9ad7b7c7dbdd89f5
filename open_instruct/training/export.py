"""What a run leaves in its folder: record, adapter, summary; and the upload, if asked for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters.inspection import START
from open_instruct.arguments import FinetuneArguments
from open_instruct.files import flush, write_json
from open_instruct.report.plots import plot_losses, plot_rates
from open_instruct.training.auto_rate import RangeTest
from open_instruct.training.checkpoint import Progress, trained_parameters
from open_instruct.training.continuing import TRAINED
from open_instruct.training.tracking import read_rows

RATES, RATES_PLOT = "auto_lr.json", "auto_lr.png"
RUN_FILES = ("run.json", "metrics.jsonl", "summary.json", "loss.png", "checkpoints", START, TRAINED, RATES, RATES_PLOT)
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


def run_record(
    a: FinetuneArguments,
    origins: dict[str, str],
    fingerprints: dict[str, Any],
    world_size: int,
    engine: str | None,
    sources: str,
    resumed_from: Path | None,
) -> dict[str, Any]:
    """Content of run.json: everything that is needed to repeat the run."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "flags": {
            name: {"value": value, "origin": origins.get(name, "default")} for name, value in sorted(asdict(a).items())
        },
        "method": a.method,
        "recipe_sources": sources,
        "command": sys.argv,
        "versions": versions,
        "git_commit": git_commit(),
        "world_size": world_size,
        "engine": engine,
        "seed": a.seed,
        "data": fingerprints,
        "resumed_from": resumed_from and str(resumed_from),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_commit() -> str | None:
    """Commit of the code that runs, or None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def start_trackers(accelerator: Any, a: FinetuneArguments) -> None:
    """Open the experiment trackers."""
    if not a.with_tracking:
        return
    name = a.run_name or f"{a.exp_name}__{a.method}__{a.seed}__{int(time.time())}"
    flags = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in asdict(a).items()
    }
    accelerator.init_trackers(
        a.wandb_project_name, config=flags, init_kwargs={"wandb": {"name": name, "entity": a.wandb_entity}}
    )


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, output_dir: Path, keep_network: bool = False) -> int:
    """Write the adapter (or the whole model) and the tokenizer beside a rename, and return the weights' size in bytes.

    `keep_network`: also what PEFT's format leaves out, the network that computes the soft prompt, so that training can go on.
    """
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=output_dir) as working:
        # PEFT would ask the Hub whether the vocabulary grew; it never does here.
        model.save_pretrained(working, **({"save_embedding_layers": False} if isinstance(model, PeftModel) else {}))
        tokenizer.save_pretrained(working)
        (Path(working) / "README.md").unlink(missing_ok=True)  # PEFT's card is an empty form
        size = sum(path.stat().st_size for path in Path(working).glob("*.safetensors"))
        if keep_network:
            save_file(
                {name: value.detach().contiguous().cpu() for name, value in trained_parameters(model).items()},
                Path(working) / TRAINED,
            )
        for path in Path(working).iterdir():
            if path.is_file():
                flush(path)
                os.replace(path, output_dir / path.name)
    return size


def open_output_dir(
    a: FinetuneArguments,
    accelerator: Any,
    record: dict[str, Any],
    start: torch.Tensor | None,
    rates: RangeTest | None,
    keep: bool,
) -> None:
    """Create the folder with its run.json, a soft prompt's start and what --auto_lr found, and open the trackers.

    `keep`: a resumed run's files stay.
    """
    folder = Path(a.output_dir)
    accelerator.wait_for_everyone()  # every process has checked the folder by now
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not keep:
            clear(folder)
            if start is not None:
                save_file({"embeddings": start.contiguous()}, folder / START)
            if rates is not None:
                write_json(folder / RATES, asdict(rates))
                plot_rates(rates.rates, rates.losses, rates.before, rates.chosen, folder / RATES_PLOT)
        write_json(folder / "run.json", record)
    start_trackers(accelerator, a)
    accelerator.wait_for_everyone()


def clear(folder: Path) -> None:
    """Remove what a former run left, and nothing else: a full model's files beside an adapter's would mislead any loader."""
    for pattern in (*RUN_FILES, *MODEL_FILES):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def finish(a: FinetuneArguments, progress: Progress, summary: dict[str, Any]) -> None:
    """Plot the losses; write summary.json, which marks the run as finished; drop checkpoints and upload, if asked for."""
    output_dir = Path(a.output_dir)
    plot_losses(
        read_rows(output_dir / "metrics.jsonl"),
        progress.base_eval_loss,
        f"{a.method}: {output_dir.name}",
        output_dir / "loss.png",
    )
    write_json(output_dir / "summary.json", summary)
    if a.clean_checkpoints_at_end:
        shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    if a.push_to_hub:
        upload(a, output_dir)


def upload(a: FinetuneArguments, output_dir: Path) -> None:
    """Upload the folder without its checkpoints. A failure is a warning: the run itself is complete."""
    from huggingface_hub import HfApi

    name = a.hf_repo_id or a.run_name or f"{a.exp_name}-{a.method}"
    repository = f"{a.hf_entity}/{name}" if a.hf_entity and "/" not in name else name
    try:
        api = HfApi()
        repository = api.create_repo(repository, exist_ok=True, private=True).repo_id
        api.upload_folder(
            repo_id=repository, folder_path=output_dir, revision=a.hf_repo_revision, ignore_patterns=["checkpoints/*"]
        )
        print(f"uploaded to {repository} (private)")
    except Exception as error:  # the network and the Hub fail in many ways; none may cost the finished run
        print(f"warning: upload to {repository} failed ({error}); everything is in {output_dir}", file=sys.stderr)
