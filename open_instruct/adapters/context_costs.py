"""What stands before a model's conversations in an evaluation, and what that costs: positions, memory, time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from open_instruct.adapters.evaluation_figures import IN_CONTEXT
from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.served import Served
from open_instruct.data import questions
from open_instruct.data.context import Context
from open_instruct.data.questions import Question
from open_instruct.errors import InputError
from open_instruct.model.backends import head_shape

TIMED = 10  # questions whose first token is timed


def common_hard_prompt(served: Served) -> Context | None:
    """Return the hard prompt that all adapters were trained behind, as the base is measured behind it, too; or None."""
    prompts = [served.hard_prompts.get(name) for name in served.names]
    return prompts[0] if prompts and all(prompt == prompts[0] for prompt in prompts) else None


def max_row_length(served: Served, context: Context | None) -> int | None:
    """Return how many tokens a row may have with all models; None: unlimited.

    Raises:
        InputError: the context leaves none.
    """
    most = served.max_length(BASE, *served.names)
    whole = served.max_length(BASE)
    if context is None or most is None or whole is None:
        return most
    left = whole - len(context.ids) + context.num_shared
    if left < 2:
        raise InputError(
            f"--context has {len(context.ids):,} tokens, and the model {whole:,} positions: shorten the text"
        )
    return min(most, left)


def tokens_before(served: Served, context: Context | None) -> dict[str, int]:
    """Return how many positions each model computes or keeps before a conversation, if a context is compared."""
    if context is None:
        return {}
    virtual = {name: folder.num_virtual_tokens for name, folder in served.adapters.folders.items()}
    return {BASE: 0, IN_CONTEXT: len(context.ids) - context.num_shared, **virtual}


def bytes_before(served: Served, context: Context | None) -> dict[str, int]:
    """Return the bytes of keys and values that a request keeps before its conversation; empty where that is unknown."""
    base = served.adapters.base
    shape, layers = head_shape(base.config), getattr(base.config.get_text_config(), "num_hidden_layers", None)
    if shape is None or not layers:
        return {}
    each = 2 * layers * shape.num_key_heads * shape.size * base.dtype.itemsize
    return {name: each * count for name, count in tokens_before(served, context).items()}


def first_token_seconds(
    served: Served, rows: Sequence[Question], models: Mapping[str, Context | None]
) -> dict[str, float]:
    """Return the median time from a question to the first token of its answer, one request at a time.

    Models take turns, so that a machine's other work disturbs all of them alike.

    Args:
        served: base and adapters.
        rows: the questions, of which the first few are asked.
        models: the context that stands before each model's conversations, or None.
    """
    one, times = Sampling(max_new_tokens=1), defaultdict(list)
    for question in [rows[0], *rows[:TIMED]]:  # the first one warms up
        prompt = questions.prompt_ids(served.tokenizer, question.messages)
        for name, before in models.items():
            ids = before.before(prompt)[0] if before else prompt
            start = time.perf_counter()
            list(served.stream([ids], BASE if before else name, one))
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in times.items()}
