"""A trained soft prompt in numbers: neighbours in the vocabulary, norms, similarities, drift, attention."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from open_instruct.adapters.folders import BASE, AdapterFolder, check_prompt, parse_adapters
from open_instruct.adapters.question_forms import form_of_questions
from open_instruct.adapters.served import Served, load
from open_instruct.data import questions, reading
from open_instruct.errors import InputError, warn
from open_instruct.model.encoder_decoder import decoder_start_of
from open_instruct.model.placed_prompts import PlacedPromptModel
from open_instruct.model.tokens import ordinary_tokens
from open_instruct.model.weights import check_tensor_names, read_tensors

START = "soft_prompt_start.safetensors"  # beside the adapter: the vectors before the first step


def inspect(
    adapter: str,
    model_name_or_path: str | None = None,
    file: str | None = None,
    rows: int = 16,
    neighbours: int = 3,
    columns: Sequence[str] | None = None,
    template: str | None = None,
    shots: int | None = None,
    shots_file: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Look inside a soft prompt.

    Args:
        adapter: folder of prompt tuning, P-tuning or prefix tuning.
        model_name_or_path: base model; unset: the one that the adapter names.
        file: questions on which attention is measured; None: it is not measured.
        rows: number of questions that are taken from the file.
        neighbours: number of nearest tokens of each virtual token.
        columns: columns of the questions; this and the next three: see `question_forms.form_of_questions`.
        template: file of the questions' templates.
        shots: exemplars before each question.
        shots_file: rows from which they are drawn.
        options: further arguments of `load`.

    Returns:
        Content of inspection.json.

    Raises:
        InputError: the adapter is no soft prompt, or wrong input.
    """
    rows_asked: list[questions.Question] = []
    if file:
        form = form_of_questions(parse_adapters([adapter]), columns, template, shots, shots_file)
        every = questions.questions(reading.read_files(reading.files_of(file)), rendering=form)
        rows_asked = list(itertools.islice(every, rows))
    served = load(adapter, model_name_or_path, **options)
    (folder,) = served.adapters.folders.values()
    check_prompt(folder)
    in_encoder = folder.prompt_kind == "embeddings" and not folder.is_own
    if file and served.adapters.base.config.is_encoder_decoder and not in_encoder:
        raise InputError(
            f"--file {file}: attention is measured for soft prompts before an encoder's input, and this one is "
            f"{folder.title}: remove --file"
        )
    result: dict[str, Any] = {
        "adapter": str(folder.path),
        "method": folder.title,
        "virtual_tokens": folder.num_virtual_tokens,
    }
    model, base = served.adapters.use(folder.name), served.adapters.base
    asked = questions.with_calls_written(rows_asked, served.tokenizer)
    prompts = [questions.prompt_ids(served.tokenizer, question.messages) for question in asked]
    if folder.prompt_kind == "keys_values":
        result |= prefix_norms(model)
        if prompts:
            served.adapters.use(BASE)
            result["base_norms"] = base_norms(base, prompts)
    else:
        result |= embedding_figures(served, folder, neighbours)
    if prompts:
        served.adapters.use(folder.name)
        result["attention"] = attention_mass(model, base, prompts, folder.num_virtual_tokens)
    return result


def embedding_figures(served: Served, folder: AdapterFolder, num_neighbours: int) -> dict[str, Any]:
    """Return neighbours, norms, similarities and drift of a soft prompt of embeddings."""
    vocabulary, ids = vocabulary_vectors(served.adapters.base, served.tokenizer, folder.is_own)
    end = served.adapters.models[folder.name].get_prompt(batch_size=1)[0].detach().float().cpu()
    figures: dict[str, Any] = {
        "norms": {"vocabulary": norms(vocabulary), "prompt": norms(end)},
        "end": nearest_tokens(end, vocabulary, ids, served.tokenizer, num_neighbours),
        "similarity": similarity(end).tolist(),
    }
    start, broken = None, []
    try:
        start = start_of(folder, end.shape)
    except InputError as error:
        broken.append(str(error))
    if start is not None:
        figures["norms"]["prompt at start"] = norms(start)
        figures["start"] = nearest_tokens(start, vocabulary, ids, served.tokenizer, num_neighbours)
        figures["moved"] = (end - start).norm(dim=1).tolist()
        figures["drift"] = drift(folder, start, broken)
    for text in broken:
        warn(text)
    return figures | ({"broken": broken} if broken else {})


@torch.no_grad()
def vocabulary_vectors(
    base: Any, tokenizer: PreTrainedTokenizerBase, in_decoder: bool = False
) -> tuple[torch.Tensor, list[int]]:
    """Return the embeddings [V', D] of the tokens that stand for text, as its layers get them, and the tokens' ids."""
    ids = ordinary_tokens(tokenizer)
    embeddings = (base.get_decoder() if in_decoder else base).get_input_embeddings()
    return embeddings(torch.tensor(ids, device=base.device)).float().cpu(), ids


def start_of(folder: AdapterFolder, shape: torch.Size) -> torch.Tensor | None:
    """Return the soft prompt [P, D] before the first step, or None where the run did not keep it.

    Raises:
        InputError: its file is damaged, or holds vectors of another shape.
    """
    path = folder.path / START
    if not path.exists():
        return None
    what, remedy = f"the soft prompt's start ({path})", "delete it: what is known without it is shown"
    tensors = read_tensors(path, "the soft prompt's start", remedy)
    check_tensor_names(tensors, ["embeddings"], what, remedy)
    if tensors["embeddings"].shape != shape:
        raise InputError(f"{what} has another shape than the adapter: {remedy}")
    return tensors["embeddings"].float()


def drift(folder: AdapterFolder, start: torch.Tensor, broken: list[str]) -> list[dict[str, float]]:
    """Return how far each checkpoint's soft prompt is from the start: mean distance of a virtual token, and mean norm.

    Only a soft prompt that is trained itself can be read from its checkpoints. Where a network makes it (P-tuning), a
    checkpoint holds that network, which is several tensors.

    Args:
        folder: the adapter.
        start: the soft prompt before the first step.
        broken: receives what is wrong with checkpoints that can't be read; these are left out.
    """
    rows = []
    found = [path for path in folder.path.glob("checkpoints/step_*/trained.safetensors") if step_at(path) is not None]
    for path in sorted(found, key=lambda path: step_at(path) or 0):
        try:
            read = read_tensors(path, "checkpoint", "its step is left out")
            tensors = [tensor for name, tensor in read.items() if "prompt_encoder" in name.split(".")]
        except InputError as error:
            broken.append(str(error))
            continue
        if len(tensors) == 1 and tensors[0].shape == start.shape:
            distance = (tensors[0] - start).norm(dim=1).mean().item()
            rows.append({"step": step_at(path), "distance": distance, "norm": tensors[0].norm(dim=1).mean().item()})
    return rows


def step_at(path: Path) -> int | None:
    """Return the step of a checkpoint's file; None where its folder is named otherwise, as a user's copy is."""
    digits = path.parent.name.removeprefix("step_")
    return int(digits) if re.fullmatch(r"[0-9]{1,18}", digits) else None


def nearest_tokens(
    prompt: torch.Tensor,
    vocabulary: torch.Tensor,
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    num_neighbours: int,
) -> list[dict[str, Any]]:
    """Return the nearest tokens of each virtual token, by cosine and by distance.

    Args:
        prompt: [P, D]
        vocabulary: [V', D]
        ids: token ids of the vocabulary's rows.
        tokenizer: decodes them.
        num_neighbours: most neighbours of a virtual token.
    """
    cosine_PV = F.normalize(prompt, dim=1) @ F.normalize(vocabulary, dim=1).T
    distance_PV = torch.cdist(prompt, vocabulary)
    num_neighbours = min(num_neighbours, len(ids))

    def named(top: Any) -> list[list[Any]]:
        pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        return [[token_name(tokenizer, ids[i]), round(value, 4)] for value, i in pairs]

    return [
        {
            "norm": vector.norm().item(),
            "cosine": named(cosines.topk(num_neighbours)),
            "distance": named(distances.topk(num_neighbours, largest=False)),
        }
        for vector, cosines, distances in zip(prompt, cosine_PV, distance_PV, strict=True)
    ]


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's text; of white space, control characters and parts of characters, the bytes: `<0x0A>`.

    One blank before a word stays. A token of another kind of tokenizer, without such bytes, has its name in the
    vocabulary.
    """
    text: str = tokenizer.decode([token])
    if text.strip() and text.isprintable() and "\ufffd" not in text:
        return text
    if "\ufffd" not in text and text:
        return "".join(f"<0x{byte:02X}>" for byte in text.encode())
    name = str(tokenizer.convert_ids_to_tokens(token))
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}  # GPT-2's, of byte-level vocabularies
    if name and all(character in byte_of for character in name):
        return "".join(f"<0x{byte_of[character]:02X}>" for character in name)
    return name


def norms(vectors: torch.Tensor) -> dict[str, float]:
    """Return quantiles of the lengths of vectors [N, D]."""
    quantiles = vectors.norm(dim=1).quantile(torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0])).tolist()
    return dict(zip(("smallest", "5 %", "median", "95 %", "largest"), quantiles, strict=True))


def similarity(prompt: torch.Tensor) -> torch.Tensor:
    """Return the cosines [P, P] of the virtual tokens [P, D] with each other."""
    unit = F.normalize(prompt, dim=1)
    return unit @ unit.T


@torch.no_grad()
def attention_mass(
    model: Any, base: Any, prompts: Sequence[Sequence[int]], num_virtual_tokens: int
) -> dict[str, list[float]]:
    """Return the share of its attention that each layer gives to the virtual tokens.

    It is a mean over heads, rows and the rows' positions; the virtual tokens' own positions don't count. Of an
    encoder–decoder it is the encoder's, which attends both ways.

    Args:
        model: PeftModel with the soft prompt.
        base: the model inside it; meanwhile its attention is computed as plain matrix products, which return the
            weights.
        prompts: token ids of sample rows.
        num_virtual_tokens: P.

    Returns:
        mass: the share in each layer, from 0 to 1; uniform: the share if all visible positions got the same, one
        number.
    """
    implementation, both_ways = base.config._attn_implementation, base.config.is_encoder_decoder
    base.set_attn_implementation("eager")
    total, uniform, num_positions = None, 0.0, 0
    try:
        for ids in prompts:
            rows = torch.tensor([list(ids)], device=base.device)
            inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "output_attentions": True}
            # [1, H, queries, P + T] of each layer; soft prompts of embeddings are queries, too
            if both_ways:
                read = torch.tensor([[decoder_start_of(base.config)]], device=base.device)
                layers = model(**inputs, decoder_input_ids=read).encoder_attentions
            else:
                layers = model(**inputs).attentions
            mass = torch.stack(
                [layer[0, :, -len(ids) :, :num_virtual_tokens].float().sum(-1).mean(0).sum() for layer in layers]
            )
            total = mass if total is None else total + mass
            seen = [len(ids) if both_ways else position for position in range(1, len(ids) + 1)]
            uniform += sum(num_virtual_tokens / (num_virtual_tokens + number) for number in seen)
            num_positions += len(ids)
    finally:
        base.set_attn_implementation(implementation)
    assert total is not None
    return {"mass": (total / num_positions).tolist(), "uniform": [uniform / num_positions]}


def prefix_norms(model: Any) -> dict[str, Any]:
    """Return the mean length of a prefix's keys and values in each layer, over heads and virtual tokens.

    Returns:
        prefix_norms: keys and values; prefix_layers: names of their layers, where there are several places.
    """
    names: list[str] = []
    if isinstance(model, PlacedPromptModel):
        places = model.prefixes()
        names = [f"{place} {layer}" for place, pairs in places.items() for layer in range(len(pairs))]
        layers = [pair for pairs in places.values() for pair in pairs]
    else:
        cache = model.get_prompt(batch_size=1)
        cache = cache.self_attention_cache if model.config.is_encoder_decoder else cache
        layers = [(layer.keys, layer.values) for layer in cache.layers]
    lengths = [[part.float().norm(dim=-1).mean().item() for part in pair] for pair in layers]
    keys, values = (list(part) for part in zip(*lengths, strict=True))
    return {"prefix_norms": {"keys": keys, "values": values}, **({"prefix_layers": names} if names else {})}


@torch.no_grad()
def base_norms(base: Any, prompts: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """Return the mean length of the base's own keys and values in each layer on sample rows, to compare with."""
    keys, values = [], []
    for ids in prompts:
        cache = base(input_ids=torch.tensor([list(ids)], device=base.device), use_cache=True).past_key_values
        keys.append([layer.keys.float().norm(dim=-1).mean().item() for layer in cache.layers])
        values.append([layer.values.float().norm(dim=-1).mean().item() for layer in cache.layers])
    return {"keys": torch.tensor(keys).mean(0).tolist(), "values": torch.tensor(values).mean(0).tolist()}
