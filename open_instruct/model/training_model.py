"""The module that is trained: a micro-batch in, its summed token loss out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from open_instruct.data.packing import IGNORE
from open_instruct.errors import InputError
from open_instruct.model import shared_prefix
from open_instruct.model.chunked_loss import Head, chunked_cross_entropy, find_head, head_forms
from open_instruct.model.shared_prefix import Backend, CannotPack, PackedContext, SoftPrompt


class TrainingModel(nn.Module):
    """The module that `accelerate` wraps: DDP, DeepSpeed and FSDP act only on the forward of what they wrap.

    `forward` takes a micro-batch and returns the summed loss of its labelled tokens in nats (float32), and their
    number. The sum, not the mean, is returned: only the caller knows how many labelled tokens the whole step has, on
    every process, and dividing earlier would weigh tokens by the micro-batch that they happen to be in.
    """

    def __init__(self, model: Any) -> None:
        """Wrap a causal language model or a PeftModel around one."""
        super().__init__()
        self.model = model

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Compute with the base model for as long as the context lasts; for PeftModels only."""
        with base_only(self.model):
            yield


class PaddedModel(TrainingModel):
    """PEFT's own forward on right-padded rows: the reference, and the way for models that can't be packed."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a batch of `packing.Padding`, and the number of its labelled tokens.

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
    """One row without padding, one shared prefix, logits at labelled positions only.

    It computes only while it is active: then the wrapped model's layers call `shared_prefix.attention`, and the model
    can't be used in any other way. Use it as a context manager, or call `activate` and `release`.
    """

    attention_name = shared_prefix.NAME  # under which transformers knows the packed attention

    def __init__(
        self,
        model: Any,
        soft_prompt: Callable[[], SoftPrompt | None],
        backend: Backend,
        head: str | None = "find",
        hard_prompt: Sequence[int] = (),
    ) -> None:
        """Wrap a model, which keeps its own attention until `activate`.

        Args:
            model: a causal language model or a PeftModel around one.
            soft_prompt: returns what stands before every example, differentiable; None where a method has no such
                thing.
            backend: computes attention; a value of `backends.BACKENDS`.
            head: which of `chunked_loss.head_forms` makes logits of the decoder's states. "find": try all of them.
                None: the model's own forward makes them, for all labelled positions at once.
            hard_prompt: tokens between the soft prompt and every example, also of the base; they are computed once a
                row.
        """
        super().__init__(model)
        self.soft_prompt = soft_prompt
        self.backend = backend
        self.hard_prompt = tuple(hard_prompt)
        self.head_name = self.find_head() if head == "find" else head
        self.head = self.head_forms()[self.head_name] if self.head_name else None
        self.windows: set[int] = set()  # that layers have called their attention with
        self._own_attention: str | None = None  # the model's, while it is replaced

    def find_head(self) -> str | None:
        """Return the name of the form that gives the model's own logits, or None if none does."""
        return find_head(self.causal)

    def head_forms(self) -> dict[str, Head]:
        """Return the known functions from the decoder's last hidden state to the logits, by name."""
        return head_forms(self.causal)

    @property
    def causal(self) -> Any:
        """The causal language model, adapter layers included."""
        return causal_of(self.model)

    def activate(self) -> None:
        """Give the model the packed attention. Nothing happens if this object has done so already.

        Raises:
            RuntimeError: another PackedModel of the same model is active; its release would undo this.
        """
        if self._own_attention is not None:
            return
        own_attention = self.causal.config._attn_implementation
        if own_attention == self.attention_name:
            raise RuntimeError("another PackedModel of this model is active: release it first")
        self._own_attention = own_attention
        self.causal.set_attn_implementation(self.attention_name)

    def release(self) -> None:
        """Give the model its own attention back, for generation. Nothing happens if it has it already."""
        if self._own_attention is not None:
            self.causal.set_attn_implementation(self._own_attention)
            self._own_attention = None

    def __enter__(self) -> PackedModel:
        """Activate."""
        self.activate()
        return self

    def __exit__(self, *error: object) -> None:
        """Release, also after an error."""
        self.release()

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Compute with the base model for as long as the context lasts: no soft prompt, and positions from 0."""
        soft_prompt, self.soft_prompt = self.soft_prompt, no_soft_prompt
        try:
            with super().without_adapter():
                yield
        finally:
            self.soft_prompt = soft_prompt

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: tuple[int, ...],
        target_positions: torch.Tensor,
        targets: torch.Tensor,
        beginning: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a batch of `packing.Packing`, and the number of its labelled tokens.

        Args:
            input_ids: [1, T], the examples one after another, without virtual tokens and without `beginning`.
            position_ids: [1, T], from 0 for each example.
            lengths: tokens of each example.
            target_positions: [N], for each labelled token the index into input_ids of the position whose hidden state
                predicts it, which is the one before it.
            targets: [N], the labelled tokens.
            beginning: [S], tokens that all examples begin with; None: none are shared.

        Raises:
            RuntimeError: the model is not active.
            InputError: the row is longer than this model can be packed.
            CannotPack: the model computes something that packed attention would get wrong.
        """
        prompt = self.soft_prompt() or SoftPrompt()
        outputs = self.outputs(input_ids, position_ids, lengths, target_positions, prompt, beginning=beginning)
        return self.loss(outputs, targets), torch.tensor(len(targets), device=targets.device)

    def outputs(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: tuple[int, ...],
        positions: torch.Tensor,
        prompt: SoftPrompt,
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
        beginning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what a row gives at some positions: states [N, D] that `head` takes, or logits [N, V] without one.

        Args:
            input_ids: see `forward`.
            position_ids: see `forward`.
            lengths: see `forward`.
            positions: [N], indices into input_ids.
            prompt: what stands before every example.
            kept: see `PackedContext`.
            beginning: see `forward`.

        Raises:
            See `forward`.
        """
        if self._own_attention is None:
            raise RuntimeError("this PackedModel is not active: call activate() first, or use it in a with statement")
        texts = [torch.tensor(self.hard_prompt, device=input_ids.device)] if self.hard_prompt else []
        texts += [] if beginning is None else [beginning]
        num_prefix_tokens = num_text = sum(map(len, texts))  # that stand in the row, which keys and values don't
        position_ids = position_ids + prompt.length + num_text
        if num_text:
            text_positions = torch.arange(num_text, device=input_ids.device)[None] + prompt.length
            input_ids = torch.cat([*(text[None] for text in texts), input_ids], 1)
            position_ids = torch.cat([text_positions, position_ids], 1)
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
        if prompt.embeddings is not None:
            num_prefix_tokens += prompt.length
            embedded = self.causal.get_input_embeddings()(input_ids)
            prefix_positions = torch.arange(prompt.length, device=position_ids.device)[None]
            inputs = {
                "inputs_embeds": torch.cat([prompt.embeddings[None].to(embedded.dtype), embedded], 1),
                "position_ids": torch.cat([prefix_positions, position_ids], 1),
            }
        num_positions, bound = sum(lengths) + num_prefix_tokens, longest_exact_row(self.causal.config)
        if bound and num_positions > bound:
            raise InputError(
                f"rows of this model are exact up to {bound} positions, and this one has {num_positions}: lower "
                "--max_tokens_per_microbatch, or use --packing False"
            )
        packed_context = PackedContext(tuple(lengths), num_prefix_tokens, prompt.keys_values, self.backend, kept=kept)
        inputs |= {"packed_context": packed_context, "use_cache": False}
        positions = positions + num_prefix_tokens
        if self.head is None:
            outputs: torch.Tensor = self.causal(**inputs, logits_to_keep=positions).logits[0]
        else:
            outputs = self.causal.get_decoder()(**inputs).last_hidden_state[0, positions]
        self.windows |= packed_context.windows
        if not packed_context.layers_seen:
            raise CannotPack("its attention does not go through transformers' AttentionInterface")
        return outputs

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the summed cross-entropy of `outputs` against the targets [N]."""
        if self.head is None:
            return F.cross_entropy(outputs.float(), targets, reduction="sum")
        num_rows = self.causal.get_output_embeddings().weight.shape[0]
        return chunked_cross_entropy(outputs, targets, self.head, num_rows, self.trained_head())

    def trained_head(self) -> list[nn.Parameter]:
        """Return the head's parameters that want a gradient."""
        parameters = self.causal.get_output_embeddings().parameters()
        return [p for p in parameters if p.requires_grad and torch.is_grad_enabled()]


@contextmanager
def base_only(model: Any) -> Iterator[None]:
    """Switch a PeftModel's adapter off, and give parameters of the base that are trained (biases) the base's values."""
    of_base = [(p, p.of_base) for p in model.parameters() if p.requires_grad and hasattr(p, "of_base")]
    trained = [parameter.detach().clone() for parameter, _ in of_base]
    with torch.no_grad():
        for parameter, value in of_base:
            parameter.copy_(value)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")  # these are seen to here
            with model.disable_adapter():
                yield
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(of_base, trained, strict=True):
                parameter.copy_(value)


def causal_of(model: Any) -> Any:
    """Return the causal language model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def longest_exact_row(config: Any) -> int | None:
    """Return the number of positions up to which a packed row gives the model's own attention, or None if any does.

    Llama 4 attends within chunks, and scales queries by a step function of their index in the row. Neither reaches the
    attention function as an argument, and neither does anything within the first chunk and before the first step.
    """
    text = config.get_text_config()
    if "chunked_attention" not in (getattr(text, "layer_types", None) or ()):
        return None
    bounds = [text.attention_chunk_size]
    if text.attn_temperature_tuning:
        bounds.append(text.floor_scale - 1)
    return min((bound for bound in bounds if bound), default=None)


def no_soft_prompt() -> SoftPrompt | None:
    """Return None: the base model has nothing before the examples."""
    return None
