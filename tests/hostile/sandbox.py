"""What the draws work on: a model, adapters, checkpoints, data and a study, which are all right and must stay so."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tests.conftest import TINY_MODEL, write_conversations

ADAPTERS = {
    "prompt": ["--use_prompt_tuning", "--num_virtual_tokens", "4", "--prompt_tuning_init", "sample_vocab"],
    "prefix": ["--use_prefix_tuning", "--num_virtual_tokens", "4", "--prefix_init", "zero"],
    "p_tuning": ["--use_p_tuning", "--num_virtual_tokens", "4", "--encoder_hidden_size", "16"],
    "lora": ["--use_lora", "--lora_rank", "2"],
}
RUN = ["--max_train_steps", "2", "--num_sample_answers", "0", "--validation_fraction", "0.2", "--logging_steps", "1"]


@dataclass(frozen=True)
class Sandbox:
    """Folders of good inputs."""

    root: Path

    @property
    def model(self) -> Path:
        """A base model."""
        return self.root / "model"

    @property
    def data(self) -> Path:
        """Conversations, as JSON Lines."""
        return self.root / "data" / "train.jsonl"

    @property
    def arrow(self) -> Path:
        """The same, as an Arrow stream."""
        return self.root / "data" / "train.arrow"

    def run(self, method: str) -> Path:
        """A finished run of a method, with checkpoints at its two steps."""
        return self.root / "runs" / method

    @property
    def study(self) -> Path:
        """A finished study of two trials."""
        return self.root / "study"

    def train(self, *words: str) -> list[str]:
        """Command-line words of a short run."""
        cache = str(self.root / "cache")
        given = " ".join(words)
        base = [] if "--model_name_or_path" in given else ["--model_name_or_path", str(self.model)]
        data = [] if "--train_file" in given else ["--train_file", str(self.data)]
        return [*base, *data, *RUN, "--dataset_local_cache_dir", cache, *words]


def build(root: Path, fork) -> Sandbox:
    """Make a sandbox; `fork` runs a command in a process of its own and returns its outcome."""
    sandbox = Sandbox(root)
    shutil.copytree(TINY_MODEL, sandbox.model)
    sandbox.data.parent.mkdir()
    write_conversations(sandbox.data, "reverse", 40, long_every=7)
    rows = [json.loads(line) for line in sandbox.data.read_text().splitlines()]
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(sandbox.arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for method, flags in ADAPTERS.items():
        words = sandbox.train(*flags, "--output_dir", str(sandbox.run(method)), "--checkpointing_steps", "1")
        outcome = fork("finetune_peft", words, root, learn=True)
        assert outcome.code == 0, outcome
    config = root / "study.yaml"
    config.write_text(study_text(sandbox))
    outcome = fork("study_peft", ["--config", str(config), "--output_dir", str(sandbox.study)], root, learn=True)
    assert outcome.code == 0, outcome
    prompt, text = ["--adapter", str(sandbox.run("prompt"))], ["--max_new_tokens", "2"]
    for command, words in {
        "generate_peft": [*text, "--input_file", str(sandbox.data), "--output_file", str(root / "answers.jsonl")],
        "evaluate_peft": [*text, "--file", str(sandbox.data), "--output_dir", str(root / "evaluated")],
        "merge_peft": ["--output", str(root / "merged")],
        "inspect_peft": ["--output_dir", str(root / "inspected")],
    }.items():
        outcome = fork(command, [*prompt, *words], root, learn=True)
        assert outcome.code == 0, outcome
    return sandbox


def study_text(sandbox: Sandbox) -> str:
    """A study of two short trials, as YAML."""
    flags = {"model_name_or_path": str(sandbox.model), "train_file": str(sandbox.data), "validation_fraction": 0.2}
    lines = [f"  {name}: {json.dumps(value)}" for name, value in flags.items()]
    lines += ["  max_train_steps: 2", f"  dataset_local_cache_dir: {json.dumps(str(sandbox.root / 'cache'))}"]
    return "\n".join(["name: small", "flags:", *lines, "methods: {ia3: , lora: }", "seeds: [1]", ""])


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of change of everything below a folder: what a command must not touch."""
    seen = {}
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            seen[path] = (status.st_mode, 0, 0) if is_folder else (status.st_mode, status.st_size, status.st_mtime_ns)
    return seen
