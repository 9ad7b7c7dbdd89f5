"""Losses of given answers: the loss of each token, and their sum over the labelled tokens of a row.

A row's figures do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from open_instruct.adapters.folders import BASE
from open_instruct.data.packing import IGNORE, to_device
from open_instruct.data.pairs import pad_pairs
from open_instruct.data.spans import Spans
from open_instruct.model.encoder_decoder import decoder_start_of

LOGITS_AT_ONCE = 1 << 28  # elements: half a gigabyte in bfloat16


@torch.no_grad()
def token_scores(model: Any, rows: Sequence[Sequence[int]], batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the loss of every token but a row's first, in nats, and whether it is the likeliest one.

    Rows are padded on the right, which changes nothing to the left of it.

    Args:
        model: a causal language model or a PeftModel.
        rows: token ids of each row.
        batch_size: most rows computed at once.

    Returns:
        For each row of T tokens, [T - 1] float32 and [T - 1] bool, on the CPU.
    """
    scores: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0), torch.empty(0))] * len(rows)
    device = next(model.parameters()).device
    vocab_size = model.get_input_embeddings().weight.shape[0]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        longest = len(rows[order[0]])
        size = max(1, min(batch_size, LOGITS_AT_ONCE // (longest * vocab_size)))
        batch, order = order[:size], order[size:]
        ids = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in batch], device=device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in batch], device=device)
        # Prompt tuning and P-tuning put P positions before the row, so positions are counted from the end.
        logits_BTV = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -longest:][:, :-1]
        for b, i in enumerate(batch):
            logits_TV, targets = logits_BTV[b, : len(rows[i]) - 1], ids[b, 1 : len(rows[i])]
            # One row at a time: in float32 the logits of the batch would take twice the memory again.
            losses = F.cross_entropy(logits_TV.float(), targets, reduction="none")
            scores[i] = losses.cpu(), (logits_TV.argmax(-1) == targets).cpu()
    return scores


@torch.no_grad()
def pair_losses(
    model: Any, rows: Sequence[Sequence[int]], spans: Sequence[Spans], batch_size: int
) -> list[tuple[float, int]]:
    """Return, for each pair, the summed loss of its target in nats, and its number of tokens.

    Args:
        model: an encoder–decoder or a PeftModel.
        rows: source and target of each pair; see `pairs`.
        spans: the target's.
        batch_size: most pairs computed at once.
    """
    device, start = next(model.parameters()).device, decoder_start_of(model.config)
    sums: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        pairs = [{"input_ids": list(rows[i]), "spans": list(spans[i][-1]) if spans[i] else []} for i in chosen]
        batch = to_device(pad_pairs(pairs, 0, start), device)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        for b, i in enumerate(chosen):
            labelled = labels[b] != IGNORE
            losses = F.cross_entropy(logits[b][labelled].float(), labels[b][labelled], reduction="none")
            sums[i] = losses.double().sum().item(), int(labelled.sum())
    return sums


@torch.no_grad()
def divergences(
    use: Callable[[str], Any],
    name: str,
    rows: Sequence[Sequence[int]],
    wholes: Sequence[Sequence[int]],
    spans: Sequence[Spans],
) -> list[tuple[float, int]]:
    """Return, for each row, how far a model is from the base behind a context, in nats, and its labelled tokens.

    Args:
        use: returns base or adapter by its name, as `Adapters.use`.
        name: of the model.
        rows: token ids of each row.
        wholes: the same rows behind the context, which ends where a row begins.
        spans: [start, end) of the labelled tokens of each row; the first token of a row is left out.

    Returns:
        KL(base behind the context ‖ model), summed over the positions that predict labelled tokens.
    """
    sums = []
    for row, whole, row_spans in zip(rows, wholes, spans, strict=True):
        labelled = [i for start, end in row_spans for i in range(max(start, 1), end)]
        if not labelled:
            sums.append((0.0, 0))
            continue
        from_end = torch.tensor(labelled) - 1 - len(row)
        both = []
        for which, ids in ((BASE, whole), (name, row)):
            model = use(which)  # which switches the other one off
            inputs = torch.tensor([ids], device=next(model.parameters()).device)
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits[0]
            both.append(logits[from_end + len(logits)].float().log_softmax(-1))
        total = F.kl_div(both[1], both[0], reduction="sum", log_target=True)
        sums.append((total.double().item(), len(labelled)))
    return sums


def answer_losses(
    model: Any, rows: Sequence[Sequence[int]], spans: Sequence[Spans], batch_size: int
) -> list[tuple[float, int]]:
    """Return, for each row, the summed loss of its labelled tokens in nats, and their number.

    Args:
        model: a causal language model or a PeftModel.
        rows: token ids of each row.
        spans: [start, end) of the labelled tokens of each row; the first token of a row has no loss.
        batch_size: most rows computed at once.
    """
    if model.config.is_encoder_decoder:
        return pair_losses(model, rows, spans, batch_size)
    sums = []
    for (losses, _), row_spans in zip(token_scores(model, rows, batch_size), spans, strict=True):
        pieces = [losses[max(start, 1) - 1 : end - 1] for start, end in row_spans]
        labelled = torch.cat(pieces) if pieces else torch.empty(0)
        sums.append((labelled.double().sum().item(), len(labelled)))
    return sums
