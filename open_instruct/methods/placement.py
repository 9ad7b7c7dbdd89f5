"""Where a soft prompt stands in an encoder–decoder, and the types of adapters that PEFT does not have.

PEFT puts embeddings before the encoder's input, and keys and values before those of the decoder's self-attention. Any
other place needs a format of our own: `adapter_config.json` then names a `peft_type` that PEFT does not know, so that
plain PEFT refuses the folder instead of computing something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PLACES = ("encoder", "decoder", "cross")
OWN_TYPES = {
    "PREFIX_TUNING": "PLACED_PREFIX_TUNING",
    "PROMPT_TUNING": "DECODER_PROMPT_TUNING",
    "P_TUNING": "DECODER_P_TUNING",
}
PEFT_TYPES = {own: theirs for theirs, own in OWN_TYPES.items()}
NAME = "soft_prompt_at"


def own_places(wanted: Sequence[str] | None, peft_place: str) -> tuple[str, ...]:
    """Return the places in their usual order, or nothing where they are PEFT's own.

    Args:
        wanted: value of --soft_prompt_at; None: PEFT's.
        peft_place: where PEFT puts this method's soft prompt.
    """
    places = tuple(place for place in PLACES if place in (wanted or ()))
    return () if places in ((), (peft_place,)) else places


def adopted_places(settings: Mapping[str, Any], peft_place: str) -> dict[str, Any]:
    """Return the value of --soft_prompt_at that an adapter's settings decide; nothing for causal models."""
    if settings.get("peft_type") in PEFT_TYPES:
        return {NAME: settings.get(NAME)}
    return {NAME: [peft_place]} if settings.get("task_type") == "SEQ_2_SEQ_LM" else {}


def bad_places(settings: Mapping[str, Any]) -> str | None:
    """Return why an `adapter_config.json` of one of our own types is none, or None; other types pass."""
    theirs = PEFT_TYPES.get(settings["peft_type"])
    known = PLACES if theirs == "PREFIX_TUNING" else ("decoder",)
    places = settings.get(NAME)
    if theirs is None or (isinstance(places, list) and places and places == [at for at in known if at in places]):
        return None
    return f"its {NAME} is {places!r}, not a list of {', '.join(known)} in this order"


def put_prompt_on(model: Any, peft_type: str, places: Sequence[str], **values: Any) -> Any:
    """Return a base with a new soft prompt: PEFT's model, or one of ours where it stands at places of our own.

    Args:
        model: the base.
        peft_type: PEFT's name of the method.
        places: see `own_places`.
        values: of PEFT's configuration.
    """
    if not places:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

        return get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**values))
    from open_instruct.model.placed_prompts import CONFIGS, PlacedPromptModel

    return PlacedPromptModel(model, CONFIGS[peft_type](**values, soft_prompt_at=list(places)))
