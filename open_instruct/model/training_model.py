"""The module that is trained: a micro-batch in, its summed token loss out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from open_instruct.data.collate import IGNORE
from open_instruct.model import shared_prefix
from open_instruct.model.chunked_loss import chunked_cross_entropy, find_head, head_forms
from open_instruct.model.shared_prefix import Backend, CannotPack, Row, SoftPrompt


class TrainingModel(nn.Module):
    """What `accelerate` wraps: DDP, DeepSpeed and FSDP act only on the forward of the module that they wrap.

    `forward` takes a micro-batch and returns the summed loss of its labelled tokens in nats (float32), and their number.
    The sum, not the mean, is returned: only the caller knows how many labelled tokens the whole step has, on every
    process, and dividing earlier would weigh tokens by the micro-batch that they happen to be in.
    """

    def __init__(self, model: Any) -> None:
        """Wrap a causal language model or a PeftModel around one."""
        super().__init__()
        self.model = model

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model, for as long as the context lasts. A plain model (full fine-tuning) has none."""
        with self.model.disable_adapter():
            yield


class PaddedModel(TrainingModel):
    """PEFT's own forward on right-padded rows: the reference, and what serves models that can't be packed."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch of `collate.Padding`.

        Args:
            input_ids: [B, T]
            attention_mask: [B, T], 1 on real tokens
            labels: [B, T], IGNORE where nothing is learned; not shifted
        """
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        # Prompt tuning and P-tuning put P positions before the row: count from its end.
        logits = logits[:, -labels.shape[1] :][:, :-1]
        targets = labels[:, 1:]
        labelled = targets != IGNORE
        return F.cross_entropy(logits[labelled].float(), targets[labelled], reduction="sum"), labelled.sum()


class PackedModel(TrainingModel):
    """One row without padding, one shared prefix, logits at labelled positions only."""

    def __init__(
        self, model: Any, soft_prompt: Callable[[], SoftPrompt | None], backend: Backend, head: str | None = "find"
    ) -> None:
        """Switch the model's attention to the packed one; `release` switches it back.

        Args:
            model: a causal language model or a PeftModel around one.
            soft_prompt: gives what stands before every example, differentiable; None where a method has no such thing.
            backend: of `model.backends`.
            head: which of `chunked_loss.head_forms` makes logits of the decoder's states; "find": tries them; None: the model's own
                forward does, for all labelled positions at once.
        """
        super().__init__(model)
        self.soft_prompt = soft_prompt
        self.backend = backend
        name = find_head(self.causal) if head == "find" else head
        self.head_name, self.head = name, head_forms(self.causal)[name] if name else None
        self.own_attention = self.causal.config._attn_implementation
        self.causal.set_attn_implementation(shared_prefix.NAME)

    @property
    def causal(self) -> Any:
        """The causal language model, adapter layers included."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def release(self) -> None:
        """Give the model its own attention back, for generation."""
        self.causal.set_attn_implementation(self.own_attention)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model: no soft prompt, and positions from 0."""
        own, self.soft_prompt = self.soft_prompt, no_soft_prompt
        try:
            with super().without_adapter():
                yield
        finally:
            self.soft_prompt = own

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: tuple[int, ...],
        before: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch of `collate.Packing`.

        Args:
            input_ids: [1, T], the examples one after another, without virtual tokens.
            position_ids: [1, T], from 0 for each example.
            lengths: tokens of each example.
            before: [N], index into the row of the token before each labelled one.
            targets: [N], the labelled tokens.
        """
        prompt = self.soft_prompt() or SoftPrompt()
        num_head = 0
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids + prompt.length}
        if prompt.embeddings is not None:
            num_head = prompt.length
            embedded = self.causal.get_input_embeddings()(input_ids)
            head_positions = torch.arange(num_head, device=position_ids.device)[None]
            inputs = {
                "inputs_embeds": torch.cat([prompt.embeddings[None].to(embedded.dtype), embedded], 1),
                "position_ids": torch.cat([head_positions, inputs["position_ids"]], 1),
            }
        inputs["row"] = row = Row(tuple(lengths), num_head, prompt.keys_values, self.backend)
        loss = self._loss(inputs, before + num_head, targets)
        if not row.layers_seen:
            raise CannotPack("its attention does not go through transformers' AttentionInterface")
        return loss, torch.tensor(len(targets), device=targets.device)

    def _loss(self, inputs: dict[str, Any], before: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.head is None:
            logits = self.causal(**inputs, use_cache=False, logits_to_keep=before).logits[0]
            return F.cross_entropy(logits.float(), targets, reduction="sum")
        hidden = self.causal.get_decoder()(**inputs, use_cache=False).last_hidden_state[0, before]
        output = self.causal.get_output_embeddings()
        trained = [p for p in output.parameters() if p.requires_grad and torch.is_grad_enabled()]
        return chunked_cross_entropy(hidden, targets, self.head, output.weight.shape[0], trained)


def no_soft_prompt() -> SoftPrompt | None:
    """Of methods that put nothing before the examples."""
    return None
