"""The form in which a frozen base is held, as flags and adapters' records name it. Imports nothing heavy.

A form is "4bit" (NormalFloat with double quantisation, as in QLoRA), "8bit" (LLM.int8()), the JSON text of a
transformers quantisation configuration, or None: as the checkpoint has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_instruct.errors import InputError, input_faults, reason_of, visible
from open_instruct.flags.combinations import json_object
from open_instruct.small_files import read_text

FLAG = "--quantisation_config"
REMEDY = "give a transformers quantisation configuration as JSON, or a file of it; see docs/quantised.md"
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
# Where a configuration lists the modules that stay as they are; most have `modules_to_not_convert`.
SKIP_KEYS = {"bitsandbytes": "llm_int8_skip_modules", "hqq": "skip_modules"}


def read_quantisation(value: str) -> dict[str, Any]:
    """Return the quantisation configuration that a value of --quantisation_config gives.

    Args:
        value: a JSON object, or the path of a file that holds one.

    Raises:
        InputError: the file can't be read, or holds no object that names a way of quantisation.
    """
    what = named_value(value)
    text = value if value.lstrip().startswith("{") else read_text(Path(value), what, REMEDY)
    with input_faults(what, REMEDY):
        values = json_object(text)
        if values.get("load_in_4bit") or values.get("load_in_8bit"):
            values.setdefault("quant_method", "bitsandbytes")
        method = values.get("quant_method")
        if not isinstance(method, str):
            raise ValueError("it names no quant_method")
        if method == "bitsandbytes" and bool(values.get("load_in_4bit")) == bool(values.get("load_in_8bit")):
            raise ValueError("of load_in_4bit and load_in_8bit it needs one")
        skipped = values.get(skip_key(method))
        if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
            raise ValueError(f"its {skip_key(method)} is no list of names")
    return values


def named_value(value: str) -> str:
    """Return the flag with its value, as errors name them."""
    return f"{FLAG} {visible(value)[:200]}"


def skip_key(quant_method: str) -> str:
    """Return the name of a configuration's list of modules that are not quantised."""
    return SKIP_KEYS.get(quant_method, "modules_to_not_convert")


def form_of_base(bits: str | None, configuration: str | None, skip_modules: Sequence[str] | None) -> str | None:
    """Return the form that flags ask for.

    Args:
        bits: "4bit", "8bit" or None.
        configuration: value of --quantisation_config, which goes before `bits`; None: none.
        skip_modules: value of --skip_modules; None: none.

    Raises:
        InputError: the configuration can't be read.
    """
    if configuration is None and not skip_modules:
        return bits
    if configuration is None:
        assert bits is not None  # `bad_skip_modules`
        values: dict[str, Any] = {"quant_method": "bitsandbytes", **BITSANDBYTES[bits]}
    else:
        values = read_quantisation(configuration)
    if skip_modules:
        values[skip_key(values["quant_method"])] = list(skip_modules)
    return json.dumps(values, sort_keys=True)


def bits_of(form: str | Mapping[str, Any] | None) -> str | None:
    """Return "4bit" or "8bit" where bitsandbytes holds a base in this form, else None.

    Args:
        form: a form, or the quantisation configuration of a checkpoint.
    """
    if form is None or (isinstance(form, str) and form in BITSANDBYTES):
        return form
    values = json.loads(form) if isinstance(form, str) else form
    return "4bit" if values.get("load_in_4bit") else "8bit" if values.get("load_in_8bit") else None


def title_of(form: str | None) -> str | None:
    """Return a form in a few words; None for a base as the checkpoint has it."""
    if form is None or form in BITSANDBYTES:
        return {"4bit": "4-bit", "8bit": "8-bit", None: None}[form]
    values = json.loads(form)
    bits = bits_of(values)
    if bits is None:
        return str(values["quant_method"])
    return f"4-bit {values.get('bnb_4bit_quant_type', 'fp4')}" if bits == "4bit" else "8-bit"


def bad_quantisation(flags: Any) -> str | None:
    """Refuse a quantisation configuration that can't be read, or beside another flag that quantises."""
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(flags, name):
            return f"it excludes --{name}: choose one"
    try:
        values = read_quantisation(flags.quantisation_config)
    except InputError as error:
        return reason_of(error).removeprefix(named_value(flags.quantisation_config)).lstrip(": ")
    if flags.use_qlora and bits_of(values) != "4bit":
        return "QLoRA holds its base in 4 bits of bitsandbytes: use --use_lora"
    if flags.skip_modules and values.get(skip_key(values["quant_method"])):
        return f"it has {skip_key(values['quant_method'])} already: drop --skip_modules"
    return None


def bad_skip_modules(flags: Any) -> str | None:
    """Refuse modules that stay whole where nothing is quantised."""
    if flags.use_qlora or flags.load_in_4bit or flags.load_in_8bit or flags.quantisation_config:
        return None
    return f"nothing is quantised: remove it, or set --load_in_4bit, --load_in_8bit or {FLAG}"
