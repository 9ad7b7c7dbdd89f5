"""A base model with its adapters and a tokenizer, ready to answer: every tool that runs an adapter begins with one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from open_instruct.adapters import generation, loaded, vllm_engine
from open_instruct.adapters.folders import BASE, AdapterFolder, base_name, parse_adapters
from open_instruct.adapters.full_models import stood_behind_hard_prompt
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.loaded import Adapters
from open_instruct.adapters.vllm_engine import VllmEngine
from open_instruct.data import chat
from open_instruct.data.context import Context
from open_instruct.data.hard_prompt import hard_prompt_of
from open_instruct.data.questions import prompt_ids
from open_instruct.data.sources import Conversation
from open_instruct.errors import InputError, warn
from open_instruct.quiet import silence_transformers


@dataclass(frozen=True)
class Served:
    """Base, adapters and tokenizer. Names of adapters are those given to `load`; "base" is the plain model."""

    adapters: Adapters
    tokenizer: PreTrainedTokenizerBase
    engine: VllmEngine | None = None  # what computes answers; None: the loop of `generation`
    hard_prompts: Mapping[str, Context] = field(default_factory=dict)  # of the adapters that were trained behind one

    @property
    def names(self) -> list[str]:
        """The adapters, without the base."""
        return list(self.adapters.folders)

    @property
    def model_name(self) -> str:
        """Name or folder from which the base was loaded."""
        return str(self.adapters.base.config._name_or_path)

    def max_length(self, *names: str) -> int | None:
        """Return how many tokens prompt and answer may have together with any of some adapters (or "base").

        Virtual tokens and hard prompts are not counted. None: the model names no limit.
        """
        return loaded.max_length(self.adapters.base.config, max(map(self.num_before, names), default=0))

    def num_before(self, name: str) -> int:
        """Return how many positions stand before every conversation with an adapter (or "base")."""
        folder, hard_prompt = self.adapters.folders.get(name), self.hard_prompts.get(name)
        num_virtual_tokens = folder.num_virtual_tokens if folder else 0
        return num_virtual_tokens + (len(hard_prompt.ids) - hard_prompt.num_shared if hard_prompt else 0)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        name: str,
        sampling: Sampling,
        batch_size: int = 32,
        streamer: Any = None,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[str]]]:
        """Yield the answers of one adapter to token ids as they come; see `generation.generate`.

        Its hard prompt, if it was trained behind one, is put before them.

        Raises:
            InputError: vLLM is to search with beams.
        """
        if self.engine is not None and sampling.num_beams > 1:
            raise InputError(f"num_beams {sampling.num_beams}: vLLM has no such search here: use transformers")
        model, max_length = self.adapters.use(name), self.max_length(name)
        if hard_prompt := self.hard_prompts.get(name):
            prompts = [hard_prompt.before(prompt)[0] for prompt in prompts]
            max_length = max_length and max_length + len(hard_prompt.ids) - hard_prompt.num_shared
        if self.engine is not None:
            return self.engine.stream(prompts, name, sampling, max_length, seeds)
        return generation.generate(
            model, self.tokenizer, prompts, sampling, max_length, batch_size, streamer, seeds=seeds
        )

    def answers(
        self,
        questions: Sequence[str | Sequence[dict[str, Any]]],
        adapter: str | None = None,
        sampling: Sampling | None = None,
        batch_size: int = 32,
    ) -> list[list[str]]:
        """Answer questions.

        Args:
            questions: texts of the user, or conversations as lists of {"role", "content"}; as a
                `data.sources.Conversation`, one has tools, too.
            adapter: name; unset: the first adapter, or the base where there is none.
            sampling: how answers are drawn; unset: greedy.
            batch_size: most answers computed at once.

        Returns:
            For each question its answers, `sampling.num_return_sequences` of them.

        Raises:
            InputError: there is no adapter of that name, or the chat template refuses a conversation.
        """
        name = adapter or (self.names[0] if self.names else BASE)
        conversations = [
            Conversation([{"role": "user", "content": item}]) if isinstance(item, str) else item for item in questions
        ]
        prompts = [prompt_ids(self.tokenizer, messages) for messages in conversations]
        return [answers for _, answers in sorted(self.stream(prompts, name, sampling or Sampling(), batch_size))]


@dataclass(frozen=True)
class Unloaded:
    """Base, adapters and tokenizer, checked as far as that needs no weights; see `prepare_served`."""

    name: str
    folders: Sequence[AdapterFolder]
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    engine: str
    trust_remote_code: bool
    allow_pickle: bool

    def load(self) -> Served:
        """Load the weights.

        Raises:
            InputError: they are missing or damaged, or an adapter belongs to another base.
        """
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}
        base = loaded.load_adapted_base(self.name, self.dtype, self.folders, **options)
        hard_prompts = hard_prompts_of(self.folders, self.tokenizer)
        served = Served(Adapters(base, self.folders), self.tokenizer, hard_prompts=hard_prompts)
        if self.engine != "vllm":
            return served
        return replace(served, engine=VllmEngine(base, self.name, self.folders, self.tokenizer, **options))


def prepare_served(
    adapter: Sequence[str] | str | None = None,
    model_name_or_path: str | None = None,
    dtype: str = "auto",
    any_base: bool = False,
    trust_remote_code: bool = False,
    chat_template_name: str | None = None,
    allow_pickle: bool = False,
    engine: str = "transformers",
) -> Unloaded:
    """Check a base model and adapters on it, and load the tokenizer, but no weights; arguments are those of `load`.

    Raises:
        InputError: an adapter is missing, damaged, pickled, or belongs to another base; or the engine can't serve it.
    """
    silence_transformers()
    folders = parse_adapters([adapter] if isinstance(adapter, str) else adapter)
    name = base_name(model_name_or_path, folders, any_base)
    check_biases(folders)
    if stood_behind_hard_prompt(name):
        warn(f"model {name} was trained behind a hard prompt, which does not stand before its questions here")
    if engine == "vllm":
        vllm_engine.check_engine(folders)
    tokenizer = loaded.tokenizer_for(name, folders, trust_remote_code)
    if loaded.is_encoder_decoder(name, folders, trust_remote_code):
        if engine != "transformers":
            raise InputError(
                f"--engine {engine} is for causal language models, and {name} is an encoder–decoder: drop it"
            )
        chat.mark_pairs(tokenizer)
    if not chat_template_name:
        check_templates(folders)
        if not tokenizer.chat_template and chat.makes_pairs(tokenizer):
            chat_template_name = chat.PLAIN
        elif not tokenizer.chat_template:
            warn(f"the tokenizer of {name} has no chat template: using tulu's (--chat_template_name)")
            chat_template_name = "tulu"
    if chat_template_name:
        chat.set_chat_template(tokenizer, chat_template_name)
    chat.check_question(tokenizer)
    return Unloaded(name, folders, tokenizer, dtype, engine, trust_remote_code, allow_pickle)


def load(
    adapter: Sequence[str] | str | None = None,
    model_name_or_path: str | None = None,
    dtype: str = "auto",
    any_base: bool = False,
    trust_remote_code: bool = False,
    chat_template_name: str | None = None,
    allow_pickle: bool = False,
    engine: str = "transformers",
) -> Served:
    """Load a base model and adapters on it. Adapters that were trained on a quantised base get it quantised.

    Args:
        adapter: folder in PEFT's format, or NAME=FOLDER, or several of them, of any methods; none: the base alone.
        model_name_or_path: base model; unset: the one that the adapters name.
        dtype: precision of the base: auto (bfloat16 on a GPU that has it, float32 elsewhere), stored (as in its files),
            float32, bfloat16, float16.
        any_base: accept a base under another name than the adapters'.
        trust_remote_code: run Python code that comes with the model.
        chat_template_name: see finetune_peft.py; unset: the tokenizer's own, or tulu where it has none.
        allow_pickle: load a base whose weights exist only as pickle files.
        engine: what computes answers: transformers, or vllm, which must be installed.

    Raises:
        InputError: an adapter is missing, damaged, pickled, or belongs to another base; or the engine can't serve it.
    """
    return prepare_served(
        adapter,
        model_name_or_path,
        dtype,
        any_base,
        trust_remote_code,
        chat_template_name,
        allow_pickle,
        engine,
    ).load()


def hard_prompts_of(folders: Sequence[AdapterFolder], tokenizer: PreTrainedTokenizerBase) -> dict[str, Context]:
    """Return the hard prompts that adapters were trained behind, from their run.json, and say that they are used."""
    found = {}
    for folder in folders:
        if (content := folder.hard_prompt) is not None:
            found[folder.name] = hard_prompt_of(content, tokenizer).tokens
            count = len(found[folder.name].ids)
            text = f"{folder.name}: its hard prompt of {count:,} tokens (run.json) stands before each question"
            print(text, file=sys.stderr)  # what is printed elsewhere are answers
    return found


def check_templates(folders: Sequence[AdapterFolder]) -> None:
    """Refuse adapters that were trained with different chat templates.

    Raises:
        InputError: naming the adapters.
    """
    templates = {loaded.chat_template(folder.path) for folder in folders} - {None}
    if len(templates) > 1:
        raise InputError(
            f"the adapters {', '.join(folder.name for folder in folders)} were trained with different chat templates: "
            "use them one at a time, or give one template for all with --chat_template_name"
        )


def check_biases(folders: Sequence[AdapterFolder]) -> None:
    """Refuse adapters that change the base itself.

    Raises:
        InputError: naming one.
    """
    for folder in folders:
        if any(part.settings.get("bias", "none") != "none" for part in (folder, folder.lora) if part):
            raise InputError(
                f"adapter {folder.name} trains the base's biases, so no other could share the base: "
                "merge it with merge_peft.py, and use that"
            )
