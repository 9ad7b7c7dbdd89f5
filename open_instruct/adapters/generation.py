"""Answers that don't depend on which other questions share the batch, greedy or sampled."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from open_instruct.data import chat
from open_instruct.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; names and meanings are those of transformers' `generate`."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int = 42

    def warpers(self) -> LogitsProcessorList:
        """What `generate` applies to the scores before it draws."""
        found = LogitsProcessorList()
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        return found


class DrawByRow(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is a draw from the softmax (Gumbel-max). Each row has random numbers of its own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        """One seed for each row."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] with noise."""
        noise = [torch.empty(scores.shape[1], dtype=torch.float64).exponential_(generator=g) for g in self.generators]
        return scores.float() - torch.stack(noise).log().to(scores.device, torch.float32)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_length: int | None = None,
    batch_size: int = 32,
    streamer: Any = None,
) -> Iterator[tuple[int, list[str]]]:
    """Answer each prompt (token ids), and give (its index, its answers) as soon as they are there.

    Only prompts of equal length share a batch: left padding shifts what soft prompts compute, and right padding has no
    meaning in generation. What is drawn for a prompt follows from the seed and the prompt alone.

    Args:
        model: a causal language model or a PeftModel.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt.
        sampling: how answers are drawn.
        max_length: prompt and answer together at most, virtual tokens not counted. A prompt that fills it gets empty answers.
        batch_size: rows in a batch at most.
        streamer: transformers' own, for one prompt and one answer.

    Yields:
        Answers without special tokens and surrounding white space, `num_return_sequences` of each prompt.
    """
    copies = sampling.num_return_sequences
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)] += [(index, copy) for copy in range(copies)]
    found: dict[int, list[str]] = defaultdict(lambda: [""] * copies)
    device = next(model.parameters()).device
    ends, end_text = turn_ends(model, tokenizer)
    was_training = model.training
    model.eval()
    for length, rows in by_length.items():
        room = min(sampling.max_new_tokens, max_length - length) if max_length else sampling.max_new_tokens
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            if room > 0:
                ids = torch.tensor([list(prompts[index]) for index, _ in chosen], device=device)
                processors = LogitsProcessorList()
                if sampling.do_sample:
                    seeds = [seed_of(sampling.seed, prompts[index], copy) for index, copy in chosen]
                    processors = LogitsProcessorList([*sampling.warpers(), DrawByRow(seeds)])
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=room,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=sampling.repetition_penalty,
                    use_cache=True,
                    eos_token_id=ends,
                    pad_token_id=tokenizer.pad_token_id,
                    logits_processor=processors,
                    streamer=streamer,
                    **({"stop_strings": end_text, "tokenizer": tokenizer} if end_text else {}),
                )
                for (index, copy), row in zip(chosen, out[:, length:], strict=True):
                    text = tokenizer.decode(row, skip_special_tokens=True)
                    found[index][copy] = (text.partition(end_text)[0] if end_text else text).strip()
            for index, copy in chosen:
                if copy == copies - 1:
                    yield index, found[index]
    model.train(was_training)


def turn_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int] | None, str | None]:
    """What ends an answer: the tokenizer's and the model's end tokens, and the end of turn that the chat template taught.

    Returns:
        Tokens; and a text, where the template ends a turn with one that is no special token.
    """
    named = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    end_text = None
    if isinstance(tokenizer.chat_template, str):
        text = taught_end(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if len(ids) == 1 and ids[0] in tokenizer.all_special_ids:
            found.add(ids[0])
        elif text:
            end_text = text
    return sorted(found) or None, end_text


def taught_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts behind an answer inside of what training labels; "" where that is nothing, or can't be found."""
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        (text,), (spans,) = chat.render(tokenizer, [probe])
    except (TemplateError, InputError):
        return ""
    said = text[slice(*spans[-1])] if spans else ""
    return said.partition("answer")[2].strip()


def seed_of(seed: int, prompt: Sequence[int], copy: int) -> int:
    """Seed of one answer: a function of the run's seed, the prompt, and which of its answers it is."""
    digest = hashlib.sha256(f"{seed} {copy} {list(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int | None = None,
    batch_size: int = 32,
) -> list[str]:
    """The one greedy answer to each prompt, in the order of the prompts. See `generate`."""
    answers = [""] * len(prompts)
    for index, found in generate(model, tokenizer, prompts, Sampling(max_new_tokens), max_length, batch_size):
        answers[index] = found[0]
    return answers
