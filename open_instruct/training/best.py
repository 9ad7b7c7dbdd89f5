"""The parameters with the lowest held-out loss so far: a run that goes on to learn its examples by heart saves these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from open_instruct.training import engines
from open_instruct.training.checkpoint import Progress, trained_parameters


@dataclass
class Best:
    """Holds copies on the main process's CPU, and nothing on the others."""

    wanted: bool
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def consider(self, progress: Progress, loss: float, model: nn.Module, accelerator: Any) -> None:
        """Copy the parameters if this held-out loss is the lowest after a step. Every process calls this. Updates `progress`."""
        lower = progress.best_eval_loss is None or loss < progress.best_eval_loss
        if self.wanted and progress.step and lower:
            progress.best_eval_loss, progress.best_step = loss, progress.step
            whole = engines.whole(trained_parameters(model), accelerator)
            self.tensors = {name: tensor.clone() for name, tensor in whole.items()}

    def put_back(self, model: nn.Module) -> None:
        """Give a whole model the copies."""
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(self.tensors[name])
