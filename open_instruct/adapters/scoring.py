"""How likely a model finds given answers: summed loss of each row, independent of the rows beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from open_instruct.data.chat import Spans

LOGITS_AT_ONCE = 1 << 28  # elements: half a gigabyte in bfloat16


@torch.no_grad()
def token_scores(model: Any, rows: Sequence[Sequence[int]], batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss of each token of each row but its first, in nats, and whether it is the likeliest one.

    Rows are padded on the right, where padding changes nothing before it.

    Args:
        model: a causal language model or a PeftModel.
        rows: token ids of each row.
        batch_size: rows computed at once at most.

    Returns:
        For each row of T tokens, [T - 1] float32 and [T - 1] bool, on the CPU.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0), torch.empty(0))] * len(rows)
    device = next(model.parameters()).device
    vocab_size = model.get_input_embeddings().weight.shape[0]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        longest = len(rows[order[0]])
        size = max(1, min(batch_size, LOGITS_AT_ONCE // (longest * vocab_size)))
        chosen, order = order[:size], order[size:]
        ids = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in chosen], device=device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in chosen], device=device)
        # Prompt tuning and P-tuning put P positions before the row: count from its end.
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -longest:][:, :-1]
        for place, i in enumerate(chosen):
            own, targets = logits[place, : len(rows[i]) - 1], ids[place, 1 : len(rows[i])]
            losses = F.cross_entropy(own.float(), targets, reduction="none")  # a row at a time: float32 of one
            found[i] = losses.cpu(), (own.argmax(-1) == targets).cpu()
    return found


def answer_losses(
    model: Any, rows: Sequence[Sequence[int]], spans: Sequence[Spans], batch_size: int
) -> list[tuple[float, int]]:
    """(summed loss, number) of the labelled tokens of each row.

    Args:
        model: a causal language model or a PeftModel.
        rows: token ids.
        spans: [start, end) of labelled tokens of each row; the first token of a row has no loss.
        batch_size: rows computed at once at most.
    """
    found = []
    for (losses, _), pieces in zip(token_scores(model, rows, batch_size), spans, strict=True):
        wanted = [losses[max(start, 1) - 1 : end - 1] for start, end in pieces]
        picked = torch.cat(wanted) if wanted else torch.empty(0)
        found.append((picked.double().sum().item(), len(picked)))
    return found
