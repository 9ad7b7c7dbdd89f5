"""Checks of flag combinations: each function returns what is wrong, or None. Flags' declarations refer to them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from open_instruct.errors import reason_of, visible

DISTILLED = ("distill_context", "distill_system", "distill_column")


def not_an_object(text: str) -> str | None:
    """Refuse text that is not a JSON object."""
    try:
        json_object(text)
    except (ValueError, RecursionError) as error:
        return f"it is not a JSON object ({reason_of(error)}): check quotes and braces"
    return None


def json_object(text: str) -> dict[str, Any]:
    """Return a JSON object of different keys and finite numbers.

    Raises:
        ValueError: it is something else.
        RecursionError: it is nested too deeply.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in items).items() if count > 1]
        if twice:
            raise ValueError(f"the key {twice[0]!r} stands there twice")
        return dict(items)

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ValueError(f"{digits[:40]} is not finite")
        return number

    value = json.loads(text, object_pairs_hook=pairs, parse_float=finite, parse_constant=finite)
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}")
    return value


def bad_mixer(text: str) -> str | None:
    """Refuse a mixture that is no JSON object of data sets and amounts."""
    if reason := not_an_object(text):
        return reason
    return bad_mixture([part for name, amount in json_object(text).items() for part in (name, str(amount))])


def bad_mixture(words: list[str]) -> str | None:
    """Refuse a mixture whose last member has no amount, or an amount that can't mean rows."""
    if not words or len(words) % 2:
        return f"it has {len(words)} words: give pairs of NAME_OR_FILE and COUNT_OR_SHARE"
    for name, amount in zip(words[::2], words[1::2], strict=True):
        try:
            means_rows = 0 < float(amount) <= 1 if "." in amount else int(amount) > 0
        except ValueError:
            means_rows = False
        if not name.strip():
            return "a data set's name is empty: give a file, a folder or a name"
        if not means_rows:
            return f"amount {amount[:40]!r} of {name} must be a number of rows (2000), or a share up to 1.0 (0.5)"
    return None


def bad_columns(words: list[str]) -> str | None:
    """Refuse what names no columns."""
    names = [word.partition("=")[0] for word in words]
    for word in words:
        name, equals, column = word.partition("=")
        if not equals or not column or not re.fullmatch(r"[^\W\d]\w*", name):
            return f"{word[:80]!r} is not NAME=COLUMN, as prompt=dialogue"
    twice = next((name for name in names if names.count(name) > 1), None)
    return f"the name {twice} stands there twice: give each name one column" if twice else None


def columns_of_rows(flags: Any) -> str | None:
    """Refuse columns that can't be named, or beside another column of the conversation."""
    if flags.sft_messages_key != "messages":
        return "it names columns of rows without --sft_messages_key: drop one of the two flags"
    return bad_columns(flags.columns)


def parse_weights(words: list[str]) -> dict[str, float]:
    """Return the weights of NAME=WEIGHT words.

    Raises:
        ValueError: a word is none, a weight can't be used, or a name stands there twice.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, separator, text = word.rpartition("=")
        try:
            weight = float(text) if separator else math.nan
        except ValueError:
            weight = math.nan
        if not name.strip() or not 0 <= weight <= 100:
            raise ValueError(f"{visible(word)[:80]!r} is not NAME=WEIGHT with a weight from 0 to 100")
        if name.strip() in weights:
            raise ValueError(f"{visible(name)[:80]!r} stands there twice")
        weights[name.strip()] = weight
    return weights


def bad_weights(words: list[str]) -> str | None:
    """Refuse words that are not NAME=WEIGHT, and names that stand there twice."""
    try:
        parse_weights(words)
    except ValueError as error:
        return f"{error}: give a=2 b=0.5"
    return None


def unused_init_text(flags: Any) -> str | None:
    """Refuse a text that a soft prompt would not start from."""
    if flags.adapter_name_or_path:
        return starts_from_adapter(flags)
    if flags.prefix_projection:
        return "a projected prefix can't start from a text: drop one of the two flags"
    init = flags.prefix_init if flags.use_prefix_tuning else flags.prompt_tuning_init
    if init in (None, "text", "screened"):
        return None
    return f"the initialisation is {init}, which uses no text: choose text, or drop this flag"


def bad_places(flags: Any) -> str | None:
    """Refuse places at which this kind of soft prompt can't stand."""
    places = flags.soft_prompt_at
    if len(set(places)) < len(places):
        return "a place stands there twice: name each once"
    if not flags.use_prefix_tuning and (len(places) > 1 or "cross" in places):
        return "embeddings stand before one input: give encoder or decoder, or choose --use_prefix_tuning"
    return None


def moving_first_token(flags: Any) -> str | None:
    """Refuse to freeze a virtual token that something else would move."""
    if flags.prefix_projection:
        return "a projected prefix has no token of its own to freeze: drop one of the two flags"
    if flags.weight_decay:
        return f"--weight_decay {flags.weight_decay:g} would shrink it: drop one of the two flags"
    return needs_packing(flags)


def bad_auto_lr(flags: Any) -> str | None:
    """Refuse a range test beside a fixed rate, or without an adapter to restore."""
    if flags.learning_rate is not None:
        return "it chooses a rate and --learning_rate sets one: drop one"
    if flags.method == "full" and not flags.adapter_name_or_path:
        return "it would need a second copy of all weights in full fine-tuning: choose an adapter method, or drop it"
    return None


def float16_weights(flags: Any) -> str | None:
    """Refuse float16 in full fine-tuning: the weights are float32, and only bfloat16 computes them without scaling."""
    if flags.dtype != "float16" or flags.method != "full" or flags.adapter_name_or_path:
        return None
    return "full fine-tuning does not compute in float16: choose bfloat16, float32, or an adapter method"


def cannot_distill(flags: Any) -> str | None:
    """Refuse to distil without a frozen base, or in the padded forward pass."""
    given = [name for name in DISTILLED if getattr(flags, name)]
    if len(given) > 1:
        return f"--{' and --'.join(given)} name several contexts: give one of them"
    if flags.method == "full" and not flags.adapter_name_or_path:
        return "its teacher is the frozen base, which full fine-tuning changes: choose an adapter method, or drop it"
    return needs_packing(flags)


def bad_hard_prompt(flags: Any) -> str | None:
    """Refuse a hard prompt beside a context that is distilled."""
    given = next((name for name in DISTILLED if getattr(flags, name)), None)
    return given and f"--{given} stands before the teacher's conversations alone: drop one of the two flags"


def without_distillation(flags: Any) -> str | None:
    """Refuse a setting of distillation where nothing is distilled."""
    if any(getattr(flags, name) for name in DISTILLED):
        return None
    return f"it has no effect without --{', --'.join(DISTILLED)}: remove it, or set one of them"


def needs_packing(flags: Any) -> str | None:
    """Refuse a flag of the packed forward pass beside the padded one."""
    return None if flags.packing else "it belongs to the packed forward pass: remove it, or drop --packing False"


def bad_share(flags: Any) -> str | None:
    """Refuse a setting of what examples share where nothing is shared."""
    given = next((name for name in DISTILLED if getattr(flags, name)), None)
    return needs_packing(flags) or (given and f"it has no effect with --{given}: remove it")


def unused_patience(flags: Any) -> str | None:
    """Refuse to wait for a held-out loss that is not measured while a run trains."""
    if not flags.validation_file and not flags.validation_fraction:
        return "no rows are held out: remove it, or set --validation_fraction or --validation_file"
    if flags.eval_steps == 0:
        return "--eval_steps 0 measures only the start and the end: remove one of the two flags"
    return None


def bad_checkpointing_steps(text: str) -> str | None:
    """Refuse what is neither `epoch` nor a positive number of steps."""
    if text == "epoch" or (text.isascii() and text.isdigit() and len(text) < 11 and int(text) > 0):
        return None
    return "it is neither a positive number of steps nor `epoch`"


def bad_resumption(flags: Any) -> str | None:
    """Refuse to resume a run that is to be replaced, and a path that is empty, as of an unset variable."""
    if flags.overwrite_output_dir:
        return "it contradicts --overwrite_output_dir: drop one"
    return None if flags.resume_from_checkpoint else "its path is empty: name a checkpoint, or give the flag alone"


def without_upload(flags: Any) -> str | None:
    """Refuse an upload's setting where nothing is uploaded."""
    return None if flags.push_to_hub else "it has no effect without --push_to_hub: remove it, or set that flag"


def contradicts_cache(flags: Any) -> str | None:
    """Refuse to skip a cache that another flag fills."""
    for name in ("cache_dataset_only", "overwrite_cache"):
        if getattr(flags, name):
            return f"--{name} fills the cache: drop one of the two flags"
    return None


def starts_from_adapter(flags: Any) -> str | None:
    """Refuse a start where a trained adapter is the start."""
    return "the trained adapter is the start: remove it" if flags.adapter_name_or_path else None


def continues_two(flags: Any) -> str | None:
    """Refuse to continue an adapter where two new ones are trained together."""
    if len(flags.methods) < 2:
        return None
    return "two methods are trained together as new adapters only: drop it, or choose one method"


def another_name(flags: Any, older: str, newer: str) -> str | None:
    """Refuse two different values under an older and a newer name of one flag."""
    if getattr(flags, older) == getattr(flags, newer):
        return None
    return f"it is an older name of --{newer}, which is {getattr(flags, newer)}: give one of them"
