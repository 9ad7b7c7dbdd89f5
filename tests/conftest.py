"""What several tests share: tiny models, small data files, and ways to run the entry point."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from assets.word_skills import unnamed_conversation
from open_instruct.finetune_peft import main
from open_instruct.methods import METHODS as REGISTRY

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL = ROOT / "assets" / "tiny-model"
TINY_T5 = ROOT / "assets" / "tiny-t5"
METHODS = [method.name for method in REGISTRY.values() if not method.quantises_base]
ADAPTERS = [name for name in METHODS if not REGISTRY[name].trains_base]


def method_flags(method: str) -> list[str]:
    """The flag that chooses a method."""
    return [] if method == "full" else [f"--use_{method}"]


def no_dropout(method: str) -> list[str]:
    """The flag that switches dropout off, of methods that have it."""
    return ["--lora_dropout", "0"] if method in ("lora", "qlora") else []


# Rates and sizes at which rounding grows little, and the numbers in tests stay as they are, whatever the recipes are.
MODEST = {
    "lora": ["--learning_rate", "3.2e-3"],
    "ia3": ["--learning_rate", "1e-2"],
    "vera": ["--learning_rate", "1e-2"],
    "prompt_tuning": ["--learning_rate", "0.06", "--num_virtual_tokens", "20", "--prompt_tuning_init", "sample_vocab"],
    "p_tuning": ["--learning_rate", "3.2e-3", "--num_virtual_tokens", "20"],
    "prefix_tuning": ["--learning_rate", "0.03", "--num_virtual_tokens", "20", "--prefix_init", "zero"],
}


def modest_flags(method: str) -> list[str]:
    """`method_flags` with settings of `MODEST`."""
    return [*method_flags(method), *MODEST.get(method, [])]


def write_conversations(path: Path, skill: str, count: int, seed: int = 0, long_every: int = 0) -> Path:
    """Write unnamed conversations of a skill as JSON Lines; every `long_every`-th has three turns: ragged lengths."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            turns = 3 if long_every and number % long_every == 0 else 1
            row = {"id": f"{skill}-{number}", "messages": unnamed_conversation(rng, skill, turns), "source": skill}
            file.write(json.dumps(row) + "\n")
    return path


def tiny_llama(**changes: int) -> LlamaForCausalLM:
    """A random Llama with grouped heads."""
    torch.manual_seed(0)
    options = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(
        LlamaConfig(**{**options, "num_key_value_heads": 2, "max_position_embeddings": 128, **changes})
    ).eval()


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 conversations of ragged length."""
    return write_conversations(tmp_path_factory.mktemp("data") / "train.jsonl", "reverse", 80, long_every=5)


@pytest.fixture
def train(tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture):
    """Run the entry point in this process; gives exit code, output, folder, summary and metrics."""

    def run(name: str, *flags: str, data: Path = data_file, model: Path = TINY_MODEL) -> SimpleNamespace:
        folder = tmp_path / name
        common = [
            "--model_name_or_path",
            str(model),
            "--output_dir",
            str(folder),
            "--dataset_local_cache_dir",
            str(tmp_path / "cache"),
        ]
        if "--validation_file" not in flags:
            common += ["--validation_fraction", "0.2"]
        source = (
            []
            if any(flag.startswith("--dataset_") and flag != "--dataset_skip_cache" for flag in flags)
            else ["--train_file", str(data)]
        )
        capsys.readouterr()
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
        code = main([*common, *source, "--num_sample_answers", "0", *flags])
        output = capsys.readouterr()
        summary = folder / "summary.json"
        return SimpleNamespace(
            code=code,
            out=output.out,
            err=output.err,
            folder=folder,
            summary=json.loads(summary.read_text()) if summary.exists() else None,
            metrics=[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            if (folder / "metrics.jsonl").exists()
            else None,
        )

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let two workers, which begin at the start and in the middle, begin with the longest tests.

    So a worker that is done early takes over short ones from the other's end, and none is left alone with a long one.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    middle = len(items) // 2 - len(slow[::2])
    items[:] = [*slow[::2], *others[:middle], *slow[1::2], *others[middle:]]


def without_measurements(rows: list[dict]) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the machine's mood."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_mb")} for row in rows]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A short run of every method, on words in reverse."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_conversations(folder / "train.jsonl", "reverse", 300)
    for method in ADAPTERS:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = [
            "--model_name_or_path", str(TINY_MODEL), "--train_file", str(data), *modest_flags(method),
            "--output_dir", str(folder / method), "--max_train_steps", "40", "--validation_fraction", "0.1",
            "--num_sample_answers", "0", "--checkpointing_steps", "20",
            "--dataset_skip_cache",
        ]  # fmt: skip
        assert main(words) == 0
    return folder


@pytest.fixture(scope="session")
def questions_file(trained) -> Path:
    """30 questions that nothing was trained on."""
    return write_conversations(trained / "heldout.jsonl", "reverse", 30, seed=99)


def questions_of(path: Path, count: int = 8) -> list[str]:
    """The questions of a file."""
    return [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()[:count]]
