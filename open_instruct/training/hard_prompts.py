"""A hard prompt in a run: read, checked against the model's context, and put into the settings."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.data.hard_prompt import FLAG, hard_prompt_of, read_hard_prompt
from open_instruct.errors import InputError
from open_instruct.model import loading
from open_instruct.training.load_data import conversation_length
from open_instruct.training.settings import Settings


def with_hard_prompt(before: Settings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Settings:
    """Return the settings with the hard prompt that the flags name, as tokens.

    Args:
        before: settings of a run that has read no data yet.
        config: the base's.
        tokenizer: with its chat template.

    Raises:
        InputError: it can't be used or leaves no room, or the adapter to continue was trained behind one and none is
            given.
    """
    flags = before.flags
    if flags.hard_prompt is None:
        if before.adapter and before.adapter.hard_prompt is not None:
            raise InputError(
                f"{before.adapter.path} was trained behind a hard prompt, which its run.json holds: give it again with "
                f"{FLAG} FILE"
            )
        return before
    given = hard_prompt_of(read_hard_prompt(flags.hard_prompt), tokenizer)
    context, num_before = loading.context_length(config), len(given.tokens.ids) + before.num_virtual_tokens
    if context and num_before + (flags.max_seq_length or 2) > context:
        raise InputError(
            f"{FLAG} {flags.hard_prompt} has {len(given.tokens.ids):,} tokens, and the model {context:,} positions, of "
            f"which {before.num_virtual_tokens:,} are virtual tokens and {flags.max_seq_length or 2:,} are to hold a "
            "conversation: shorten the text, or lower --max_seq_length"
        )
    length = conversation_length(context, num_before, flags.max_seq_length)
    return replace(
        before,
        data=replace(before.data, max_length=length, hard_prompt=given),
        forward=replace(before.forward, max_length=length, hard_prompt=given.tokens.ids),
    )
