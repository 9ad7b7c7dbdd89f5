"""Distillation of a context: the student is base + adapter, the teacher is the base with the context before each row.

The teacher is the same frozen base, and its context is a prefix of keys and values like any other, computed once. So a
teacher's row is a packed row, and a step costs one more forward pass without gradients. Cartridges (Eyuboglu et al.
2025) is the published form, for prefixes; here any adapter can be the student.

Dimensions: C tokens of the context, T tokens in the row, N labelled tokens, V vocabulary, D hidden size, K key/value
heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from open_instruct.data import packing
from open_instruct.data.context import Context, RowContexts
from open_instruct.errors import InputError
from open_instruct.model.chunked_loss import chunked_loss
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.model.shared_prefix import Backend, SoftPrompt
from open_instruct.model.training_model import PackedModel, base_only, longest_exact_row

Kind = Literal["forward", "reverse", "mixed"]
Measure = Literal["distillation", "student", "teacher"]
CHUNK = 4096  # tokens of the context that are computed at once
CHECKED = 4096  # most tokens of the context with which the teacher is compared with the model's own forward pass


@dataclass(frozen=True)
class DistillationSettings:
    """What is distilled, and how far the student is from the teacher.

    Args:
        file: text file of the context, or None.
        column: column of the rows' own contexts, or None. With neither, they are the rows' system messages.
        kind: forward: KL(teacher ‖ student); reverse: KL(student ‖ teacher); mixed: their mean.
        weight: share of the divergence in the loss; the rest is the cross-entropy of the labels.
        offload: hold the keys and values of the context in the CPU's memory.
    """

    file: str | None
    column: str | None
    kind: Kind
    weight: float
    offload: bool = False


class DistilledModel(PackedModel):
    """A packed model whose loss is the divergence from the same base with a context before each example.

    The divergence is that of the whole distributions at the positions that predict labelled tokens.
    """

    def __init__(
        self,
        model: Any,
        soft_prompt: Callable[[], SoftPrompt | None],
        backend: Backend,
        head: str | None,
        context: Context | RowContexts,
        settings: DistillationSettings,
    ) -> None:
        """Wrap a PeftModel; see `PackedModel`.

        Raises:
            InputError: the output layer is trained, or the positions of this model can't be moved.
        """
        super().__init__(model, soft_prompt, backend, head)
        self.context = context
        self.settings = settings
        self.measure: Measure = "distillation"
        self.is_base = False
        self.teacher: tuple[SoftPrompt, torch.Tensor] | None = None
        if any(parameter.requires_grad for parameter in self.causal.get_output_embeddings().parameters()):
            raise InputError("--distill_context needs a frozen output layer, which this adapter trains: use another")
        if longest_exact_row(self.causal.config):
            raise InputError("--distill_context does not work with attention in chunks of positions: use another model")

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """See `TrainingModel`; may be nested, which PEFT's own switch may not."""
        if self.is_base:
            yield
            return
        self.is_base = True
        try:
            with super().without_adapter():
                yield
        finally:
            self.is_base = False

    @contextmanager
    def measuring(self, measure: Measure) -> Iterator[None]:
        """Let the loss be the labels' cross-entropy of student or teacher for as long as the context lasts."""
        before, self.measure = self.measure, measure
        try:
            yield
        finally:
            self.measure = before

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: tuple[int, ...],
        target_positions: torch.Tensor,
        targets: torch.Tensor,
        beginning: torch.Tensor | None = None,
        **behind_contexts: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss in nats, and the number of labelled tokens; see `PackedModel.forward`.

        Args:
            input_ids: see `PackedModel.forward`, as the following.
            position_ids: of the row.
            lengths: of the examples.
            target_positions: of the labelled tokens.
            targets: the labelled tokens.
            beginning: None, as nothing is shared here but the context.
            behind_contexts: where examples have contexts of their own, the row with these; see `PackingBehindContexts`.
        """
        assert beginning is None
        row = input_ids, position_ids, lengths, target_positions
        count = torch.tensor(len(targets), device=targets.device)
        if self.measure == "student":
            return super().forward(*row, targets)
        theirs = self.own_outputs(**behind_contexts) if behind_contexts else self.teacher_outputs(*row)
        if self.measure == "teacher":
            return self.loss(theirs, targets), count
        outputs = self.outputs(*row, self.soft_prompt() or SoftPrompt())
        return self.distillation_loss(outputs, theirs, targets), count

    def distillation_loss(self, outputs: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the summed loss of the student's outputs against the teacher's and the labels; see `outputs`."""
        head = self.head or (lambda logits: logits)
        kind, weight = self.settings.kind, self.settings.weight

        def loss(logits: torch.Tensor, at: slice) -> torch.Tensor:
            with torch.no_grad():
                wanted = head(theirs[at]).float()
            total = weight * divergence(logits, wanted, kind)
            if weight < 1:
                total = total + (1 - weight) * F.cross_entropy(logits, targets[at], reduction="sum")
            return total

        num_rows = 4 * self.causal.get_output_embeddings().weight.shape[0]  # both models' logits, and their logarithms
        result: torch.Tensor = chunked_loss(outputs, head, loss, num_rows, [])
        return result

    @torch.no_grad()
    def own_outputs(
        self,
        teacher_input_ids: torch.Tensor,
        teacher_position_ids: torch.Tensor,
        teacher_lengths: tuple[int, ...],
        teacher_target_positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the base gives at the labelled tokens of a row with a context of its own before each example."""
        with self.as_base():
            return self.outputs(
                teacher_input_ids, teacher_position_ids, teacher_lengths, teacher_target_positions, SoftPrompt()
            )

    @torch.no_grad()
    def teacher_outputs(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: tuple[int, ...], positions: torch.Tensor
    ) -> torch.Tensor:
        """Return what the base gives at the row's positions if the context stands before each example; see `outputs`.

        The examples' own beginning-of-sequence token is left out, as the context has it. What it would predict, the
        context's last token predicts.
        """
        with self.as_base():
            prompt, last = self.context_prompt(input_ids.device)
            shared, place = self.context.num_shared, position_ids[0]
            if not shared:
                return self.outputs(input_ids, position_ids, lengths, positions, prompt)
            kept = place >= shared
            example = torch.arange(len(lengths), device=place.device).repeat_interleave(
                torch.tensor(lengths, device=place.device)
            )
            moved = positions - shared * (example[positions] + 1)
            rest = tuple(length - shared for length in lengths)
            outputs = self.outputs(input_ids[:, kept], position_ids[:, kept] - shared, rest, moved.clamp(min=0), prompt)
            return torch.where((place[positions] < shared)[:, None], last.to(outputs), outputs)

    def context_prompt(self, device: torch.device) -> tuple[SoftPrompt, torch.Tensor]:
        """Return the context as a prefix of keys and values, and the base's output [D] or [V] at its last token.

        They are computed once: call it without the adapter.
        """
        if self.teacher is None:
            pairs, last = self.context_keys(device)
            self.teacher = SoftPrompt(len(self.context_ids), keys_values=pairs), last
        return self.teacher

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Tokens of the context that stands before all rows."""
        assert isinstance(self.context, Context)
        return self.context.ids

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Compute with the base, in evaluation mode, for as long as the context lasts."""
        with evaluating(self.model), self.without_adapter():
            yield

    def context_keys(
        self, device: torch.device, first_position: int = 0
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """Return the context's keys and values of each layer, and the output at its last token; in pieces of CHUNK.

        Args:
            device: of the model.
            first_position: of the context's first token.
        """
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, len(self.context_ids), CHUNK):
            ids = torch.tensor([self.context_ids[start : start + CHUNK]], device=device)
            length = ids.shape[1]
            kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            before = SoftPrompt(start, keys_values=pairs) if pairs else SoftPrompt()
            places = torch.arange(length, device=device)[None] + first_position
            last = self.outputs(ids, places, (length,), torch.tensor([length - 1], device=device), before, kept)[0]
            new = [kept[layer] for layer in sorted(kept)]
            if self.settings.offload:  # the attention of each layer takes its own back
                new = [(keys.cpu(), values.cpu()) for keys, values in new]
            pairs = (
                [
                    (torch.cat([keys, more], 2), torch.cat([values, others], 2))
                    for (keys, values), (more, others) in zip(pairs, new, strict=True)
                ]
                if pairs
                else new
            )
        return pairs, last

    def forget_context(self) -> None:
        """Let the context be computed again, as when the model's weights have moved to other processes."""
        self.teacher = None


def divergence(logits: torch.Tensor, wanted: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return the Kullback–Leibler divergence of distributions over the whole vocabulary, summed over positions.

    Args:
        logits: [n, V] of the student, float32.
        wanted: [n, V] of the teacher, float32.
        kind: see `DistillationSettings`.
    """
    student, teacher = logits.log_softmax(-1), wanted.log_softmax(-1)
    if kind == "forward":
        return F.kl_div(student, teacher, reduction="sum", log_target=True)
    reverse = F.kl_div(teacher, student, reduction="sum", log_target=True)
    if kind == "reverse":
        return reverse
    return (F.kl_div(student, teacher, reduction="sum", log_target=True) + reverse) / 2


@torch.no_grad()
def teacher_problem(model: DistilledModel, ids: list[int], tolerance: float) -> str:
    """Return why the packed teacher is not the base with the context before a row, or "".

    Args:
        model: not active.
        ids: a row's tokens.
        tolerance: largest relative difference of the tokens' losses.
    """
    given = model.context
    beginning = (given.ids if isinstance(given, Context) else given.sample)[:CHECKED]
    context = Context(beginning, given.num_shared, False)
    short = DistilledModel(model.model, model.soft_prompt, model.backend, model.head_name, context, model.settings)
    row = [*context.ids[: context.num_shared], *ids]
    batch = packing.to_device(packing.pack([{"input_ids": row, "spans": [1, len(row)]}]), model.causal.device)
    targets = batch.pop("targets")
    whole, _ = context.before(row)
    with evaluating(model.model), base_only(model.model):
        logits = model.causal(input_ids=torch.tensor([whole], device=targets.device), use_cache=False).logits[0]
        own = F.cross_entropy(logits[-len(row) : -1].float(), targets, reduction="none")
    with short:
        outputs = short.teacher_outputs(
            batch["input_ids"], batch["position_ids"], batch["lengths"], batch["target_positions"]
        )
        found = F.cross_entropy((short.head or (lambda x: x))(outputs).float(), targets, reduction="none")
    error = ((found - own).abs().sum() / own.sum()).item()
    return "" if error < tolerance else f"the base's losses behind the context differ by {error:.1%} from its own"
