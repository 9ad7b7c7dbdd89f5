"""Every method of PEFT that changes layers and has no flag of its own, chosen by a configuration (--peft_config)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.errors import InputError, reason_of
from open_instruct.methods import peft_configuration
from open_instruct.methods.base import LayerMethod, Recipe, task_type, trained_in_float32, unusual_linears
from open_instruct.methods.facts import ModelFacts, between
from open_instruct.methods.features import Feature
from open_instruct.methods.peft_types import TYPES, UNTUNED

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARDED = "its layers read weights, or hold buffers, outside of what is gathered: use DDP or ZeRO-2"
QUANTISED = "PEFT has no quantised layers for it: drop the flag, or use --use_lora"


class PeftLayers(LayerMethod):
    """A type of PEFT's adapters, with the fields of a configuration where one was read.

    There is one object for each type, which knows adapters of it (`PEFT_LAYERS`), and one for each file.
    """

    name = "peft"
    merges_into = "weights"
    wants_plain_layers = True
    probed_away_from_start = True

    def __init__(self, kind: str, path: str = "", fields: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Take a type, and the fields of the configuration in `path`."""
        known = TYPES[kind]
        self.kind, self.path, self.configuration = kind, path, fields or None
        self.title = known.title
        self.peft_types = self.continues_from = (kind,)
        obstacles = {Feature.ZERO_3: SHARDED, Feature.FSDP: SHARDED}
        if not known.quantised:
            obstacles |= {Feature.EIGHT_BITS: QUANTISED, Feature.FOUR_BITS: QUANTISED}
        self.obstacles = MappingProxyType(obstacles)

    @classmethod
    def of_file(cls, path: str) -> PeftLayers:
        """Return the method of a configuration's file.

        Raises:
            InputError: it can't be used; the file, the field and a remedy are named.
        """
        fields = peft_configuration.read_configuration(path)
        peft_configuration.check_fields(path, fields)
        return cls(fields["peft_type"], path, fields)

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return the type's rate."""
        known = TYPES[self.kind]
        source = "PEFT method comparison" if known.wide else "PEFT method comparison's default, tuned by nobody"
        return Recipe(
            learning_rate=between(known.narrow, known.wide or UNTUNED, facts.hidden_size),
            warmup_ratio=0.06,
            sources=f"measured here (hidden size 128), {source} (2048 and more)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Any) -> nn.Module:
        """Put PEFT's layers where the configuration says, else where PEFT puts them in this architecture."""
        from peft import get_peft_model

        fields = self.configuration or {}
        what = f"{peft_configuration.FLAG} {self.path}"
        config: Any = peft_configuration.make_configuration(self.path, fields, task_type(model).value)
        peft_configuration.check_expressions(fields, [name for name, _ in model.named_modules()], what)
        if fields.get("target_modules") == "all-linear" and getattr(config, "exclude_modules", "none") is None:
            config.exclude_modules = unusual_linears(model) or None
        kind = model.config.model_type
        try:
            wrapped = trained_in_float32(get_peft_model(model, config))
        except (InputError, NameError):
            raise
        except Exception as error:  # PEFT's refusals have many types, assertions and missing packages among them
            raise InputError(
                f"{what}: {self.title} can't be put on this {kind} model ({reason_of(error)}): change "
                f"{peft_configuration.fields_in(fields, error)}"
            ) from error
        if not any(parameter.requires_grad for parameter in wrapped.parameters()):
            raise InputError(f"{what}: nothing of this {kind} model would be trained: change its fields")
        return wrapped

    def flags_of(self, folder: Path) -> dict[str, Any]:
        """See `Method`: the adapter's own configuration."""
        return {"peft_config": str(folder / "adapter_config.json")}

    def changes_base(self, settings: Any) -> bool:
        """See `Method`: trained biases are the base's own, and PEFT leaves modules that it trains in their place."""
        fields = self.configuration or {}
        return fields.get("bias", "none") != "none" or bool(fields.get("modules_to_save"))

    def drops_inputs(self, settings: Any) -> bool:
        """See `Method`."""
        dropout = TYPES[self.kind].dropout
        return bool(dropout and (self.configuration or {}).get(dropout))


PEFT_LAYERS = {kind: PeftLayers(kind) for kind in TYPES}
