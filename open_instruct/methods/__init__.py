"""The fine-tuning methods, one module each, and their registry."""

from open_instruct.methods.base import Method, Recipe
from open_instruct.methods.facts import ModelFacts, model_facts
from open_instruct.methods.features import Feature
from open_instruct.methods.full import Full
from open_instruct.methods.ia3 import Ia3
from open_instruct.methods.lora import Lora, QLora
from open_instruct.methods.p_tuning import PTuning
from open_instruct.methods.peft_layers import PEFT_LAYERS, PeftLayers
from open_instruct.methods.prefix_tuning import PrefixTuning
from open_instruct.methods.prompt_tuning import PromptTuning
from open_instruct.methods.vera import Vera

# Those that have a flag of their own; --peft_config chooses the others (`PEFT_LAYERS`).
METHODS: dict[str, Method] = {
    method.name: method
    for method in (Full(), Lora(), QLora(), PrefixTuning(), PromptTuning(), PTuning(), Ia3(), Vera())
}


def method_of(name: str, peft_config: str | None = None) -> Method:
    """Return the method that flags choose.

    Args:
        name: value of `Flags.method`: a key of `METHODS`, or the name of those that a configuration chooses.
        peft_config: value of --peft_config.

    Raises:
        InputError: the configuration can't be used.
    """
    return PeftLayers.of_file(str(peft_config)) if name == PeftLayers.name else METHODS[name]


def method_of_type(peft_type: str) -> Method | None:
    """Return the method that makes adapters of a PEFT type, or None. Of two, prefer that with an unquantised base."""
    makers = [method for method in (*METHODS.values(), *PEFT_LAYERS.values()) if peft_type in method.peft_types]
    return min(makers, key=lambda method: method.quantises_base is not None, default=None)


__all__ = [
    "METHODS",
    "PEFT_LAYERS",
    "Feature",
    "Method",
    "ModelFacts",
    "Recipe",
    "method_of",
    "method_of_type",
    "model_facts",
]
