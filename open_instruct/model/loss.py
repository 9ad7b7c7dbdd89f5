"""The module that is trained: a micro-batch in, its summed token loss out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from open_instruct.data.collate import IGNORE


class TrainingModel(nn.Module):
    """What `accelerate` wraps: DDP, DeepSpeed and FSDP act only on the forward of the module that they wrap.

    The sum, not the mean, is returned: only the caller knows how many labelled tokens the whole step has, on every
    process, and dividing earlier would weigh tokens by the micro-batch that they happen to be in.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap a causal language model or a PeftModel around one."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """PEFT's own padded forward.

        Args:
            input_ids: [B, T]
            attention_mask: [B, T], 1 on real tokens
            labels: [B, T], IGNORE where nothing is learned; not shifted

        Returns:
            Summed loss of the labelled tokens in nats (float32), and their number.
        """
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        # Prompt tuning and P-tuning put P positions before the row: count from its end.
        logits = logits[:, -labels.shape[1] :][:, :-1]
        targets = labels[:, 1:]
        labelled = targets != IGNORE
        return F.cross_entropy(logits[labelled].float(), targets[labelled], reduction="sum"), labelled.sum()
