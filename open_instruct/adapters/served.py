"""A base model with its adapters, ready to be asked: what every tool that uses a trained adapter starts from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from open_instruct.adapters import folders as adapters
from open_instruct.adapters import generation
from open_instruct.adapters.folders import BASE, Adapters
from open_instruct.adapters.generation import Sampling
from open_instruct.data import chat, questions
from open_instruct.errors import InputError
from open_instruct.model import loading
from open_instruct.quiet import silence_transformers


@dataclass(frozen=True)
class Served:
    """Base, adapters and tokenizer. Names of adapters are those given to `load`; "base" is the plain model."""

    adapters: Adapters
    tokenizer: PreTrainedTokenizerBase

    @property
    def names(self) -> list[str]:
        """The adapters, without the base."""
        return list(self.adapters.folders)

    def room(self, name: str) -> int | None:
        """Tokens that prompt and answer may have together, virtual ones not counted; None where the model says nothing."""
        context = loading.context_length(self.adapters.base.config)
        folder = self.adapters.folders.get(name)
        return context and context - (folder.num_virtual_tokens if folder else 0)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        name: str,
        sampling: Sampling,
        batch_size: int = 32,
        streamer: Any = None,
    ) -> Iterator[tuple[int, list[str]]]:
        """Answers of one adapter to token ids, as they come; see `generation.generate`."""
        model = self.adapters.use(name)
        return generation.generate(model, self.tokenizer, prompts, sampling, self.room(name), batch_size, streamer)

    def answers(
        self,
        asked: Sequence[str | list[dict[str, Any]]],
        adapter: str | None = None,
        sampling: Sampling | None = None,
        batch_size: int = 32,
    ) -> list[list[str]]:
        """Answer questions.

        Args:
            asked: texts, each said by the user, or conversations as lists of {"role", "content"}.
            adapter: name; unset: the only adapter, or the base where there is none.
            sampling: how answers are drawn; unset: greedy.
            batch_size: answers computed at once at most.

        Returns:
            For each question its answers, `sampling.num_return_sequences` of them.
        """
        name = adapter or (self.names[0] if self.names else BASE)
        conversations = [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in asked]
        prompts = [questions.prompt_ids(self.tokenizer, messages) for messages in conversations]
        return [found for _, found in sorted(self.stream(prompts, name, sampling or Sampling(), batch_size))]


def load(
    adapter: Sequence[str] | str | None = None,
    model_name_or_path: str | None = None,
    dtype: str = "auto",
    any_base: bool = False,
    trust_remote_code: bool = False,
    chat_template_name: str | None = None,
    allow_pickle: bool = False,
) -> Served:
    """Load a base model and adapters on it. Adapters that were trained on a quantised base get it quantised.

    Args:
        adapter: folder in PEFT's format, or NAME=FOLDER, or several of them, of any methods; none: the base alone.
        model_name_or_path: base model; unset: the one that the adapters name.
        dtype: of the base: auto (bfloat16 on a GPU that has it, float32 elsewhere), stored (as in its files), float32, bfloat16, float16.
        any_base: accept a base under another name than the adapters'.
        trust_remote_code: run Python code that comes with the model.
        chat_template_name: see finetune_peft.py; unset: the tokenizer's own, or tulu where it has none.
        allow_pickle: load a base whose weights exist only as pickle files.

    Raises:
        InputError: an adapter is missing, damaged, pickled, or belongs to another base.
    """
    silence_transformers()
    folders = adapters.parse_adapters([adapter] if isinstance(adapter, str) else adapter)
    name = adapters.base_name(model_name_or_path, folders, any_base)
    tokenizer = adapters.load_tokenizer(name, folders, trust_remote_code)
    templates = {folder.name: adapters.chat_template(folder.path) for folder in folders}
    if not chat_template_name and len(set(templates.values()) - {None}) > 1:
        raise InputError(
            f"the adapters {', '.join(templates)} were trained with different chat templates: use them one at a time, or give one template "
            "for all with --chat_template_name"
        )
    if chat_template_name or not tokenizer.chat_template:
        if not chat_template_name:
            print(
                f"warning: the tokenizer of {name} has no chat template: taking tulu's (--chat_template_name)",
                file=sys.stderr,
            )
        chat.set_chat_template(tokenizer, chat_template_name or "tulu")
    biased = next((folder.name for folder in folders if getattr(folder.config, "bias", "none") != "none"), None)
    if biased:
        raise InputError(
            f"adapter {biased} trains the base's biases, so no other could share the base: merge it with merge_peft.py, and use that"
        )
    base = adapters.load_base(name, dtype, folders, trust_remote_code, allow_pickle)
    return Served(Adapters(base, folders), tokenizer)
