"""What is known of PEFT's types of adapters that no flag of their own chooses: a type at a time.

A rate is measured at hidden size 128 (the bundled model, docs/peft_methods.md); at 2,048 and more it is the rate of
PEFT's method comparison (MetaMathQA, Llama-3.2-3B, hidden size 3,072), where someone has tuned it, or the comparison's
default of 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNTUNED = 1e-4  # the default rate of PEFT's method comparison

OWN_FLAGS = {
    "LORA": "--use_lora, or --use_qlora",
    "IA3": "--use_ia3",
    "VERA": "--use_vera",
    "PROMPT_TUNING": "--use_prompt_tuning",
    "PREFIX_TUNING": "--use_prefix_tuning",
    "P_TUNING": "--use_p_tuning",
}

REFUSED = {
    "ADALORA": "it prunes ranks after each step of the optimizer and adds a penalty to the loss, and the importances "
    "that it collects for that are in no checkpoint: use --use_lora",
    "ADAPTION_PROMPT": "PEFT can't take it off a model again, so no base could be measured or shared: use "
    "--use_prefix_tuning",
    "CARTRIDGE": "it is a prefix that starts from a text: use --use_prefix_tuning, with --distill_context for a "
    "distilled one",
    "CPT": "it is a soft prompt with a loss of its own, and not a layer: use --use_prompt_tuning",
    "LILY": "its layers mix their parts by a mean over all tokens of a batch, padding and later tokens included, so an "
    "answer would depend on what it is computed with: use --use_lora",
    "MULTITASK_PROMPT_TUNING": "it is a soft prompt for several tasks, whose number each row would have to name: use "
    "--use_prompt_tuning",
    "POLY": "each row would have to name its task, and conversations name none: use --use_lora",
    "SHADOW": "it runs a second model beside the base and adds that one's loss to its own: use --use_lora",
    "XLORA": "it mixes trained LoRA adapters in two passes over each row: train one with --use_lora",
}


@dataclass(frozen=True)
class PeftType:
    """A type of adapter in PEFT.

    Args:
        title: its name in prose.
        narrow: learning rate at hidden size 128.
        wide: learning rate at hidden size 2,048 and more; None: nobody has tuned it, and it is `UNTUNED`.
        quantised: PEFT has layers of it for bitsandbytes' quantised weights.
        dropout: field of the dropout on a layer's inputs.
        defaults: fields that differ from PEFT's defaults where the file does not set them.
        refused: fields whose values other than these can't be used, with the reason.
    """

    title: str
    narrow: float
    wide: float | None = None
    quantised: bool = False
    dropout: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


RANDOM_EVALUATION = "held-out losses and answers would be random"

TYPES = {
    "ADAMSS": PeftType(
        "AdaMSS",
        1e-2,
        refused={
            "use_asa": (False, "its ranks would be changed after each step, by importances that are in no checkpoint")
        },
    ),
    "BEFT": PeftType("BEFT", 3e-2),
    "BOFT": PeftType("BOFT", 1e-2, dropout="boft_dropout"),
    "C3A": PeftType("C3A", 3e-1, wide=3e-1),
    "DEFT": PeftType("DEFT", 1e-2, dropout="deft_dropout"),
    "DELORA": PeftType("DeLoRA", 3e-3),
    "FOURIERFT": PeftType("FourierFT", 2e-2, defaults={"init_weights": True}),  # PEFT starts far from the base
    "FROD": PeftType("FRoD", 1e-2, wide=1e-3, dropout="frod_dropout", defaults={"progressbar": False}),
    "GLORA": PeftType("GLoRA", 3e-3, wide=5e-4),
    "GRALORA": PeftType("GraLoRA", 3e-3, wide=2e-4, dropout="gralora_dropout"),
    "HIRA": PeftType("HiRA", 1e-2, wide=4.5e-3, quantised=True, dropout="hira_dropout"),
    "HRA": PeftType("HRA", 3e-3),
    "LN_TUNING": PeftType("LN tuning", 3e-2),
    "LOHA": PeftType("LoHa", 2e-2),
    "LOKR": PeftType("LoKr", 3e-2, wide=3e-3),
    "MISS": PeftType("MiSS", 1e-3, dropout="miss_dropout"),
    "OFT": PeftType("OFT", 2e-3),
    "OSF": PeftType("OSF", 1e-2, wide=5e-5),
    "PEANUT": PeftType("PEANuT", 1e-3),
    "PSOFT": PeftType("PSOFT", 3e-3, dropout="psoft_dropout"),
    "PVERA": PeftType(
        "PVeRA",
        6e-2,
        wide=3e-3,
        quantised=True,
        dropout="pvera_dropout",
        refused={
            "sample_at_inference": (False, RANDOM_EVALUATION),
            "generator_seed": (None, "a resumed run would draw other numbers than the uninterrupted one"),
        },
    ),
    "RANDLORA": PeftType("RandLoRA", 1e-3, quantised=True, dropout="randlora_dropout"),
    "ROAD": PeftType("RoAd", 3e-2, wide=1e-3, quantised=True),
    "SHIRA": PeftType("SHiRA", 3e-3, wide=3e-4),
    "SUPERTUNING": PeftType("super tuning", 3e-2, dropout="lora_dropout"),
    "TINYLORA": PeftType("TinyLoRA", 3e-3, wide=1e-3, dropout="tinylora_dropout"),
    "TRAINABLE_TOKENS": PeftType("trainable tokens", 3e-2),
    "UNILORA": PeftType("Uni-LoRA", 5e-1, wide=2e-3, dropout="unilora_dropout"),
    "VBLORA": PeftType("VB-LoRA", 2e-2, wide=5e-4, dropout="vblora_dropout"),
    "WAVEFT": PeftType("WaveFT", 3e-4),
}
