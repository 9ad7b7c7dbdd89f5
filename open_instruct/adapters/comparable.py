"""Whether a full model can be measured beside a base: said by tokenizers and headers, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from open_instruct.adapters.forgetting import FLAG, passage_ids
from open_instruct.adapters.served import Unloaded
from open_instruct.data import chat
from open_instruct.data.questions import Question
from open_instruct.data.tokenising import NO_LIMIT
from open_instruct.errors import InputError
from open_instruct.model import loading


def check_comparable(
    name: str, alone: Unloaded, base: Unloaded, rows: Sequence[Question], passages: Sequence[str]
) -> None:
    """Refuse a full model that can't be measured beside the base, as far as its weights need not be loaded for it.

    Args:
        name: the model.
        alone: the same.
        base: base and adapters.
        rows: questions with answers whose loss is measured; may be empty.
        passages: other text whose loss is measured; may be empty.

    Raises:
        InputError: it writes other tokens than the base where a loss per token is compared, or has no weights that
            fit its configuration.
    """
    if labelled_tokens(alone.tokenizer, rows) != labelled_tokens(base.tokenizer, rows):
        raise InputError(
            f"--model {name} writes answers in other tokens than the base, so losses per token can't be compared: "
            "leave loss out of --metrics, or give one template with --chat_template_name"
        )
    if passages and passage_ids(alone.tokenizer, passages) != passage_ids(base.tokenizer, passages):
        raise InputError(
            f"--model {name} writes {FLAG} in other tokens than the base, so losses per token can't be compared: drop "
            "one of the two flags"
        )
    loading.check_weights(alone.name, alone.allow_pickle)
    options: dict[str, Any] = {"trust_remote_code": alone.trust_remote_code}
    loading.check_fit_early(alone.name, loading.load_config(alone.name, **options), None, **options)


def labelled_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question]) -> list[list[int]]:
    """Return the tokens of each row that the loss is a mean over."""
    if not rows:
        return []
    ids, spans = chat.tokenize(tokenizer, [question.answered for question in rows], NO_LIMIT)
    return [
        [token for start, end in of_row for token in row[start:end]] for row, of_row in zip(ids, spans, strict=True)
    ]
