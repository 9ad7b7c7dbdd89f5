"""The fine-tuning methods, one module each, and their registry."""

from open_instruct.flags import JOINED
from open_instruct.methods.base import Method, Recipe
from open_instruct.methods.facts import ModelFacts, model_facts
from open_instruct.methods.features import Feature
from open_instruct.methods.full import Full
from open_instruct.methods.ia3 import Ia3
from open_instruct.methods.lora import Lora, QLora
from open_instruct.methods.p_tuning import PTuning
from open_instruct.methods.peft_layers import PEFT_LAYERS, PeftLayers
from open_instruct.methods.prefix_tuning import PrefixTuning
from open_instruct.methods.prompt_and_lora import PromptAndLora
from open_instruct.methods.prompt_tuning import PromptTuning
from open_instruct.methods.vera import Vera

# Those that have a flag of their own; --peft_config chooses the others (`PEFT_LAYERS`).
METHODS: dict[str, Method] = {
    method.name: method
    for method in (Full(), Lora(), QLora(), PrefixTuning(), PromptTuning(), PTuning(), Ia3(), Vera())
}
LORAS: dict[str, Lora] = {method.name: method for method in (Lora(), QLora())}
# A soft prompt and LoRA, which the flags of both choose together.
COMBINED = {name: PromptAndLora(name, METHODS[prompt], LORAS[lora]) for name, (prompt, lora) in JOINED.items()}


def method_of(name: str, peft_config: str | None = None) -> Method:
    """Return the method that flags choose.

    Args:
        name: value of `Flags.method`: a key of `METHODS` or `COMBINED`, or the name of those that a configuration
            chooses.
        peft_config: value of --peft_config.

    Raises:
        InputError: the configuration can't be used.
    """
    if name == PeftLayers.name:
        return PeftLayers.of_file(str(peft_config))
    return COMBINED[name] if name in COMBINED else METHODS[name]


def method_of_type(peft_type: str) -> Method | None:
    """Return the method that makes adapters of a PEFT type, or None. Of two, prefer that with an unquantised base."""
    makers = [method for method in (*METHODS.values(), *PEFT_LAYERS.values()) if peft_type in method.peft_types]
    return min(makers, key=lambda method: method.quantises_base is not None, default=None)


def method_of_pair(prompt_type: str, lora_type: str) -> Method | None:
    """Return the method that makes a soft prompt and LoRA of two PEFT types together, or None; see `method_of_type`."""
    makers = [
        method
        for method in COMBINED.values()
        if prompt_type in method.prompt.peft_types and lora_type in method.lora.peft_types
    ]
    return min(makers, key=lambda method: method.quantises_base is not None, default=None)


__all__ = [
    "COMBINED",
    "METHODS",
    "PEFT_LAYERS",
    "Feature",
    "Method",
    "ModelFacts",
    "Recipe",
    "method_of",
    "method_of_pair",
    "method_of_type",
    "model_facts",
]
