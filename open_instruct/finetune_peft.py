"""Fine-tune a causal language model on conversations: prompt, prefix and P-tuning, LoRA, QLoRA, VeRA, IA3, in full.

    python open_instruct/finetune_peft.py --model_name_or_path MODEL --train_file FILE --use_prompt_tuning

See `--help` for every flag and README.md for what a run leaves in --output_dir. Flags are parsed and checked here,
before anything heavy is imported. The run itself is in training/run.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file, from a clone that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import open_instruct.interrupts
import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.command_line import parse, warn_of_lost_lists, warn_without_effect
from open_instruct.errors import InputError, for_terminal, system_fault
from open_instruct.flags import check_flags
from open_instruct.interrupts import INTERRUPTED, ending_at_once
from open_instruct.streams import standard_streams
from open_instruct.training.preemption import PREEMPTED, Preempted, RunGuard


@standard_streams(lasting=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Training goes on where nobody reads its output any more.

    Returns:
        The exit code. 0: done; 2: wrong input, reported in one line; 75: preempted, can be resumed; 130: interrupted.
    """
    with RunGuard() as guard:
        try:
            words = sys.argv[1:] if argv is None else argv
            flags, origins = parse(words)
            check_flags(flags, origins)
            if int(os.environ.get("RANK", "0")) == 0:
                warn_without_effect(flags, origins)
                warn_of_lost_lists(words)
            with ending_at_once():
                from open_instruct.training.run import run

            run(flags, origins, guard)
        except InputError as error:
            return report_error(error, guard)
        except (OSError, MemoryError) as error:
            return report_error(InputError(system_fault(error)), guard)
        except Preempted as stop:
            return report_stop(str(stop))
        except RuntimeError:
            if guard.signal is None:
                raise
            return report_stop(f"stopped by {guard.signal}, as were the other processes")  # contact with them is lost
        except KeyboardInterrupt:
            print("interrupted: continue with --resume_from_checkpoint if there is a checkpoint", file=sys.stderr)
            return INTERRUPTED
        return 0


def report_stop(text: str) -> int:
    """Print on the main process why the run was stopped, and return the exit code on which launchers requeue it."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)
    return PREEMPTED


def report_error(error: InputError, guard: RunGuard) -> int:
    """Print the error on one line and return exit code 2; with several processes, end this one at once.

    Its launcher then ends the others, which may be waiting for it in a collective.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(5)  # if all processes meet the error, the first reports it, and the launcher ends this one meanwhile
    print(f"error: {f'process {rank}: ' if rank else ''}{for_terminal(error)}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        guard.close()  # the folder's lock, which `_exit` would leave behind
        sys.stdout.flush()
        os._exit(2)
    return 2


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # At interpreter shutdown a gloo thread aborts the process now and then; the launcher would end the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
