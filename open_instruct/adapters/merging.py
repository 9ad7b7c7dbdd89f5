"""Adapter → plain checkpoint without PEFT, compared with base + adapter before it is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

from open_instruct.adapters import loaded, prompt_tokens
from open_instruct.adapters.folders import AdapterFolder, base_name, check_mergeable, parse_adapters, quantisation
from open_instruct.adapters.generation import greedy_answers, turn_ends
from open_instruct.adapters.loaded import Adapters
from open_instruct.adapters.prompt_tokens import NewTokens
from open_instruct.data.chat import render_texts
from open_instruct.errors import InputError, input_faults, warn
from open_instruct.files import flush, write_json
from open_instruct.model import loading
from open_instruct.model.encoder_decoder import decoder_start_of
from open_instruct.model.quantised import dequantised
from open_instruct.quiet import silence_transformers
from open_instruct.serving.checkpoint import MERGED, Prefix, read_prefixes, write_prefix
from open_instruct.temporary import share, temporary_folder

PROBES = ("The sum of seven and five is", "Write one sentence about the sea.", "x")
NEW_TOKENS = 16  # of the greedy text that is compared
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of logits, relative to the largest


@dataclass(frozen=True)
class Expected:
    """Outputs of base + adapter for the probes, by adapter: logits [T, V] of each probe, and its greedy text."""

    logits: dict[str, list[torch.Tensor]]
    texts: dict[str, list[str]]


def merge(
    adapter: Sequence[str],
    output: str,
    model_name_or_path: str | None = None,
    dtype: str = "stored",
    any_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    quantised_in_training: str | None = None,
) -> dict[str, Any]:
    """Merge adapters into a plain checkpoint and verify it.

    Args:
        adapter: folders, or NAME=FOLDER.
        output: folder of the checkpoint; must not exist.
        model_name_or_path: base model; unset: the one that the adapters name.
        dtype: precision of the checkpoint: stored (as the base is), float32, bfloat16, float16.
        any_base: accept a base under another name than the adapters'.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: load a base whose weights exist only as pickle files.
        quantised_in_training: "4bit" or "8bit", for adapters that don't record on which form of the base they were
            trained.

    Returns:
        Content of `merged.json`: adapters, their tokens, largest relative difference of a logit, leaked probability.

    Raises:
        InputError: nothing to merge, an adapter that no plain checkpoint can hold, or a result that differs.
    """
    silence_transformers()
    folders = parse_adapters(adapter)
    check_mergeable(folders, output)
    name = base_name(model_name_or_path, folders, any_base)
    base = loaded.load_adapted_base(name, dtype, folders, trust_remote_code, allow_pickle, quantised_in_training)
    check_pairs(base, folders)
    if getattr(base, "is_quantized", False):
        base = dequantised(base)  # an adapter corrects the base that it was trained on, rounding included
    check_length(base, folders)
    adapters = Adapters(base, folders)
    tokenizer = loaded.tokenizer_for(name, folders, trust_remote_code)
    plain_tokenizer = loaded.tokenizer_for(name, folders, trust_remote_code)
    templates = {
        folder.name: loaded.tokenizer_for(name, [folder], trust_remote_code).chat_template for folder in folders
    }
    wanted = expected(adapters, tokenizer)
    prefixes = prefixes_of(adapters)
    old_rows = base.get_input_embeddings().weight.shape[0]
    model, new_tokens = merged_model(adapters, tokenizer, templates)

    with temporary_folder(Path(output)) as working:
        model.save_pretrained(working)
        tokenizer.save_pretrained(working)
        result = {
            "base": name,
            "adapters": {folder.name: {"path": str(folder.path), "method": folder.title} for folder in folders},
            "tokens": {new.adapter: entry(new, working, prefixes.get(new.adapter)) for new in new_tokens},
            "written_by": "tokenizer" if model.config.is_encoder_decoder else "chat template",
            "vocabulary_rows": model.get_input_embeddings().weight.shape[0],
            "rows_of_the_base": old_rows,
            "quantised_in_training": quantisation(folders, quantised_in_training),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        write_json(working / MERGED, result)
        device, precision = model.device, model.dtype
        del model, adapters, base  # a second copy of the model comes next
        config = loading.load_config(str(working), trust_remote_code=trust_remote_code)
        reloaded = loading.load_model(str(working), config, precision, None, trust_remote_code=trust_remote_code)
        reloaded = reloaded.to(device).eval()
        caches = {prefix.adapter: caches_of(prefix, device) for prefix in read_prefixes(working)}
        saved_tokenizer = AutoTokenizer.from_pretrained(working)
        result |= verify(reloaded, saved_tokenizer, plain_tokenizer, new_tokens, wanted, caches)
        write_json(working / MERGED, result)
        share(working)
        for path in working.rglob("*"):
            flush(path)
        working.rename(free_name(Path(output)))
    return result


def prefixes_of(adapters: Adapters) -> dict[str, Sequence[tuple[torch.Tensor, torch.Tensor]]]:
    """Return keys and values [1, K, P, E] of each layer of the adapters that are prefixes."""
    prefixes = {}
    for name, folder in adapters.folders.items():
        if folder.method and folder.prompt_kind == "keys_values":
            prompt = folder.method.soft_prompt(adapters.use(name))
            assert prompt and prompt.keys_values
            prefixes[name] = prompt.keys_values
    return prefixes


def entry(new: NewTokens, folder: Path, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] | None) -> dict[str, Any]:
    """Return what merged.json says of an adapter's tokens, and write its keys and values where it is a prefix."""
    common = {"first": new.ids[0], "number": len(new.ids), "text": new.text}
    if prefix is None:
        return {**common, "kind": "embeddings"}
    return {**common, "kind": "keys_values", **write_prefix(folder, new.adapter, prefix)}


def caches_of(prefix: Prefix, device: torch.device) -> Callable[[int], DynamicCache]:
    """Return what makes a cache that holds a prefix, for a number of rows."""
    pairs = [(keys.to(device).transpose(0, 1), values.to(device).transpose(0, 1)) for keys, values in prefix.load()]

    def make(num_rows: int) -> DynamicCache:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1), layer)
        return cache

    return make


def free_name(wanted: Path) -> Path:
    """Return a folder's name, or one with a number if somebody has made it meanwhile: the result is not lost."""
    number, path = 1, wanted
    while os.path.lexists(path):
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    if path != wanted:
        warn(f"--output {wanted} was made by another process meanwhile: the result is in {path}")
    return path


def check_length(base: Any, folders: Sequence[AdapterFolder]) -> None:
    """Refuse a soft prompt that leaves no position of the model for anything else.

    Raises:
        InputError: naming it.
    """
    for folder in folders:
        max_length = loaded.max_length(base.config, folder.num_virtual_tokens)
        if max_length is not None and max_length <= 0:
            raise InputError(
                f"adapter {folder.name} has {folder.num_virtual_tokens} virtual tokens, "
                f"and the model has positions for {loaded.max_length(base.config)} tokens in all"
            )


@torch.no_grad()
def expected(adapters: Adapters, tokenizer: PreTrainedTokenizerBase) -> Expected:
    """Run the probes through base + adapter, by PEFT's own forward pass.

    Raises:
        InputError: logits are not finite.
    """
    logits, texts = {}, {}
    for name in adapters.folders:
        model = adapters.use(name)
        probes = [tokenizer(text)["input_ids"] for text in PROBES]
        logits[name] = [probe_logits(model, ids) for ids in probes]
        if not all(torch.isfinite(values).all() for values in logits[name]):
            raise InputError(
                f"base + {name} computes logits that are not finite, so nothing can be merged: use another --dtype, or "
                "train the adapter anew"
            )
        texts[name] = greedy_answers(model, tokenizer, probes, NEW_TOKENS)
    return Expected(logits, texts)


def probe_logits(model: Any, ids: list[int], prompt: Sequence[int] = (), cache: Any = None) -> torch.Tensor:
    """Return the logits [T, V] of a probe's T tokens, in float32; an encoder–decoder repeats its source.

    Args:
        model: base with or without adapter.
        ids: the probe.
        prompt: tokens before it, whose logits are left out.
        cache: keys and values in the place of `prompt`, or None.
    """
    inputs = torch.tensor([ids if cache else [*prompt, *ids]], device=model.device)
    if not model.config.is_encoder_decoder:
        logits: torch.Tensor = model(input_ids=inputs, past_key_values=cache).logits[0, -len(ids) :]
        return logits.float()
    read = torch.tensor([[decoder_start_of(model.config), *ids[:-1]]], device=model.device)
    answers: torch.Tensor = model(input_ids=inputs, decoder_input_ids=read, use_cache=False).logits[0]
    return answers.float()


def check_pairs(base: Any, folders: Sequence[AdapterFolder]) -> None:
    """Refuse what a plain encoder–decoder can't hold.

    Raises:
        InputError: a prefix, or several soft prompts.
    """
    if not base.config.is_encoder_decoder:
        return
    for folder in folders:
        if folder.prompt_kind == "keys_values":
            raise InputError(
                f"adapter {folder.name} is {folder.title}: keys and values of an encoder–decoder can't be merged, as "
                "no engine serves them: serve it with PEFT, or train prompt tuning or LoRA"
            )
    if len(folders) > 1:
        raise InputError(
            f"{len(folders)} adapters can't be merged into one encoder–decoder, whose tokenizer writes one soft prompt "
            "before each text: merge each into a checkpoint of its own"
        )


def merged_model(
    adapters: Adapters, tokenizer: PreTrainedTokenizerBase, templates: dict[str, str | None]
) -> tuple[Any, list[NewTokens]]:
    """Return the plain model, and the tokens that stand for soft prompts (none where weights change).

    The base inside `adapters` becomes that model.

    Args:
        adapters: one that changes weights, soft prompts, or one soft prompt with LoRA.
        tokenizer: the base's; it gets the new tokens.
        templates: chat template of each adapter.
    """
    folders = list(adapters.folders.values())
    settings = adapters.base.generation_config
    if any(getattr(settings, name, None) not in (None, 1.0, 0, 50) for name in ("temperature", "top_p", "top_k")):
        settings.do_sample = True  # what such values mean; transformers refuses to save them without it
    settings.eos_token_id = turn_ends(adapters.base, tokenizer)[0]  # stop where training taught the adapter to stop
    name, method = folders[0].name, folders[0].method
    if method is not None and method.merges_into != "tokens":
        model = adapters.use(name)
        model = adapters.loras.get(name, model)
        assert isinstance(model, PeftModel)
        untie(adapters.base)
        is_tied = adapters.base.config.tie_word_embeddings
        with input_faults(f"adapter {name} ({method.title})", "it can't be merged here; serve it with PEFT"):
            merged = model.merge_and_unload(safe_merge=True)
        merged.config.tie_word_embeddings = is_tied  # PEFT 0.21 unties T5Gemma in name only
        if not folders[0].prompt_kind:
            return merged, []
        assert merged is adapters.base  # which the soft prompt's tokens come into
    if adapters.base.config.is_encoder_decoder:
        folder = folders[0]
        new = prompt_tokens.add_tokens(tokenizer, folder.name, folder.num_virtual_tokens)
        prompt_tokens.grow_encoder(adapters.base, (new, adapters.models[folder.name].get_prompt(1)[0]))
        prompt_tokens.put_before_sources(tokenizer, new)
        return adapters.base, [new]
    prompts = []
    width = adapters.base.get_input_embeddings().weight.shape[1]
    for folder in folders:
        is_prefix = folder.prompt_kind == "keys_values"
        new = prompt_tokens.add_tokens(tokenizer, folder.name, folder.num_virtual_tokens, is_prefix)
        vectors = torch.zeros(len(new.ids), width) if is_prefix else adapters.models[folder.name].get_prompt(1)[0]
        prompts.append((new, vectors))
    prompt_tokens.grow(adapters.base, prompts)
    new_tokens = [new for new, _ in prompts]
    prompt_tokens.put_first(tokenizer, new_tokens, templates)
    check_template(tokenizer, new_tokens, templates)
    return adapters.base, new_tokens


def untie(base: Any) -> None:
    """Give the head a weight of its own where it shares the embedding's, and an adapter changes one of the two."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = [layer for layer in (embedding, head) if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(getattr(getattr(layer, "token_adapter", None), "tied_adapter", None) for layer in adapted):
        return  # rows of tokens, which PEFT trains in both at once
    if adapted and base.config.get_text_config().tie_word_embeddings:
        while head is not None and not isinstance(head, torch.nn.Linear):
            head = getattr(head, "base_layer", None) or getattr(head, "original_module", None)
        if head is not None:
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False


def check_template(
    tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[NewTokens], templates: dict[str, str | None]
) -> None:
    """Check that a chat is rendered as in an adapter's training, after its tokens.

    Raises:
        InputError: it is not.
    """
    chat = [{"role": "user", "content": "question"}]
    for new in new_tokens:
        template = templates[new.adapter]
        if not template:
            continue
        (in_training,), _ = render_texts(tokenizer, [chat], template, add_generation_prompt=True)
        options: dict[str, Any] = {"adapter": new.adapter, "prefixes_served": True, "add_generation_prompt": True}
        (merged,), _ = render_texts(tokenizer, [chat], **options)
        if merged != new.text + in_training:
            raise InputError(
                f"the chat template of adapter {new.adapter} can't be extended by its tokens: "
                "merge it alone, or serve it with PEFT"
            )


@torch.no_grad()
def verify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    plain_tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[NewTokens],
    wanted: Expected,
    caches: Mapping[str, Callable[[int], Any]],
) -> dict[str, Any]:
    """Compare a merged checkpoint, as reloaded, with base + adapter.

    Args:
        model: the merged model.
        tokenizer: the one that was saved with it.
        plain_tokenizer: the one before the merge.
        new_tokens: the tokens of each soft prompt.
        wanted: outputs of base + adapter.
        caches: makes, for a number of rows, keys and values in the place of a prefix's placeholders.

    Returns:
        `largest_difference` of a logit, relative to the largest logit; `leaked_probability`, the most that new tokens
        and rows take; how many greedy texts are equal, `equal_texts` of `texts` (in float32 all of them; where 16 bits
        round, near ties may differ).

    Raises:
        InputError: they differ.
    """
    worst, leaked, num_equal, num_texts = 0.0, 0.0, 0, 0
    tolerance = TOLERANCE[model.dtype]
    ids_of = {new.adapter: list(new.ids) for new in new_tokens}
    all_new_ids = [token for ids in ids_of.values() for token in ids]
    probes = [plain_tokenizer(text)["input_ids"] for text in PROBES]
    before_text = prompt_tokens.before_plain_text(new_tokens)
    default = list(before_text.ids) if before_text else []
    if [tokenizer(text)["input_ids"] for text in PROBES] != [default + ids for ids in probes]:
        raise InputError(
            "the tokenizer does not put the new tokens before plain text: this tokenizer can't be merged into"
        )
    for name, wanted_logits in wanted.logits.items():
        prompt, cache = ids_of.get(name, []), caches.get(name)
        for ids, wanted_TV in zip(probes, wanted_logits, strict=True):
            logits_TV = probe_logits(model, ids, prompt, cache and cache(1))
            difference = (logits_TV[:, : wanted_TV.shape[-1]] - wanted_TV).abs().max() / wanted_TV.abs().max()
            # Other than `max`, this keeps a NaN, which no tolerance allows.
            worst = difference.item() if not difference.item() <= worst else worst
            if prompt:
                added = sorted({*all_new_ids, *range(wanted_TV.shape[-1], logits_TV.shape[-1])})
                leaked = max(leaked, logits_TV.softmax(-1)[:, added].sum(-1).max().item())
        if not worst <= tolerance:
            raise InputError(
                f"the merged model's logits differ from base + {name} by {worst:.1e} of the largest "
                f"(at most {tolerance:.0e} is rounding): its architecture does more with token ids than look up one "
                "embedding; serve the adapter with PEFT instead"
            )
        texts = greedy_answers(model, plain_tokenizer, [prompt + ids for ids in probes], NEW_TOKENS, cache=cache)
        pairs = list(zip(texts, wanted.texts[name], strict=True))
        num_equal, num_texts = num_equal + sum(a == b for a, b in pairs), num_texts + len(pairs)
        different = next(((text, wanted_text) for text, wanted_text in pairs if text != wanted_text), None)
        if different and model.dtype == torch.float32:
            raise InputError(
                f"the merged model answers {different[0]!r} where base + {name} answers {different[1]!r}: "
                "serve the adapter with PEFT instead"
            )
    return {
        "largest_difference": worst,
        "leaked_probability": leaked,
        "equal_texts": num_equal,
        "texts": num_texts,
    }
