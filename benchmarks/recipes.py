r"""Print the held-out loss of every method with no hyperparameter set, as a share of the base model's loss.

Over steps, batches and prompt lengths. Run from the repository root, with any model and conversations; flags that are
not known here go to the trainer:

    python -m benchmarks.recipes --model_name_or_path MODEL --train_file FILE --validation_file FILE \
        --max_seq_length 192 --steps 50 150 --batches 4 --virtual_tokens 0 1 10 100

Each setting has a row; 0 virtual tokens stand for the recipe's number. The largest share is printed at the end: below
1, every method learned.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

from accelerate.state import AcceleratorState

from open_instruct.command_line import parse
from open_instruct.flags import check_flags
from open_instruct.training.base_model import Bases
from open_instruct.training.preemption import RunGuard
from open_instruct.training.run import run

RUNS = {
    "full": [],
    "LoRA": ["--use_lora"],
    "IA3": ["--use_ia3"],
    "VeRA": ["--use_vera"],
    "prompt tuning": ["--use_prompt_tuning"],
    "P-tuning": ["--use_p_tuning"],
    "prefix tuning": ["--use_prefix_tuning"],
    "… with projection": ["--use_prefix_tuning", "--prefix_projection"],
}
OPEN_INSTRUCT_SETTINGS = [  # its learning rate, with PEFT's random start
    "--use_prompt_tuning",
    "--num_virtual_tokens",
    "20",
    "--prompt_tuning_init",
    "random",
    "--learning_rate",
    "2e-5",
]


def main() -> int:
    """Run every method with every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[150])
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--virtual_tokens", type=int, nargs="+", default=[0])
    settings, trainer_flags = parser.parse_known_args()
    bases, largest_share = Bases(), 0.0
    names = [*RUNS, "prompt tuning, 2e-5, random start"]
    print(
        "| steps × batch, virtual tokens | base | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:

        def share(words: list[str]) -> tuple[float, float]:
            """Return the held-out loss of a run as a share of the base model's, and the base model's."""
            common = ["--output_dir", str(Path(folder, "run")), "--overwrite_output_dir", "--num_sample_answers", "0"]
            arguments, origins = parse(
                [*trainer_flags, *words, *common, "--dataset_local_cache_dir", str(Path(folder, "cache"))]
            )
            check_flags(arguments, origins)
            AcceleratorState._reset_state(reset_partial_state=True)
            quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
            with quiet[0], quiet[1], RunGuard() as guard:
                summary = run(arguments, origins, guard, bases)
            assert summary is not None
            return summary["final_eval_loss"] / summary["base_eval_loss"], summary["base_eval_loss"]

        for steps in settings.steps:
            for batch in settings.batches:
                for num_virtual_tokens in settings.virtual_tokens:
                    is_first = num_virtual_tokens == settings.virtual_tokens[0]
                    length = ["--max_train_steps", str(steps), "--per_device_train_batch_size", str(batch)]
                    cells, base = [], 0.0
                    for name, method in RUNS.items():
                        is_soft_prompt = "tuning" in name or "projection" in name
                        if not is_soft_prompt and not is_first:
                            cells.append("")
                            continue
                        prompt_length = ["--num_virtual_tokens", str(num_virtual_tokens)] if is_soft_prompt else []
                        loss_share, base = share([*length, *method, *prompt_length])
                        largest_share = max(largest_share, loss_share)
                        cells.append(f"{loss_share:.3f}")
                    cells.append(f"**{share([*length, *OPEN_INSTRUCT_SETTINGS])[0]:.3f}**" if is_first else "")
                    setting = f"{steps} × {batch}, {num_virtual_tokens or 'recipe'}"
                    print(f"| {setting} | {base:.3f} | {' | '.join(cells)} |", flush=True)
    print(f"\nlargest share without settings: {largest_share:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
