"""Where a soft prompt begins: of a text and draws of random tokens, the one with which the base does best before any training.

Draws differ by a factor of ten and more in their first loss, and those that begin low tend to end low (docs/experiments.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from open_instruct.arguments import FinetuneArguments
from open_instruct.data.plan import Plan
from open_instruct.methods import METHODS
from open_instruct.training import engines
from open_instruct.training.examples import Data
from open_instruct.training.model_setup import method_settings
from open_instruct.training.packing import Forward
from open_instruct.training.probing import first_examples, mean_loss, micro_batches

STARTS = 16  # the text and 15 draws
JUDGED_ON = 16  # examples


def starts(a: FinetuneArguments, model: Any, tokenizer: PreTrainedTokenizerBase, resumed: bool) -> list[torch.Tensor]:
    """The starts to choose from, where the initialisation is `screened` and there is one to choose."""
    init = a.prefix_init if a.method == "prefix_tuning" else a.prompt_tuning_init
    if init != "screened" or a.adapter_name_or_path or a.dry_run or resumed:
        return []
    return METHODS[a.method].starts(model, tokenizer, method_settings(a), STARTS)


def choose_start(
    a: FinetuneArguments, accelerator: Accelerator, forward: Forward, data: Data, plan: Plan, found: list[torch.Tensor]
) -> None:
    """Begin at the start with the lowest loss on the run's first examples. Every process does the same."""
    if not found:
        return
    method, model = METHODS[a.method], forward.model.model
    best = 0
    if accelerator.is_main_process:
        losses = []
        batches = micro_batches(forward.training, data.train, first_examples(plan, JUDGED_ON))
        for start in found:
            method.begin_at(model, start)
            losses.append(mean_loss(accelerator, forward.model, batches))
        best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        what = "the text's" if best == 0 else f"draw {best} of random tokens"
        print(
            f"start: {what}, of {len(losses)} the lowest loss, {losses[best]:.4f} (the text's {losses[0]:.4f}, worst {max(losses):.4f})"
        )
    method.begin_at(model, found[engines.told(best)])
