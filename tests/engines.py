"""Several trainings in the same processes, under an engine that has no public way to run on CPUs.

    python -m torch.distributed.run --nproc_per_node 2 --standalone tests/engines.py ENGINE RUNS.json

ENGINE is ddp, fsdp2, or a DeepSpeed configuration: a path, or the name of a file in configs/ds_configs. RUNS.json holds
a list of command lines. The exit code is 0 if it is 0 for all of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use_deepspeed(engine: str) -> None:
    """Set what `accelerate launch --use_deepspeed` sets, without building a communication kernel that is not needed."""
    import deepspeed
    from accelerate import PartialState

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    shipped = ROOT / "configs" / "ds_configs"
    named = [shipped / f"{engine}.json", shipped / f"{engine}.conf", Path(engine)]
    config = next(path for path in named if path.exists())
    if "TEST_ACCUMULATION" in os.environ:
        content = {
            **json.loads(config.read_text()),
            "gradient_accumulation_steps": int(os.environ["TEST_ACCUMULATION"]),
        }
        config = Path(sys.argv[2]).with_name("config.json")
        config.write_text(json.dumps(content))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(config)
    PartialState(cpu=True)


def use_fsdp2() -> None:
    """Set what `accelerate launch` sets for FSDP2, in the only way that works on CPUs: a private attribute."""
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = "2"
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "true"
    PartialState(cpu=True)


def make_run(engine: str) -> Callable[[list[str]], int]:
    """Start an engine; gives what trains once with a command line and returns the exit code."""
    if engine == "ddp":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif engine == "fsdp2":
        use_fsdp2()
    else:
        use_deepspeed(engine)
    from accelerate import Accelerator, DistributedType, PartialState
    from accelerate.state import AcceleratorState

    from open_instruct.finetune_peft import main as finetune

    Accelerator.end_training = lambda self: self.wait_for_everyone()  # the next run needs the group of processes

    def run(words: list[str]) -> int:
        AcceleratorState._reset_state()
        if engine == "fsdp2":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return finetune(words)

    return run


def main() -> int:
    """Run all."""
    run = make_run(sys.argv[1])
    for words in json.loads(Path(sys.argv[2]).read_text()):
        code = run(words)
        if code:
            return code
    return 0


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # as the entry point does, so that no thread of gloo meets a dying interpreter
