"""Adapter → plain checkpoint, checked against base + adapter before anybody relies on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters import prompt_tokens as vocabulary
from open_instruct.adapters.folders import AdapterFolder, Adapters
from open_instruct.adapters.generation import greedy_answers, turn_ends
from open_instruct.errors import InputError
from open_instruct.model import loading

PROBES = ("The sum of seven and five is", "Write one sentence about the sea.", "x")
NEW_TOKENS = 16  # of the greedy text that is compared
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of logits, relative to the largest


@dataclass(frozen=True)
class Expected:
    """What base + adapter answer to the probes, by adapter: logits [T, V] of each probe, and greedy text."""

    logits: dict[str, list[torch.Tensor]]
    texts: dict[str, list[str]]


def check_mergeable(folders: Sequence[AdapterFolder]) -> None:
    """Refuse what a plain checkpoint can't express.

    Raises:
        InputError: prefix tuning, an unknown method, or several adapters of which one changes weights.
    """
    for folder in folders:
        if folder.method == "PREFIX_TUNING":
            raise InputError(
                f"adapter {folder.name} is a prefix of keys and values in each layer, and no plain checkpoint can hold that: serve it with "
                "generate_peft.py or plain PEFT, or train prompt tuning or P-tuning instead"
            )
        if folder.method not in ("PROMPT_TUNING", "P_TUNING", "LORA", "IA3"):
            raise InputError(
                f"adapter {folder.name} is {folder.title}, which can't be merged here: use LoRA, IA3, prompt tuning or P-tuning"
            )
    if len(folders) > 1 and any(not folder.num_virtual_tokens for folder in folders):
        others = ", ".join(f"{folder.name} ({folder.title})" for folder in folders if not folder.num_virtual_tokens)
        raise InputError(
            f"{others} would change the weights that the others share: merge it alone, only soft prompts go together"
        )


@torch.no_grad()
def expected(adapters: Adapters, tokenizer: PreTrainedTokenizerBase) -> Expected:
    """Run the probes through base + adapter, as PEFT does it."""
    logits, texts = {}, {}
    for name in adapters.folders:
        model = adapters.use(name)
        probes = [tokenizer(text)["input_ids"] for text in PROBES]
        logits[name] = [
            model(input_ids=torch.tensor([ids], device=adapters.base.device)).logits[0, -len(ids) :].float()
            for ids in probes
        ]
        texts[name] = greedy_answers(model, tokenizer, probes, NEW_TOKENS)
    return Expected(logits, texts)


def merge(
    adapters: Adapters, tokenizer: PreTrainedTokenizerBase, templates: dict[str, str | None]
) -> tuple[Any, list[vocabulary.NewTokens]]:
    """The plain model, and the tokens that stand for soft prompts (none for LoRA and IA3). The tokenizer is changed with it.

    Args:
        adapters: one that changes weights, or soft prompts of embeddings.
        tokenizer: of the base.
        templates: chat template of each adapter.
    """
    folders = list(adapters.folders.values())
    settings = adapters.base.generation_config
    if any(getattr(settings, name, None) not in (None, 1.0, 0, 50) for name in ("temperature", "top_p", "top_k")):
        settings.do_sample = True  # what they mean; transformers saves no other
    add_end(adapters.base, tokenizer)
    if not folders[0].num_virtual_tokens:
        model = adapters.use(folders[0].name)
        assert isinstance(model, PeftModel)
        return model.merge_and_unload(safe_merge=True), []
    prompts = []
    for folder in folders:
        vectors = adapters.models[folder.name].get_prompt(batch_size=1)[0]
        prompts.append((vocabulary.add_tokens(tokenizer, folder.name, folder.num_virtual_tokens), vectors))
    vocabulary.grow(adapters.base, prompts)
    sets = [new for new, _ in prompts]
    vocabulary.put_first(tokenizer, sets, templates)
    check_template(tokenizer, sets, templates)
    return adapters.base, sets


def add_end(base: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the checkpoint stop where training taught the adapter to."""
    base.generation_config.eos_token_id = turn_ends(base, tokenizer)[0]


def check_template(
    tokenizer: PreTrainedTokenizerBase, sets: Sequence[vocabulary.NewTokens], templates: dict[str, str | None]
) -> None:
    """A chat must be what the adapter was trained with, after its tokens.

    Raises:
        InputError: it is not.
    """
    chat = [{"role": "user", "content": "question"}]
    for new in sets:
        if templates[new.adapter]:
            own = tokenizer.apply_chat_template(
                chat, chat_template=templates[new.adapter], tokenize=False, add_generation_prompt=True
            )
            if tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, adapter=new.adapter
            ) != new.text + str(own):
                raise InputError(
                    f"the chat template of adapter {new.adapter} can't be extended by its tokens: merge it alone, or serve it with PEFT"
                )


@torch.no_grad()
def verify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    plain: PreTrainedTokenizerBase,
    sets: Sequence[vocabulary.NewTokens],
    wanted: Expected,
) -> dict[str, Any]:
    """Compare a merged checkpoint, as reloaded, with base + adapter.

    Args:
        model: the merged model.
        tokenizer: saved with it.
        plain: the tokenizer before.
        sets: tokens of each soft prompt.
        wanted: of base + adapter.

    Returns:
        Largest difference of a logit, relative to the largest logit; the probability that new tokens take at most; how many greedy
        texts are equal (all in float32; near ties may differ where 16 bits round).

    Raises:
        InputError: they differ.
    """
    worst, leaked, equal, count = 0.0, 0.0, 0, 0
    tolerance = TOLERANCE[model.dtype]
    tokens_of = {new.adapter: list(new.ids) for new in sets}
    for number, name in enumerate(wanted.logits):
        first = tokens_of.get(name, [])
        probes = [plain(text)["input_ids"] for text in PROBES]
        if number == 0 and [tokenizer(text)["input_ids"] for text in PROBES] != [first + ids for ids in probes]:
            raise InputError(
                "the tokenizer does not put the new tokens before plain text: this tokenizer can't be merged into"
            )
        for ids, own in zip(probes, wanted.logits[name], strict=True):
            logits = model(input_ids=torch.tensor([first + ids], device=model.device)).logits[0, len(first) :].float()
            width = own.shape[-1]
            worst = max(worst, ((logits[:, :width] - own).abs().max() / own.abs().max()).item())
            if first:
                leaked = max(
                    leaked, logits.softmax(-1)[:, [token for new in sets for token in new.ids]].sum(-1).max().item()
                )
        if not worst <= tolerance:
            raise InputError(
                f"the merged model's logits differ from base + {name} by {worst:.1e} of the largest (at most {tolerance:.0e} is rounding): "
                "its architecture does more with token ids than look up one embedding; serve the adapter with PEFT instead"
            )
        texts = greedy_answers(model, plain, [first + ids for ids in probes], NEW_TOKENS)
        equal, count = equal + sum(a == b for a, b in zip(texts, wanted.texts[name], strict=True)), count + len(texts)
        if texts != wanted.texts[name] and model.dtype == torch.float32:
            pair = next(both for both in zip(texts, wanted.texts[name], strict=True) if both[0] != both[1])
            raise InputError(
                f"the merged model says {pair[0]!r} where base + {name} says {pair[1]!r}: serve the adapter with PEFT instead"
            )
    return {"largest_difference": worst, "leaked_probability": leaked, "equal_texts": equal, "texts": count}


def check_room(base: Any, folders: Sequence[AdapterFolder]) -> None:
    """Soft prompts take positions of the context.

    Raises:
        InputError: one fills it.
    """
    context = loading.context_length(base.config)
    for folder in folders:
        if context and folder.num_virtual_tokens >= context:
            raise InputError(
                f"adapter {folder.name} has {folder.num_virtual_tokens} virtual tokens, and the model has room for {context}"
            )
