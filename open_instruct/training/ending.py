"""When a run ends: after the steps of its plan, or earlier, where --patience is at its end."""

from __future__ import annotations

from open_instruct.errors import InputError
from open_instruct.training.state import TrainState


def check_patience(patience: int | None, eval_steps: int, num_steps: int) -> None:
    """Refuse a patience that can't end the run before its last step.

    The first evaluation after a step is always the lowest so far, so patience ends with evaluation 1 + patience at the
    earliest.

    Args:
        patience: evaluations in a row without a lower loss that end the run; None: it makes all steps.
        eval_steps: steps between evaluations.
        num_steps: steps of the plan.

    Raises:
        InputError: naming both numbers of evaluations.
    """
    num_before_end = (num_steps - 1) // eval_steps if eval_steps else 0
    if patience is not None and num_before_end < 1 + patience:
        raise InputError(
            f"--patience {patience} needs {1 + patience} held-out evaluations before the last of the {num_steps} "
            f"steps, and there are {num_before_end} (every {eval_steps} steps): lower it, or lower --eval_steps"
        )


def has_ended(state: TrainState, num_steps: int, patience: int | None) -> bool:
    """Return whether no step is left.

    This depends only on what a checkpoint holds, and on losses that all processes share.
    """
    is_out_of_patience = patience is not None and state.history.num_without_better >= patience
    return state.step >= num_steps or is_out_of_patience


def end_text(state: TrainState, num_steps: int) -> str:
    """Return why the run ended."""
    if state.step >= num_steps:
        return f"all {num_steps} steps of the plan"
    return (
        f"--patience, after step {state.step} of {num_steps}: the last {state.history.num_without_better} held-out "
        "evaluations found no lower loss"
    )
