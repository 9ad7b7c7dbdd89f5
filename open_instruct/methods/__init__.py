"""The fine-tuning methods, one module each, and their registry."""

from open_instruct.methods.base import Method, MethodSettings, ModelFacts, Recipe, model_facts
from open_instruct.methods.full import Full
from open_instruct.methods.ia3 import Ia3
from open_instruct.methods.lora import Lora, QLora
from open_instruct.methods.p_tuning import PTuning
from open_instruct.methods.prefix_tuning import PrefixTuning
from open_instruct.methods.prompt_tuning import PromptTuning

METHODS: dict[str, Method] = {
    method.name: method for method in (Full(), Lora(), QLora(), PrefixTuning(), PromptTuning(), PTuning(), Ia3())
}

__all__ = ["METHODS", "Method", "MethodSettings", "ModelFacts", "Recipe", "model_facts"]
