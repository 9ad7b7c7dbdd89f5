"""A model with a soft prompt around a base whose layers have LoRA: two adapters of PEFT, used and saved as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from open_instruct.methods.prompt_and_lora import PARTS


class PromptOverLora(PeftModelForCausalLM):
    """PEFT's model of a soft prompt, which also switches off, saves and takes off the LoRA in its base."""

    lora: PeftModel

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute with the plain base for as long as the context lasts."""
        with super().disable_adapter(), self.lora.disable_adapter():
            yield

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write two plain PEFT adapters, each into a sub-folder."""
        prompt, lora = (Path(save_directory) / part for part in PARTS)
        super().save_pretrained(str(prompt), **options)
        self.lora.save_pretrained(str(lora), **options)

    def unload(self) -> Any:
        """Take LoRA off the base, and return it."""
        return self.lora.unload()


def prompt_over_lora(prompt: PeftModelForCausalLM, lora: PeftModel) -> PromptOverLora:
    """Return the model of a soft prompt as one that knows the LoRA in its base.

    Args:
        prompt: PEFT's model, around a base.
        lora: PEFT's model of LoRA, in the same base.
    """
    assert prompt.get_base_model() is lora.get_base_model()
    # The object stays, with its parameters and their names; a second one would share them all.
    prompt.__class__ = PromptOverLora
    # No sub-module: the base, and LoRA in it, would have two names each.
    prompt.__dict__["lora"] = lora
    assert isinstance(prompt, PromptOverLora)
    return prompt


def has_adapter(module: Any, name: str) -> bool:
    """Return whether a module of a base belongs to an adapter, by the adapter's name inside PEFT."""
    if isinstance(module, BaseTunerLayer):
        return any(name in getattr(module, part) for part in module.adapter_layer_names)
    return isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters


def changes_embeddings(base: Any, name: str) -> bool:
    """Return whether an adapter of layers changes the embeddings of a base's input."""
    return has_adapter(base.get_input_embeddings(), name)
