"""Held-out loss of every method with no hyperparameter set, against the base model and against the settings that users brought.

Run from the repository root, with any model and conversations:

    python -m benchmarks.recipes --model_name_or_path MODEL --train_file FILE --max_train_steps 150 --max_seq_length 448

Prints the README's table of results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from open_instruct.finetune_peft import main as finetune

RUNS = {
    "full": [],
    "LoRA": ["--use_lora"],
    "IA3": ["--use_ia3"],
    "prompt tuning": ["--use_prompt_tuning"],
    "P-tuning": ["--use_p_tuning"],
    "prefix tuning": ["--use_prefix_tuning"],
    "… with projection": ["--use_prefix_tuning", "--prefix_projection"],
    "prompt tuning, 2e-5, random start": ["--use_prompt_tuning", "--prompt_tuning_init", "random", "--learning_rate", "2e-5"],
}


def main() -> int:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, flags = parser.parse_known_args()
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, method) in enumerate(RUNS.items()):
            output = Path(folder, str(number))
            words = [*flags, *method, "--output_dir", str(output), "--num_sample_answers", "0", "--eval_steps", "0"]
            with contextlib.redirect_stdout(sys.stderr):
                code = finetune([*words, "--dataset_local_cache_dir", str(Path(folder, "cache"))])
            if code:
                return code
            summary = json.loads((output / "summary.json").read_text())
            losses = losses or {"base": summary["base_eval_loss"]}
            losses[name] = summary["final_eval_loss"]
    print("| | " + " | ".join(losses) + " |")
    print("|" + "---|" * (len(losses) + 1))
    print("| held-out loss | " + " | ".join(f"{loss:.3f}" for loss in losses.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
