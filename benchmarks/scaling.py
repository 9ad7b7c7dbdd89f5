"""Print what several processes cost and gain: bytes exchanged in a step, speed of 2 against 1, what fits where.

    python -m benchmarks.scaling           # measured: 2 processes over the loopback device (Linux), one thread each
    python -m benchmarks.scaling --fits    # computed, by the estimator behind --dry_run

Bytes are what the loopback device counted during 20 steps less 4 steps, so loading and saving cancel out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from open_instruct.flags import default_values
from open_instruct.methods import METHODS, Feature
from open_instruct.model import memory
from open_instruct.training import engines

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "assets" / "tiny-model"
ENGINES = {
    "ddp": Feature.DDP,
    "zero2": Feature.ZERO_2,
    "zero3": Feature.ZERO_3,
    "fsdp2": Feature.FSDP,
}
MEASURED = {
    "prompt tuning": ["--use_prompt_tuning"],
    "prefix tuning": ["--use_prefix_tuning"],
    "LoRA": ["--use_lora"],
    "full": [],
}
SIZES = {  # hidden, feed-forward, layers, heads, key/value heads, vocabulary: Llama 3's 1B (head tied), 8B, 70B
    "1B": (2048, 8192, 16, 32, 8, 128_256),
    "8B": (4096, 14_336, 32, 32, 8, 128_256),
    "70B": (8192, 28_672, 80, 64, 8, 128_256),
}
STEPS = (4, 20)
ROW = 4096  # tokens
GPU_MB = 80_000


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", action="store_true")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="engines to measure (default: all)"
    )
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
    elif arguments.fits:
        print_fits()
    else:
        print_measured(arguments.engines)


def print_measured(chosen: list[str]) -> None:
    """Print traffic and speed of every engine and method."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        alone = launch("ddp", folder, 1)
        print("| method | engine | trained numbers, MB | weights, MB | MB a step | tokens/s of 2 processes / 1 |")
        print("|---" * 6 + "|")
        for engine in chosen:
            for method, figures in launch(engine, folder, 2).items():
                ratio = figures["tokens_per_second"] / alone[method]["tokens_per_second"]
                sizes = f"{figures['trained_mb']:.2f} | {figures['weights_mb']:.0f}"
                traffic = f"{figures['mb_a_step']:.2f}"
                print(f"| {method} | {ENGINES[engine]} | {sizes} | {traffic} | {ratio:.2f} |", flush=True)


def make_model(folder: Path) -> None:
    """Save a model of 19 million random weights, with the bundled model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=1024, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)


def launch(engine: str, folder: Path, num_processes: int) -> dict[str, dict[str, float]]:
    """Return the figures of each method, from runs in the same processes."""
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(num_processes),
        "--standalone",
        "-m",
        "benchmarks.scaling",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *words, "--worker", engine, str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    return json.loads((folder / "figures.json").read_text())


def worker(engine: str, folder: str) -> None:
    """Train few and more steps with each method; the first process writes the figures."""
    from tests.engines import make_run

    run = make_run(engine)
    out = Path(folder) / "out"

    def train(flags: list[str], steps: int) -> int:
        """Return the bytes that a run of so many steps sent."""
        words = [
            "--model_name_or_path", f"{folder}/model", "--train_file", str(ROOT / "data" / "sample" / "train.jsonl"),
            *flags, "--output_dir", str(out), "--overwrite_output_dir", "--max_train_steps", str(steps),
            "--validation_fraction", "0", "--dataset_skip_cache", "--max_train_samples", "384",
            "--logging_steps", "1000",
            "--per_device_train_batch_size", str(32 // int(os.environ["WORLD_SIZE"])),
        ]  # fmt: skip
        before = loopback_bytes()
        if run(words):
            raise SystemExit(1)
        return loopback_bytes() - before

    train(MEASURED["prompt tuning"], 1)  # not measured: the processes connect
    figures = {}
    for method, flags in MEASURED.items():
        few, more = (train(flags, steps) for steps in STEPS)
        summary = json.loads((out / "summary.json").read_text())
        figures[method] = {
            "mb_a_step": (more - few) / (STEPS[1] - STEPS[0]) / 1e6,
            "tokens_per_second": summary["tokens_per_second"],
            "trained_mb": summary["trainable_parameters"] * 4 / 1e6,
            "weights_mb": summary["total_parameters"] * 4 / 1e6,
        }
    if os.environ["RANK"] == "0":
        (Path(folder) / "figures.json").write_text(json.dumps(figures))


def loopback_bytes() -> int:
    """Return the bytes that the loopback device has carried since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def print_fits() -> None:
    """Print the memory that each GPU needs: bfloat16 base, rows of 4,096 tokens, checkpointing.

    Logits are computed in chunks, but not under ZeRO-3.
    """
    engines_and_gpus = [
        (None, 1),
        (Feature.DDP, 8),
        (Feature.ZERO_2, 8),
        (Feature.ZERO_3, 8),
        (Feature.FSDP, 8),
    ]
    engines_and_gpus += [(Feature.ZERO_3, 32), (Feature.FSDP, 32)]
    print(
        "| model | method | "
        + " | ".join(f"{engine or 'alone'}, {gpus} GPU{'s' if gpus > 1 else ''}" for engine, gpus in engines_and_gpus)
        + " |"
    )
    print("|---" * (len(engines_and_gpus) + 2) + "|")
    for size in SIZES:
        for method in ("prompt_tuning", "prefix_tuning", "lora", "full"):
            model, config = empty_model(size, method)
            cells = [cell(model, config, method, engine, gpus) for engine, gpus in engines_and_gpus]
            print(f"| {size} | {METHODS[method].title} | " + " | ".join(cells) + " |", flush=True)


def empty_model(size: str, method: str) -> tuple[torch.nn.Module, LlamaConfig]:
    """Return a base model with its adapter, of parameters that take no memory, and its configuration."""
    hidden, feed_forward, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=size == "1B", pad_token_id=0,
    )  # fmt: skip
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if method == "full" else torch.bfloat16)
        model.tie_weights()
        settings = METHODS[method].settings(
            default_values(num_virtual_tokens=50, prompt_tuning_init="text", prefix_init="text")
        )
        return METHODS[method].wrap(model, AutoTokenizer.from_pretrained(BUNDLED), settings), config


def cell(model: torch.nn.Module, config: LlamaConfig, method: str, engine: str | None, num_gpus: int) -> str:
    """Return the gigabytes that each GPU needs, bold where they fit."""
    trains = METHODS[method].memory_kind
    logit_rows = ROW if engine == Feature.ZERO_3 else (1 << 27) // config.vocab_size
    sharing = engines.sharing(engine, num_gpus)
    estimate = memory.estimate_mb(
        model, config, ROW + 50, logit_rows, True, False, 2, trains, method == "lora", sharing
    )
    total_mb = estimate["total"]
    return f"**{total_mb / 1000:,.0f}**" if total_mb < GPU_MB else f"{total_mb / 1000:,.0f}"


if __name__ == "__main__":
    main()
