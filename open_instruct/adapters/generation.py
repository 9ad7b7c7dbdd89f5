"""Answers that don't depend on which other questions share the batch, greedy or sampled."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from open_instruct.data import chat
from open_instruct.errors import InputError, input_faults
from open_instruct.model.evaluation_mode import evaluating

# Whatever a model's generation_config.json says: one answer of token ids for each row. Noise draws, not transformers.
PLAIN = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    **dict.fromkeys(["output_attentions", "output_hidden_states", "output_scores", "output_logits"], False),
}


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing answers; names and meanings are those of transformers' `generate`."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int = 42
    num_beams: int = 1  # continuations that are followed at once; the likeliest is the answer. 1: greedy

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            InputError: beams follow the likeliest tokens, and tokens are to be drawn.
        """
        if self.num_beams > 1 and self.do_sample:
            raise InputError(
                f"num_beams {self.num_beams} follows the likeliest tokens, and do_sample draws them: drop one"
            )

    def warpers(self) -> LogitsProcessorList:
        """Return what transformers' `generate` applies to the scores before it draws, in its order."""
        processors = LogitsProcessorList()
        if self.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            processors.append(TopPLogitsWarper(self.top_p))
        return processors


class DrawByRow(LogitsProcessor):
    """Adds Gumbel noise to the scores, so that the largest is a draw from their softmax (the Gumbel-max trick).

    If E is exponentially distributed, -log E is Gumbel noise. Each row has a random generator of its own, so that its
    draws do not depend on the other rows.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """Make the generators, one seed for each row."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [B, V] with noise."""
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
    cache: Callable[[int], Any] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """Answer each prompt, and yield its index and its answers as soon as they are there.

    Only prompts of equal length share a batch: left padding shifts what soft prompts compute, and right padding has no
    meaning in generation. What is drawn for a prompt follows from the seed and the prompt alone.

    Args:
        model: a causal language model or a PeftModel.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt.
        sampling: how answers are drawn. Beams are followed without a streamer or a cache.
        max_length: most tokens of prompt and answer together, virtual tokens not counted; None: unlimited. A prompt
            that fills it gets empty answers.
        batch_size: most rows in a batch; each beam is a row.
        streamer: one of transformers' streamers, for one prompt and one answer.
        cache: makes, for a number of rows, the keys and values of the prompts' first tokens, which are not computed.
        seeds: a seed for each prompt, instead of `sampling.seed` for all.

    Yields:
        The index of a prompt, and its `num_return_sequences` answers, without special tokens and surrounding white
        space.
    """
    assert sampling.num_beams == 1 or not (streamer or cache)
    copies, num_at_once = sampling.num_return_sequences, max(1, batch_size // sampling.num_beams)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    answers: dict[int, list[str]] = defaultdict(lambda: [""] * copies)
    device = next(model.parameters()).device
    end_ids, end_text = turn_ends(model, tokenizer)
    makes_pairs = model.config.is_encoder_decoder  # whose output begins with the decoder's start, not with the prompt
    with evaluating(model):
        for length, indices in by_length.items():
            max_new_tokens = sampling.max_new_tokens
            if max_length is not None:
                max_new_tokens = min(max_new_tokens, max_length - length)
            rows = itertools.product(indices, range(copies))
            while batch := list(itertools.islice(rows, num_at_once)):
                if max_new_tokens > 0:
                    ids = torch.tensor([list(prompts[index]) for index, _ in batch], device=device)
                    processors = LogitsProcessorList()
                    if sampling.do_sample:
                        draws = [
                            seed_of(seeds[index] if seeds else sampling.seed, prompts[index], copy)
                            for index, copy in batch
                        ]
                        processors = LogitsProcessorList([*sampling.warpers(), DrawByRow(draws)])
                    out = model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=max_new_tokens,
                        **{**PLAIN, "num_beams": sampling.num_beams},
                        repetition_penalty=sampling.repetition_penalty,
                        eos_token_id=end_ids,
                        pad_token_id=tokenizer.pad_token_id,
                        logits_processor=processors,
                        streamer=streamer,
                        **({"past_key_values": cache(len(batch))} if cache else {}),
                        **({"stop_strings": end_text, "tokenizer": tokenizer} if end_text else {}),
                    )
                    for (index, copy), row in zip(batch, out[:, 1 if makes_pairs else length :], strict=True):
                        text = tokenizer.decode(row, skip_special_tokens=True)
                        answers[index][copy] = (text.partition(end_text)[0] if end_text else text).strip()
                for index, copy in batch:
                    if copy == copies - 1:
                        yield index, answers.pop(index, [""] * copies)


@torch.no_grad()
def check_generation(model: Any, what: str) -> None:
    """Let a model write a few tokens: transformers reads most of generation_config.json only then.

    Args:
        model: in evaluation mode, as `fit.try_out` leaves it.
        what: the input that it came from, as the user knows it.

    Raises:
        InputError: it can't.
    """
    ids = torch.tensor([[0, 1, 2]], device=model.device)
    with input_faults(what, "repair its generation_config.json"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **PLAIN, pad_token_id=0)


def turn_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int] | None, str | None]:
    """Return what ends an answer.

    An answer ends at the tokenizer's end token, at the end tokens of the model's generation config, and where the chat
    template ends the assistant's turn. Many templates end it with a token or a text of their own, and training taught
    the adapter to write that.

    Returns:
        The ids of the end tokens, or None where there are none. The text that ends a turn where that is no special
        token, else None: generation then has to look for it in the decoded answer.
    """
    named = model.generation_config.eos_token_id
    end_ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    end_text = None
    if isinstance(tokenizer.chat_template, str) and not chat.makes_pairs(tokenizer):
        text = taught_end(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if len(ids) == 1 and ids[0] in tokenizer.all_special_ids:
            end_ids.add(ids[0])
        elif text:
            end_text = text
    return sorted(end_ids) or None, end_text


def taught_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text after an answer that training labels, and so teaches the model to write.

    It is found by rendering a sample conversation. It is "" if the template writes nothing there, or can't be rendered.
    """
    try:
        labelled = chat.learned_probe(tokenizer)
    except InputError:
        return ""
    return labelled.partition("answer")[2].strip()


def seed_of(seed: int, prompt: Sequence[int], copy: int) -> int:
    """Return the seed of one answer, which follows from the run's seed, the prompt and the answer's number alone."""
    digest = hashlib.sha256(f"{seed} {copy} {list(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int | None = None,
    batch_size: int = 32,
    cache: Callable[[int], Any] | None = None,
) -> list[str]:
    """Return the greedy answer to each prompt, in the order of the prompts; see `generate` for the arguments."""
    answers = [""] * len(prompts)
    sampling = Sampling(max_new_tokens)
    for index, texts in generate(model, tokenizer, prompts, sampling, max_length, batch_size, cache=cache):
        answers[index] = texts[0]
    return answers
