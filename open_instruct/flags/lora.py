"""What the texts of LoRA's flags mean, and checks of them that need no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from open_instruct.errors import InputError, reason_of
from open_instruct.limits import PATTERN_SECONDS, evaluating_input

ALL_LINEAR, ATTENTION, MLP = "all-linear", "attention", "mlp"
GROUPS_OF_LAYERS = (ALL_LINEAR, ATTENTION, MLP)
NAME = re.compile(r"[\w.\-]+")  # of a module; anything else is a regular expression
MAX_LAYER = 9999
MAX_ITERATIONS = 1000
# Starts in which the update of a LoRA of rank r begins as a part of the weight.
FROM_WEIGHTS = ("pissa", "olora")
REFUSED_INITS = {
    "loftq": "LoftQ replaces the weights of the base by ones that it quantises itself, on which plain PEFT could not "
    "put the saved adapter",
    "eva": "EVA needs the inputs of all layers over the training data, which are not collected before a run",
    "corda": "CorDA needs the covariances of all layers' inputs, which are not collected before a run",
}
KNOWN_INITS = "true, gaussian, pissa, pissa_niter_N or olora"


def is_pattern(word: str) -> bool:
    """Return whether a value of --lora_target_modules is a regular expression, not a name."""
    return not NAME.fullmatch(word)


def layer_indices(words: Sequence[str]) -> list[int]:
    """Return the indices that words such as `0-7` and `12` mean, sorted.

    Raises:
        ValueError: a word is neither an index nor a range.
    """
    indices: set[int] = set()
    for word in words:
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", word, re.ASCII)
        if not match:
            raise ValueError(f"{word[:40]!r} is neither an index of a layer (12) nor a range (0-7)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {word} ends before it begins")
        indices |= set(range(first, last + 1))
    return sorted(indices)


def iterations_of(init: str) -> int | None:
    """Return N of `pissa_niter_N`; None for other starts, and where N is no number in 1 … `MAX_ITERATIONS`."""
    match = re.fullmatch(r"pissa_niter_(\d{1,4})", init, re.ASCII)
    return int(match[1]) if match and 1 <= int(match[1]) <= MAX_ITERATIONS else None


def starts_from_weights(init: str | None) -> bool:
    """Return whether a start (a value of --init_lora_weights) is computed from the base's weights."""
    return init is not None and (init in FROM_WEIGHTS or iterations_of(init) is not None)


def bad_targets(flags: Any) -> str | None:
    """Refuse names and regular expressions that can't be used together, or at all."""
    words = flags.lora_target_modules
    patterns = [word for word in words if is_pattern(word)]
    if len(words) > 1 and (patterns or ALL_LINEAR in words):
        alone = f"{patterns[0][:80]!r} is a regular expression" if patterns else f"{ALL_LINEAR} means every layer"
        return f"{alone}, and stands alone: join expressions with |, or give names only"
    if patterns and flags.lora_layers:
        return "a regular expression says itself which layers it means: drop --lora_layers, or give names"
    if patterns:
        try:
            with evaluating_input("it", "repair it", PATTERN_SECONDS):
                re.compile(patterns[0])
        except InputError as error:
            return f"it is no regular expression ({reason_of(error)})"
    return None


def bad_layers(flags: Any) -> str | None:
    """Refuse what is no list of layers."""
    try:
        layer_indices(flags.lora_layers)
    except ValueError as error:
        return f"{error}: give indices from 0, as in 0-7 12"
    return None


def bad_init(flags: Any) -> str | None:
    """Refuse a start that is unknown, or would not be exact here."""
    init = flags.init_lora_weights
    if flags.adapter_name_or_path:
        return "the trained adapter is the start: remove it"
    if init in REFUSED_INITS:
        return f"{REFUSED_INITS[init]}: use {KNOWN_INITS}"
    if init not in ("true", "gaussian") and not starts_from_weights(init):
        return f"no such start: use {KNOWN_INITS} (N from 1 to {MAX_ITERATIONS})"
    if not starts_from_weights(init):
        return None
    if flags.use_qlora or flags.load_in_4bit or flags.load_in_8bit or flags.quantisation_config:
        return "it splits the base's weights, which are not exact where they are quantised: use true or gaussian"
    if flags.weight_decay:
        return f"--weight_decay {flags.weight_decay:g} would shrink the copy of the start that stays fixed: drop one"
    if flags.use_8bit_optimizer:
        return "--use_8bit_optimizer might move the copy of the start that stays fixed: drop one of the two flags"
    return None


def bad_bias(flags: Any) -> str | None:
    """Refuse to train biases that a quantised layer casts to its own precision whenever it computes."""
    quantised = flags.use_qlora or flags.load_in_4bit or flags.load_in_8bit or flags.quantisation_config
    if flags.lora_bias != "none" and quantised:
        return "quantised layers round their biases to their own precision in every pass: use none"
    return None


def bad_full_modules(flags: Any) -> str | None:
    """Refuse modules that are trained in full where two adapters would both save them."""
    if len(flags.methods) < 2:
        return None
    return "PEFT would save these modules with the soft prompt, too: drop it, or name them in --lora_target_modules"


def bad_ratio(flags: Any) -> str | None:
    """Refuse a ratio of two rates where there is one."""
    if len(flags.methods) > 1:
        return None
    return "no soft prompt is trained with LoRA: remove it, and set --learning_rate"


def starts_of_tokens(words: Sequence[str]) -> dict[str, str | None]:
    """Return the tokens that words of --new_tokens name (TOKEN, or TOKEN=TEXT), each with the text of its start.

    Raises:
        ValueError: a token or its text is empty, or stands there twice.
    """
    starts: dict[str, str | None] = {}
    for word in words:
        token, equals, text = word.partition("=")
        if not token.strip() or token != token.strip() or (equals and not text.strip()):
            raise ValueError(f"{word[:80]!r} is neither TOKEN nor TOKEN=TEXT")
        if token in starts:
            raise ValueError(f"the token {token[:80]} stands there twice")
        starts[token] = text or None
    return starts


def bad_new_tokens(flags: Any) -> str | None:
    """Refuse words that name no new tokens, and tokens beside what trains their rows already."""
    if flags.adapter_name_or_path:
        return "a trained adapter has the tokens that it has: remove it, or merge the adapter and train on the result"
    if len(flags.methods) > 1:
        return "PEFT puts a soft prompt before embeddings that LoRA does not change: drop it, or the soft prompt"
    try:
        starts_of_tokens(flags.new_tokens)
    except ValueError as error:
        return f"{error}: give tokens as <tool> or <cite>=source"
    for name in ("modules_to_save", "lora_target_modules"):
        both = {word.rpartition(".")[2] for word in getattr(flags, name) or ()} & {"embed_tokens", "lm_head", "wte"}
        if both:
            return f"--{name} {sorted(both)[0]} changes their rows too: drop one of the two flags"
    return None
