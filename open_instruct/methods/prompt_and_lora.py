"""A soft prompt and LoRA, trained together and saved as two adapters; PEFT trains one at a time.

The soft prompt is PEFT's model around a base whose layers have LoRA. Loaded one after the other, LoRA first, the two
saved adapters compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.errors import InputError
from open_instruct.methods.base import Method, Recipe
from open_instruct.methods.facts import ModelFacts
from open_instruct.methods.features import Feature
from open_instruct.methods.lora import Lora

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from open_instruct.model.shared_prefix import SoftPrompt

PARTS = ("soft_prompt", "lora")  # sub-folders of the two adapters
SHARDED = "two adapters are not gathered for saving: use DDP or ZeRO-2, or train one of the two methods"


class PromptAndLora(Method):
    """Two methods as one: the soft prompt's, with LoRA's layers beneath it."""

    merges_into = "weights and tokens"
    causal_only = True
    memory_kind = "layers"

    def __init__(self, name: str, prompt: Method, lora: Lora) -> None:
        """Take the name of the two methods together, and both."""
        self.name, self.title = name, f"{prompt.title} and {lora.title}"
        self.prompt, self.lora = prompt, lora
        self.settings_class = make_dataclass(
            f"{type(prompt).__name__}{type(lora).__name__}Settings",
            [("lora_learning_rate_ratio", "float | None", field(default=None))],
            bases=(prompt.settings_class, lora.settings_class),
            frozen=True,
        )
        self.quantises_base = lora.quantises_base
        self.prompt_kind = prompt.prompt_kind
        self.trains_prompt_directly = prompt.trains_prompt_directly
        self.max_virtual_tokens = prompt.max_virtual_tokens
        self.init_flag = prompt.init_flag
        self.wants_keys = prompt.wants_keys
        sharded = {Feature.ZERO_3: SHARDED, Feature.FSDP: SHARDED}
        self.obstacles = MappingProxyType({**prompt.obstacles, **lora.obstacles, **sharded})

    def num_numbers(self, model: Any, settings: Any) -> int:
        """See `Method`."""
        return self.prompt.num_numbers(model, settings) + self.lora.num_numbers(model, settings)

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return the soft prompt's recipe, with LoRA's rate as a multiple of its rate."""
        prompt, lora = (method.recipe(facts, values) for method in (self.prompt, self.lora))
        return replace(
            prompt,
            lora_learning_rate_ratio=lora.learning_rate / prompt.learning_rate,
            sources=f"{self.prompt.title}: {prompt.sources}; {self.lora.title}: {lora.sources}",
        )

    def further_rates(self, settings: Any, learning_rate: float) -> dict[str, float]:
        """See `Method`."""
        return {"learning_rate of LoRA": settings.lora_learning_rate_ratio * learning_rate}

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Any) -> nn.Module:
        """Put the soft prompt around the base first: PEFT then freezes all that it finds in the base.

        Raises:
            InputError: LoRA would change the embeddings of the input, as PEFT's forward pass of a soft prompt would not
                see.
        """
        from open_instruct.model.prompt_over_lora import changes_embeddings, prompt_over_lora

        prompt: Any = self.prompt.wrap(model, tokenizer, settings)
        lora: Any = self.lora.wrap(model, tokenizer, settings)
        if changes_embeddings(model, lora.active_adapter):
            raise InputError(
                "--lora_target_modules names the embeddings of the input, which PEFT reads unchanged behind a soft "
                "prompt: name other modules, or train LoRA alone"
            )
        return prompt_over_lora(prompt, lora)

    def drops_inputs(self, settings: Any) -> bool:
        """See `Method`."""
        return self.lora.drops_inputs(settings)

    def changes_base(self, settings: Any) -> bool:
        """See `Method`."""
        return self.lora.changes_base(settings)

    def obstacles_of(self, settings: Any) -> Mapping[Feature, str]:
        """See `Method`."""
        return {**self.lora.obstacles_of(settings), **self.prompt.obstacles_of(settings), **self.obstacles}

    def parameter_groups(self, model: nn.Module, settings: Any, learning_rate: float) -> list[dict[str, Any]]:
        """See `Method`: the soft prompt's group has the run's rate, and LoRA's have a multiple of it."""
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        of_prompt = [parameter for name, parameter in trained if "prompt_encoder" in name.split(".")]
        known, rate = {id(parameter) for parameter in of_prompt}, settings.lora_learning_rate_ratio * learning_rate
        groups = [{"params": of_prompt}]
        for group in self.lora.parameter_groups(model, settings, rate):
            of_lora = [parameter for parameter in group["params"] if id(parameter) not in known]
            groups.append({"lr": rate, **group, "params": of_lora})
        return groups

    def soft_prompt(self, model: Any) -> SoftPrompt | None:
        """See `Method`."""
        return self.prompt.soft_prompt(model)

    def prompt_vectors(self, model: Any) -> torch.Tensor | None:
        """See `Method`."""
        return self.prompt.prompt_vectors(model)

    def start_of(self, model: Any, ids: list[int]) -> torch.Tensor:
        """See `Method`."""
        return self.prompt.start_of(model, ids)

    def start_of_keys(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """See `Method`."""
        return self.prompt.start_of_keys(pairs)

    def set_init(self, model: Any, values: torch.Tensor) -> None:
        """See `Method`."""
        self.prompt.set_init(model, values)
