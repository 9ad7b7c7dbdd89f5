"""Show that two checkouts train alike: the same commands in both, and their results compared bit for bit.

    python scripts/loss_compare.py OLD_CHECKOUT NEW_CHECKOUT
    python scripts/loss_compare.py ../before . --methods lora prompt_tuning --work_dir /tmp/compare

A refactoring must change no loss. Every method is trained for a few steps on the bundled model and data, packed and
padded, on one process and on two; metrics.jsonl, the saved weights and summary.json must be equal, apart from times and
memory. Results in --work_dir are kept, so that the old checkout has to be run only once. Exit code 1: something
differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

VARIANTS = {
    "full": ["--learning_rate", "1e-4"],
    "lora": ["--use_lora"],
    "qlora": ["--use_qlora"],
    "ia3": ["--use_ia3"],
    "prompt_tuning": ["--use_prompt_tuning"],
    "prompt_tuning_vocab": ["--use_prompt_tuning", "--prompt_tuning_init", "sample_vocab", "--num_virtual_tokens", "7"],
    "p_tuning": ["--use_p_tuning"],
    "prefix_tuning": ["--use_prefix_tuning"],
    "prefix_projection": ["--use_prefix_tuning", "--prefix_projection", "--num_virtual_tokens", "5"],
    "auto_lr": ["--use_prompt_tuning", "--auto_lr"],
}
MEASURED = {"tokens_per_second", "peak_memory_mb", "wall_seconds"}  # these depend on the machine, not on the code
STEPS = ["--max_train_steps", "6", "--eval_steps", "3", "--checkpointing_steps", "2", "--num_sample_answers", "4"]


def main() -> int:
    """Run every case in both checkouts and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout of the repository before the change")
    parser.add_argument("new", type=Path, help="checkout after the change")
    parser.add_argument(
        "--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="methods to compare (default: all)"
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--work_dir", type=Path, default=Path("output/loss_compare"), help="folder of the runs")
    args = parser.parse_args()
    num_different = 0
    for name, packing, processes in itertools.product(args.methods, ["True", "False"], args.processes):
        if name == "auto_lr" and packing == "False":
            continue
        case = f"{name}-{'packed' if packing == 'True' else 'padded'}-{processes}"
        words = [*VARIANTS[name], "--packing", packing, *STEPS]
        old, new = (result(args.work_dir / label, checkout, case, words, processes) for label, checkout in
                    (("old", args.old), ("new", args.new)))  # fmt: skip
        differences = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        num_different += bool(differences)
        print(f"{case:32} {'equal' if not differences else 'DIFFERENT: ' + '; '.join(differences)}", flush=True)
    print(f"{num_different} cases differ")
    return int(num_different > 0)


def result(folder: Path, checkout: Path, case: str, words: list[str], processes: int) -> dict[str, Any]:
    """Train a case with the code of a checkout, unless that was done before, and read what must be equal."""
    output = (folder / case).resolve()
    if not (output / "summary.json").exists():
        root = checkout.resolve()
        data = ["--train_file", str(root / "data/sample/train.jsonl")]
        data += ["--validation_file", str(root / "data/sample/heldout.jsonl"), "--dataset_skip_cache"]
        data += ["--model_name_or_path", str(root / "assets/tiny-model"), "--output_dir", str(output)]
        launcher = [sys.executable]
        if processes > 1:
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
            launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
            launcher += ["--main_process_port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment["HF_HUB_OFFLINE"] = "1"
        command = [*launcher, str(root / "open_instruct/finetune_peft.py"), *data, "--overwrite_output_dir", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return {"run failed": done.stderr[-2000:]}
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    weights = sorted([*output.glob("*.safetensors"), *output.glob("checkpoints/step_4/*.safetensors")])
    return {
        "metrics.jsonl": [{key: value for key, value in row.items() if key not in MEASURED} for row in rows],
        **{f"summary {key}": value for key, value in summary.items() if key not in MEASURED},
        **{str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in weights},
    }


if __name__ == "__main__":
    sys.exit(main())
